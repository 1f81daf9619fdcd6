"""Which implementation computes each operation of a run on this machine: asked before training, and printed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megapt.batch import IGNORE
from megapt.config import Config, ModelConfig
from megapt.errors import UserError
from megapt.model.kernels import Kernels
from megapt.parallel.pipeline.stages import DTYPES
from megapt.zero.accumulate import fuses_products
from megapt_kernels.adamw import AdamWShard
from megapt_kernels.attention_dispatch import AttentionSpec
from megapt_kernels.library import LibraryError
from megapt_kernels.registry import ENVIRONMENT, Explanation, Unsupported, operation

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_TOKENS = 8  # of the tensors that implementations are asked about: their widths matter, not how many rows they have


def check_kernels(config: Config, device: torch.device) -> None:
    """UserError where this machine has not what `kernels` names, with what is missing."""
    for key, name, arguments in _asked(config, device):
        _ask(config, key, name, *arguments())


def chosen(config: Config, device: torch.device, wanted: str) -> str:
    """What computes the operation of a key of `kernels`, in words."""
    for key, name, arguments in _asked(config, device):
        if key == wanted:
            return _ask(config, key, name, *arguments())
    raise KeyError(wanted)


def _ask(config: Config, key: str, name: str, positional: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    kind = getattr(config.kernels, key)
    try:
        answer: Explanation = operation(name).explain(*positional, impl=kind, **keywords)
    except (LibraryError, Unsupported) as error:
        raise UserError(f"kernels.{key}: {error}") from error
    if answer.chosen is None:
        reasons = [f"{who}: {why}" for who, why in answer.rejected if "was asked for" not in why]
        remedy = f"kernels.{key}=auto takes what is"
        if kind == "auto":
            remedy = f"{ENVIRONMENT}={os.environ.get(ENVIRONMENT)} is set: without it, auto takes what is"
        raise UserError(
            f"kernels.{key} = {kind} computes {name} by nothing that is here in {config.precision}: "
            f"{'; '.join(reasons) or 'there is no such implementation'}. {remedy}"
        )
    return answer.chosen.name


def _asked(
    config: Config, device: torch.device
) -> Iterator[tuple[str, str, Callable[[], Arguments]]]:
    """Of every key in use: its operation, and arguments as the run will have them."""
    model, tensor = config.model, config.parallel.tensor
    kernels, dtype = Kernels.of(config), DTYPES[config.precision]
    wide = torch.promote_types(dtype, torch.float32)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def norm() -> Arguments:
        x, weight = empty(_TOKENS, model.hidden), empty(model.hidden)
        if model.norm == "layer_norm":
            return (x, weight, weight, model.norm_eps, x), {}
        return (x, weight, model.norm_eps, x), {"offset": float(model.norm_offset)}

    if kernels.norm != "compiled":
        yield "norm", model.norm, norm
    if model.gated and kernels.glu != "compiled":
        glu = "swiglu" if model.activation == "silu" else "geglu"
        yield "glu", glu, lambda: ((empty(_TOKENS, 2 * model.ffn // tensor),), {})
    heads, kv_heads = model.heads // tensor, max(1, model.num_kv_heads // tensor)
    if model.position == "rope" and kernels.rope != "compiled":
        table = empty(_TOKENS, model.rotary_width // 2, dtype=wide)
        qkv = empty(_TOKENS, heads + 2 * kv_heads, model.head_width)
        yield "rope", "rope_", lambda: ((qkv, table, table), {"heads": heads + kv_heads})
    yield "attention", "attention", lambda: (_attention(config, heads, kv_heads, empty), {})
    yield "cross_entropy", "linear_cross_entropy", lambda: _loss(config, empty)
    if config.zero.backend == "native":
        yield "adamw", "adamw_step_", lambda: _adamw(empty, dtype, wide)
        if fuses_products(config.kernels.wgrad, dtype, device):
            x = empty(_TOKENS, _TOKENS)
            yield "wgrad", "wgrad_accumulate_", lambda: ((empty(_TOKENS, _TOKENS, dtype=wide), x, x), {})


def _loss(config: Config, empty: Callable[..., torch.Tensor]) -> Arguments:
    width, rows = config.model.hidden, 256
    h, weight, labels = empty(_TOKENS, width), empty(rows, width), empty(_TOKENS, dtype=torch.int64)
    softcap, z_loss = config.model.logit_softcap, config.train.z_loss
    rules = {"start": 0, "length": rows, "ignore_index": IGNORE, "softcap": softcap, "z_loss": z_loss}
    return (h, weight, labels), rules


def _attention(
    config: Config, heads: int, kv_heads: int, empty: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionSpec]:
    """One sequence, in two documents where documents end attention; of the layers with a window if there are any."""
    model, length = config.model, config.batch.sequence
    q = empty(1, length, heads, model.head_width)
    k, v = (empty(1, length, kv_heads, model.head_width) for _ in range(2))
    cut = (length // 2, length - length // 2) if config.data.separates_documents and length > 1 else None
    window = min((w for w in _windows(model) if w is not None), default=None)
    scores = AttentionSpec(model.attention == "causal", window, model.attention_scale, model.attention_softcap, cut)
    return q, k, v, scores


def _windows(model: ModelConfig) -> set[int | None]:
    return {model.window_of(layer) for layer in range(model.layers)}


def _adamw(empty: Callable[..., torch.Tensor], dtype: torch.dtype, wide: torch.dtype) -> Arguments:
    master, grad, first, second = (empty(_TOKENS, dtype=wide) for _ in range(4))
    shard = AdamWShard(master, grad, first, second, None if dtype == wide else empty(_TOKENS))
    scalar = empty(dtype=torch.float32)
    return ([shard],), {"lr": 1.0, "betas": (0.9, 0.95), "eps": 1e-8, "step": scalar, "scale": scalar, "skip": scalar}
