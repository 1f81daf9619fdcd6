"""What is measured: for each operation its inputs, its call, and the formula in plain PyTorch that it is held to."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import megapt_kernels
from megapt_kernels.bench.presets import Preset

Inputs = dict[str, Any]  # tensors, lists of tensors and plain values by name
PASSES = ("fwd", "bwd", "fwd+bwd")
BETAS, EPS, LR, DECAY = (0.9, 0.95), 1e-8, 1e-3, 0.1
_CROSS_ENTROPY_TOKENS = 8192  # logits of more tokens at once no trainer keeps


@dataclass(frozen=True)
class Case:
    """One operation on one set of shapes.

    make: inputs on a device, a function of the generator alone. differentiable: names of the inputs that get gradients.
    arguments: inputs -> (positional, keywords) of the public function. outputs: (what it returned, inputs) -> the
    tensors that are compared. plain: the formula, inputs -> those tensors; it works in place where the operation does.
    exact: the same on inputs in higher precision, with less memory. in_place: the operation writes into differentiable
    inputs. floor: dtype whose rounding is forgiven; None for that of each tensor.
    """

    op: str
    name: str
    shape: dict[str, int]
    dtype: torch.dtype
    make: Callable[[torch.Generator, torch.device], Inputs]
    differentiable: tuple[str, ...]
    arguments: Callable[[Inputs], tuple[tuple[Any, ...], dict[str, Any]]]
    plain: Callable[[Inputs], tuple[Tensor, ...]]
    outputs: Callable[[Any, Inputs], tuple[Tensor, ...]]
    passes: tuple[str, ...] = PASSES
    exact: Callable[[Inputs], tuple[Tensor, ...]] | None = None
    call: Callable[[Inputs, str], tuple[Tensor, ...]] | None = None
    in_place: bool = False
    floor: torch.dtype | None = None
    plain_bytes: int = 0

    @property
    def title(self) -> str:
        return f"{self.op} ({self.name})" if self.name else self.op

    def whole_arguments(self, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`arguments` with the function's defaults, as implementations are asked."""
        positional, keywords = self.arguments(inputs)
        bound = inspect.signature(public(self.op)).bind(*positional, **keywords)
        bound.apply_defaults()
        return bound.args, {name: value for name, value in bound.kwargs.items() if name != "impl"}

    def run(self, inputs: Inputs, impl: str) -> tuple[Tensor, ...]:
        """The public function with this implementation."""
        if self.call is not None:
            return self.call(inputs, impl)
        positional, keywords = self.arguments(inputs)
        return self.outputs(public(self.op)(*positional, **keywords, impl=impl), inputs)


def public(name: str) -> Callable[..., Any]:
    return getattr(megapt_kernels, name)


def mapped(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """The inputs with every tensor replaced."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value)
        return [one(v) for v in value] if isinstance(value, list) else value

    return {name: one(value) for name, value in inputs.items()}


def cases(ops: Iterable[str], preset: Preset, dtype: torch.dtype) -> list[Case]:
    """All cases of these operations."""
    return [case for op in ops for case in _MAKERS[op](preset, dtype)]


def _tuple(made: Any, _: Inputs) -> tuple[Tensor, ...]:
    return tuple(made) if isinstance(made, (tuple, list)) else (made,)


def _random(
    shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, device: torch.device, scale: float = 1.0
) -> Tensor:
    return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(scale)


# Norms


def _norms(op: str) -> Callable[[Preset, torch.dtype], list[Case]]:
    centred = op == "layer_norm"

    def formula(i: Inputs) -> tuple[Tensor, ...]:
        total = i["x"] + i["residual"] if "residual" in i else i["x"]
        wide = total if total.dtype == torch.float64 else total.float()
        if centred:
            wide = wide - wide.mean(-1, keepdim=True)
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * i["weight"]
        y = y + i["bias"] if centred else y
        return (y.to(total.dtype), total)[: 2 if "residual" in i else 1]

    def arguments(i: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        weights = (i["weight"], i["bias"]) if centred else (i["weight"],)
        return (i["x"], *weights, 1e-5, i.get("residual")), {}

    def build(preset: Preset, dtype: torch.dtype) -> list[Case]:
        shape = {"T": preset.tokens, "H": preset.hidden}

        def make(residual: bool) -> Callable[[torch.Generator, torch.device], Inputs]:
            def inputs(g: torch.Generator, d: torch.device) -> Inputs:
                size = (preset.tokens, preset.hidden)
                made = {"x": _random(size, dtype, g, d), "weight": 1 + _random(size[1:], dtype, g, d, 0.1)}
                made |= {"bias": _random(size[1:], dtype, g, d, 0.1)} if centred else {}
                return made | ({"residual": _random(size, dtype, g, d)} if residual else {})

            return inputs

        names = ("x", "weight", "bias") if centred else ("x", "weight")
        return [
            Case(op, "", shape, dtype, make(False), names, arguments, formula, _tuple),
            Case(op, "residual", shape, dtype, make(True), (*names, "residual"), arguments, formula, _tuple),
        ]

    return build


# Gated units


def _gated(op: str) -> Callable[[Preset, torch.dtype], list[Case]]:
    def formula(i: Inputs) -> tuple[Tensor, ...]:
        gate, up = i["xy"].chunk(2, -1)
        return ((F.silu(gate) if op == "swiglu" else F.gelu(gate, approximate="tanh")) * up,)

    def build(preset: Preset, dtype: torch.dtype) -> list[Case]:
        shape = {"T": preset.tokens, "F": preset.ffn // preset.tensor}

        def make(g: torch.Generator, d: torch.device) -> Inputs:
            return {"xy": _random((shape["T"], 2 * shape["F"]), dtype, g, d)}

        return [Case(op, "", shape, dtype, make, ("xy",), lambda i: ((i["xy"],), {}), formula, _tuple)]

    return build


# Rotary positions: queries and keys of a fused projection, turned where they are


def _turned(i: Inputs) -> tuple[Tensor, ...]:
    x, half = i["x"], i["cos"].shape[-1]
    times = x.shape[0] // i["cos"].shape[0]
    cos, sin = (i[name].repeat(times, 1)[:, None] for name in ("cos", "sin"))
    first, second = x[..., :half], x[..., half:]
    return (torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype),)


def _rope(preset: Preset, dtype: torch.dtype) -> list[Case]:
    turned = (preset.heads + preset.kv_heads) // preset.tensor
    whole = turned + preset.kv_heads // preset.tensor
    shape = {"T": preset.tokens, "N": turned, "D": preset.width, "S": preset.sequence}

    def make(g: torch.Generator, d: torch.device) -> Inputs:
        frequencies = 5e5 ** -(torch.arange(0, preset.width, 2, dtype=torch.float64) / preset.width)
        angles = torch.arange(preset.sequence, dtype=torch.float64)[:, None] * frequencies
        qkv = _random((preset.tokens, whole, preset.width), dtype, g, d)
        return {"x": qkv[:, :turned], "cos": angles.cos().float().to(d), "sin": angles.sin().float().to(d)}

    def arguments(i: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (i["x"], i["cos"], i["sin"]), {}

    return [Case("rope_", "", shape, dtype, make, ("x",), arguments, _turned, _tuple, in_place=True)]


# Cross entropy


def _token_losses(logits: Tensor, target: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, target, ignore_index=-100, reduction="none")


def _vocab_parallel_cross_entropy(preset: Preset, dtype: torch.dtype) -> list[Case]:
    shape = {"T": min(preset.tokens, _CROSS_ENTROPY_TOKENS), "V": preset.vocabulary // preset.tensor}

    def make(g: torch.Generator, d: torch.device) -> Inputs:
        target = torch.randint(0, shape["V"], (shape["T"],), generator=g, device=d)
        target[::17] = -100
        return {"logits": _random((shape["T"], shape["V"]), dtype, g, d, 3.0), "target": target}

    return [
        Case(
            "vocab_parallel_cross_entropy", "", shape, dtype, make, ("logits",),
            lambda i: ((i["logits"], i["target"]), {"start": 0, "length": shape["V"]}),
            lambda i: (_token_losses(i["logits"], i["target"]),),
            _tuple,
            plain_bytes=16 * shape["T"] * shape["V"],
        )
    ]  # fmt: skip


def _linear_cross_entropy(preset: Preset, dtype: torch.dtype) -> list[Case]:
    tokens = min(preset.tokens, _CROSS_ENTROPY_TOKENS)
    shape = {"T": tokens, "V": preset.vocabulary // preset.tensor, "H": preset.hidden}

    def make(g: torch.Generator, d: torch.device) -> Inputs:
        target = torch.randint(0, shape["V"], (tokens,), generator=g, device=d)
        target[::17] = -100
        weight = _random((shape["V"], preset.hidden), dtype, g, d, 2 / math.sqrt(preset.hidden))
        return {"h": _random((tokens, preset.hidden), dtype, g, d), "weight": weight, "target": target}

    def by_blocks(i: Inputs) -> tuple[Tensor, ...]:
        def block(h: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return _token_losses(h @ weight.t(), target).sum()

        parts = zip(i["h"].split(512), i["target"].split(512), strict=True)
        return (sum(checkpoint(block, h, i["weight"], t, use_reentrant=False) for h, t in parts),)

    return [
        Case(
            "linear_cross_entropy", "", shape, dtype, make, ("h", "weight"),
            lambda i: ((i["h"], i["weight"], i["target"]), {"start": 0, "length": shape["V"]}),
            lambda i: (_token_losses(i["h"] @ i["weight"].t(), i["target"]).sum(),),
            _tuple,
            passes=("fwd+bwd",),
            exact=by_blocks,
            floor=dtype,
            plain_bytes=16 * tokens * shape["V"],
        )
    ]  # fmt: skip


# Attention


def _attention(preset: Preset, dtype: torch.dtype) -> list[Case]:
    shape = {
        "B": preset.tokens // preset.sequence,
        "S": preset.sequence,
        "A": preset.heads // preset.tensor,
        "G": preset.kv_heads // preset.tensor,
        "D": preset.width,
    }

    def make(g: torch.Generator, d: torch.device) -> Inputs:
        sizes = {"q": shape["A"], "k": shape["G"], "v": shape["G"]}
        return {n: _random((shape["B"], shape["S"], h, shape["D"]), dtype, g, d) for n, h in sizes.items()}

    def arguments(i: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (i["q"], i["k"], i["v"], public("AttentionSpec")(causal=True)), {}

    def formula(i: Inputs) -> tuple[Tensor, ...]:
        q, k, v = (i[name].transpose(1, 2) for name in ("q", "k", "v"))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(shape["D"])
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril_()
        wide = scores if scores.dtype == torch.float64 else scores.float()
        return ((wide.masked_fill(~seen, -math.inf).softmax(-1).to(q.dtype) @ v).transpose(1, 2),)

    def by_heads(i: Inputs) -> tuple[Tensor, ...]:
        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return formula({"q": q, "k": k, "v": v})[0]

        group = shape["A"] // shape["G"]
        rows = []
        for b in range(shape["B"]):
            at = [(slice(b, b + 1), slice(None), [h], [h // group]) for h in range(shape["A"])]
            parts = [(i["q"][x, y, h], i["k"][x, y, g], i["v"][x, y, g]) for x, y, h, g in at]
            rows.append(torch.cat([checkpoint(head, *part, use_reentrant=False) for part in parts], 2))
        return (torch.cat(rows),)

    scores = shape["B"] * shape["A"] * shape["S"] ** 2
    return [
        Case(
            "attention", "", shape, dtype, make, ("q", "k", "v"), arguments, formula, _tuple,
            exact=by_heads, plain_bytes=(3 * dtype.itemsize + 12) * scores,
        )
    ]  # fmt: skip


# AdamW on the shards of a rank: some of a few tensors of different sizes, the last of an odd one


def _shards(i: Inputs, decays: Sequence[float]) -> list[Any]:
    rows = zip(i["master"], i["grad"], i["exp_avg"], i["exp_avg_sq"], i["weights"], decays, strict=True)
    return [public("AdamWShard")(*tensors, weight_decay=decay) for *tensors, decay in rows]


def _adamw(preset: Preset, dtype: torch.dtype) -> list[Case]:
    sizes = [preset.shard // 8 * parts for parts in (4, 2, 1)]
    sizes.append(preset.shard - sum(sizes) - 3)
    sizes.append(3)
    shape, decays = {"P": preset.shard}, [DECAY, DECAY, DECAY, 0.0, 0.0]
    copies = dtype != torch.float32

    def make(g: torch.Generator, d: torch.device) -> Inputs:
        spread = {"master": 0.02, "grad": 1e-3, "exp_avg": 1e-3, "exp_avg_sq": 1e-3}
        made = {n: [_random((size,), torch.float32, g, d, by) for size in sizes] for n, by in spread.items()}
        made["exp_avg_sq"] = [v.square_() for v in made["exp_avg_sq"]]
        weights = [m.to(dtype) if copies else None for m in made["master"]]
        values = {"step": 10.0, "scale": 2.0, "skip": 0.0}
        scalars = {n: torch.tensor(value, dtype=torch.float32, device=d) for n, value in values.items()}
        return {**made, "weights": weights, **scalars}

    def scalars(i: Inputs) -> dict[str, Any]:
        return {"lr": LR, "betas": BETAS, "eps": EPS} | {name: i[name] for name in ("step", "scale", "skip")}

    def written(i: Inputs) -> tuple[Tensor, ...]:
        return (*i["master"], *i["exp_avg"], *i["exp_avg_sq"], *(w for w in i["weights"] if w is not None))

    def step(i: Inputs, scale: Tensor) -> tuple[Tensor, ...]:
        (beta1, beta2), t = BETAS, i["step"]
        tensors = (i["master"], i["grad"], i["exp_avg"], i["exp_avg_sq"], i["weights"])
        for m, g, a, s, w, decay in zip(*tensors, decays, strict=True):
            g = g / scale
            a.lerp_(g, 1 - beta1)
            s.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            root = (s / (1 - beta2**t)).sqrt_().add_(EPS)
            m.mul_(1 - LR * decay).sub_(LR * (a / (1 - beta1**t)) / root)
            if w is not None:
                w.copy_(m)
        return written(i)

    def clipping(total: Tensor) -> Tensor:
        return total.sqrt().clamp(min=1.0)

    def norm_and_step(i: Inputs) -> tuple[Tensor, ...]:
        return step(i, clipping(sum(g.square().sum() for g in i["grad"])))

    def call(i: Inputs, impl: str) -> tuple[Tensor, ...]:
        total = public("squared_norm")(i["grad"], impl=impl)
        keywords = scalars(i) | {"scale": clipping(total).to(torch.float32)}
        public("adamw_step_")(_shards(i, decays), **keywords, impl=impl)
        return written(i)

    def arguments(i: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (_shards(i, decays),), scalars(i)

    def outputs(_: Any, i: Inputs) -> tuple[Tensor, ...]:
        return written(i)

    alone = Case(
        "adamw_step_", "", shape, dtype, make, (), arguments, lambda i: step(i, i["scale"]), outputs, passes=("fwd",)
    )
    return [alone, replace(alone, name="norm", plain=norm_and_step, call=call)]


def _squared_norm(preset: Preset, dtype: torch.dtype) -> list[Case]:
    sizes = [preset.shard - preset.shard // 4 - 3, preset.shard // 4, 3]

    def make(g: torch.Generator, d: torch.device) -> Inputs:
        return {"grad": [_random((size,), torch.float32, g, d, 1e-3) for size in sizes]}

    def plain(i: Inputs) -> tuple[Tensor, ...]:
        return (torch.stack([g.square().sum() for g in i["grad"]]).sum(),)

    def arguments(i: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (i["grad"],), {}

    shape = {"P": preset.shard}
    return [Case("squared_norm", "", shape, torch.float32, make, (), arguments, plain, _tuple, passes=("fwd",))]


# A weight's gradient, summed over micro-batches in fp32: of the fused gate and up projection


def _wgrad(preset: Preset, dtype: torch.dtype) -> list[Case]:
    shape = {"T": preset.tokens, "O": 2 * preset.ffn // preset.tensor, "K": preset.hidden}

    def make(g: torch.Generator, d: torch.device) -> Inputs:
        return {
            "main_grad": _random((shape["O"], shape["K"]), torch.float32, g, d),
            "dy": _random((shape["T"], shape["O"]), dtype, g, d),
            "x": _random((shape["T"], shape["K"]), dtype, g, d),
        }

    def formula(i: Inputs) -> tuple[Tensor, ...]:
        return (i["main_grad"].add_(i["dy"].t() @ i["x"]),)

    return [
        Case(
            "wgrad_accumulate_", "", shape, dtype, make, (),
            lambda i: ((i["main_grad"], i["dy"], i["x"]), {}), formula, lambda _, i: (i["main_grad"],), passes=("fwd",),
        )
    ]  # fmt: skip


# Mixtures of experts: rows to their experts, and back


def _permuted(i: Inputs) -> tuple[Tensor, ...]:
    order = i["experts"].reshape(-1).argsort(stable=True)
    return (i["x"][order // i["experts"].shape[1]],)


def _moe_permute(preset: Preset, dtype: torch.dtype) -> list[Case]:
    shape = {"T": preset.tokens, "H": preset.hidden, "k": preset.top_k, "E": preset.experts}

    def make(g: torch.Generator, d: torch.device) -> Inputs:
        chosen = torch.rand(shape["T"], shape["E"], generator=g, device=d).argsort(-1)[:, : shape["k"]]
        return {"x": _random((shape["T"], shape["H"]), dtype, g, d), "experts": chosen.contiguous()}

    return [
        Case(
            "moe_permute", "", shape, dtype, make, ("x",),
            lambda i: ((i["x"], i["experts"], shape["E"]), {}),
            _permuted,
            lambda made, _: (made[0],),
        )
    ]  # fmt: skip


def _moe_unpermute(preset: Preset, dtype: torch.dtype) -> list[Case]:
    shape = {"T": preset.tokens, "H": preset.hidden, "k": preset.top_k, "E": preset.experts}
    size = shape["T"] * shape["k"]

    def make(g: torch.Generator, d: torch.device) -> Inputs:
        chosen = torch.rand(shape["T"], shape["E"], generator=g, device=d).argsort(-1)[:, : shape["k"]]
        return {
            "rows": _random((size, shape["H"]), dtype, g, d),
            "order": chosen.reshape(-1).argsort(stable=True),
            "weights": torch.rand(shape["T"], shape["k"], generator=g, device=d),
        }

    def formula(i: Inputs) -> tuple[Tensor, ...]:
        rows = i["rows"][i["order"].argsort()].view(shape["T"], shape["k"], shape["H"])
        return ((rows * i["weights"][..., None]).sum(1).to(i["rows"].dtype),)

    return [
        Case(
            "moe_unpermute", "", shape, dtype, make, ("rows", "weights"),
            lambda i: ((i["rows"], i["order"], i["weights"]), {}), formula, _tuple,
        )
    ]  # fmt: skip


_MAKERS: dict[str, Callable[[Preset, torch.dtype], list[Case]]] = {
    "rms_norm": _norms("rms_norm"),
    "layer_norm": _norms("layer_norm"),
    "rope_": _rope,
    "swiglu": _gated("swiglu"),
    "geglu": _gated("geglu"),
    "vocab_parallel_cross_entropy": _vocab_parallel_cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "attention": _attention,
    "adamw_step_": _adamw,
    "squared_norm": _squared_norm,
    "wgrad_accumulate_": _wgrad,
    "moe_permute": _moe_permute,
    "moe_unpermute": _moe_unpermute,
}
