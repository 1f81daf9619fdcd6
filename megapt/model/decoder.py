"""The decoder: one description wide enough for Llama and GPT-2, cut into chunks of consecutive layers.

What is computed stands here; where it is computed is left to `parallel.tensor`'s layers. Shapes: B sequences of S
tokens, T = B x S (this rank's part of T between tensor-parallel regions under sequence parallelism), H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from megapt.batch import MicroBatch
from megapt.config import ModelConfig
from megapt.model.attention import causal_attention
from megapt.model.blocks import row_blocks
from megapt.model.norms import make_norm
from megapt.model.positions import Rotary, rotary_table
from megapt.parallel.tensor import (
    ColumnParallelLinear,
    ParameterFactory,
    RowParallelLinear,
    VocabularyEmbedding,
    VocabularyHead,
)
from megapt.parameters import Parameter


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (arXiv 2305.13245), this rank's heads only."""

    def __init__(self, model: ModelConfig, factory: ParameterFactory, at: str) -> None:
        super().__init__()
        self.qkv = ColumnParallelLinear(factory, f"{at}.q", f"{at}.k", f"{at}.v")
        self.out = RowParallelLinear(factory, f"{at}.out")
        self.heads, self.kv_heads = (w // model.head_width for w in self.qkv.widths[:2])

    def forward(self, x: Tensor, batch: int, rotary: Rotary | None) -> Tensor:
        return self.out(causal_attention(self.qkv(x), batch, self.heads, self.kv_heads, rotary))


class MLP(nn.Module):
    """Plain, or gated (arXiv 2002.05202)."""

    def __init__(self, model: ModelConfig, factory: ParameterFactory, at: str) -> None:
        super().__init__()
        self.gated, self.activation = model.gated, model.activation
        self.up = ColumnParallelLinear(factory, *([f"{at}.gate"] if model.gated else []), f"{at}.up")
        self.down = RowParallelLinear(factory, f"{at}.down")

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(_Gated.apply(y, self.activation) if self.gated else _activate(y, self.activation))


class _Gated(Function):
    """activation(gate) x up of [gate, up] as [T, 2F] -> [T, F].

    The activation is computed again in the backward pass rather than kept, and both gradients land in one tensor.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, activation: str) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(y)
        gate, up = y.chunk(2, dim=-1)
        out = y.new_empty(up.shape)
        for g, u, o in row_blocks(gate, up, out):
            torch.mul(_activate(g, activation), u, out=o)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        dy = torch.empty_like(y)
        for g, u, dg, du, d in row_blocks(*y.chunk(2, dim=-1), *dy.chunk(2, dim=-1), grad):
            torch.mul(_activate(g, ctx.activation), d, out=du)
            _activate_backward(d * u, g, ctx.activation, dg)
        return dy, None


def _activate(x: Tensor, kind: str) -> Tensor:
    return F.silu(x) if kind == "silu" else F.gelu(x, approximate=_APPROXIMATION[kind])


def _activate_backward(grad: Tensor, x: Tensor, kind: str, out: Tensor) -> None:
    if kind == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)
    else:
        torch.ops.aten.gelu_backward.grad_input(grad, x, approximate=_APPROXIMATION[kind], grad_input=out)


_APPROXIMATION = {"gelu": "none", "gelu_tanh": "tanh"}


class Layer(nn.Module):
    def __init__(self, model: ModelConfig, factory: ParameterFactory, index: int) -> None:
        super().__init__()
        at = f"layers.{index}"
        self.attention_norm = make_norm(model, factory, f"{at}.attention_norm")
        self.attention = Attention(model, factory, f"{at}.attention")
        self.mlp_norm = make_norm(model, factory, f"{at}.mlp_norm")
        self.mlp = MLP(model, factory, f"{at}.mlp")

    def forward(self, x: Tensor, batch: int, rotary: Rotary | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), batch, rotary)
        return x + self.mlp(self.mlp_norm(x))


class Embedding(nn.Module):
    """Token embeddings, plus learned positions where the model has them."""

    def __init__(self, model: ModelConfig, factory: ParameterFactory) -> None:
        super().__init__()
        self.tokens = VocabularyEmbedding(factory)
        self.positions: Parameter | None = None
        if model.position == "learned":
            (self.positions,) = factory("positions.weight")

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x = self.tokens(tokens_BS.flatten())
        if self.positions is not None:
            batch, sequence = tokens_BS.shape
            where = torch.arange(sequence, device=tokens_BS.device).repeat(batch)
            x = x + F.embedding(self.tokens.tp.local_tokens(where), self.positions)
        return x


class Head(nn.Module):
    """Final norm, output projection and loss."""

    def __init__(self, model: ModelConfig, factory: ParameterFactory) -> None:
        super().__init__()
        self.norm = make_norm(model, factory, "norm")
        self.output = VocabularyHead(factory)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        h = self.norm(x)
        return self.output.logits(h) if labels is None else self.output(h, labels.flatten())


class DecoderChunk(nn.Module):
    """Consecutive layers of the model, with the embedding if they are the first and the head if they are the last.

    `forward` takes the previous chunk's output x_TH (None on the first chunk, which reads the batch's tokens) and gives
    x_TH, or on the last chunk the summed loss of the labels (logits [T, vocabulary] if there are none).
    """

    def __init__(
        self, model: ModelConfig, factory: ParameterFactory, layers: Sequence[int], first: bool, last: bool
    ) -> None:
        super().__init__()
        self.model, self.first, self.last = model, first, last
        self.embedding = Embedding(model, factory) if first else None
        self.layers = nn.ModuleList(Layer(model, factory, index) for index in layers)
        self.head = Head(model, factory) if last else None

    def forward(self, x: Tensor | None, batch: MicroBatch) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(batch.tokens)
        assert x is not None
        rows, sequence = batch.tokens.shape
        rotary = None
        if self.model.position == "rope":
            rotary = rotary_table(self.model, sequence, x.device, torch.promote_types(x.dtype, torch.float32))
        for layer in self.layers:
            x = layer(x, rows, rotary)
        return x if self.head is None else self.head(x, batch.labels)
