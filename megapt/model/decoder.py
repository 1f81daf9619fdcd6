"""The decoder: one description wide enough for Llama and GPT-2, cut into chunks of consecutive layers.

What is computed stands here; where it is computed is left to `parallel.tensor`'s layers. Shapes: B sequences of S
tokens, T = B x S (this rank's part of T between tensor-parallel regions under sequence parallelism), H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapt.config import ModelConfig
from megapt.model.norms import make_norm
from megapt.model.positions import rotary_table, rotate
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
        self.width, self.rotary = model.head_width, model.position == "rope"
        self.qkv = ColumnParallelLinear(factory, f"{at}.q", f"{at}.k", f"{at}.v")
        self.out = RowParallelLinear(factory, f"{at}.out")
        self.heads, self.kv_heads = (w // self.width for w in self.qkv.widths[:2])

    def forward(self, x: Tensor, batch: int, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        qkv = self.qkv(x).view(batch, -1, self.heads + 2 * self.kv_heads, self.width)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.heads != self.kv_heads and q.device.type == "cpu":
            # On CPU the kernel that never forms the S x S matrix wants as many key heads as query heads.
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != k.shape[1])
        return self.out(y.transpose(1, 2).flatten(0, 1).flatten(1))


class MLP(nn.Module):
    """Plain, or gated (arXiv 2002.05202)."""

    def __init__(self, model: ModelConfig, factory: ParameterFactory, at: str) -> None:
        super().__init__()
        self.gated, self.activation = model.gated, model.activation
        self.up = ColumnParallelLinear(factory, *([f"{at}.gate"] if model.gated else []), f"{at}.up")
        self.down = RowParallelLinear(factory, f"{at}.down")

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.gated:
            gate, up = y.chunk(2, dim=-1)
            return self.down(_activate(gate, self.activation) * up)
        return self.down(_activate(y, self.activation))


def _activate(x: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


class Layer(nn.Module):
    def __init__(self, model: ModelConfig, factory: ParameterFactory, index: int) -> None:
        super().__init__()
        at = f"layers.{index}"
        self.attention_norm = make_norm(model, factory, f"{at}.attention_norm")
        self.attention = Attention(model, factory, f"{at}.attention")
        self.mlp_norm = make_norm(model, factory, f"{at}.mlp_norm")
        self.mlp = MLP(model, factory, f"{at}.mlp")

    def forward(self, x: Tensor, batch: int, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
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

    `forward` takes tokens [B, S] on the first chunk, else the previous chunk's output x_TH, and gives x_TH, or on the
    last chunk the summed loss of `labels` [B, S] (logits [T, vocabulary] if there are no labels).
    """

    def __init__(
        self, model: ModelConfig, factory: ParameterFactory, layers: Sequence[int], first: bool, last: bool
    ) -> None:
        super().__init__()
        self.model, self.first, self.last = model, first, last
        self.embedding = Embedding(model, factory) if first else None
        self.layers = nn.ModuleList(Layer(model, factory, index) for index in layers)
        self.head = Head(model, factory) if last else None

    def forward(self, x: Tensor, batch: int, sequence: int, labels: Tensor | None = None) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        rotary = None
        if self.model.position == "rope":
            rotary = rotary_table(self.model, sequence, x.device, torch.promote_types(x.dtype, torch.float32))
        for layer in self.layers:
            x = layer(x, batch, rotary)
        return x if self.head is None else self.head(x, labels)
