"""Every byte of a checkpoint against its checksums: everything that is damaged is named, not only the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megapt.checkpoint.folders import resolve
from megapt.checkpoint.index import Index, Slice, file_problem, read_index
from megapt.checkpoint.loading import THREADS, Reader, stored_model
from megapt.checkpoint.rawfile import WIDTHS
from megapt.errors import UserError


@dataclass(frozen=True)
class Report:
    """problems: messages that name file and tensor, or the file alone where index or marker are damaged; slices and
    nbytes: how much was looked at."""

    folder: Path
    problems: list[str]
    tensors: int = 0
    slices: int = 0
    nbytes: int = 0


def verify(path: str | Path, progress: Callable[[int], None] = lambda count: None) -> Report:
    """Read all of a checkpoint and compare every checksum; `progress` hears of bytes as they are done.

    UserError only where `path` means no committed checkpoint; all else is in the report.
    """
    folder = resolve(path)
    try:
        index = read_index(folder, files=False)
    except UserError as error:
        return Report(folder, [str(error)])
    reader = Reader(folder, index)
    problems = [*_model_problem(folder, index), *_unused_files(folder, index)]
    work = [(name, kind, e.dtype, part) for name, kind, e in index.entries() for part in e.slices]

    def check(job: tuple[str, str, str, Slice]) -> str | None:
        name, kind, dtype, part = job
        try:
            reader.check(name, kind, part)
        except UserError as error:
            return str(error)
        finally:
            progress(part.numel * WIDTHS[dtype])
        return None

    with ThreadPoolExecutor(THREADS, "checkpoint-verify") as pool:
        problems += [found for found in pool.map(check, work) if found]
    return Report(folder, problems, len(index.tensors), len(work), sum(p.numel * WIDTHS[d] for *_, d, p in work))


def work_bytes(path: str | Path) -> int:
    """Bytes that `verify` will read; 0 where the index cannot be read."""
    try:
        return sum(read_index(path, files=False).files.values())
    except UserError:
        return 0


def _model_problem(folder: Path, index: Index) -> Iterator[str]:
    if "config" in index.meta:
        try:
            stored_model(folder, index)
        except UserError as error:
            yield str(error)


def _unused_files(folder: Path, index: Index) -> Iterator[str]:
    """Files that no slice lies in must be there all the same, being listed; the others are named with their slices."""
    used = {part.file for _, _, entry in index.entries() for part in entry.slices}
    for name, size in index.files.items():
        if name not in used and (problem := file_problem(folder, name, size)):
            yield f"{folder} is damaged: {problem}"
