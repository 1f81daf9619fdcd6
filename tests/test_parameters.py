"""The parameter table's shards, and initial weights that no layout, precision or device can change."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapt.config import Config, from_tree
from megapt.errors import UserError
from megapt.mesh import Axis, ParallelMesh
from megapt.model.table import parameter_table
from megapt.parallel.pipeline.stages import build_chunks
from megapt.parallel.tensor import TensorParallel
from megapt.parameters import (
    ParameterSpec,
    Shard,
    Split,
    _centre,
    _inverse,
    _tail,
    derive_key,
    initialise_,
    normal_rows,
    philox,
)

MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "layers": 4, "hidden": 32, "heads": 8, "kv_heads": 2, "ffn": 48, "vocabulary": 61, "max_sequence": 32,
    },
    "gpt2": {
        "layers": 4, "hidden": 32, "heads": 8, "ffn": 48, "vocabulary": 61, "max_sequence": 32, "norm": "layer_norm",
        "activation": "gelu_tanh", "gated": False, "position": "learned", "bias": "all", "tied_embeddings": True,
    },
}  # fmt: skip


# Philox and the normal sequence.


def normal(key: tuple[int, int], start: int, count: int) -> Tensor:
    return normal_rows(key, start, count, 1, 0, "cpu").squeeze(0)


def test_philox_known_answer() -> None:
    """Of the authors' Random123: counter 0, key 0."""
    made = philox(torch.tensor([0]), (0, 0))
    assert " ".join(f"{int(word):08x}" for word in made) == "6627e8d5 e169c58d bc57ac4c 9b00dbd8"


def _philox_in_python(counter: int, key: tuple[int, int]) -> list[int]:
    """Section 3.3 of the paper, in integers without bounds."""
    c, (k0, k1) = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], key
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p1 >> 32 ^ c[1] ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


@given(
    st.integers(0, 2**63 - 1),
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
)
def test_philox_does_not_overflow(counter: int, key: tuple[int, int]) -> None:
    assert [int(word) for word in philox(torch.tensor([counter]), key)] == _philox_in_python(counter, key)


@given(st.integers(0, 2**40), st.integers(0, 50), st.integers(1, 50))
@settings(max_examples=50)
def test_a_part_of_the_sequence_is_a_part_of_the_sequence(start: int, skip: int, count: int) -> None:
    key = derive_key(7, "weight")
    assert torch.equal(normal(key, start + skip, count), normal(key, start, skip + count)[skip:])


def test_keys_differ_by_seed_and_by_name() -> None:
    keys = {derive_key(seed, name) for seed in (1, 2, 12) for name in ("a", "b", "2/a", "layers.0", "layers.1")}
    assert len(keys) == 15


def test_the_sequence_is_the_inverse_distribution_of_uniform_words() -> None:
    key, count = derive_key(3, "x"), 1 << 20
    words = torch.stack(philox(torch.arange(count // 4), key), dim=1).flatten()
    expected = torch.special.ndtri((words.double() + 0.5) * 2.0**-32)
    torch.testing.assert_close(normal(key, 0, count), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("word", [0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 322122547, 322122548])
def test_the_ends_and_the_seams_of_the_distribution(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megapt.parameters.philox", lambda counter, key: (torch.full_like(counter, word),) * 4)
    probability = torch.tensor((word + 0.5) * 2.0**-32, dtype=torch.float64)
    value = normal((0, 0), 0, 1)[0]
    # Above one half the probability itself has lost digits, so the mirror image is compared.
    expected = torch.special.ndtri(probability) if word < 2**31 else -torch.special.ndtri(1 - probability)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert value.abs() < 6.4


def test_the_sequence_is_normal() -> None:
    count = 1 << 21
    x = normal(derive_key(11, "y"), 0, count)
    # Standard errors: mean 1/sqrt(n), variance sqrt(2/n), skewness sqrt(6/n), kurtosis sqrt(24/n).
    unit = 1 / math.sqrt(count)
    assert abs(x.mean()) < 4 * unit
    assert abs(x.var() - 1) < 4 * math.sqrt(2) * unit
    assert abs((x**3).mean()) < 4 * math.sqrt(15) * unit
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96) * unit
    below = torch.special.ndtr(x.sort().values)  # Kolmogorov-Smirnov against the normal distribution
    distance = (below - (torch.arange(count) + 0.5) / count).abs().max()
    assert distance < 1.95 * unit
    for lag in (1, 2, 3, 4, 1024):
        assert abs((x[lag:] * x[:-lag]).mean()) < 4 * unit
    assert abs((x * normal(derive_key(11, "z"), 0, count)).mean()) < 4 * unit


# Shards.


@st.composite
def _specs(draw: st.DrawFn) -> tuple[ParameterSpec, int, int]:
    """A parameter of one to three dimensions, a tensor size that can hold it, and a padding."""
    dims = draw(st.integers(1, 3))
    shape = [draw(st.integers(1, 5)) for _ in range(dims)]
    size = draw(st.integers(1, 8))
    kind = draw(st.sampled_from(["whole", "units", "shared", "padded"]))
    dim, unit = draw(st.integers(0, dims - 1)), draw(st.integers(1, 3))
    if kind == "whole":
        return ParameterSpec("p", tuple(shape)), size, 1
    if kind == "padded":
        dim, shape[0] = 0, draw(st.integers(1, 40))
        return ParameterSpec("p", tuple(shape), Split(0, padded=True)), size, draw(st.integers(1, 9))
    if kind == "units":
        shape[dim] = unit * size * draw(st.integers(1, 3))
    else:
        heads = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
        shape[dim] = unit * heads
    return ParameterSpec("p", tuple(shape), Split(dim, unit)), size, 1


@given(_specs())
@settings(max_examples=300)
def test_primary_shards_cover_every_element_exactly_once(case: tuple[ParameterSpec, int, int]) -> None:
    spec, size, padding = case
    shards = [spec.shard(rank, size, padding) for rank in range(size)]
    covered = torch.zeros(spec.shape, dtype=torch.long)
    held = torch.zeros(spec.shape, dtype=torch.long)
    for shard in shards:
        held[shard.slices()] += 1
        if shard.primary:
            covered[shard.slices()] += 1
        local = torch.empty(shard.shape)
        assert shard.valid(local).shape == held[shard.slices()].shape
    assert (covered == 1).all()
    assert len({shard.shape for shard in shards}) == 1  # collectives need equal parts
    if spec.split is None:
        assert (held == size).all()
    elif spec.split.padded:
        assert (held == 1).all() and all(shard.shape[0] % padding == 0 for shard in shards)
    else:
        assert (held == shards[0].sharers).all()
        assert all(shard.start % spec.split.unit == 0 for shard in shards)


def test_units_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(UserError, match="k: 6 units of 4 cannot be cut over 4 tensor ranks"):
        ParameterSpec("k", (24, 8), Split(0, unit=4)).shard(0, 4)


# Initial weights.


def _filled(spec: ParameterSpec, shard: Shard, seed: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    local = torch.full(shard.shape, math.nan, dtype=dtype)
    initialise_(local, spec, shard, seed)
    return local


@given(_specs(), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
@settings(max_examples=150)
def test_a_shard_is_filled_like_the_whole(
    case: tuple[ParameterSpec, int, int], seed: int, dtype: torch.dtype
) -> None:
    spec, size, padding = case
    spec = ParameterSpec(spec.name, spec.shape, spec.split, std=0.02)
    whole = _filled(spec, ParameterSpec(spec.name, spec.shape).shard(0, 1), seed)
    for rank in range(size):
        shard = spec.shard(rank, size, padding)
        local = _filled(spec, shard, seed, dtype)
        assert torch.equal(shard.valid(local), whole[shard.slices()].to(dtype))
        assert not local.narrow(shard.dim, shard.length, shard.shape[shard.dim] - shard.length).any()


def test_more_than_one_draw_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ParameterSpec("w", (6, 50), Split(1), std=1.0)
    whole = _filled(spec, spec.shard(0, 1))
    for draw in (1, 7, 60, 130):
        monkeypatch.setattr("megapt.parameters._DRAW_CPU", draw)
        assert torch.equal(_filled(spec, spec.shard(0, 1)), whole)
        assert torch.equal(_filled(spec, spec.shard(1, 2)), whole[:, 25:])


PINNED: list[tuple[ParameterSpec, int, int, str, str]] = [
    (ParameterSpec("w", (6, 50), Split(1, 5), std=0.5), 2, 1, "fbd00d70fe9a4efa", "a6d4e29355e4c54b"),
    (ParameterSpec("w", (9, 7), Split(0, padded=True), std=0.02), 2, 4, "15ecb210de62e01c", "0227fdbb21a693ad"),
    (ParameterSpec("deep", (3, 4, 5), Split(1, 2), std=1.0), 2, 1, "9f9589d0326818a4", "8678355054717b92"),
    (ParameterSpec("big", (40, 4096), Split(1, 1024), std=0.02), 2, 1, "00ed8debf482f254", "51989a1ed2b8b056"),
    (ParameterSpec("long", (3, 70001), std=0.02), 2, 1, "65a2115b13f5cdaa", "56818368ed73a59a"),
]


@pytest.mark.parametrize(("spec", "size", "padding", "single", "half"), PINNED, ids=lambda v: getattr(v, "name", ""))
def test_initial_weights_are_those_of_earlier_versions(
    spec: ParameterSpec, size: int, padding: int, single: str, half: str
) -> None:
    shard = spec.shard(1, size, padding)
    for dtype, digest in ((torch.float32, single), (torch.float64, single), (torch.bfloat16, half)):
        data = _filled(spec, shard, dtype=dtype).double().numpy().tobytes()
        assert hashlib.blake2b(data, digest_size=8).hexdigest() == digest


def test_rows_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(*arguments: Any) -> Tensor:
        calls.append(arguments[3])
        return normal_rows(*arguments)

    monkeypatch.setattr("megapt.parameters.normal_rows", counting)
    spec = ParameterSpec("down", (512, 256), Split(1), std=0.02)
    _filled(spec, spec.shard(1, 4))
    assert calls == [512]


def test_the_branch_without_a_wait_gives_the_same_bits() -> None:
    q = torch.arange(-4095, 4096, dtype=torch.float64) / 8192
    selected = torch.where(q.abs() > 0.425, _tail(q), _centre(q))
    assert torch.equal(_inverse(q), selected)


def test_constants() -> None:
    spec = ParameterSpec("norm.weight", (5,), fill=1.0)
    assert torch.equal(_filled(spec, spec.shard(0, 4)), torch.ones(5))


def _config(model: str, tensor: int, pipeline: int, precision: str = "fp32", **parallel: Any) -> Config:
    return from_tree(
        {
            "precision": precision,
            "model": MODELS[model],
            "parallel": {"tensor": tensor, "pipeline": pipeline, "vocabulary_multiple": 16, **parallel},
            "zero": {"backend": "native"},
            "data": {"train": "unused"},
            "batch": {"sequence": 16, "samples": 8},
            "train": {"steps": 1},
        }
    ).config


def _assembled(config: Config, data: int = 1) -> dict[str, Tensor]:
    """Every rank's shards put together; ranks that hold the same element must agree on it."""
    parallel, table = config.parallel, parameter_table(config.model)
    whole: dict[str, Tensor] = {}
    for pp in range(parallel.pipeline):
        for dp in range(data):
            for tp in range(parallel.tensor):
                axes = (Axis(pp, parallel.pipeline, None), Axis(dp, data, None), Axis(tp, parallel.tensor, None))
                mesh = ParallelMesh(*axes, Axis(0, 1, None), 0, 1, torch.device("cpu"))
                _, parameters = build_chunks(config, mesh, TensorParallel(mesh.tp, parallel.sequence_parallel))
                for p in parameters:
                    name = p.spec.tied_to or p.spec.name
                    part = p.shard.valid(p.data)
                    if name not in whole:
                        whole[name] = torch.full(table[name].shape, math.nan, dtype=p.dtype)
                    known = whole[name][p.shard.slices()]
                    assert (known.isnan() | (known == part)).all(), name
                    known.copy_(part)
    assert not any(value.isnan().any() for value in whole.values())
    assert set(whole) == {name for name, spec in table.items() if spec.tied_to is None}
    return whole


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("tensor", "pipeline", "data", "more"),
    [
        (2, 1, 1, {}),
        (4, 1, 2, {}),  # two ranks share a key/value head of the Llama
        (8, 2, 1, {}),  # the last ranks' rows of the vocabulary are padding only
        (1, 4, 1, {}),
        (2, 2, 2, {"schedule": "interleaved", "chunks": 2}),
        (2, 2, 1, {"layers_per_stage": [1, 3]}),
    ],
)
def test_initial_weights_do_not_depend_on_the_layout(
    model: str, tensor: int, pipeline: int, data: int, more: dict[str, Any]
) -> None:
    alone = _assembled(_config(model, 1, 1))
    cut = _assembled(_config(model, tensor, pipeline, **more), data)
    assert alone.keys() == cut.keys()
    assert all(torch.equal(alone[name], cut[name]) for name in alone)


@pytest.mark.parametrize("model", MODELS)
def test_initial_weights_of_other_precisions_are_the_rounded_ones(model: str) -> None:
    single = _assembled(_config(model, 2, 1))
    for precision, dtype in (("bf16", torch.bfloat16), ("fp64", torch.float64)):
        other = _assembled(_config(model, 2, 1, precision))
        assert all(value.dtype == dtype for value in other.values())
        assert all(torch.equal(value, single[name].to(dtype)) for name, value in other.items())


def test_initial_weights_have_the_deviation_that_the_table_says() -> None:
    weights = _assembled(_config("llama", 1, 1))
    assert weights["embedding.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert weights["layers.1.mlp.down.weight"].std() == pytest.approx(0.02 / math.sqrt(8), rel=0.1)
    assert not torch.equal(weights["layers.0.mlp.up.weight"], weights["layers.1.mlp.up.weight"])
