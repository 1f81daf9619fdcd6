"""Saved in any layout, loaded in any layout: bit for bit."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megapt import checkpoint
from megapt.checkpoint import plan as planning
from megapt.checkpoint import written
from megapt.checkpoint.plan import Piece, plan
from megapt.config import ModelConfig
from megapt.errors import UserError
from megapt.mesh import ParallelMesh
from megapt.model.table import parameter_table
from megapt.parameters import ParameterSpec, Split
from megapt.prove.ranks import run_ranks
from megapt.zero.base import Fragment
from tests.checkpoint.fakes import GPT2, KINDS, LLAMA, Layout, check_loaded, fragments, meta_of, true_value
from tests.checkpoint.ranks import (
    LAYOUTS,
    every_layout_to_every_layout,
    every_rank_has_its_own_folder,
    one_rank_cannot_write,
)

ONE = ParallelMesh.create(1, 1, 1, torch.device("cpu"))


def save_alone(folder: Path, model: ModelConfig, step: int = 1, padding: int = 1, **meta: object) -> Path:
    own = fragments(model, Layout(padding=padding), 0, 0, 0)
    return checkpoint.save(folder, step, own, ONE, {**meta_of(model), **meta}, parameter_table(model))


def load_alone(path: Path, model: ModelConfig, layout: Layout, **options: bool) -> int:
    """Load what each rank of a layout holds, one after the other, and compare it."""
    count = 0
    for pp in range(layout.pp):
        for dp in range(layout.dp):
            for tp in range(layout.tp):
                target = fragments(model, layout, pp, dp, tp, fill=float("nan"))
                checkpoint.load(path, target, ONE, model, complete=False, **options)
                count += check_loaded(target)
    return count


def test_four_ranks_save_and_load_every_layout(tmp_path: Path) -> None:
    counts = run_ranks(4, every_layout_to_every_layout, str(tmp_path))
    assert all(count > 1000 for count in counts)
    without_zero = next(step for step, layout in enumerate(LAYOUTS) if layout.dp == 4)
    sizes = [f.stat().st_size for f in (tmp_path / f"llama/step-{without_zero:08d}").glob("rank-*.safetensors")]
    assert len(sizes) == 4 and max(sizes) < 1.3 * min(sizes)  # all hold everything, and share the writing
    # One process reads what four wrote, and the tied copy and the padding are nowhere.
    for name, model in (("llama", LLAMA), ("gpt2", GPT2)):
        for step in range(len(LAYOUTS)):
            path = tmp_path / name / f"step-{step:08d}"
            weights = dict(checkpoint.load_weights(path))
            owners = [spec for spec in parameter_table(model).values() if spec.tied_to is None]
            assert list(weights) == [spec.name for spec in owners]
            for spec in owners:
                assert torch.equal(weights[spec.name], true_value(spec.name, "weight", spec.shape))
            assert checkpoint.model_config(path) == model


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=4, padding=3),
        Layout(tp=4, padding=16),  # the last ranks hold padding only
        Layout(tp=2, pp=2, dp=3, cut="flat", padding=2),
        Layout(dp=5, cut="each", dtype=torch.float64),
    ],
    ids=str,
)
def test_one_process_saves_and_others_load(tmp_path: Path, model: ModelConfig, layout: Layout) -> None:
    path = save_alone(tmp_path, model, padding=8)
    assert load_alone(path, model, layout) > 1000


def test_rounding_from_fp64_is_to_nearest(tmp_path: Path) -> None:
    saved = fragments(LLAMA, Layout(dtype=torch.float64), 0, 0, 0)
    for fragment in saved:
        fragment.tensors["weight"].copy_(torch.linspace(0, 1, fragment.numel, dtype=torch.float64))
    path = checkpoint.save(tmp_path, 1, saved, ONE, meta_of(LLAMA))
    target = fragments(LLAMA, Layout(), 0, 0, 0, fill=0.0)
    checkpoint.load(path, target, ONE, LLAMA)
    for before, after in zip(saved, target, strict=True):
        assert torch.equal(after.tensors["weight"], before.tensors["weight"].float())


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    path = save_alone(tmp_path, LLAMA)
    target = fragments(LLAMA, Layout(dtype=torch.bfloat16), 0, 0, 0, fill=0.0)
    with pytest.raises(UserError, match="embedding.weight: stored as torch.float32.*torch.bfloat16"):
        checkpoint.load(path, target, ONE, LLAMA)


def test_weights_only_leaves_the_moments(tmp_path: Path) -> None:
    path = save_alone(tmp_path, LLAMA, step=3)
    target = fragments(LLAMA, Layout(tp=2), 0, 0, 1, fill=5.0)
    before = {f.parameter.spec.name: f.tensors["exp_avg"].clone() for f in target}
    checkpoint.load(path, target, ONE, LLAMA, weights_only=True, complete=False)
    check_loaded(target, kinds=("weight",))
    assert all(torch.equal(f.tensors["exp_avg"], before[f.parameter.spec.name]) for f in target)


def test_a_checkpoint_of_weights_says_that_it_has_no_moments(tmp_path: Path) -> None:
    saved = fragments(LLAMA, Layout(), 0, 0, 0)
    for fragment in saved:
        del fragment.tensors["exp_avg"], fragment.tensors["exp_avg_sq"]
    path = checkpoint.save(tmp_path, 1, saved, ONE, meta_of(LLAMA))
    target = fragments(LLAMA, Layout(), 0, 0, 0, fill=5.0)
    with pytest.raises(UserError, match="holds no exp_avg of embedding.weight, only weight"):
        checkpoint.load(path, target, ONE, LLAMA)
    checkpoint.load(path, target, ONE, LLAMA, weights_only=True)
    check_loaded(target, kinds=("weight",))


def test_each_parameter_has_the_state_of_its_optimizer(tmp_path: Path) -> None:
    """Muon's matrices have momentum; what AdamW trained cannot be trained on by Muon, nor the other way round."""

    def own(muon: bool, fill: float | None = None) -> list[Fragment]:
        found = fragments(LLAMA, Layout(), 0, 0, 0, fill=fill)
        for fragment in found:
            if muon and fragment.parameter.spec.role == "matrix":
                fragment.tensors["momentum"] = fragment.tensors.pop("exp_avg")
                del fragment.tensors["exp_avg_sq"]
        return found

    names = parameter_table(LLAMA)
    for step, kind in enumerate(("adamw", "muon")):
        meta: dict[str, Any] = {"config": {**meta_of(LLAMA)["config"], "optimizer": {"kind": kind}}}
        checkpoint.save(tmp_path, step, own(kind == "muon"), ONE, meta, names)
        loaded = own(kind == "muon", fill=0.0)
        checkpoint.load(tmp_path / f"step-{step:08d}", loaded, ONE, LLAMA)
        for found, saved in zip(loaded, own(kind == "muon"), strict=True):
            assert found.tensors.keys() == saved.tensors.keys()
            assert all(torch.equal(tensor, saved.tensors[key]) for key, tensor in found.tensors.items())
        other = own(kind != "muon", fill=0.0)
        with pytest.raises(UserError, match=rf"holds no \w+ of layers.0.attention.q.weight.*optimizer.kind = {kind}"):
            checkpoint.load(tmp_path / f"step-{step:08d}", other, ONE, LLAMA)
        assert not any(tensor.any() for fragment in other for tensor in fragment.tensors.values())
        checkpoint.load(tmp_path / f"step-{step:08d}", other, ONE, LLAMA, weights_only=True)


def test_another_model_is_refused_by_name_before_anything_is_filled(tmp_path: Path) -> None:
    path = save_alone(tmp_path, LLAMA)
    other = LLAMA.model_copy(update={"layers": 2, "bias": "qkv", "ffn": 12})
    target = fragments(other, Layout(), 0, 0, 0, fill=5.0)
    with pytest.raises(UserError) as caught:
        checkpoint.load(path, target, ONE, other)
    message = str(caught.value)
    assert "missing in the checkpoint: layers.0.attention.q.bias" in message
    assert "not in the model: layers.2.attention_norm.weight" in message
    assert "layers.0.mlp.up.weight (stored [8, 12], model [12, 12])" in message
    assert all((f.tensors["weight"][: f.numel] == 5.0).all() for f in target)
    with pytest.raises(UserError, match="not in the model: head.weight"):
        tied = LLAMA.model_copy(update={"tied_embeddings": True})
        checkpoint.load(path, [], ONE, tied)


@pytest.mark.parametrize(
    ("model", "change", "words"),
    [
        (LLAMA, {"heads": 2, "kv_heads": 1, "head_dim": 8}, ["heads (stored 4, given 2)", "head_dim (stored 4"]),
        (LLAMA, {"rope_theta": 5e5}, ["rope_theta (stored 10000.0, given 500000.0)"]),
        (LLAMA, {"norm_eps": 1e-6}, ["norm_eps (stored 1e-05, given 1e-06)"]),
        (GPT2, {"activation": "gelu"}, ["activation (stored gelu_tanh, given gelu)"]),
        (GPT2, {"max_sequence": 12}, ["max_sequence (stored 10, given 12)", "positions.weight"]),
    ],
)
def test_another_model_of_the_same_shapes_is_refused(
    tmp_path: Path, model: ModelConfig, change: dict[str, object], words: list[str]
) -> None:
    path = save_alone(tmp_path, model)
    other = model.model_copy(update=change)
    for weights_only in (False, True):
        with pytest.raises(UserError, match="does not hold this model") as caught:
            checkpoint.load(path, [], ONE, other, weights_only=weights_only)
        for word in words:
            assert word in str(caught.value)
        assert "init_std" not in str(caught.value) and "layers (" not in str(caught.value)


def test_what_changes_no_number_may_differ(tmp_path: Path) -> None:
    path = save_alone(tmp_path / "llama", LLAMA)
    for change in ({"init_std": 0.5}, {"max_sequence": 64}):
        assert checkpoint.load(path, [], ONE, LLAMA.model_copy(update=change), complete=False)
    path = save_alone(tmp_path / "gpt2", GPT2)  # which leaves kv_heads and head_dim to their defaults
    same = GPT2.model_copy(update={"kv_heads": 4, "head_dim": 2})
    assert checkpoint.load(path, [], ONE, same, complete=False)


def test_a_checkpoint_that_names_no_model_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, fragments(LLAMA, Layout(), 0, 0, 0), ONE, {})
    with pytest.raises(UserError, match="its meta has no config.model"):
        checkpoint.load(path, [], ONE, LLAMA)


def test_ranks_take_the_checkpoint_that_rank_0_chooses(tmp_path: Path) -> None:
    save_alone(tmp_path / "0", LLAMA, step=3)
    first, second = run_ranks(2, every_rank_has_its_own_folder, str(tmp_path))
    chosen, late, unseen, alone, refused, nothing = first
    assert first == second
    assert chosen == str(tmp_path / "0" / "step-00000003")
    assert late == str(tmp_path / "0" / "step-00000004")
    assert "rank 1 (pp 0, dp 1, tp 0): " in unseen and "is not seen committed here" in unseen
    assert "rank 0 (" not in unseen
    assert "rank 1 (pp 0, dp 1, tp 0): " in alone and "but rank 0 sees no checkpoint" in alone
    assert refused == "rank 0 (pp 0, dp 0, tp 0): there is no checkpoint nowhere"
    assert nothing == "None"


def test_a_failing_rank_fails_all_and_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    first, second = run_ranks(2, one_rank_cannot_write, str(tmp_path / "run"))
    assert first == second
    write, folder, damage = first
    assert "step 2 was not saved" in write and "rank 1 (pp 0, dp 1, tp 0): [Errno 27] File too large" in write
    assert "rank-00001-000.safetensors" in write
    assert "rank 0 (pp 0, dp 0, tp 0): [Errno" in folder
    assert "rank 1 (pp 0, dp 1, tp 0):" in damage and "checksum" in damage
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["step-00000001"]


def test_an_incomplete_model_is_not_committed(tmp_path: Path) -> None:
    table = parameter_table(LLAMA)
    whole = fragments(LLAMA, Layout(), 0, 0, 0)
    with pytest.raises(UserError, match="no rank holds layers.1.mlp.up.weight"):
        part = [f for f in whole if f.parameter.spec.name != "layers.1.mlp.up.weight"]
        checkpoint.save(tmp_path, 1, part, ONE, {}, table)
    with pytest.raises(UserError, match="embedding.weight: slices at .* do not make up"):
        checkpoint.save(tmp_path, 1, fragments(LLAMA, Layout(tp=2), 0, 0, 0), ONE, {}, table)
    at = next(n for n, f in enumerate(whole) if f.parameter.spec.name == "layers.0.mlp_norm.weight")
    whole[at] = Fragment(whole[at].parameter, 0, 8, {k: t[:8] for k, t in whole[at].tensors.items()})
    with pytest.raises(UserError, match="no data-parallel rank holds element 8 of weight of layers.0.mlp_norm"):
        checkpoint.save(tmp_path, 1, whole, ONE, {})
    assert list(tmp_path.iterdir()) == []


def test_large_states_are_spread_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "FILE_BYTES", 3000)
    path = save_alone(tmp_path, LLAMA)
    files = sorted(path.glob("rank-00000-*.safetensors"))
    assert len(files) > 4
    assert load_alone(path, LLAMA, Layout(tp=2, dp=2, cut="flat")) > 1000


def test_safetensors_and_json_are_all_there_is(tmp_path: Path) -> None:
    """The files mean what the format's own library reads, and the marker is what sha256sum checks."""
    import hashlib

    from safetensors.torch import load_file

    path = save_alone(tmp_path, LLAMA, tokens=12)
    tensors = load_file(path / "rank-00000-000.safetensors")
    assert torch.equal(tensors["exp_avg/norm.weight"], true_value("norm.weight", "exp_avg", (12,)))
    index = json.loads((path / "index.json").read_text())
    assert (index["format"], index["version"], index["step"]) == ("megapt-checkpoint", 1, 1)
    assert index["meta"] == {**meta_of(LLAMA), "tokens": 12}
    assert set(index["tensors"]["norm.weight"]["kinds"]) == set(KINDS)
    digest, name = (path / "COMMITTED").read_text().split()
    assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest
    assert {f.suffix for f in path.iterdir()} == {".safetensors", ".json", ""}


@given(
    st.integers(1, 6).flatmap(
        lambda ranks: st.lists(
            st.tuples(st.integers(1, 40), st.lists(st.integers(0, 40), min_size=ranks - 1, max_size=ranks - 1)),
            min_size=1,
            max_size=8,
        )
    )
)
def test_plans_take_every_element_once(tensors: list[tuple[int, list[int]]]) -> None:
    ranks = len(tensors[0][1]) + 1
    pieces: list[list[Piece]] = [[] for _ in range(ranks)]
    for number, (size, inner) in enumerate(tensors):
        bounds = [0, *sorted(min(cut, size) for cut in inner), size]
        shard = ParameterSpec(f"p{number}", (size,)).shard(0, 1)
        for rank in range(ranks):
            if bounds[rank] < bounds[rank + 1]:
                piece = Piece(f"p{number}", "weight", "F32", (size,), shard, bounds[rank], bounds[rank + 1])
                pieces[rank].append(piece)
    items, load = plan(pieces), [0] * ranks
    for item in items:
        load[item.writer] += item.rectangle.slot.nbytes
        name, size = item.rectangle.name, item.rectangle.shape[0]
        assert item.sources[0][1] == 0 and item.sources[-1][2] == size
        assert all(a[2] == b[1] for a, b in zip(item.sources, item.sources[1:], strict=False))
        for rank, start, stop in item.sources:
            assert any(p.name == name and p.start <= start and stop <= p.stop for p in pieces[rank])
        alone = [
            rank for rank, own in enumerate(pieces) if any((p.name, p.stop - p.start) == (name, size) for p in own)
        ]
        assert alone in ([], [item.writer])
    assert len({item.rectangle.name for item in items}) == len(items) == len(tensors)
    largest = max(item.rectangle.slot.nbytes for item in items)
    fixed = [sum(i.rectangle.slot.nbytes for i in items if len(i.sources) == 1 and i.writer == r) for r in range(ranks)]
    assert all(n == f or n <= 1.05 * sum(load) / ranks + largest for n, f in zip(load, fixed, strict=True))
    assert [len(item.sources) > 1 for item in items] == sorted([len(item.sources) > 1 for item in items], reverse=True)


@given(
    st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(0, 1), st.integers(1, 3), st.booleans()),
    st.lists(st.integers(0, 42), max_size=4),
)
def test_large_pieces_are_written_where_they_are(form: tuple[int, int, int, int, bool], inner: list[int]) -> None:
    """Any cut of the flat shard becomes at most three rectangles per rank, which cover the shard once."""
    rows, columns, dim, parts, vector = form
    shape = (rows * parts,) if vector else (rows * parts, columns) if dim == 0 else (rows, columns * parts)
    spec = ParameterSpec("w", shape, Split(0 if vector else dim))
    shard = spec.shard(parts - 1, parts)
    size = torch.Size(shard.shape).numel()
    bounds = [0, *sorted(min(cut, size) for cut in inner), size]
    pieces = [[Piece("w", "weight", "F32", shape, shard, a, b)] if a < b else [] for a, b in pairwise(bounds)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "PIECE_BYTES", 1)
        items = plan(pieces)
    flat = torch.arange(1, size + 1)
    whole = torch.zeros(shape, dtype=torch.long)
    for item in items:
        (source,) = item.sources
        rank, start, stop = source
        assert rank == item.writer and any(p.start <= start and stop <= p.stop for p in pieces[rank])
        box = tuple(slice(a, a + n) for a, n in zip(item.rectangle.offset, item.rectangle.extent, strict=True))
        whole[box] += flat[start:stop].view(item.rectangle.extent)
    assert torch.equal(whole[shard.slices()].flatten(), flat) and int(whole.sum()) == int(flat.sum())
    for rank in range(len(pieces)):
        own = [item.rectangle.key for item in items if item.writer == rank]
        assert len(own) == len(set(own)) <= 3


def test_without_zero_nothing_is_sent() -> None:
    split = ParameterSpec("w", (8, 4), Split(0)).shard(1, 2)
    pieces = [[Piece(f"p{n}", "weight", "F32", (8, 4), split, 0, 16) for n in range(6)] for _ in range(3)]
    items = plan(pieces)
    assert all(item.sources == ((item.writer, 0, 16),) for item in items)
    assert sorted(item.writer for item in items) == [0, 0, 1, 1, 2, 2]
    assert all(item.rectangle.offset == (4, 0) for item in items)
