"""From text to `.bin/.idx`: tokenize with worker processes, write in input order, go on after an interruption."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megapt.data import pieces, tokenizers
from megapt.data.build_progress import BuildProgress
from megapt.data.build_state import FORMAT, State, WorkingFolder
from megapt.data.documents import Invalid
from megapt.data.encode import Rules, WorkersDied, encode_all
from megapt.data.indexed import best_dtype
from megapt.data.pieces import STDIN, Source, check_unchanged, list_sources, work_items
from megapt.data.statistics import LengthCounts
from megapt.errors import UserError
from megapt.files import StrPath, write_whole

_REPORT, _PICTURE = "report.json", "lengths.png"


@dataclass(frozen=True)
class BuildReport:
    """What a build read and wrote.

    `documents` (empty ones included), `sequences` and `tokens` (end-of-document tokens included) written; `bytes`
    of text and `files` read, compressed files counted as they are inside; `seconds` taken to tokenize, interrupted
    attempts included as far as their work counted; `replaced`: invalid bytes or characters that became U+FFFD;
    `skipped`: documents left out because they held some; `duplicates`: documents left out because an earlier one has
    the same text; `passed_over`: files in the folders given that are binary or
    were written by a build; `engine`: the library that encoded.
    """

    documents: int
    sequences: int
    tokens: int
    bytes: int
    files: int
    seconds: float
    replaced: int
    skipped: int
    duplicates: int
    passed_over: int
    engine: str


def build(inputs: Iterable[StrPath], output_prefix: StrPath, tokenizer_path: StrPath, text_key: str = "text",
          append_eod: bool = True, workers: int = 1, progress: bool = True, overwrite: bool = False,
          eod: str | None = None, split_sentences: bool = False, invalid: Invalid = "replace",
          dedup: Literal["exact"] | None = None) -> BuildReport:
    """Tokenize files and folders into `{output_prefix}.bin/.idx`, with `.report.json` and `.lengths.png` beside them.

    A .jsonl (or .ndjson) holds a document per line under `text_key`, a .parquet one per row in that column, and any
    other text file is one document; .gz and .zst of the first and the last are read too, and "-" is JSON lines from
    standard input. Folders are read recursively, in the order of their sorted paths (see `pieces.list_sources`). A
    document is one sequence, or with `split_sentences` one sequence per sentence (see `sentences`). `append_eod` ends
    the last sequence of each document that is not empty with the tokenizer's end-of-document token (`eod` names it
    where the tokenizer does not say).

    A document of more than 8 MiB is encoded in pieces of about 4 MiB cut between lines, which bounds memory (some
    hundred MiB per worker, and for one line of JSON three times its size) and, for byte-level tokenizers, leaves the
    tokens as they would be in one piece.

    `invalid`: what becomes of a document that is not valid UTF-8: "replace" its faults by U+FFFD, "skip" it, or "fail".
    `dedup="exact"` keeps the first of documents with the same text (128-bit hashes, 16 bytes of memory per document).

    One worker is this process, in which the tokenizers library uses threads of its own; more are processes of one
    thread each. The output is the same for any number of `workers`. It grows in `{output_prefix}.building`; a build
    that was interrupted goes on from there when started again with the same arguments (standard input excepted, which
    is gone), and the files appear only when whole. UserError if the output exists and `overwrite` is not set, if an
    unfinished build with other arguments is there and `overwrite` is not set, if there is nothing to read, if a file
    cannot be used or changes meanwhile, if the disk is full, or if the tokenizer has no end-of-document token to
    append.
    """
    prefix = _check_prefix(output_prefix)
    most = max(64, 4 * (os.cpu_count() or 1))
    if not 1 <= workers <= most:
        raise UserError(f"{workers} workers are not possible on a machine of {os.cpu_count()} CPUs; 1 to {most} are")
    tokenizer = tokenizers.load(tokenizer_path, eod)
    if append_eod and tokenizer.eod is None:
        raise UserError(f"tokenizer {tokenizer.path} does not say which token ends a document; name it "
                        "(eod), or build without (append_eod off)")
    inputs = list(inputs)
    sources, passed_over = list_sources(inputs)
    if not sources:
        raise UserError(f"no text files in {', '.join(map(str, inputs)) or 'an empty list of inputs'}"
                        f" ({passed_over} files passed over, binary or written by a build)")
    rules = Rules(text_key, append_eod, split_sentences, invalid, dedup == "exact")
    manifest = _manifest(sources, tokenizer, rules)
    folder = WorkingFolder(prefix, best_dtype(tokenizer.vocabulary), not split_sentences, rules.hashes)
    keep = True
    try:
        folder.lock()
        _open_folder(folder, manifest, sources, overwrite, progress)
        try:
            if not folder.state.whole:
                _encode_rest(folder, sources, tokenizer, rules, workers, progress)
                check_unchanged(sources)
                _finish(folder, sources, tokenizer, manifest)
        except WorkersDied:
            raise
        except UserError:  # the inputs or the arguments must change, and then this work is of no use
            keep = False
            raise
        folder.publish([_REPORT, _PICTURE])
    except OSError as error:
        kept = f"; what is done stays in {folder.path}, and the same command goes on from there"
        raise UserError(f"{error.filename or folder.path}: {error.strerror or error}"
                        f"{kept if folder.started else ''}") from error
    finally:
        if keep and folder.started:
            folder.close()
        else:
            folder.remove()
    return _report(folder.state, len(sources), passed_over)


def _check_prefix(output_prefix: StrPath) -> str:
    prefix = os.fspath(output_prefix)
    if not Path(prefix).name or prefix.endswith(("/", "/.", "/..")) or prefix in (".", ".."):
        raise UserError(f"the output {prefix!r} names no file; give a path and the beginning of the files' names, "
                        "such as data/corpus")
    return prefix


def _manifest(sources: list[Source], tokenizer: tokenizers.Tokenizer, rules: Rules) -> dict[str, Any]:
    """All that the output depends on."""
    return {
        "format": FORMAT,
        "inputs": [[STDIN if s.path == STDIN else os.path.abspath(s.path), s.size, s.mtime_ns] for s in sources],
        "tokenizer": tokenizer.fingerprint(),
        "eod": tokenizer.eod,
        "options": dataclasses.asdict(rules) | {"lines": pieces.LINES, "piece": pieces.PIECE},
    }


def _open_folder(folder: WorkingFolder, manifest: dict[str, Any], sources: list[Source], overwrite: bool,
                 say: bool) -> None:
    """Begin, or go on with what is there if it is this very build."""
    found = folder.manifest()
    same = found == manifest
    if found is not None and not same and not overwrite:
        different = ", ".join(key for key in manifest if found.get(key) != manifest[key])
        raise UserError(f"{folder.path} holds an unfinished build that differs in its {different}; repeat the "
                        "arguments it was started with to go on, or set overwrite to start over")
    if same and folder.state.whole:
        return
    existing = [prefix for prefix in (f"{folder.prefix}.bin", f"{folder.prefix}.idx") if os.path.exists(prefix)]
    if existing and not overwrite:
        raise UserError(f"{' and '.join(existing)} exist already; choose another output, or set overwrite")
    # What came through standard input cannot be passed over a second time.
    if not same or not folder.started or any(source.path == STDIN for source in sources):
        folder.begin(manifest)
    elif say:
        print(f"going on from {folder.path}: {folder.state.documents:,} documents are done", file=sys.stderr)
    folder.open()


def _encode_rest(folder: WorkingFolder, sources: list[Source], tokenizer: tokenizers.Tokenizer, rules: Rules,
                 workers: int, progress: bool) -> None:
    """Encode and append all work items that are not done."""
    state = folder.state
    tokenizer.accelerate()
    state.engine = tokenizer.engine
    before, began = state.seconds, time.monotonic()
    items = work_items(sources, state.next_file, state.next_skip)
    total = sum(source.size for source in sources)
    with (BuildProgress(progress, total, state) as shown,
          closing(encode_all(items, workers, tokenizer, rules)) as results):
        for item, encoded in results:
            folder.append(encoded, item)
            state.seconds = before + time.monotonic() - began
            shown.update()
    folder.commit()


def _finish(folder: WorkingFolder, sources: list[Source], tokenizer: tokenizers.Tokenizer,
            manifest: dict[str, Any]) -> None:
    """The index, the report and the picture, all inside the folder."""
    state = folder.state
    if state.tokens == 0:
        raise UserError(f"the {len(sources)} input files hold {state.documents} documents and no tokens; there is "
                        "nothing to write")
    lengths = LengthCounts(folder.document_lengths())
    report = dataclasses.asdict(_report(state, len(sources), 0))
    del report["passed_over"]
    report |= {
        "dtype": folder.dtype.name,
        "bytes_per_token": state.bytes / state.tokens,
        "tokens_per_document": state.tokens / state.documents,
        "document_length_quantiles": lengths.quantiles(),
        "tokenizer": {"path": tokenizer.path, "sha256": manifest["tokenizer"], "vocabulary": tokenizer.vocabulary,
                      "eod": tokenizer.eod},
        "options": {key: value for key, value in manifest["options"].items() if key not in ("lines", "piece", "hashes")}
        | {"dedup": "exact" if manifest["options"]["hashes"] else None},
        "inputs": [{"path": source.path, "bytes": source.size} for source in sources],
    }
    write_whole(folder.path / _REPORT, (json.dumps(report, indent=2) + "\n").encode())
    name = os.fsencode(Path(folder.prefix).name).decode("utf-8", "replace")  # fonts know characters alone
    title = f"{name}: {state.documents:,} documents, {state.tokens:,} tokens"
    write_whole(folder.path / _PICTURE, lengths.picture(title))
    folder.write_index()


def _report(state: State, files: int, passed_over: int) -> BuildReport:
    return BuildReport(state.documents, state.sequences, state.tokens, state.bytes, files, state.seconds,
                       state.replaced, state.skipped, state.duplicates, passed_over, state.engine)
