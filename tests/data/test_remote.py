"""Corpora behind URLs: fsspec's memory and a web server of this process, blocks on disk."""

from __future__ import annotations

import http.server
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from megapt.data import remote
from megapt.data.describe import describe
from megapt.data.indexed import IndexedReader, open_pair
from megapt.data.pair_writer import PairWriter
from megapt.data.remote import BlockCache, RemoteFile
from megapt.data.transfer import merge
from megapt.data.verify import check_pair
from megapt.errors import UserError

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp", reason="fsspec reads http:// with aiohttp")
BLOCK = 4096


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a dictionary; `mode` plays servers with less."""

    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = 1 << 16, True  # else every answer waits for an acknowledgement
    files: ClassVar[dict[str, bytes]] = {}
    mode: ClassVar[str] = "ranges"
    version: ClassVar[int] = 0
    requests: ClassVar[list[tuple[str, str, int]]] = []
    failures: ClassVar[int] = 0

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        data = self.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        if body and Handler.failures:
            Handler.failures -= 1
            self.send_error(503)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and self.mode == "ranges":
            start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            data = data[start:stop]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{self.version}"')
        self.end_headers()
        Handler.requests.append((self.command, self.path, len(data)))
        if body:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # a full queue drops callers, who try again after a second


@pytest.fixture
def server() -> Iterator[str]:
    with Server(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
        Handler.files, Handler.mode, Handler.version, Handler.failures = {}, "ranges", 0, 0
        Handler.requests.clear()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def write(prefix: Path, documents: int = 300) -> IndexedReader:
    rng = np.random.default_rng(7)
    lengths = rng.integers(0, 150, documents)
    with PairWriter(prefix, "u2") as writer:
        writer.write(rng.integers(0, 60000, int(lengths.sum())))
        writer.add_sequences(lengths)
        writer.add_boundaries(np.arange(1, documents + 1))
        writer.finish()
        writer.commit()
    return IndexedReader(prefix)


def put(url: str, prefix: Path) -> None:
    """Copy a pair to where the URL points."""
    for ending in (".bin", ".idx"):
        data = Path(f"{prefix}{ending}").read_bytes()
        if url.startswith("http"):
            Handler.files[f"/{url.rpartition('/')[2]}{ending}"] = data
        else:
            fsspec.filesystem("memory").pipe(url + ending, data)


@pytest.fixture(params=["memory", "http"])
def url(request: pytest.FixtureRequest, server: str, tmp_path: Path) -> str:
    return f"{server}/corpus" if request.param == "http" else f"memory://bucket-{os.path.basename(tmp_path)}/corpus"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote.BlockCache.__init__, "__defaults__", (None, remote.CACHE_BYTES, BLOCK))
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def test_a_remote_corpus_reads_like_a_local_one(tmp_path: Path, url: str) -> None:
    local = write(tmp_path / "d")
    put(url, tmp_path / "d")
    reader = IndexedReader(url, cache=tmp_path / "cache", cache_bytes=3 * BLOCK)
    assert (reader.num_tokens, reader.num_sequences, reader.num_documents) == (
        local.num_tokens, local.num_sequences, local.num_documents)
    assert reader.packed and reader.fingerprint() == local.fingerprint()
    assert reader.full_hash() == local.full_hash()
    rng = np.random.default_rng(0)
    for start, count in [(0, 0), (0, local.num_tokens), *rng.integers(0, local.num_tokens // 2, (8, 2)).tolist()]:
        assert np.array_equal(reader.tokens(start, count), local.tokens(start, count))
        assert not reader.tokens(start, count).flags.writeable
        assert reader.sequence_at(start) == local.sequence_at(start)
    for i in rng.integers(0, len(local), 6).tolist():
        assert np.array_equal(reader.sequence(i), local.sequence(i))
        assert reader.document_at(i) == local.document_at(i)
        assert reader.document(i) == local.document(i)
        assert reader.token_range(i, len(local)) == local.token_range(i, len(local))
    assert describe(reader) == {**describe(local), "prefix": url}
    reader.verify()
    assert not check_pair(*open_pair(url), vocabulary=60000).findings
    merge([url], tmp_path / "copy")
    for ending in ("bin", "idx"):
        assert (tmp_path / f"copy.{ending}").read_bytes() == (tmp_path / f"d.{ending}").read_bytes()


def test_columns_behave_like_arrays(tmp_path: Path, url: str) -> None:
    local = write(tmp_path / "d", 3000)
    put(url, tmp_path / "d")
    reader = IndexedReader(url)
    for theirs, ours in ((reader.offsets, local.offsets), (reader.document_boundaries, local.document_boundaries)):
        assert len(theirs) == len(ours) and theirs.dtype == ours.dtype
        assert theirs[5] == ours[5] and theirs[-1] == ours[-1]
        assert theirs[10:900].tolist() == ours[10:900].tolist() and theirs[-3:].tolist() == ours[-3:].tolist()
        at = np.array([0, 7, -1, 2000])
        assert theirs[at].tolist() == ours[at].tolist()
        for value in [-1, 0, *ours[::301].tolist(), *(ours[::307] + 1).tolist(), 10**9]:
            for side in ("left", "right"):
                assert theirs.searchsorted(value, side) == np.searchsorted(ours, value, side)  # type: ignore[call-overload]
        with pytest.raises(IndexError):
            theirs[len(ours)]
        with pytest.raises(IndexError, match="steps of 1"):
            theirs[::2]
        with pytest.raises(TypeError, match="not fetched whole"):
            np.asarray(theirs)


def test_little_is_fetched_of_a_large_index(tmp_path: Path, server: str) -> None:
    """Opening, the fingerprint and one sample of an index of 1.2 MB, counted in bytes."""
    write(tmp_path / "d", 60_000)
    put(f"{server}/corpus", tmp_path / "d")
    size = (tmp_path / "d.idx").stat().st_size
    assert size > 1_100_000
    reader = IndexedReader(f"{server}/corpus", cache=tmp_path / "cache")
    opened = sum(count for command, path, count in Handler.requests if command == "GET" and path.endswith(".idx"))
    assert opened < 1000
    reader.tokens(reader.num_tokens // 2, 100)
    reader.document_at(reader.sequence_at(reader.num_tokens // 2))
    used = sum(count for command, path, count in Handler.requests if command == "GET")
    assert used < 6 * BLOCK
    reader.fingerprint()
    assert sum(count for command, _, count in Handler.requests if command == "GET") - used == 2 * 64 * 4096


def blocks(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.block"))


def test_blocks_are_kept_bounded_and_used_again(tmp_path: Path, server: str) -> None:
    local = write(tmp_path / "d")
    put(f"{server}/corpus", tmp_path / "d")
    reader = IndexedReader(f"{server}/corpus", cache=tmp_path / "cache", cache_bytes=3 * BLOCK)
    per_block = BLOCK // 2
    for block in (0, 1, 2, 0, 3, 0):
        assert np.array_equal(reader.tokens(block * per_block, 10), local.tokens(block * per_block, 10))
        time.sleep(0.002)  # for clocks of files
        assert sum(path.stat().st_size for path in blocks(tmp_path / "cache")) <= 3 * BLOCK
    names = {path.name.split(".")[1] for path in blocks(tmp_path / "cache")}
    assert names == {"0", "2", "3"}  # 1 was left alone for longest
    Handler.requests.clear()
    again = IndexedReader(f"{server}/corpus", cache=tmp_path / "cache", cache_bytes=3 * BLOCK)
    again.tokens(0, 10)
    assert not [count for command, path, count in Handler.requests
                if command == "GET" and path.endswith(".bin") and count > 1]
    for path in blocks(tmp_path / "cache"):
        path.write_bytes(b"cut")  # not as long as a block, so it is fetched anew
    assert np.array_equal(again.tokens(0, 5000), local.tokens(0, 5000))


def test_what_lies_in_the_folder_stays_but_for_blocks(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine" * BLOCK)
    old, new = (folder / f"{'0' * 24}.7.block.{name}.partial" for name in ("00000000", "11111111"))
    for path in (old, new):
        path.write_bytes(bytes(10 * BLOCK))
    os.utime(old, (1, 1))
    cache = BlockCache(folder, 2 * BLOCK)
    for block in range(4):
        cache.read("1" * 24, block, BLOCK, 0, 4, lambda: bytes(BLOCK))
    assert not old.exists() and new.exists() and (folder / "notes.txt").exists() and len(blocks(folder)) == 2


def _read_much(folder: Path, seed: int, failed: Any) -> None:
    expected = np.frombuffer(_served(), "<u2")
    cache = BlockCache(folder, 3 * BLOCK, BLOCK)
    rng = np.random.default_rng(seed)
    for _ in range(300):
        block = int(rng.integers(0, 12))
        start = int(rng.integers(0, BLOCK // 2 - 8)) * 2
        got = cache.read("2" * 24, block, BLOCK, start, start + 16,
                         lambda block=block: _served()[block * BLOCK:(block + 1) * BLOCK])
        at = (block * BLOCK + start) // 2
        if not np.array_equal(got.view("<u2"), expected[at:at + 8]):
            failed.value += 1


def _served() -> bytes:
    return np.arange(12 * BLOCK // 2, dtype="<u2").tobytes()


def test_processes_share_a_folder_that_is_too_small_for_them(tmp_path: Path) -> None:
    """Three processes evict each other's blocks all the time, and all read what they should."""
    context = multiprocessing.get_context("fork")
    failed = context.Value("i", 0)
    workers = [context.Process(target=_read_much, args=(tmp_path / "cache", seed, failed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0] and failed.value == 0
    assert len(blocks(tmp_path / "cache")) <= 3 + 3


def test_one_fetches_while_others_wait(tmp_path: Path) -> None:
    fetched: list[int] = []

    def fetch() -> bytes:
        fetched.append(1)
        time.sleep(0.1)
        return bytes(BLOCK)

    def read() -> None:
        BlockCache(tmp_path / "cache").read("3" * 24, 0, BLOCK, 0, 8, fetch)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1


def test_failures_that_pass_are_asked_again(tmp_path: Path, server: str) -> None:
    local = write(tmp_path / "d")
    put(f"{server}/corpus", tmp_path / "d")
    reader = IndexedReader(f"{server}/corpus", cache=tmp_path / "cache")
    Handler.failures = 2
    assert np.array_equal(reader.tokens(0, 100), local.tokens(0, 100))
    Handler.failures = 10**6
    with pytest.raises(UserError, match=r"corpus.bin cannot be read \(4 attempts\): .*503"):
        reader.tokens(local.num_tokens - 10, 10)


def test_a_file_that_changes_is_noticed(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next fetch that looks; and blocks of the old file are not taken for the new one's."""
    monkeypatch.setattr(remote, "_RECHECK", 0.0)
    write(tmp_path / "d")
    put(url, tmp_path / "d")
    reader = IndexedReader(url, cache=tmp_path / "cache")
    reader.tokens(0, 10)
    with open(tmp_path / "d.bin", "r+b") as file:
        file.write(b"\x01\x02")
    Handler.version += 1
    put(url, tmp_path / "d")
    with pytest.raises(UserError, match="corpus.bin changed while it was in use"):
        reader.tokens(reader.num_tokens - 10, 10)
    again = IndexedReader(url, cache=tmp_path / "cache")
    assert again.tokens(0, 1).tolist() == [0x0201]


def test_refusals_name_the_url_and_the_reason(tmp_path: Path, server: str) -> None:
    write(tmp_path / "d")
    put(f"{server}/corpus", tmp_path / "d")
    port = server.rpartition(":")[2]
    for prefix, message in (
        (f"{server}/absent", r"absent.idx does not exist or cannot be reached \(404"),
        ("memory://nowhere/corpus", "memory://nowhere/corpus.idx does not exist"),
        ("nosuch://bucket/corpus", "nosuch://bucket/corpus.idx cannot be read: .*nosuch"),
        ("http://127.0.0.1:1/corpus", "127.0.0.1:1/corpus.idx does not exist or cannot be reached .*onnect"),
    ):
        with pytest.raises(UserError, match=message):
            IndexedReader(prefix, cache=tmp_path / "cache")
    Handler.mode = "whole"
    with pytest.raises(UserError, match=rf"127.0.0.1:{port}/corpus.idx .*no Range support"):
        IndexedReader(f"{server}/corpus", cache=tmp_path / "cache")
    with pytest.raises(UserError, match="too small for blocks"):
        BlockCache(tmp_path / "cache", 2 * BLOCK - 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        BlockCache(tmp_path / "file" / "cache")


def test_an_order_of_its_own_is_refused(tmp_path: Path, url: str) -> None:
    write(tmp_path / "d")
    path = tmp_path / "d.idx"
    count = IndexedReader(tmp_path / "d").num_sequences
    whole = bytearray(path.read_bytes())
    whole[34 + 4 * count:34 + 4 * count + 8] = (2).to_bytes(8, "little")
    path.write_bytes(whole)
    put(url, tmp_path / "d")
    with pytest.raises(UserError, match="megapt data merge"):
        IndexedReader(url, cache=tmp_path / "cache")


def test_local_urls_are_local(tmp_path: Path) -> None:
    local = write(tmp_path / "d")
    assert np.array_equal(IndexedReader(f"file://{tmp_path}/d").tokens(0, 50), local.tokens(0, 50))
    assert not isinstance(IndexedReader(f"file://{tmp_path}/d").bin, RemoteFile)


def test_fsspec_is_loaded_for_urls_only(tmp_path: Path) -> None:
    write(tmp_path / "d")
    program = ("import sys; from megapt.data.indexed import IndexedReader; IndexedReader(sys.argv[1]).tokens(0, 1); "
               "assert not {'fsspec', 'aiohttp', 'torch'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "d")], check=True)
