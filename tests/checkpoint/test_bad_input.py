"""Whatever stands in a checkpoint's folder: right values, or one message that names file and tensor."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megapt import checkpoint
from megapt.checkpoint.plain import Checkpoint, Damaged
from megapt.checkpoint.verify import verify
from megapt.errors import UserError
from tests.checkpoint.fakes import LLAMA, meta_of, true_value
from tests.checkpoint.handmade import Tree, change, commit, load, weights

NORM = "layers.0.mlp_norm.weight"


def entry(tree: Tree, name: str = "head.weight") -> Tree:
    return tree["tensors"][name]["kinds"]["weight"]


def first(tree: Tree, name: str = "head.weight") -> Tree:
    return entry(tree, name)["slices"][0]


def named(old: str, new: str) -> Callable[[Tree], object]:
    """The first file gets another name everywhere in the index."""

    def edit(tree: Tree) -> None:
        tree["files"][new] = tree["files"].pop(old)
        for tensor in tree["tensors"].values():
            for part in tensor["kinds"]["weight"]["slices"]:
                part["file"] = new if part["file"] == old else part["file"]

    return edit


FILE = "rank-00000-000.safetensors"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.update(version=2), ["format version 2", "legal here: 1"]),
        (lambda t: t.update(version=True), ["format version True"]),
        (lambda t: t.pop("tensors"), ["'tensors' is missing"]),
        (lambda t: t.update(tensors=[]), ["'tensors' is [], not an object"]),
        (lambda t: t.update(meta=None), ["'meta' is None, not an object"]),
        (lambda t: t.update(step="1"), ["'step' is '1', not a whole number"]),
        (lambda t: t.update(step=-1), ["'step' is -1"]),
        (lambda t: t["tensors"]["head.weight"].pop("shape"), ["head.weight: 'shape' is missing"]),
        (lambda t: t["tensors"]["head.weight"].update(shape=[2**40, 2**40]), ["head.weight", "any file can hold"]),
        (lambda t: t["tensors"]["head.weight"].update(shape=[-21, 12]), ["head.weight", "[-21, 12]"]),
        (lambda t: t["tensors"]["head.weight"].update(shape=[21.0, 12]), ["head.weight", "[21.0, 12]"]),
        (lambda t: t["tensors"]["head.weight"].update(shape=[1] * 9), ["head.weight", "9 dimensions"]),
        (lambda t: t["tensors"]["head.weight"].update(shape=[22, 12]), ["weight of head.weight", "do not make up"]),
        (lambda t: entry(t).update(dtype="I64"), ["head.weight: weight: the dtype 'I64' is unknown"]),
        (lambda t: entry(t).update(dtype="F64"), [FILE, "weight of head.weight", "it holds F32 [11, 12], not F64"]),
        (lambda t: entry(t).update(dtype="BF16"), ["weight of head.weight: stored as torch.bfloat16"]),
        (lambda t: entry(t)["slices"].pop(), ["weight of head.weight", "do not make up"]),
        (lambda t: entry(t)["slices"].append(first(t)), ["weight of head.weight", "do not make up"]),
        (lambda t: entry(t)["slices"][1].update(offset=[0, 0]), ["weight of head.weight", "do not make up"]),
        (lambda t: first(t).update(offset=[20, 0]), ["head.weight", "lies outside of (21, 12)"]),
        (lambda t: first(t).update(offset=[0]), ["head.weight", "lies outside"]),
        (lambda t: first(t).update(shape=[2**70, 1]), ["head.weight: weight: 'shape'"]),
        (lambda t: first(t).update(checksum="md5:00"), ["head.weight: weight: the checksum 'md5:00'"]),
        (lambda t: first(t).update(checksum="crc32:00000000"), ["weight of head.weight", "its checksum is"]),
        (lambda t: first(t).update(key="weight/norm.weight"), ["head.weight: weight: the key 'weight/norm.weight'"]),
        (lambda t: first(t).update(key="weight/head.weight/0"), [FILE, "it holds no weight/head.weight/0"]),
        (lambda t: first(t).update(file="other.safetensors"), ["weight of head.weight", "not listed"]),
        (named(FILE, "../../etc/passwd"), ["the file name '../../etc/passwd' is not plain"]),
        (named(FILE, "/etc/passwd"), ["the file name '/etc/passwd' is not plain"]),
        (named(FILE, "..\\x"), ["is not plain"]),
        (named(FILE, ".."), ["the file name '..' is not plain"]),
        (named(FILE, ""), ["the file name '' is not plain"]),
        (named(FILE, "a\0b"), [r"the file name 'a\x00b' is not plain"]),
        (named(FILE, "linked"), ["linked is a symbolic link out of the folder"]),
        (named(FILE, "sub"), ["sub is not a file"]),
        (named(FILE, "pipe"), ["pipe is not a file"]),
        (named(FILE, "ring"), ["ring"]),
        (lambda t: t["files"].update({FILE: -1}), ["the size of rank-00000-000.safetensors is -1"]),
        (lambda t: t["files"].update({FILE: 2**63}), ["the size of rank-00000-000.safetensors is 922"]),
        (lambda t: t["tensors"].update({"\x1b[2J": t["tensors"]["norm.weight"]}), [r"\x1b[2J"]),
        (lambda t: t["tensors"].update({"\ud800": t["tensors"]["norm.weight"]}), [r"\ud800"]),
        (lambda t: t["tensors"].pop(NORM), [f"missing in the checkpoint: {NORM}"]),
        (lambda t: t["tensors"][NORM].update(kinds={}), [f"missing in the checkpoint: {NORM}"]),
        (lambda t: t["meta"].update(config=[]), ["its meta has no config.model"]),
        (lambda t: t["meta"].update(config={"model": 3}), ["holds a model that this version does not know"]),
        (lambda t: t["meta"]["config"]["model"].update(heads=-4), ["does not know: heads: "]),
        (lambda t: t["meta"]["config"]["model"].update(surprise=1), ["does not know: surprise: "]),
    ],
)  # fmt: skip
def test_an_index_that_cannot_be_is_refused(tmp_path: Path, edit: Callable[[Tree], Any], words: list[str]) -> None:
    path = weights(tmp_path / "c")
    (path / "linked").symlink_to("/etc/hostname")
    (path / "sub").mkdir()
    os.mkfifo(path / "pipe")
    (path / "ring").symlink_to(path / "ring")
    change(path, edit)
    with pytest.raises(UserError) as caught:
        load(path)
    for word in words:
        assert word in str(caught.value)
    assert str(caught.value).isprintable() or "\n" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is not JSON"),
        (b"\xff\xfe{}", "it is not JSON"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b"[]", "it is [], not an object"),
        (b'{"format":"x"}', "the format 'x'"),
        (b'{"format":"megapt-checkpoint","version":1,"version":1}', "the key 'version' stands there twice"),
        (b'{"format":"megapt-checkpoint","version":1,"step":NaN}', "NaN"),
        (b'{"format":"megapt-checkpoint","version":1,"step":1e999}', "too large"),
        (b'{"format":"megapt-checkpoint","version":1,"step":' + b"9" * 5000 + b"}", "it is not JSON"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = weights(tmp_path / "c")
    commit(path, data)
    with pytest.raises(UserError, match="index.json is not an index: ") as caught:
        load(path)
    assert words in str(caught.value)
    with pytest.raises(Damaged):
        Checkpoint(path).read("norm.weight")


def test_marker_and_index_that_are_no_files(tmp_path: Path) -> None:
    path = weights(tmp_path / "c")
    marker, index = path / "COMMITTED", path / "index.json"
    kept = marker.read_bytes(), index.read_bytes()
    marker.write_bytes(b"")
    with pytest.raises(UserError, match="the hash of index.json is not the one in COMMITTED"):
        load(path)
    marker.unlink()
    marker.mkdir()
    with pytest.raises(UserError, match="holds no COMMITTED marker"):
        load(path)
    marker.rmdir()
    (tmp_path / "elsewhere").write_bytes(kept[0])
    marker.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="COMMITTED is a symbolic link out of the folder"):
        load(path)
    marker.unlink()
    marker.write_bytes(kept[0])
    index.unlink()
    os.mkfifo(index)
    with pytest.raises(UserError, match="index.json is not a file"):
        load(path)
    index.unlink()
    index.mkdir()
    with pytest.raises(UserError, match="index.json is not a file"):
        load(path)
    index.rmdir()
    index.write_bytes(kept[1])
    load(path)


def test_junk_beside_checkpoints_is_passed_over(tmp_path: Path) -> None:
    path = weights(tmp_path / "step-00000003")
    (tmp_path / "step-00000009").write_text("a file")
    (tmp_path / "step-12").mkdir()
    (tmp_path / "step-00000010.bak").mkdir()
    (tmp_path / ".step-00000011.partial").mkdir()
    (tmp_path / "latest").write_text("step-00000009")
    (tmp_path / "model.pt").write_bytes(b"\x80\x02cposix\nsystem\n")
    os.symlink("/nonexistent", tmp_path / "step-00000012")
    (path / "core.1234").write_bytes(bytes(100))
    (path / "optimizer.pt").write_bytes(b"\x80\x02cposix\nsystem\n")
    (path / "rank-00009-000.safetensors").write_bytes(b"old")
    assert checkpoint.resolve(tmp_path) == path
    load(tmp_path)
    assert verify(tmp_path).problems == []


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    path = weights(tmp_path / "c")
    (path / FILE).rename(path / "blob")
    (path / FILE).symlink_to("blob")
    os.symlink(path, tmp_path / "alias")
    load(tmp_path / "alias")
    Checkpoint(tmp_path / "alias").read("norm.weight")


def header_of(data: bytes) -> Tree:
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def with_header(data: bytes, header: Tree | bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + struct.unpack("<Q", data[:8])[0] :]


def edited(edit: Callable[[Tree], Any]) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        header = header_of(data)
        edit(header)
        return with_header(data, header)

    return apply


HEAD, EMBEDDING = "weight/head.weight", "weight/embedding.weight"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: b"", "a file of 0 bytes has none"),
        (lambda d: d[:5], "a file of 5 bytes has none"),
        (lambda d: d[:-4], "the tensors end at"),
        (lambda d: d + b"\0", "the tensors end at"),
        (lambda d: d[:100], "its length is given as"),
        (lambda d: b"\xff" * 8 + d[8:], "its length is given as 18446744073709551615"),
        (lambda d: with_header(d, b"[" * 50000), "nested too deeply"),
        (lambda d: with_header(d, b"\xff"), "it is not JSON"),
        (lambda d: with_header(d, b"[]"), "not an object"),
        (lambda d: with_header(d, b'{"a":1,"a":1}'), "stands there twice"),
        (lambda d: with_header(d, json.dumps(header_of(d)).encode()), "not the shortest form"),
        (edited(lambda h: h.pop("__metadata__")), "its metadata is not"),
        (edited(lambda h: h[HEAD].update(data_offsets=h[EMBEDDING]["data_offsets"])), "does not begin where"),
        (edited(lambda h: h[HEAD].update(data_offsets=[0, 2**62])), "are not the offsets of F32"),
        (edited(lambda h: h[HEAD].update(data_offsets=[-4, 4])), "head.weight': 'data_offsets'"),
        (edited(lambda h: h[HEAD].update(shape=[2**40, 2**40])), "are not the offsets of F32"),
        (edited(lambda h: h[HEAD].update(dtype="F8")), "head.weight': the dtype 'F8' is unknown"),
        (edited(lambda h: h[HEAD].update(dtype="I32")), "the dtype 'I32' is unknown"),
        (edited(lambda h: h[HEAD].update(shape=list(reversed(h[HEAD]["shape"])))), "it holds F32 [12, 11]"),
        (edited(lambda h: h.update({"weight/other": h.pop(HEAD)})), "it holds no weight/head.weight"),
    ],
)
def test_a_spoilt_tensor_file_is_named(tmp_path: Path, spoil: Callable[[bytes], bytes], words: str) -> None:
    """Whether or not the index knows the spoilt file's size."""
    path = weights(tmp_path / "c")
    data = spoil((path / FILE).read_bytes())
    (path / FILE).write_bytes(data)
    change(path, lambda tree: tree["files"].update({FILE: len(data)}))
    with pytest.raises(UserError) as caught:
        load(path)
    assert FILE in str(caught.value) and " of " in str(caught.value) and words in str(caught.value)
    problems = verify(path).problems
    assert problems and all(FILE in problem for problem in problems)
    read_plainly(path)


def read_plainly(path: Path) -> None:
    """By the reader for numpy, which may also be content: right values, or Damaged."""
    try:
        reader = Checkpoint(path)
        for name in reader.names("weight"):
            true = true_value(name, "weight", reader.read(name).shape)
            assert reader.read(name).tobytes() == true.numpy().tobytes(), name
    except Damaged:
        pass


def test_a_config_that_disagrees_with_the_tensors(tmp_path: Path) -> None:
    path = weights(tmp_path / "c")
    change(path, lambda tree: tree.update(meta=meta_of(LLAMA)))
    with pytest.raises(UserError, match="are not those of its config.model:\nmissing in the checkpoint: layers.1.att"):
        checkpoint.model_config(path)
    (problem,) = verify(path).problems
    assert "config.model" in problem
    with pytest.raises(UserError, match="does not hold this model:\nof another setting: model.layers"):
        load(path)


VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, 2**80, 0.5, -0.0, 1e300, "", "0", "..", "../x", "/etc/passwd",
    "C:\\x", "\0", "\ud800", "\x1b[31m", "F16", "F64", "weight", "COMMITTED", "index.json", [], {}, [[]], [0], [0, 0],
    [1, 1], {"a": 1}, [None], [True, 2], "x" * 5000, [1] * 40,
)  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield from places(tree[key], (*path, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def mutated(tree: Tree, every: list[tuple[Any, ...]], chooser: random.Random) -> bytes:
    """One index with one thing wrong, or sometimes none: of structure, of values or of text."""
    tree = copy.deepcopy(tree)
    *path, key = chooser.choice(every)
    parent = at(tree, tuple(path))
    action = chooser.randrange(7)
    if action == 0:
        parent[key] = chooser.choice(VALUES)
    elif action == 1:
        del parent[key]
    elif action == 2:
        parent[key] = copy.deepcopy(at(tree, chooser.choice(every)))
    elif action == 3 and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(chooser.choice(parent)))
    elif action == 3:
        parent[chooser.choice(("x", "", "shape", "weight", *parent))] = parent.pop(key)
    elif action == 4 and type(parent[key]) is int:
        parent[key] += chooser.choice((-1, 1, 2**20, 2**62, -(2**40)))
    elif action == 4 and isinstance(parent[key], str) and parent[key]:
        spot = chooser.randrange(len(parent[key]))
        parent[key] = parent[key][:spot] + chr(chooser.randrange(1, 0x500)) + parent[key][spot + 1 :]
    text = json.dumps(tree).encode()
    if action == 5:
        spot = chooser.randrange(len(text))
        text = text[:spot] + bytes([text[spot] ^ chooser.randrange(1, 256)]) + text[spot + 1 :]
    elif action == 6:
        begin, end = sorted(chooser.choices(range(len(text)), k=2))
        text = chooser.choice((text[:begin], text[:begin] + text[end:], text[:end] + text[begin:]))
    return text


def test_no_mutant_of_an_index_gets_through(tmp_path: Path) -> None:
    """2,000 of them, committed with a marker of their own: right values or a UserError, of both readers."""
    path = weights(tmp_path / "c")
    tree = json.loads((path / "index.json").read_bytes())
    every, chooser = list(places(tree)), random.Random(5)
    # Most places are in the config, where little can go wrong.
    every = [place for place in every if place[0] != "meta"] * 3 + every
    refused = 0
    for number in range(2000):
        commit(path, mutated(tree, every, chooser))
        try:
            load(path)
        except UserError as error:
            refused += 1
            assert str(error)
        if number % 4 == 0:
            read_plainly(path)
    assert 1000 < refused < 1990
