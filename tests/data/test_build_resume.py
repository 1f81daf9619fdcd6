"""Builds that are killed, run out of disk or find another's work, and go on."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megapt.data import build_state, encode, pieces, streams
from megapt.data.build import build
from megapt.data.build_state import WorkingFolder
from megapt.data.statistics import LengthCounts
from megapt.errors import UserError

ENDINGS = (".bin", ".idx", ".report.json", ".lengths.png")
ARGUMENTS: dict[str, Any] = {"tokenizer_path": "bytes", "progress": False, "dedup": "exact", "invalid": "skip"}

# Builds as a process of its own and dies, by kill -9, when an event (a call of `function`) comes for the n-th time.
SCRIPT = """
import os, signal, sys
from megapt.data import build_state, pieces, streams
from megapt.data.build import build

folder, output, module, function, count, workers = sys.argv[1:]
pieces.LINES, pieces.PIECE, streams.BLOCK, build_state.COMMIT_SECONDS = 600, 1000, 256, 0.0
owner = build_state.WorkingFolder if module == "WorkingFolder" else os
inner, left = getattr(owner, function), int(count)

def counted(*arguments, **more):
    global left
    left -= 1
    if left == 0:
        if workers == "2":
            import multiprocessing
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*arguments, **more)

setattr(owner, function, counted)
build([folder], output, "bytes", progress=False, dedup="exact", invalid="skip", workers=int(workers))
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is the slowest part of a small build, and tested by itself."""
    monkeypatch.setattr(LengthCounts, "picture", lambda self, title: b"picture")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LINES", 600)
    monkeypatch.setattr(pieces, "PIECE", 1000)
    monkeypatch.setattr(streams, "BLOCK", 256)
    monkeypatch.setattr(build_state, "COMMIT_SECONDS", 0.0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small and long documents, duplicates of both, and a long one that is dropped at its end for its last byte."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = [f"document {i % 40}\n" * (i % 9) for i in range(100)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    long = b"".join(b"line %d of many\n" % i for i in range(400))
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.txt").write_bytes(long)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines * 2))
    (folder / "d.txt").write_bytes(long[:3000] + b"more\n" + long[3000:] + b"\xff")
    (folder / "e.txt").write_bytes(long)
    (folder / "f.txt.gz").write_bytes(gzip.compress(long + b"end"))
    (folder / "g.txt").write_bytes(b"last")
    return folder


@pytest.fixture(scope="module")
def expected(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "LINES", 600)
        patch.setattr(pieces, "PIECE", 1000)
        patch.setattr(streams, "BLOCK", 256)
        whole = tmp_path_factory.mktemp("whole") / "out"
        report = build([inputs], whole, **ARGUMENTS)
    assert (report.skipped, report.duplicates) == (1, 304 - report.documents)
    return {ending: Path(f"{whole}{ending}").read_bytes() for ending in ENDINGS[:2]}


def killed(inputs: Path, output: Path, module: str, function: str, count: int, workers: int = 1) -> list[int]:
    """Run until the kill; the process ids of the workers."""
    run = subprocess.run([sys.executable, "-c", SCRIPT, inputs, output, module, function, str(count), str(workers)],
                         stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], timeout=60, check=False)
    assert run.returncode == -9
    return [int(word) for word in run.stdout.split()]


def finished(output: Path, expected: dict[str, bytes]) -> None:
    names = {path.name for path in output.parent.iterdir()}
    assert names == {output.name + ending for ending in ENDINGS}
    for ending, data in expected.items():
        assert Path(f"{output}{ending}").read_bytes() == data


# Kills: in the middle of the appends, during a commit, and between the two steps in which a document is dropped.
@pytest.mark.parametrize(("module", "function", "count", "workers"), [
    ("WorkingFolder", "append", 20, 2), ("WorkingFolder", "append", 45, 1), ("os", "fsync", 130, 1),
    ("WorkingFolder", "_sizes", 2, 1),
])
def test_killed_builds_go_on(inputs: Path, expected: dict[str, bytes], tmp_path: Path, module: str, function: str,
                             count: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    children = killed(inputs, output, module, function, count, workers)
    assert [path.name for path in tmp_path.iterdir()] == ["out.building"]
    state = json.loads((tmp_path / "out.building" / "state.json").read_text())
    assert state["bytes"] > 0
    for _ in range(100):  # the workers notice that their parent is gone
        if not any(os.path.exists(f"/proc/{child}") for child in children):
            break
        time.sleep(0.05)
    else:
        raise AssertionError(f"of the workers {children} some still run")
    assert len(children) == (2 if workers == 2 else 0)
    encoded: list[int] = []
    inner = encode.Encoder.__call__

    def counted(self: encode.Encoder, item: pieces.WorkItem) -> encode.Encoded:
        encoded.append(sum(piece.stop - piece.start for piece in item.pieces))
        return inner(self, item)

    monkeypatch.setattr(encode.Encoder, "__call__", counted)
    report = build([inputs], output, **ARGUMENTS)
    assert sum(encoded) == report.bytes - state["bytes"]  # nothing that was done is done again
    finished(output, expected)


def test_kills_between_the_last_renames(inputs: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    for published in range(4):  # .bin, report, picture, .idx
        output = tmp_path / str(published) / "out"
        with pytest.MonkeyPatch.context() as patch:
            inner, done = os.replace, 0

            def stop(old: Any, new: Any, inner: Any = inner, published: int = published) -> None:
                nonlocal done
                if str(new).startswith(f"{tmp_path}/") and ".building" not in str(new):
                    if done == published:
                        raise KeyboardInterrupt
                    done += 1
                inner(old, new)

            patch.setattr(os, "replace", stop)
            with pytest.raises(KeyboardInterrupt):
                build([inputs], output, **ARGUMENTS)
        assert Path(f"{output}.building").is_dir()
        assert not Path(f"{output}.idx").exists()
        build([inputs], output, **ARGUMENTS)
        finished(output, expected)


def test_a_full_disk_is_reported_and_survived(inputs: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    script = f"""
import resource, signal
from pathlib import Path
from megapt.data import build_state, pieces, streams
from megapt.data.build import build
from megapt.errors import UserError
pieces.LINES, pieces.PIECE, streams.BLOCK, build_state.COMMIT_SECONDS = 600, 1000, 256, 0.0
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))
try:
    build([{str(inputs)!r}], {str(tmp_path / "out")!r}, "bytes", progress=False, dedup="exact", invalid="skip")
except UserError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True,
                         cwd=Path(__file__).parents[2])
    assert run.stderr == ""
    assert run.stdout == (f"{tmp_path}/out.building: File too large; what is done stays in {tmp_path}/out.building, "
                          "and the same command goes on from there\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out.building"]
    assert json.loads((tmp_path / "out.building" / "state.json").read_text())["documents"] > 0
    build([inputs], tmp_path / "out", **ARGUMENTS)
    finished(tmp_path / "out", expected)


def test_other_arguments_are_told_apart(inputs: Path, expected: dict[str, bytes], tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"

    def interrupt() -> None:
        inner, left = WorkingFolder.append, [30]

        def append(*arguments: Any) -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            inner(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WorkingFolder, "append", append)
            with pytest.raises(KeyboardInterrupt):
                build([inputs], output, **ARGUMENTS, overwrite=True)

    interrupt()
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "out.building").iterdir())
    for arguments, difference in [({"append_eod": False}, "options"), ({"invalid": "fail"}, "options"),
                                  ({"inputs": [inputs / "a.jsonl"]}, "inputs")]:
        with pytest.raises(UserError, match=f"out.building holds an unfinished build that differs in its {difference}"):
            build(**({"inputs": [inputs], "output_prefix": output} | ARGUMENTS | arguments))
        assert sorted((path.name, path.read_bytes()) for path in (tmp_path / "out.building").iterdir()) == before
    manifest = output.parent / "out.building" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"format": 1', '"format": 0'))  # of a version whose state has other fields
    (manifest.parent / "state.json").rename(tmp_path / "state")
    (manifest.parent / "state.json").write_text('{"other": 1}')
    with pytest.raises(UserError, match="differs in its format"):
        build([inputs], output, **ARGUMENTS)
    (tmp_path / "state").rename(manifest.parent / "state.json")
    manifest.write_text(text)
    build([inputs], output, **(ARGUMENTS | {"progress": True}))  # the very same goes on
    assert "going on from" in capsys.readouterr().err
    finished(output, expected)
    interrupt()
    build([inputs / "g.txt"], output, "bytes", progress=False, overwrite=True)
    assert Path(f"{output}.bin").read_bytes() == bytes(b for c in b"last" for b in (c, 0)) + b"\x00\x01"


def test_two_builds_keep_apart(inputs: Path, tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", f"""
import numpy, sys
from megapt.data.build_state import WorkingFolder
from megapt.data.statistics import LengthCounts
folder = WorkingFolder({str(tmp_path / "out")!r}, numpy.dtype("u2"), True, False)
folder.lock()
print("locked", flush=True)
sys.stdin.read()
"""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="another process is building"):
        build([inputs], tmp_path / "out", **ARGUMENTS)
    assert (tmp_path / "out.building").is_dir()
    holder.communicate()
    build([inputs], tmp_path / "out", **ARGUMENTS)


def test_a_folder_removed_while_it_is_locked_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another build ends, and a third begins, between the opening of the lock file and the lock."""
    first, second, lock = (WorkingFolder(str(tmp_path / "out"), np.dtype("u2"), True, False) for _ in range(3))
    first.lock()
    real = fcntl.lockf

    def late(file: Any, operation: int) -> None:
        monkeypatch.setattr(fcntl, "lockf", real)
        first.remove()
        lock.path.mkdir()
        (lock.path / "lock").write_bytes(b"")
        real(file, operation)

    monkeypatch.setattr(fcntl, "lockf", late)
    with pytest.raises(UserError, match="another process is building"):
        second.lock()
    second.remove()
    assert lock.path.is_dir()
