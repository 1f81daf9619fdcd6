"""Speed of the data path: python docs/results/loader/bench.py --output docs/results/loader/result.json

Everything runs on one core. Each speed is the best of several rounds, by the clock and by the CPU time of the thread
that reads: the second hardly suffers from other programs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SEQUENCE, BATCH, VOCABULARY = 8192, 16, 50304
ROUNDS, STEPS = 15, 20
GIANT_TOKENS, GIANT_DOCUMENTS = 10**12, 10**9


def best(work: Callable[[], object], rounds: int = ROUNDS) -> tuple[float, float]:
    """(seconds, CPU seconds) of the quickest round."""
    found = []
    for _ in range(rounds):
        clock, cpu = time.perf_counter(), time.thread_time()
        work()
        found.append((time.perf_counter() - clock, time.thread_time() - cpu))
    return min(f[0] for f in found), min(f[1] for f in found)


def corpus(prefix: Path, documents: int, dtype: str = "u2") -> Path:
    """Documents of about 1,000 tokens, as web pages have them: log-normal."""
    from megapt.data.indexed import IndexedWriter

    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, dtype) as writer:
        for length in (rng.lognormal(6.3, 1.1, documents).astype(np.int64) + 2).tolist():
            writer.add_document(rng.integers(0, 50000, length, dtype=np.uint16))
    return prefix


def reading(folder: Path) -> dict[str, Any]:
    """Tokens per second of StepLoader.step, on the corpus in the page cache."""
    import torch

    from megapt.config import FimConfig, MaskedLmConfig
    from megapt.data.batches import BatchSchedule
    from megapt.data.composite import CompositeDataset, Objective
    from megapt.data.dataset import TokenDataset
    from megapt.data.loader import StepLoader
    from megapt.data.objectives import FillInTheMiddle, MaskedLm
    from megapt.data.receipt import Receipt
    from megapt.data.vocabulary import Vocabulary

    torch.set_num_threads(1)
    prefix = corpus(folder / "corpus", 150_000)
    names = {"<pre>": 50000, "<mid>": 50001, "<suf>": 50002, "<mask>": 50003}
    ids = {f"{' ' * (i % 2)}t{i}": i for i in range(50000)} | names
    vocabulary = Vocabulary("bench", VOCABULARY, ids, frozenset(names.values()))
    fim = FillInTheMiddle(FimConfig(prefix="<pre>", middle="<mid>", suffix="<suf>"), vocabulary, 1)
    masked = MaskedLm(MaskedLmConfig(mask="<mask>"), vocabulary, 1)
    words = MaskedLm(MaskedLmConfig(mask="<mask>", whole_word=True), vocabulary, 1)
    cases: dict[str, tuple[str, int, Objective]] = {
        "concatenate, micro-batch 1": ("concatenate", 1, Objective()),
        "concatenate, micro-batch 4": ("concatenate", 4, Objective()),
        "concatenate, documents": ("concatenate", 1, Objective(documents=True)),
        "best_fit, documents": ("best_fit", 1, Objective(documents=True)),
        "fill in the middle": ("concatenate", 1, Objective(fim=fim)),
        "masked_lm": ("concatenate", 1, Objective(masked=masked)),
        "masked_lm, whole words": ("concatenate", 1, Objective(masked=words)),
    }
    result = {}
    for name, (packing, micro, objective) in cases.items():
        source = TokenDataset(prefix, "train", "1", SEQUENCE, 1, packing=packing, cache=folder / "cache")  # type: ignore[arg-type]
        data = CompositeDataset({"corpus": source}, VOCABULARY, None, objective)
        slow = objective.masked is not None
        steps = 3 if slow else STEPS
        with StepLoader(data, BatchSchedule(BATCH), micro, 0, 1, prefetch=0) as loader:
            for step in range(source.num_samples_per_epoch // BATCH):  # all of it into the page cache
                loader.step(step)
                if slow and step > 3:
                    break
            seconds, cpu = best(partial(_read, loader, steps))
        tokens = steps * BATCH * SEQUENCE
        result[name] = {"tokens_per_second": tokens / seconds, "tokens_per_cpu_second": tokens / cpu}
    data = CompositeDataset({"corpus": source}, VOCABULARY)
    seconds, cpu = best(lambda: Receipt.of(data).advance(data, np.arange(1024)))
    result["receipt of 1024 samples"] = {"milliseconds": 1e3 * seconds, "cpu_milliseconds": 1e3 * cpu}
    return result


def _read(loader: Any, steps: int) -> None:
    for step in range(steps):
        loader.step(step)


def packing(folder: Path) -> dict[str, Any]:
    """Building the best-fit index of a million documents, once."""
    from megapt.data.indexed import IndexedReader, IndexedWriter
    from megapt.data.packing import packed_index

    lengths = np.random.default_rng(0).lognormal(6.3, 1.1, 1_000_000).astype(np.int64) + 2
    with IndexedWriter(folder / "million", "u1") as writer:
        for length in lengths.tolist():
            writer.add_document(np.zeros(length, np.uint8))
    reader = IndexedReader(folder / "million")
    clock, cpu = time.perf_counter(), time.process_time()
    index = packed_index(reader, (0, 1_000_000), SEQUENCE, "best_fit", 1, folder / "cache", say=lambda _: None)
    return {
        "documents": 1_000_000, "sequence": SEQUENCE, "samples": index.num_items,
        "seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu,
        "padding": 1 - float(lengths.sum()) / (index.num_items * SEQUENCE),
    }  # fmt: skip


def giant(prefix: Path) -> None:
    """10^12 tokens in 10^9 documents of 1,000, as files of holes: where the reader looks, the index says the truth."""
    from megapt.data.index_format import Header

    each, count = GIANT_TOKENS // GIANT_DOCUMENTS, GIANT_DOCUMENTS
    header = Header(np.dtype("<u2"), count, 2)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * GIANT_TOKENS)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(header.pack())
        file.truncate(header.end)
        probes = {(count - 2) * k // 31 for k in range(32)} | {count - 1}
        for probe in sorted({p + k for p in probes for k in (0, 1)}):
            if probe < count:
                _entry(file, header, probe, each)
        file.seek(header.boundaries_at + 8)
        file.write(np.array([count], "<i8").tobytes())
    from megapt.data.dataset import TokenDataset

    known = ""
    while True:  # what is written may lie in the fingerprint's blocks, and then other places are read
        data = TokenDataset(prefix, "train", "1", SEQUENCE, 1)
        if data.identity == known:
            return
        known, starts = data.identity, data.places(np.arange(BATCH))[1]
        with open(f"{prefix}.idx", "r+b") as file:
            for start in starts.tolist():
                _path(file, header, start // each)
                _path(file, header, (start + SEQUENCE) // each)
                for k in range(start // each, (start + SEQUENCE) // each + 2):
                    _entry(file, header, min(k, count - 1), each)


def _path(file: Any, header: Any, wanted: int) -> None:
    """The entries that a binary search for a document looks at."""
    low, high = 0, GIANT_DOCUMENTS
    while high - low > 1:
        middle = (low + high) >> 1
        _entry(file, header, middle, GIANT_TOKENS // GIANT_DOCUMENTS)
        low, high = (middle, high) if middle <= wanted else (low, middle)


def _entry(file: Any, header: Any, number: int, each: int) -> None:
    file.seek(header.lengths_at + 4 * number)
    file.write(np.array([each], "<i4").tobytes())
    file.seek(header.offsets_at + 8 * number)
    file.write(np.array([2 * each * number], "<i8").tobytes())


def opening(prefix: Path, documents: bool) -> dict[str, Any]:
    """In this process, fresh: open, first batch; what it took beyond the imports, and the memory of everything."""
    from megapt.data.composite import CompositeDataset, Objective
    from megapt.data.dataset import TokenDataset

    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start, cpu = time.perf_counter(), time.process_time()
    data = TokenDataset(prefix, "train", "1", SEQUENCE, 1)
    composite = CompositeDataset({"giant": data}, VOCABULARY, None, Objective(documents=documents))
    opened = time.perf_counter() - start
    tokens, labels = (np.empty((BATCH, SEQUENCE), np.int64) for _ in range(2))
    rows = composite.fill(np.arange(BATCH), tokens, labels)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "tokens": data.num_tokens, "documents_in_corpus": data.reader.num_sequences, "documents": documents,
        "documents_in_batch": None if rows is None else len(rows.row),
        "open_seconds": opened, "first_batch_seconds": seconds, "cpu_seconds": cpu,
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "rss_of_imports_mib": imported,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--documents", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[3]))
    if options.open:
        print(json.dumps(opening(options.open, options.documents)))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        giant(folder / "giant")
        opened = []
        for more in ([], ["--documents"]):
            command = [sys.executable, __file__, "--open", str(folder / "giant"), *more]
            tries = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                     for _ in range(3)]  # fmt: skip
            opened.append(min(tries, key=lambda one: one["first_batch_seconds"]))
        result: dict[str, Any] = {"opening": opened, "reading": reading(folder), "packing": packing(folder)}
    result["environment"] = {
        "cores": os.cpu_count(), "processor": _processor(), "python": platform.python_version(),
        "numpy": np.__version__, "system": platform.system(), "load": os.getloadavg(),
    }  # fmt: skip
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
