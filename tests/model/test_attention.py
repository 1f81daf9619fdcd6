"""Attention from the projection's layout against PyTorch's own operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megapt.batch import Documents
from megapt.config import ModelConfig
from megapt.model.attention import attention
from megapt.model.positions import Rotary, at_positions, rotary_table
from megapt_kernels import blockwise
from megapt_kernels.blockwise import Scores
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


def masked(
    qkv: Tensor, heads: int, kv_heads: int, documents: Documents, scores: Scores, rotary: Rotary | None
) -> Tensor:
    """All tokens at once, with a mask that keeps them inside of their document and window."""
    owner = torch.repeat_interleave(torch.tensor(documents.lengths))
    allowed = owner.unsqueeze(1) == owner
    if scores.causal:
        allowed &= torch.ones_like(allowed).tril()
    if scores.window is not None:
        allowed &= torch.ones_like(allowed).triu(1 - scores.window)
    q, k, v = qkv.view(1, len(owner), heads + 2 * kv_heads, -1).split([heads, kv_heads, kv_heads], dim=2)
    if rotary is not None:
        q, k = (turned(t, *(r[documents.positions] for r in rotary)) for t in (q, k))
    k, v = (t.repeat_interleave(heads // kv_heads, dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if scores.softcap is None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scores.scale)
    else:
        s = q @ k.mT * (scores.scale or q.shape[-1] ** -0.5)
        s = scores.softcap * (s / scores.softcap).tanh()
        y = s.masked_fill(~allowed, float("-inf")).softmax(-1) @ v
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
        return attention(qkv, rows, 4, 2, at_positions(rotary, places), Scores(causal), documents)

    assert_accurate(
        own,
        lambda x: masked(
            x, 4, 2, documents, Scores(causal), table(40, 16, torch.promote_types(x.dtype, torch.float32))
        ),
        [random(40, 8 * 16, seed=1)],
        random(40, 4 * 16, seed=2),
    )


def test_without_documents_rows_are_bidirectional_too() -> None:
    qkv, rotary = random(2 * 9, 4 * 8, seed=1), table(9, 8, torch.float64)
    ours = attention(qkv, 2, 2, 1, rotary, Scores(causal=False))
    documents = documents_of(9, 9)
    torch.testing.assert_close(ours, masked(qkv, 2, 1, documents, Scores(causal=False), rotary))


# One token, some, more than a block of queries; a cap that bends, alone and with a window.
SCORES = [
    Scores(scale=0.3),
    Scores(window=1),
    Scores(window=7, scale=0.3),
    Scores(window=130),
    Scores(softcap=1.5),
    Scores(softcap=1.5, scale=0.5, window=33),
    Scores(softcap=1.5, window=200),
    Scores(softcap=1.5, causal=False),
]


@pytest.mark.parametrize("lengths", [(330, 330), (40, 300, 15, 5, 200, 100)])
@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_windows_caps_and_scales_are_as_accurate_as_pytorch(
    scores: Scores, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "_ELEMENTS", (1 << 16, 0))  # so that heads do not fit one block
    documents = documents_of(*lengths)
    assert_accurate(
        lambda x: attention(x, 2, 4, 2, None, scores, documents if len(lengths) > 2 else None),
        lambda x: masked(x, 4, 2, documents, scores, None),
        [random(660, 8 * 16, seed=1)],
        random(660, 4 * 16, seed=2),
    )


@pytest.mark.parametrize("scores", [Scores(window=3), Scores(softcap=1.0, window=3), Scores(softcap=1.0)], ids=str)
def test_gradients_of_windows_and_caps_by_finite_differences(scores: Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "_QUERIES", (2, 2))
    rotary = table(7, 4, torch.float64)
    qkv = random(14, 4 * 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention(x, 2, 2, 1, rotary, scores), qkv)


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


@pytest.mark.parametrize("scores", [Scores(window=256), Scores(softcap=1.0, window=256), Scores(softcap=1.0)], ids=str)
def test_windows_and_caps_never_form_the_matrix_of_scores(scores: Scores) -> None:
    """Eight heads of 2048 tokens: blocks stay of one size, whatever the sequence."""
    qkv = random(2048, 12 * 8, seed=1).float().requires_grad_()
    with _Largest() as largest:
        attention(qkv, 1, 8, 2, None, scores).sum().backward()
    assert 2048 * 8 * 8 <= largest.elements <= 4 * 128 * 2048 < 2048 * 2048


def test_gradients_by_finite_differences() -> None:
    rotary = table(5, 8, torch.float64)
    qkv = random(10, 4 * 8, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention(x, 2, 2, 1, rotary), qkv)


def test_no_token_sees_a_later_one_or_another_sequence() -> None:
    qkv = random(2 * 20, 4 * 8, seed=1)
    changed = qkv.clone()
    changed[12] += 1
    for scores, last in ((Scores(), 20), (Scores(window=5), 17), (Scores(window=5, softcap=1.0), 17)):
        differs = (attention(changed, 2, 2, 1, None, scores) != attention(qkv, 2, 2, 1, None, scores)).any(1)
        assert differs.nonzero().flatten().tolist() == list(range(12, last)), scores


def test_the_kernel_never_forms_the_matrix_of_scores() -> None:
    """Grouped heads must not send the CPU to the kernel that materialises sequence x sequence."""
    qkv = random(64, 4 * 8, seed=1).float().requires_grad_()
    with torch.profiler.profile() as profile:
        attention(qkv, 1, 2, 1, None).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert any("flash_attention_for_cpu_backward" in name for name in names)
    assert not any("softmax" in name or "bmm" in name for name in names)
