"""Attention from the projection's layout against PyTorch's own operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megapt.batch import Documents
from megapt.config import ModelConfig
from megapt.model.attention import attention
from megapt.model.positions import Rotary, at_positions, rotary_table
from tests.model.accuracy import assert_accurate, random
from tests.model.test_positions import plain as turned

# batch, sequence, heads, key/value heads, width
SHAPES = [(2, 70, 6, 2, 16), (3, 33, 4, 4, 8), (1, 130, 4, 1, 64), (2, 1, 2, 1, 8)]


def table(sequence: int, width: int, dtype: torch.dtype) -> Rotary:
    tree = {"layers": 1, "hidden": width, "heads": 1, "ffn": 4, "vocabulary": 8}
    return rotary_table(ModelConfig.model_validate(tree), sequence, torch.device("cpu"), dtype)


def reference(qkv: Tensor, batch: int, heads: int, kv_heads: int, rotary: Rotary | None) -> Tensor:
    """Key and value heads repeated, and everything left to autograd."""
    width = qkv.shape[1] // (heads + 2 * kv_heads)
    q, k, v = qkv.view(batch, -1, heads + 2 * kv_heads, width).split([heads, kv_heads, kv_heads], dim=2)
    if rotary is not None:
        q, k = turned(q, *rotary), turned(k, *rotary)
    k, v = (t.repeat_interleave(heads // kv_heads, dim=2) for t in (k, v))
    y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
    return y.transpose(1, 2).reshape(qkv.shape[0], -1)


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_as_accurate_as_pytorch(shape: tuple[int, ...], positions: bool) -> None:
    batch, sequence, heads, kv_heads, width = shape

    def call(function, qkv: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        return function(qkv, batch, heads, kv_heads, table(sequence, width, dtype) if positions else None)

    assert_accurate(
        lambda x: call(attention, x),
        lambda x: call(reference, x),
        [random(batch * sequence, (heads + 2 * kv_heads) * width, seed=1)],
        random(batch * sequence, heads * width, seed=2),
    )


def documents_of(*lengths: int) -> Documents:
    sizes = torch.tensor(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Documents(lengths, F.pad(sizes.cumsum(0), (1, 0)).int(), positions)


def masked(qkv: Tensor, heads: int, kv_heads: int, documents: Documents, causal: bool, rotary: Rotary) -> Tensor:
    """All tokens at once, with a mask that keeps them inside of their document."""
    owner = torch.repeat_interleave(torch.tensor(documents.lengths))
    allowed = owner.unsqueeze(1) == owner
    if causal:
        allowed &= torch.ones_like(allowed).tril()
    q, k, v = qkv.view(1, len(owner), heads + 2 * kv_heads, -1).split([heads, kv_heads, kv_heads], dim=2)
    q, k = (turned(t, *(r[documents.positions] for r in rotary)) for t in (q, k))
    k, v = (t.repeat_interleave(heads // kv_heads, dim=2) for t in (k, v))
    y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=allowed)
    return y.transpose(1, 2).reshape(len(owner), -1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(20, 20), (7, 1, 12, 9, 11), (5, 5, 10, 5, 5, 10), (40,)])
def test_documents_are_separate(lengths: tuple[int, ...], causal: bool) -> None:
    """Two rows of twenty tokens hold documents of any lengths, of equal ones side by side, and of one token."""
    documents = documents_of(*lengths)
    rows = 1 if len(lengths) == 1 else 2

    def own(qkv: Tensor) -> Tensor:
        rotary = table(40 // rows, 16, torch.promote_types(qkv.dtype, torch.float32))
        places = documents.positions.view(rows, -1)
        return attention(qkv, rows, 4, 2, at_positions(rotary, places), causal, documents)

    assert_accurate(
        own,
        lambda x: masked(x, 4, 2, documents, causal, table(40, 16, torch.promote_types(x.dtype, torch.float32))),
        [random(40, 8 * 16, seed=1)],
        random(40, 4 * 16, seed=2),
    )


def test_without_documents_rows_are_bidirectional_too() -> None:
    qkv, rotary = random(2 * 9, 4 * 8, seed=1), table(9, 8, torch.float64)
    ours = attention(qkv, 2, 2, 1, rotary, causal=False)
    documents = documents_of(9, 9)
    torch.testing.assert_close(ours, masked(qkv, 2, 1, documents, False, rotary))


def test_gradients_by_finite_differences() -> None:
    rotary = table(5, 8, torch.float64)
    qkv = random(10, 4 * 8, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention(x, 2, 2, 1, rotary), qkv)


def test_no_token_sees_a_later_one_or_another_sequence() -> None:
    qkv = random(2 * 20, 4 * 8, seed=1)
    before = attention(qkv, 2, 2, 1, None)
    changed = qkv.clone()
    changed[12] += 1
    differs = (attention(changed, 2, 2, 1, None) != before).any(1)
    assert differs[12:20].all() and not differs[:12].any() and not differs[20:].any()


def test_the_kernel_never_forms_the_matrix_of_scores() -> None:
    """Grouped heads must not send the CPU to the kernel that materialises sequence x sequence."""
    qkv = random(64, 4 * 8, seed=1).float().requires_grad_()
    with torch.profiler.profile() as profile:
        attention(qkv, 1, 2, 1, None).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert any("flash_attention_for_cpu_backward" in name for name in names)
    assert not any("softmax" in name or "bmm" in name for name in names)


@pytest.mark.parametrize("dtype, asked", [(torch.float32, False), (torch.bfloat16, True)])
def test_grouped_heads_keep_to_kernels_without_the_matrix_of_scores(
    dtype: torch.dtype, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off the CPU: in fp32 no such kernel takes fewer key/value heads, and torch would form the matrix unasked."""
    seen = []

    def watched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((options["enable_gqa"], k.shape[1], v.shape[1]))
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    out = attention(torch.empty(2 * 8, (4 + 2 * 2) * 16, dtype=dtype, device="meta"), 2, 4, 2, None)
    assert seen == [(asked, *([2, 2] if asked else [4, 4]))] and out.shape == (2 * 8, 4 * 16)
