"""verify, diff, export-weights, average and describe; and that loading fills everything, from any number of slices."""

from __future__ import annotations

import json
import math
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapt import checkpoint
from megapt.checkpoint import average, diff, export_weights, verify
from megapt.checkpoint.describe import describe
from megapt.checkpoint.index import Entry, Index, Slice, TensorIndex, marker_of
from megapt.checkpoint.loading import Reader, open_reader
from megapt.checkpoint.rectangles import rectangles
from megapt.errors import UserError
from megapt.model.table import parameter_table
from tests.checkpoint.fakes import KINDS, Layout, fragments, meta_of, true_value
from tests.checkpoint.handmade import ONE, SMALL, change, load, weights, write

TABLE = parameter_table(SMALL)


def full(folder: Path, parts: int = 2, **changed: torch.Tensor) -> Path:
    """Weights and moments of SMALL; `changed` by name of the weight, with `_` for dots."""
    tensors = {(name, kind): true_value(name, kind, spec.shape) for name, spec in TABLE.items() for kind in KINDS}
    for name in TABLE:
        if (given := changed.get(name.replace(".", "_"))) is not None:
            tensors[name, "weight"] = given
    return write(folder, tensors, {**meta_of(SMALL), "updates": 1}, parts)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


# Verify


def test_verify_names_everything_that_is_damaged(tmp_path: Path) -> None:
    path = full(tmp_path / "c")
    done: list[int] = []
    report = verify.verify(path, done.append)
    assert report.problems == [] and report.tensors == len(TABLE) and sum(done) == report.nbytes
    assert report.nbytes == sum(math.prod(spec.shape) * 4 for spec in TABLE.values()) * len(KINDS)
    reader = open_reader(path)
    for name, kind in (("head.weight", "exp_avg"), ("norm.weight", "weight")):
        part = reader.index.tensors[name].kinds[kind].slices[1]
        flip(path / part.file, reader._open(part.file).tensors[part.key].begin)
    problems = verify.verify(path).problems
    assert len(problems) == 2
    assert "rank-00001-000.safetensors, exp_avg of head.weight: its checksum is" in "".join(problems)
    assert "rank-00001-000.safetensors, weight of norm.weight: its checksum is" in "".join(problems)
    (path / "rank-00000-000.safetensors").unlink()
    problems = verify.verify(path).problems
    gone = [problem for problem in problems if "rank-00000-000.safetensors is missing" in problem]
    assert len(gone) == len(TABLE) * len(KINDS) and len(problems) == len(gone) + 2


# Diff


def test_the_same_tensors_in_other_slices_are_the_same(tmp_path: Path) -> None:
    found = diff.diff(full(tmp_path / "a", 1), full(tmp_path / "b", 3))
    assert found.same() and found.equal == len(TABLE) * len(KINDS)


def test_diff_says_what_differs_and_by_how_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff, "_BLOCK", 50)
    head, up = (true_value(name, "weight", TABLE[name].shape) for name in ("head.weight", "layers.0.mlp.up.weight"))
    norm = torch.zeros(12)
    head[20, 3] += 2.0
    up[1, 1], up[7, 2] = math.nan, up[7, 2] + 1.0
    norm[3] = -0.0
    one = full(tmp_path / "a", norm_weight=torch.zeros(12))
    two = full(tmp_path / "b", head_weight=head, layers_0_mlp_up_weight=up, norm_weight=norm)
    found = diff.diff(one, two)
    rows = {d.name: d for d in found.tensors}
    assert [d.name for d in found.tensors] == ["layers.0.mlp.up.weight", "head.weight", "norm.weight"]
    assert (rows["head.weight"].elements, rows["head.weight"].of) == (1, 21 * 12)
    assert rows["head.weight"].largest == pytest.approx(2.0, rel=1e-4)
    assert rows["head.weight"].relative == pytest.approx(2.0 / head.max().item(), rel=1e-3)
    assert (rows["layers.0.mlp.up.weight"].elements, rows["layers.0.mlp.up.weight"].largest) == (2, math.inf)
    assert (rows["norm.weight"].elements, rows["norm.weight"].largest) == (1, 0.0)  # bits: 0.0 and -0.0
    assert found.equal == len(TABLE) * len(KINDS) - 3 and not found.meta and not found.same(ignore_meta=True)


def test_diff_of_other_names_shapes_kinds_dtypes_and_meta(tmp_path: Path) -> None:
    ones = {("a", "weight"): torch.ones(3), ("b", "weight"): torch.ones(2, 2), ("c", "weight"): torch.ones(4)}
    one = write(tmp_path / "a", ones | {("a", "exp_avg"): torch.ones(3)}, {"x": {"y": 1, "z": 2}})
    del ones["a", "weight"]
    other = ones | {("b", "weight"): torch.ones(4), ("c", "weight"): torch.ones(4).double()}
    two = write(tmp_path / "b", other, {"x": {"y": 1, "z": 3}, "w": []})
    found = diff.diff(one, two)
    assert (found.missing_kinds, found.missing, found.surplus) == (["exp_avg"], ["weight of a"], [])
    assert found.changed == ["weight of b: shape [2, 2], [4]", "weight of c: F32, F64"]
    assert found.meta == [("meta.x.z", 2, 3), ("meta.w", None, [])]
    assert diff.diff(two, one).surplus_kinds == ["exp_avg"] and found.equal == 1


def test_diff_reads_no_damaged_tensor(tmp_path: Path) -> None:
    one, two = full(tmp_path / "a"), full(tmp_path / "b")
    flip(two / "rank-00000-000.safetensors", -1)
    with pytest.raises(UserError, match="is damaged: rank-00000-000.safetensors"):
        diff.diff(one, two)


# Export


@pytest.mark.parametrize(("dtype", "limit"), [(None, 10**9), ("bf16", 500), ("fp64", 3000)])
def test_exported_weights_are_what_safetensors_reads(tmp_path: Path, dtype: str | None, limit: int) -> None:
    from safetensors.torch import load_file

    output = export_weights.export_weights(full(tmp_path / "c"), tmp_path / "out", dtype, limit)
    kind = {None: torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[dtype]
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(output.glob("*.safetensors")):
        tensors |= load_file(file)
        assert file.stat().st_size < limit + 2000 or len(load_file(file)) == 1
    assert tensors.keys() == TABLE.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, true_value(name, "weight", TABLE[name].shape).to(kind))
    assert checkpoint.model_config(tmp_path / "c").model_validate(
        json.loads((output / "config.json").read_text())["model"]
    ) == SMALL
    index = output / "model.safetensors.index.json"
    assert index.exists() == (limit < 10**9)
    if index.exists():
        places = json.loads(index.read_text())["weight_map"]
        assert all(name in load_file(output / file) for name, file in places.items())


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = weights(tmp_path / "c")
    with pytest.raises(UserError, match="dtype 'fp8' is unknown"):
        export_weights.export_weights(path, tmp_path / "out", "fp8")
    with pytest.raises(UserError, match="c already exists"):
        export_weights.export_weights(path, path)
    flip(path / "rank-00001-000.safetensors", -1)
    for job in (export_weights.export_weights, lambda p, o: average.average(o, [p, p])):
        with pytest.raises(UserError, match="weight of head.weight: its checksum"):
            job(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


# Average


def test_an_average_is_a_checkpoint_of_the_mean(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    heads = [torch.randn(TABLE["head.weight"].shape, generator=generator) for _ in range(3)]
    paths = [full(tmp_path / str(n), parts=n + 1, head_weight=head) for n, head in enumerate(heads)]
    change(paths[1], lambda tree: tree.update(step=7))
    path = average.average(tmp_path / "mean", paths, [1, 1, 2])
    found = dict(checkpoint.load_weights(path))
    exact = sum(head.double() * share for head, share in zip(heads, (0.25, 0.25, 0.5), strict=True))
    assert torch.equal(found["head.weight"], exact.float())
    index = checkpoint.read_index(path)
    assert all(set(tensor.kinds) == {"weight"} for tensor in index.tensors.values()) and index.step == 7
    assert [row["share"] for row in index.meta["averaged"]] == [0.25, 0.25, 0.5]
    assert verify.verify(path).problems == [] and checkpoint.model_config(path) == SMALL
    target = fragments(SMALL, Layout(), 0, 0, 0, fill=0.0)
    checkpoint.load(path, target, ONE, SMALL, weights_only=True)
    with pytest.raises(UserError, match="holds no exp_avg of embedding.weight, only weight"):
        checkpoint.load(path, target, ONE, SMALL)
    same = average.average(tmp_path / "same", [paths[0]] * 3)
    assert diff.diff(same, paths[0], lambda count: None).tensors == []


def test_averages_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    one, two = full(tmp_path / "a"), full(tmp_path / "b")
    for shares, message in (([1], "1 weights were given for 2"), ([1, -1], "from 0 on"), ([0, 0], "one at least")):
        with pytest.raises(UserError, match=message):
            average.average(tmp_path / "out", [one, two], shares)
    with pytest.raises(UserError, match="two checkpoints at least, not of 1"):
        average.average(tmp_path / "out", [one])
    change(two, lambda tree: tree["meta"]["config"]["model"].update(rope_theta=5e5))
    with pytest.raises(UserError, match="are not of one model: model.rope_theta .stored 10000.0, given 500000.0."):
        average.average(tmp_path / "out", [one, two])
    assert not (tmp_path / "out").exists()


def test_a_tensor_without_a_weight_is_refused(tmp_path: Path) -> None:
    tensors = {(name, "weight"): true_value(name, "weight", spec.shape) for name, spec in TABLE.items()}
    path = write(tmp_path / "c", {**tensors, ("extra", "exp_avg"): torch.zeros(3)}, meta_of(SMALL))
    jobs = [
        lambda: average.average(tmp_path / "out", [path, path]),
        lambda: export_weights.export_weights(path, tmp_path / "out"),
        lambda: load(path),
    ]
    for job in jobs:
        with pytest.raises(UserError, match="not in the model: extra"):
            job()
    with pytest.raises(UserError, match="holds no extra"):
        list(checkpoint.load_weights(path))
    (problem,) = verify.verify(path).problems
    assert "not in the model: extra" in problem and not (tmp_path / "out").exists()


# Describe


def test_a_checkpoint_describes_itself(tmp_path: Path) -> None:
    path = full(tmp_path / "c", parts=2)
    found = describe(path, tensors=True)
    numel = sum(math.prod(spec.shape) for spec in TABLE.values())
    assert (found["step"], found["parameters"], found["ranks"], found["updates"]) == (1, numel, 2, 1)
    assert found["kinds"]["exp_avg"] == {"dtypes": ["F32"], "tensors": len(TABLE), "slices": 2 * len(TABLE),
                                         "bytes": 4 * numel}  # fmt: skip
    assert found["model"] == SMALL.model_dump() and found["versions"] is None and found["layout"] is None
    assert found["tensors"]["norm.weight"]["kinds"]["weight"] == {"dtype": "F32", "slices": 2, "bytes": 48}
    assert 0 <= found["age_seconds"] < 600
    more = {"layout": {"world": 4}, "versions": {"torch": "2"}, "loss": 1.5, "receipt": {"samples": 8}}
    change(path, lambda tree: tree["meta"].update(more))
    found = describe(path)
    assert (found["layout"], found["loss"], found["samples"]) == ({"world": 4}, 1.5, 8)
    change(path, lambda tree: tree["meta"].update(layout=None, receipt=3, config={"model": {}, "zero": []}))
    assert "does not know" in describe(path)["model"]["problem"]


# Loading


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=0, max_size=4).flatmap(
        lambda shape: st.tuples(
            st.just(tuple(shape)), *(st.integers(0, math.prod(shape)) for _ in range(2))
        )
    )
)
def test_a_range_is_made_of_few_rectangles_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, *ends = case
    start, stop = sorted(ends)
    flat = torch.arange(math.prod(shape))
    parts = list(rectangles(shape, start, stop))
    assert len(parts) <= max(1, 2 * len(shape) - 1)
    seen = []
    for offset, extent, position in parts:
        inside = flat.view(shape)[tuple(slice(a, a + n) for a, n in zip(offset, extent, strict=True))]
        seen.append(inside.flatten())
        assert inside.flatten()[0] == position
    assert torch.equal(torch.cat(seen) if seen else flat[:0], flat[start:stop])


def test_what_is_not_filled_is_named(tmp_path: Path) -> None:
    path = full(tmp_path / "c")
    whole = fragments(SMALL, Layout(), 0, 0, 0, fill=0.0)
    checkpoint.load(path, whole, ONE, SMALL)
    part = [f for f in whole if f.parameter.spec.name != "layers.0.mlp.up.weight"]
    with pytest.raises(UserError, match="left parts of the model as they were: layers.0.mlp.up.weight$"):
        checkpoint.load(path, part, ONE, SMALL)
    half = fragments(SMALL, Layout(dp=2, cut="each"), 0, 0, 0, fill=0.0)
    with pytest.raises(UserError, match="weight of embedding.weight from element 127 on") as caught:
        checkpoint.load(path, half, ONE, SMALL, weights_only=True)
    assert "exp_avg" not in str(caught.value)
    with pytest.raises(UserError, match="left parts of the model as they were: embedding.weight, layers.0"):
        checkpoint.load(path, iter(()), ONE, SMALL)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_rectangle_out_of_any_slices(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple))
    parts, verified = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    value = torch.randn(shape)
    path = write(tmp_path_factory.mktemp("any") / "c", {("w", "weight"): value}, {}, parts)
    reader = Reader(path, checkpoint.read_index(path), verify=verified)
    for _ in range(2):
        low = [data.draw(st.integers(0, n - 1)) for n in shape]
        high = [data.draw(st.integers(a + 1, n)) for a, n in zip(low, shape, strict=True)]
        dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
        out = torch.zeros([b - a for a, b in zip(low, high, strict=True)], dtype=dtype)
        reader.fill("w", "weight", out, low)
        assert torch.equal(out, value[tuple(slice(a, b) for a, b in zip(low, high, strict=True))].to(dtype))


def test_large_slices_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megapt.checkpoint import loading, stored

    monkeypatch.setattr(loading, "_BLOCK", 100)
    monkeypatch.setattr(stored, "CHUNK", 24)
    load(weights(tmp_path / "c"))
    out = torch.zeros(5, 3)
    open_reader(tmp_path / "c").fill("head.weight", "weight", out, [9, 4])
    assert torch.equal(out, true_value("head.weight", "weight", (21, 12))[9:14, 4:7])


# Indices


@settings(deadline=None)
@given(st.data())
def test_only_exact_covers_are_covers(data: st.DataObject) -> None:
    """A grid of cells joined at random; with one cell less, more, or moved it is no cover."""
    shape = data.draw(st.lists(st.integers(2, 6), min_size=1, max_size=3).map(tuple))
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=3))}) for n in shape]
    spans = [list(zip(c, c[1:], strict=False)) for c in cuts]
    cells = [(tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in product(*spans)]
    change_ = data.draw(st.sampled_from(["none", "drop", "twice", "move", "stretch"]))
    number = data.draw(st.integers(0, len(cells) - 1))
    offset, extent = cells[number]
    if change_ == "drop":
        del cells[number]
    elif change_ == "twice":
        cells.append(cells[number])
    elif change_ == "move":
        cells[number] = tuple((at + 1) for at in offset), extent
    elif change_ == "stretch":
        cells[number] = offset, (extent[0] + 1, *extent[1:])
    parts = tuple(Slice(o, e, "f", "weight/w", "crc32:00000000") for o, e in cells)
    index = Index(1, {}, {"w": TensorIndex(shape, {"weight": Entry("F32", parts)})}, {"f": 0})
    if change_ == "none":
        index.check()
    else:
        with pytest.raises(UserError, match="weight of w: slices at .* do not make up"):
            index.check()


def synthetic(ranks_tp: int, ranks_dp: int, layers: int) -> Index:
    """As 405 billion parameters saved by 1,024 ranks: every tensor's shards in rectangles over the dp ranks."""
    tensors: dict[str, TensorIndex] = {}
    shapes = {"q": (16384, 16384), "k": (1024, 16384), "v": (1024, 16384), "out": (16384, 16384),
              "gate": (53248, 16384), "up": (53248, 16384), "down": (16384, 53248), "norm": (16384,)}  # fmt: skip
    for layer in range(layers):
        for number, (part, shape) in enumerate(shapes.items()):
            name = f"layers.{layer}.{part}.weight"
            kinds: dict[str, Entry] = {}
            for kind in KINDS:
                count = 1 if len(shape) == 1 else ranks_tp * ranks_dp
                rows = shape[0] // count
                slices = tuple(
                    Slice((n * rows, *(0 for _ in shape[1:])), (rows, *shape[1:]),
                          f"rank-{(number * 131 + n) % 1024:05d}-000.safetensors", f"{kind}/{name}", "crc32:00000000")
                    for n in range(count)
                )  # fmt: skip
                kinds[kind] = Entry("F32", slices)
            tensors[name] = TensorIndex(shape, kinds)
    files = {f"rank-{n:05d}-000.safetensors": 1 << 31 for n in range(1024)}
    return Index(1, {}, tensors, files)


def test_the_index_of_a_giant_opens_in_seconds(tmp_path: Path) -> None:
    """170,000 slices; the time is the processor's, so that a busy machine fails nothing."""
    data = synthetic(8, 8, 126).encode()
    (tmp_path / "index.json").write_bytes(data)
    (tmp_path / "COMMITTED").write_bytes(marker_of(data))
    started = time.process_time()
    index = checkpoint.read_index(tmp_path, files=False)
    spent = time.process_time() - started
    slices = sum(len(entry.slices) for _, _, entry in index.entries())
    assert slices > 160_000 and spent < 15, f"{slices} slices in {spent:.1f} s"


def test_a_tensor_in_thousands_of_slices_is_checked_in_linear_time() -> None:
    def seconds(count: int) -> float:
        parts = tuple(
            Slice((r, c), (1, 1), "f", "weight/w", "crc32:00000000") for r in range(count) for c in range(64)
        )
        index: Any = Index(1, {}, {"w": TensorIndex((count, 64), {"weight": Entry("F32", parts)})}, {"f": 0})
        started = time.process_time()
        index.check()
        return time.process_time() - started

    assert seconds(512) < 64 * max(seconds(64), 0.01)  # eight times the slices: quadratic would be 64 times the work
