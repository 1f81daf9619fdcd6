"""The background writer: a process beside each rank that writes snapshots while the rank trains.

A line on stdin says how many bytes of JSON the next job is, which lie in the memory whose descriptor is the argument:
a pipe would hold up the rank where the writer does not read. Answers go as JSON lines to stdout: {"ready": ...} at the
beginning, {"written": ...} once this rank's files are on
disk, from rank 0 also {"committed": ...}, or {"error": ...}. It ends with its rank, killed or not, since its stdin ends
then. It imports no torch, so that it starts in a moment and stays small.
"""

from __future__ import annotations

import json
import mmap
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from megapt.checkpoint.commit import Commit
from megapt.checkpoint.written import RankFiles, Rectangle
from megapt.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # sent to all of a job; the rank decides


def main() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    _answer(ready=True)
    threading.Thread(target=_listen, args=(jobs, int(sys.argv[1])), daemon=True).start()
    while True:
        job = jobs.get()
        try:
            _work(job)
        except (UserError, OSError) as error:
            _answer(error=str(error))


def _listen(jobs: queue.SimpleQueue[dict[str, Any]], memory: int) -> None:
    for line in sys.stdin:
        with mmap.mmap(memory, int(line), prot=mmap.PROT_READ) as job:
            jobs.put(json.loads(job[:]))
    os._exit(0)  # in the midst of whatever: what is not committed does not count


def _work(job: dict[str, Any]) -> None:
    started = time.monotonic()
    rectangles = [Rectangle.of(row) for row in job["rectangles"]]
    files = RankFiles(Path(job["partial"]), job["rank"], rectangles)
    try:
        if rectangles:
            snapshot = memoryview(mmap.mmap(job["snapshot"], job["nbytes"], prot=mmap.PROT_READ))
            for rectangle, at in zip(rectangles, job["places"], strict=True):
                files.add(rectangle, snapshot[at : at + rectangle.slot.nbytes])
        files.close()
    finally:
        files.abandon()
    _answer(written=True)
    if job["commit"] is not None:
        warnings = Commit.of(job["commit"]).complete()
        _answer(committed=True, seconds=time.monotonic() - started, warnings=warnings)


def _answer(**tree: Any) -> None:
    print(json.dumps(tree), flush=True)


if __name__ == "__main__":
    main()
