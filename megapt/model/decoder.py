"""The decoder: one description wide enough for Llama and GPT-2, cut into chunks of consecutive layers.

What is computed stands here; where it is computed is left to `parallel.tensor`'s layers. Shapes: B sequences of S
tokens, T = B x S (this rank's part of T between tensor-parallel regions under sequence parallelism), H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapt.batch import MicroBatch
from megapt.config import ModelConfig
from megapt.model.attention import attention
from megapt.model.compiled import chain, turned
from megapt.model.kernels import AUTO, Kernels
from megapt.model.norms import Norm, QKNorm, make_norm
from megapt.model.positions import Rotary, at_positions, rotary_table
from megapt.model.recompute import Policy, drop_all, drop_output, keep_input
from megapt.parallel.loss import LossSettings, VocabularyHead
from megapt.parallel.tensor import (
    Again,
    ColumnParallelLinear,
    ParameterFactory,
    RowParallelLinear,
    VocabularyEmbedding,
)
from megapt.parameters import Parameter
from megapt_kernels.blockwise import Scores
from megapt_kernels.glu import geglu, swiglu


class Attention(nn.Module):
    """Self-attention with grouped key/value heads (arXiv 2305.13245), this rank's heads only."""

    def __init__(
        self, model: ModelConfig, factory: ParameterFactory, at: str, layer: int, kernels: Kernels = AUTO
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.qkv = ColumnParallelLinear(factory, f"{at}.q", f"{at}.k", f"{at}.v")
        self.heads, self.kv_heads = (w // model.head_width for w in self.qkv.widths[:2])
        self.qk_norm: QKNorm | None = None
        if model.qk_norm != "none":
            self.qk_norm = QKNorm(model, factory, at, self.heads, self.kv_heads, kernels)
        self.out = RowParallelLinear(factory, f"{at}.out")
        self.scores = Scores(
            model.attention == "causal", model.window_of(layer), model.attention_scale, model.attention_softcap
        )

    def forward(
        self,
        x: Tensor,
        batch: MicroBatch,
        rotary: Rotary | None,
        again: Again | None = None,
        drop: bool = False,
        graph_only: bool = False,
    ) -> Tensor:
        def core(qkv: Tensor) -> Tensor:
            rows, turning, angles = len(batch.tokens), self.heads + self.kv_heads, rotary
            if self.qk_norm is not None:
                qkv = self.qk_norm(qkv)
            if self.kernels.rope == "compiled" and angles is not None:
                width = qkv.shape[1] // (turning + self.kv_heads)
                qkv, angles = chain(turned)(qkv, *angles, rows, turning, width), None
            owned = self.qk_norm is not None or not drop  # else it is what the backward starts from
            return attention(
                qkv, rows, self.heads, self.kv_heads, angles, self.scores, batch.documents, self.kernels, owned
            )

        y, y_again = drop_all(core, self.qkv(x, again), drop)
        return self.out(y, y_again, graph_only)


class MLP(nn.Module):
    """Plain, or gated (arXiv 2002.05202)."""

    def __init__(self, model: ModelConfig, factory: ParameterFactory, at: str, kernels: Kernels = AUTO) -> None:
        super().__init__()
        self.gated, self.activation, self.kernel = model.gated, model.activation, kernels.glu
        self.up = ColumnParallelLinear(factory, *([f"{at}.gate"] if model.gated else []), f"{at}.up")
        self.down = RowParallelLinear(factory, f"{at}.down")

    def forward(
        self, x: Tensor, again: Again | None = None, drop: bool = False, graph_only: bool = False
    ) -> Tensor:
        y, y_again = drop_output(self._activate, self.up(x, again), drop)
        return self.down(y, y_again, graph_only)

    def _activate(self, y: Tensor) -> Tensor:
        if self.kernel == "compiled":
            return chain(gated if self.gated else _activate)(y, self.activation)
        if not self.gated:
            return _activate(y, self.activation)
        if self.activation == "silu":
            return swiglu(y, impl=self.kernel)
        return geglu(y, approximate=_APPROXIMATION[self.activation], impl=self.kernel)


def gated(y: Tensor, activation: str) -> Tensor:
    """activation(gate) x up of [gate, up] as [T, 2F] -> [T, F], by plain operations."""
    gate, up = y.chunk(2, dim=-1)
    return _activate(gate, activation) * up


def _activate(x: Tensor, kind: str) -> Tensor:
    return F.silu(x) if kind == "silu" else F.gelu(x, approximate=_APPROXIMATION[kind])


_APPROXIMATION: dict[str, Literal["none", "tanh"]] = {"gelu": "none", "gelu_tanh": "tanh"}


class Layer(nn.Module):
    """Attention and MLP, each with a norm before, after or both, added to the residual stream x_TH one after the other
    or, with a parallel residual (GPT-J, GPT-NeoX: arXiv 2204.06745), at once.

    recompute: what its backward computes again rather than finds kept.
    """

    def __init__(
        self,
        model: ModelConfig,
        factory: ParameterFactory,
        index: int,
        recompute: Policy = "none",
        kernels: Kernels = AUTO,
    ) -> None:
        super().__init__()
        self.recompute, self.parallel = recompute, model.parallel_residual
        at = f"layers.{index}"

        def norm(name: str, there: bool) -> Norm | None:
            return make_norm(model, factory, f"{at}.{name}", kernels) if there else None

        before, after = model.norm_placement != "after", model.norm_placement != "before"
        self.attention_norm = norm("attention_norm", before)
        self.attention = Attention(model, factory, f"{at}.attention", index, kernels)
        self.attention_norm_after = norm("attention_norm_after", after)
        self.mlp_norm = norm("mlp_norm", before)
        self.mlp = MLP(model, factory, f"{at}.mlp", kernels)
        self.mlp_norm_after = norm("mlp_norm_after", after)

    def forward(self, x: Tensor, batch: MicroBatch, rotary: Rotary | None) -> Tensor:
        if self.recompute != "full" or not torch.is_grad_enabled():
            return self._whole(x, batch, rotary)
        whole = partial(self._whole, batch=batch, rotary=rotary)
        return keep_input(whole, partial(whole, graph_only=True), x)

    def _whole(self, x: Tensor, batch: MicroBatch, rotary: Rotary | None, graph_only: bool = False) -> Tensor:
        """With `graph_only` products that end in the result, which no backward needs, are left out."""
        drop = self.recompute == "selective"
        y, again = _normed(self.attention_norm, x, drop)
        attended = self.attention(y, batch, rotary, again, drop, graph_only and self.parallel)
        if self.attention_norm_after is not None:
            attended = self.attention_norm_after(attended)
        if self.mlp_norm is not None and not (drop or self.parallel):
            again = None
            y, stream = self.mlp_norm.of_sum(attended, x)
        else:
            stream = x + attended
            y, again = _normed(self.mlp_norm, x if self.parallel else stream, drop)
        made = self.mlp(y, again, drop, graph_only and self.mlp_norm_after is None)
        return stream + (made if self.mlp_norm_after is None else self.mlp_norm_after(made))


def _normed(norm: Norm | None, x: Tensor, drop: bool) -> tuple[Tensor, Again | None]:
    return (x, None) if norm is None else drop_output(norm, x, drop)


class Embedding(nn.Module):
    """Token embeddings, scaled and with learned positions where the model has them."""

    def __init__(self, model: ModelConfig, factory: ParameterFactory) -> None:
        super().__init__()
        self.tokens = VocabularyEmbedding(factory)
        self.scale = model.embedding_scale
        self.positions: Parameter | None = None
        if model.position == "learned":
            (self.positions,) = factory("positions.weight")

    def forward(self, batch: MicroBatch) -> Tensor:
        x = self.tokens(batch.tokens.flatten())
        if self.scale is not None:
            # Gemma rounds it to the weights' precision, and its models were trained so.
            x = x * float(torch.tensor(self.scale, dtype=x.dtype))
        if self.positions is not None:
            rows, sequence = batch.tokens.shape
            where = torch.arange(sequence, device=x.device).repeat(rows)
            if batch.documents is not None:
                where = batch.documents.positions
            x = x + F.embedding(self.tokens.tp.local_tokens(where), self.positions)
        return x


class Head(nn.Module):
    """Final norm, output projection and loss."""

    def __init__(
        self, model: ModelConfig, factory: ParameterFactory, settings: LossSettings, kernels: Kernels = AUTO
    ) -> None:
        super().__init__()
        self.norm = make_norm(model, factory, "norm", kernels)
        self.output = VocabularyHead(factory, settings, kernels.cross_entropy)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        h = self.norm(x)
        return self.output.logits(h) if labels is None else self.output(h, labels.flatten())


class DecoderChunk(nn.Module):
    """Consecutive layers of the model, with the embedding if they are the first and the head if they are the last.

    `forward` takes the previous chunk's output x_TH (None on the first chunk, which reads the batch's tokens) and gives
    x_TH, or on the last chunk the summed loss of the labels (logits [T, vocabulary] if there are none).

    recompute: what each layer computes again in the backward pass; default: nothing. kernels: what computes
    what lies between the parallel layers. before: called with the embedding, each layer and the head right before it
    runs; set where its weights may still be on their way.
    """

    def __init__(
        self,
        model: ModelConfig,
        factory: ParameterFactory,
        layers: Sequence[int],
        first: bool,
        last: bool,
        settings: LossSettings | None = None,
        recompute: Sequence[Policy] | None = None,
        kernels: Kernels = AUTO,
    ) -> None:
        super().__init__()
        self.model, self.first, self.last = model, first, last
        self.embedding = Embedding(model, factory) if first else None
        policies = recompute or ["none"] * len(layers)
        self.layers = nn.ModuleList(
            Layer(model, factory, index, policy, kernels) for index, policy in zip(layers, policies, strict=True)
        )
        settings = settings or LossSettings(model.logit_softcap)
        self.head = Head(model, factory, settings, kernels) if last else None
        self.before: Callable[[nn.Module], None] | None = None

    def forward(self, x: Tensor | None, batch: MicroBatch) -> Tensor:
        before = self.before or _nothing
        if self.embedding is not None:
            before(self.embedding)
            x = self.embedding(batch)
        assert x is not None
        rotary = self._rotary(x, batch)
        for layer in self.layers:
            before(layer)
            x = layer(x, batch, rotary)
        if self.head is None:
            return x
        before(self.head)
        return self.head(x, batch.labels)

    def _rotary(self, x: Tensor, batch: MicroBatch) -> Rotary | None:
        if self.model.position != "rope":
            return None
        wide = torch.promote_types(x.dtype, torch.float32)
        table = rotary_table(self.model, batch.tokens.shape[1], x.device, wide)
        if batch.documents is None:
            return table
        return at_positions(table, batch.documents.positions.view_as(batch.tokens))


def _nothing(module: nn.Module) -> None:
    pass
