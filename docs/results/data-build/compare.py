"""Times `megapt data build` beside a restatement of Megatron-LM's tools/preprocess_data.py, in one run, on one corpus.

    python docs/results/data-build/compare.py CORPUS --tokenizer TOKENIZER [--workers 1 2] [--rounds 3] [--json FILE]

CORPUS is a .jsonl of documents under "text", or a .txt, of whose paragraphs about 10 MB in documents of four are made
(the same every time). TOKENIZER is a tokenizer.json or a SentencePiece .model.

Megatron-LM's script is in no package. What runs here is NOT it but a restatement of what it does per document, from its
source: `multiprocessing.Pool(workers).imap(encode, lines, 32)` over the lines of one file; in the worker json.loads and
one call of the tokenizer per document, the end-of-document token appended; in the main process, per document, an array
made of the ids and written, its length and the document's boundary noted; at the end the index. It leaves out what
only costs time there (sentence splitting, several keys, printing), so it is not slower than the original for its own
sake.

Both are timed in fresh processes, alternately, with the same number of workers. "documents/s" counts from the first
line read to the closed output; start-up (imports, loading the tokenizer) and the report's picture are left out, as in
Megatron-LM's own figure. "command" is the whole process, "cpu" what it and its workers computed, start-up included. The
best of all rounds counts. The files must be identical.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CORPUS_BYTES = 10_000_000
PARAGRAPHS = 4  # per document


def make_corpus(source: Path, target: Path) -> None:
    """Documents of paragraphs drawn from a text."""
    paragraphs = [line for line in source.read_text(encoding="utf-8").split("\n") if line.strip()]
    chance = random.Random(0)
    size = 0
    with open(target, "w", encoding="utf-8") as file:
        while size < CORPUS_BYTES:
            text = "\n".join(chance.sample(paragraphs, PARAGRAPHS))
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())


class Restated:
    """What preprocess_data.py's Encoder is to its pool."""

    encode: Any
    eod: Any

    def __init__(self, tokenizer: str) -> None:
        self.path = tokenizer

    def initializer(self) -> None:
        """In every worker: load the tokenizer."""
        if self.path.endswith(".model"):
            import sentencepiece

            model = sentencepiece.SentencePieceProcessor(model_file=self.path)
            Restated.encode, Restated.eod = model.encode, model.eos_id()
        else:
            from tokenizers import Tokenizer

            hugging = Tokenizer.from_file(self.path)
            hugging.encode_special_tokens = True  # text is text, so that ids can be compared
            Restated.encode = lambda text: hugging.encode(text, add_special_tokens=False).ids
            Restated.eod = hugging.token_to_id("<|endoftext|>")

    def __call__(self, line: str) -> tuple[list[int], int]:
        ids = Restated.encode(json.loads(line)["text"])
        if ids:
            ids.append(Restated.eod)
        return ids, len(line)


def restated(corpus: str, prefix: str, tokenizer: str, workers: int) -> float:
    """Seconds from the first line to the closed files."""
    encoder = Restated(tokenizer)
    lengths: list[int] = []
    boundaries = [0]
    with open(corpus, encoding="utf-8") as lines, multiprocessing.get_context("fork").Pool(
            workers, initializer=encoder.initializer) as pool, open(prefix + ".bin", "wb") as output:
        began = time.monotonic()
        for ids, _ in pool.imap(encoder, lines, 32):
            if ids:
                output.write(np.array(ids, dtype=np.uint16).tobytes(order="C"))
                lengths.append(len(ids))
            boundaries.append(len(lengths))
        sizes = np.array(lengths, np.int64) * 2
        with open(prefix + ".idx", "wb") as index:
            index.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(lengths), len(boundaries)))
            index.write(np.array(lengths, np.int32).tobytes())
            index.write((np.cumsum(sizes) - sizes).tobytes())
            index.write(np.array(boundaries, np.int64).tobytes())
        return time.monotonic() - began


def ours(corpus: str, prefix: str, tokenizer: str, workers: int) -> float:
    """Seconds as the report states them."""
    from megapt.data.build import build

    return build([corpus], prefix, tokenizer, workers=workers, progress=False, overwrite=True).seconds


def timed(way: str, corpus: Path, prefix: Path, tokenizer: str, workers: int) -> tuple[float, float, float]:
    """Seconds of the work, of the whole process, and of the CPUs for it and its workers."""
    began, before = time.monotonic(), os.times()
    run = subprocess.run([sys.executable, __file__, str(corpus), "--tokenizer", tokenizer, "--workers", str(workers),
                          "--one", way, str(prefix)], capture_output=True, text=True, check=True,
                         env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"})
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return float(run.stdout.split()[-1]), time.monotonic() - began, cpu


def compare(corpus: Path, tokenizer: str, workers: list[int], rounds: int, folder: Path) -> dict[str, Any]:
    """The figures of both, for each number of workers."""
    documents = sum(1 for _ in open(corpus, "rb"))
    result: dict[str, Any] = {"documents": documents, "bytes": corpus.stat().st_size, "tokenizer": Path(tokenizer).name,
                              "rounds": rounds, "python": sys.version.split()[0], "cpus": os.cpu_count(), "workers": {}}
    for count in workers:
        best: dict[str, list[float]] = {}
        for _ in range(rounds):
            for way in ("restated", "megapt"):
                taken = timed(way, corpus, folder / way, tokenizer, count)
                best[way] = [min(pair) for pair in zip(taken, best.get(way, taken), strict=True)]
        for ending in (".bin", ".idx"):
            if (folder / f"restated{ending}").read_bytes() != (folder / f"megapt{ending}").read_bytes():
                raise SystemExit(f"the two {ending} files differ")
        figures = {way: {"documents_per_second": round(documents / work), "command_seconds": round(command, 3),
                         "cpu_seconds": round(cpu, 2)} for way, (work, command, cpu) in best.items()}
        ratio = best["restated"][0] / best["megapt"][0]
        result["workers"][str(count)] = figures | {"ratio": round(ratio, 2)}
        print(f"{count} workers: restated {figures['restated']}, megapt {figures['megapt']}, ratio {ratio:.2f}; "
              "files identical", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "PREFIX"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way = {"restated": restated, "megapt": ours}[options.one[0]]
        print(way(str(options.corpus), options.one[1], options.tokenizer, options.workers[0]))
        return
    with tempfile.TemporaryDirectory() as folder:
        corpus = options.corpus
        if corpus.suffix != ".jsonl":
            corpus = Path(folder) / "corpus.jsonl"
            make_corpus(options.corpus, corpus)
        result = compare(corpus, options.tokenizer, options.workers, options.rounds, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
