"""The rank's side of its background writer: start it, give it jobs, hear what became of them."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import megapt
from megapt.errors import UserError

_CHUNK = 1 << 30  # one system call writes no more than 2 GiB
_READY_WITHIN = 60.0  # seconds; it takes a fraction of one on a machine at rest


class Writer:
    """A process of `megapt.checkpoint.writer`, with one job at a time. inherited: descriptors that it needs, or that
    must stay open as long as it lives."""

    def __init__(self, inherited: Sequence[int]) -> None:
        root = str(Path(megapt.__file__).parents[1])
        known = os.environ.get("PYTHONPATH")
        self._job = os.memfd_create("job", os.MFD_CLOEXEC)
        self._last = "ready"  # the answer after which nothing can fail any more
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "megapt.checkpoint.writer", str(self._job)],  # -P: not from the current folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._job, *inherited],
            env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{known}" if known else root},
        )
        self._received = b""
        self.answers: dict[str, Any] = {}

    def give(self, job: dict[str, Any]) -> None:
        """Let it write; does not wait for it. The answers to the job before, which has ended, are forgotten."""
        assert self._process.stdin is not None
        self.answers = {name: said for name, said in self.answers.items() if name == "ready"}
        self._last = "written" if job["commit"] is None else "committed"
        data = memoryview(json.dumps(job).encode())
        os.ftruncate(self._job, len(data))
        for at in range(0, len(data), _CHUNK):
            os.pwrite(self._job, data[at : at + _CHUNK], at)
        try:
            self._process.stdin.write(b"%d\n" % len(data))
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died between two jobs: `failure` says so

    def hear(self, seconds: float = 0.0) -> None:
        """Take what it has said by now, or until something comes within `seconds`."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while "died" not in self.answers and poll.poll(seconds * 1000):
            seconds = 0.0
            data = os.read(descriptor, 1 << 16)
            if not data:
                status = self._process.wait()
                how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
                self.answers["died"] = f"its background writer {how}"
            *lines, self._received = (self._received + data).split(b"\n")
            for line in lines:
                self.answers |= json.loads(line)

    def wait(self, answer: str) -> dict[str, Any]:
        """Until that answer has come; raises UserError where the job failed instead."""
        while answer not in self.answers and self.failure is None:
            self.hear(60.0)
        if answer not in self.answers:
            raise UserError(self.failure)
        return self.answers

    def check_ready(self) -> None:
        """UserError unless it has come to life."""
        deadline = time.monotonic() + _READY_WITHIN
        while not self.answers.keys() & {"ready", "died"} and time.monotonic() < deadline:
            self.hear(1.0)
        if "ready" not in self.answers:
            raise UserError(self.failure or f"its background writer has not started within {_READY_WITHIN:g} s")

    @property
    def failure(self) -> str | None:
        """Why the job was not done, as far as was heard."""
        return None if self._last in self.answers else self.answers.get("error") or self.answers.get("died")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End it, in the midst of a job or not."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass
        self._process.kill()
        self._process.wait()
        os.close(self._job)
