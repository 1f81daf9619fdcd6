"""The attention dispatcher: its numbers on a CPU, its choices on machines that are written down, its words."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megapt_kernels.attention_backends import case as cases
from megapt_kernels.attention_backends import flash_attn, torch_flex, torch_sdpa, torch_varlen
from megapt_kernels.attention_backends.case import Case, Library, Machine
from megapt_kernels.attention_backends.documents import cu_seqlens, starts_and_ends
from megapt_kernels.attention_backends.known_wrong import KNOWN_WRONG, known_wrong
from megapt_kernels.attention_dispatch import OPERATIONS, AttentionSpec, attention, order
from megapt_kernels.registry import Unsupported, explain

CASES = {
    "one token": ((1, 1, 2, 1, 8), AttentionSpec()),
    "127": ((2, 127, 4, 2, 16), AttentionSpec()),
    "129 without order": ((1, 129, 2, 2, 16), AttentionSpec(causal=False)),
    "64 past a block": ((1, 192, 2, 1, 8), AttentionSpec(scale=0.5)),
    "window": ((2, 96, 4, 1, 8), AttentionSpec(window=7)),
    "window of one": ((1, 20, 2, 2, 8), AttentionSpec(window=1)),
    "window above all": ((1, 33, 2, 1, 8), AttentionSpec(window=1000)),
    "soft cap": ((1, 40, 2, 2, 8), AttentionSpec(softcap=1.5)),
    "documents": ((2, 64, 4, 2, 8), AttentionSpec(lengths=(1, 0, 40, 23, 1, 1, 62))),
    "equal documents": ((2, 64, 2, 1, 8), AttentionSpec(lengths=(32,) * 4)),
    "everything": ((2, 64, 4, 2, 8), AttentionSpec(window=9, softcap=2.0, scale=0.3, lengths=(64, 1, 20, 43))),
    "documents without order": ((1, 70, 2, 1, 8), AttentionSpec(causal=False, lengths=(3, 66, 1))),
    "odd width": ((1, 30, 2, 1, 7), AttentionSpec(window=5)),
}


def plain(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Attention as one writes it down, in the dtype of its arguments, with the matrix of all scores."""
    (batch, length, _, width), group = q.shape, q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    s = (q @ k.mT) * (width**-0.5 if spec.scale is None else spec.scale)
    if spec.softcap is not None:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    row, column = torch.arange(length)[:, None], torch.arange(length)
    seen = torch.ones(batch, length, length, dtype=torch.bool)
    if spec.lengths is not None:
        document = torch.repeat_interleave(torch.tensor(spec.lengths)).view(batch, length)
        seen &= document[:, :, None] == document[:, None, :]
    if spec.causal:
        seen &= column <= row
    if spec.window is not None:
        seen &= row - column < spec.window
    return (s.masked_fill(~seen[:, None], float("-inf")).softmax(-1) @ v).transpose(1, 2)


def tensors(shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """q, k, v and a gradient, fp64, with values that bfloat16 has as well."""
    batch, length, heads, kv_heads, width = shape
    make = torch.Generator().manual_seed(seed)
    sizes = (heads, kv_heads, kv_heads, heads)
    made = (torch.randn(batch, length, h, width, generator=make, dtype=torch.float64) for h in sizes)
    return [t.to(torch.bfloat16).double() for t in made]


def computed(function: Any, made: list[Tensor], dtype: torch.dtype, *arguments: Any, **keywords: Any) -> list[Tensor]:
    """The result and the gradients of q, k and v, in fp64."""
    q, k, v = (t.to(dtype).requires_grad_() for t in made[:3])
    y = function(q, k, v, *arguments, **keywords)
    return [t.double() for t in (y.detach(), *torch.autograd.grad(y, (q, k, v), made[3].to(dtype)))]


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_errors_stay_near_those_of_plain_pytorch(name: str, dtype: torch.dtype, impl: str) -> None:
    shape, spec = CASES[name]
    made = tensors(shape)
    exact = computed(plain, made, torch.float64, spec)
    theirs = computed(plain, made, dtype, spec)
    ours = computed(attention, made, dtype, spec, impl=impl)
    floor = torch.finfo(dtype).eps
    for factor, wanted, other, got in zip((2, 3, 3, 3), exact, theirs, ours, strict=True):
        bound = factor * (other - wanted).abs().max() + floor * wanted.abs().max()
        assert (got - wanted).abs().max() <= bound


@pytest.mark.parametrize("name", ["documents", "everything", "odd width", "documents without order"])
def test_the_reference_differentiates(name: str) -> None:
    _, spec = CASES[name]
    small = (1, 6, 2, 1, 2)
    spec = replace(spec, lengths=(3, 1, 2) if spec.lengths else None, window=spec.window and 2)
    q, k, v = (t.requires_grad_() for t in tensors(small)[:3])
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, spec, impl="reference"), (q, k, v))


def test_the_operators_keep_their_promises() -> None:
    q, k, v = (t[0].requires_grad_() for t in tensors((1, 12, 2, 1, 4))[:3])
    for flash in (False, True):
        arguments = (q, k, v, [5, 7], True, 3, None, None, flash)
        # Tracing them is held by the test of torch.compile.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.megapt_kernels.attention_by_runs.default, arguments, test_utils=checks)


@pytest.mark.parametrize("name", ["127", "everything"])
def test_compiles_in_one_graph(name: str) -> None:
    shape, spec = CASES[name]
    made = tensors(shape)
    torch.compiler.reset()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, spec), backend="aot_eager", fullgraph=True)
    wanted, got = computed(attention, made, torch.float32, spec), computed(compiled, made, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_strides_do_not_matter() -> None:
    qkv = torch.randn(2, 20, 6, 16, generator=torch.Generator().manual_seed(1))
    views = qkv.split([4, 1, 1], dim=2)
    turned = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in views]
    assert turned[0].stride(3) != 1
    wanted = attention(*(t.contiguous() for t in views))
    assert torch.equal(attention(*views), wanted) and torch.equal(attention(*turned), wanted)


@pytest.mark.parametrize("shape", [(0, 4, 2, 1, 8), (2, 0, 2, 1, 8)])
def test_nothing_gives_nothing(shape: tuple[int, ...]) -> None:
    made = tensors(shape)
    y, *gradients = computed(attention, made, torch.float32)
    assert y.shape == made[3].shape
    assert [g.shape for g in gradients] == [t.shape for t in made[:3]]


class _Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            self.elements = max(self.elements, t.numel() if isinstance(t, Tensor) else 0)
        return out


@pytest.mark.parametrize("spec", [AttentionSpec(), AttentionSpec(window=100, softcap=3.0), AttentionSpec(window=100)])
def test_no_back_end_keeps_all_scores(spec: AttentionSpec) -> None:
    from megapt_kernels.attention_backends import eager

    # Inside of the operator, where the mode sees what is made.
    q, k, v, dy = (t[0].float() for t in tensors((1, 4096, 1, 1, 8)))
    arguments = [4096], spec.causal, spec.window, None, spec.softcap, False
    with _Largest() as largest:
        out, sums = eager._forward._init_fn(q, k, v, *arguments)
        eager._backward._init_fn(dy, q, k, v, out, sums, *arguments)
    assert 0 < largest.elements <= 4096 * 256


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"q": torch.zeros(2, 4, 8)}, r"attention: q is \[B, S, heads, D\]"),
    "dtype": ({"q": torch.zeros(2, 4, 4, 8, dtype=torch.int32)}, "attention: q is bfloat16, float16.*not torch.int32"),
    "mixed dtypes": ({"k": torch.zeros(2, 4, 2, 8, dtype=torch.float16)}, "attention: k is torch.float16, but q is"),
    "device": ({"v": torch.zeros(2, 4, 2, 8, device="meta")}, "attention: v is on meta, but q is on cpu"),
    "values": ({"v": torch.zeros(2, 4, 1, 8)}, "attention: k is .* but v is"),
    "length": ({"k": torch.zeros(2, 5, 2, 8), "v": torch.zeros(2, 5, 2, 8)}, "k is .* only heads may differ"),
    "heads": ({"k": torch.zeros(2, 4, 3, 8), "v": torch.zeros(2, 4, 3, 8)}, "q has 4 heads.* k's 3"),
    "window": ({"spec": AttentionSpec(window=0)}, "spec.window .* at least 1, not 0"),
    "window ahead": ({"spec": AttentionSpec(window=2, causal=False)}, "spec.causal must be True"),
    "soft cap": ({"spec": AttentionSpec(softcap=0.0)}, "spec.softcap is positive, not 0.0"),
    "scale": ({"spec": AttentionSpec(scale=float("nan"))}, "spec.scale is a finite number"),
    "too few": ({"spec": AttentionSpec(lengths=(4, 3))}, "spec.lengths sums to 7 tokens; .* 2 x 4 = 8"),
    "over the end": ({"spec": AttentionSpec(lengths=(3, 2, 3))}, "document 1 of spec.lengths, tokens 3 to 4"),
    "negative": ({"spec": AttentionSpec(lengths=(4, 5, -1))}, "of a row of 4|-1 tokens"),
    "impl": ({"impl": "cudnn"}, "impl is one of .*torch cudnn.*not 'cudnn'"),
    "a library of a GPU": ({"impl": "flash-attn 3"}, "flash-attn 3: runs on CUDA devices, not on cpu"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refusals_name_the_argument(name: str) -> None:
    arguments = {"q": torch.zeros(2, 4, 4, 8), "k": torch.zeros(2, 4, 2, 8), "v": torch.zeros(2, 4, 2, 8)}
    changes, message = WRONG[name]
    with pytest.raises(Unsupported, match=message):
        attention(**(arguments | changes))


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["megapt_kernels.attention_dispatch"], "_announced", set())
    q, k, v, _ = (t.float() for t in tensors((1, 8, 2, 1, 8)))
    with caplog.at_level(logging.INFO, "megapt_kernels"):
        for spec in (AttentionSpec(), AttentionSpec(), AttentionSpec(window=2, lengths=(5, 3))):
            attention(q, k, v, spec)
    assert caplog.messages == [
        "attention on cpu (float32, causal): torch",
        "attention on cpu (float32, causal, windows, documents): torch",
    ]


# --- Choices on machines that are written down.

_HERE = Library((1,))
_ALL = {
    "cudnn": 92000,
    "flash_attn_2": Library((2, 8, 3)),
    "flash_attn_3": Library((3, 0)),
    "flash_attn_4": Library((4, 0, 0), None, frozenset({"deterministic", "max_seqlen_q", "backward window"})),
    "varlen": Library((2, 13), None, frozenset({"scale", "window_size", "enable_gqa"})),
    "triton": Library((3, 6)),
}
_TORCH_ONLY = {name: _ALL[name] for name in ("cudnn", "varlen", "triton")}
HOPPER = Machine("cuda", (9, 0), (2, 13), **_ALL)
HOPPER_TORCH = Machine("cuda", (9, 0), (2, 13), **_TORCH_ONLY)
BLACKWELL = Machine("cuda", (10, 0), (2, 13), **_ALL)
AMPERE = Machine("cuda", (8, 0), (2, 13), **_ALL)
ADA_TORCH = Machine("cuda", (8, 9), (2, 13), **_TORCH_ONLY)
TURING = Machine("cuda", (7, 5), (2, 13), **_TORCH_ONLY)
CPU = Machine("cpu", triton=Library((3, 9)))


class Shape:
    """What the dispatcher reads of a tensor, for a device that is not here."""

    def __init__(self, machine: Machine, shape: tuple[int, ...], dtype: torch.dtype, grad: bool) -> None:
        self.device, self.shape, self.dtype, self.requires_grad = torch.device(machine.device), shape, dtype, grad


def chosen(machine: Machine, monkeypatch: pytest.MonkeyPatch, spec: AttentionSpec, **changes: Any) -> Any:
    monkeypatch.setattr(cases, "machine", lambda device: machine)
    options = {"batch": 2, "length": 4096, "heads": 32, "kv_heads": 8, "width": 128, "grad": True}
    options |= {"dtype": torch.bfloat16} | changes
    rows, width, how = (options["batch"], options["length"]), options["width"], (options["dtype"], options["grad"])
    q, k = (Shape(machine, (*rows, options[name], width), *how) for name in ("heads", "kv_heads"))
    return explain("attention", q, k, k, spec)


DENSE, DOCUMENTS = AttentionSpec(), AttentionSpec(lengths=(4096, 96, 4000))
CAPPED = AttentionSpec(softcap=30.0)
TABLE: list[tuple[Machine, AttentionSpec, dict[str, Any], str]] = [
    (CPU, DENSE, {}, "torch"),
    (CPU, replace(DENSE, window=128), {}, "torch"),
    (CPU, CAPPED, {}, "blockwise"),
    (HOPPER, DENSE, {}, "flash-attn 3"),
    (HOPPER, DOCUMENTS, {}, "flash-attn 3"),
    (HOPPER, CAPPED, {}, "flash-attn 3"),
    (HOPPER, DENSE, {"width": 512}, "torch efficient"),
    (HOPPER, CAPPED, {"width": 512}, "blockwise"),
    (HOPPER, replace(DENSE, deterministic=True), {}, "flash-attn 2"),
    (HOPPER, replace(DENSE, deterministic=True), {"grad": False}, "flash-attn 3"),
    (HOPPER, DENSE, {"dtype": torch.float32}, "torch efficient"),
    (HOPPER, DOCUMENTS, {"dtype": torch.float32}, "triton"),
    (HOPPER, replace(DENSE, deterministic=True), {"dtype": torch.float32}, "triton"),
    (HOPPER, DENSE, {"dtype": torch.float64}, "blockwise"),
    (HOPPER_TORCH, DENSE, {}, "torch cudnn"),
    (HOPPER_TORCH, DENSE, {"length": 4096 + 64}, "torch flash"),
    (HOPPER_TORCH, DENSE, {"length": 4096 + 64, "grad": False}, "torch cudnn"),
    (HOPPER_TORCH, DENSE, {"length": 1}, "torch flash"),
    (HOPPER_TORCH, DENSE, {"width": 80}, "torch cudnn"),
    (HOPPER_TORCH, DENSE, {"width": 192}, "torch flash"),
    (HOPPER_TORCH, DENSE, {"width": 100}, "triton"),
    (HOPPER_TORCH, AttentionSpec(causal=False), {}, "torch cudnn"),
    (HOPPER_TORCH, DOCUMENTS, {}, "torch varlen"),
    (HOPPER_TORCH, replace(DENSE, window=512), {}, "torch varlen"),
    (HOPPER_TORCH, replace(DENSE, window=4096), {}, "torch cudnn"),
    (HOPPER_TORCH, replace(DENSE, lengths=(2048,) * 4), {}, "torch cudnn"),
    (HOPPER_TORCH, CAPPED, {}, "triton"),
    (HOPPER_TORCH, replace(DENSE, deterministic=True), {}, "triton"),
    (replace(HOPPER_TORCH, torch=(2, 10)), DENSE, {"length": 4096 + 64}, "torch cudnn"),
    (replace(HOPPER_TORCH, triton=Library(problem="is not installed")), CAPPED, {}, "blockwise"),
    (replace(HOPPER_TORCH, triton=Library(problem="is not installed")), DOCUMENTS, {"width": 100}, "blockwise"),
    (BLACKWELL, DENSE, {}, "flash-attn 4"),
    (BLACKWELL, DOCUMENTS, {}, "flash-attn 4"),
    (BLACKWELL, replace(DENSE, deterministic=True), {}, "flash-attn 4"),
    (BLACKWELL, CAPPED, {}, "flash-attn 2"),
    (BLACKWELL, DENSE, {"width": 256}, "torch flash"),
    (replace(BLACKWELL, flash_attn_4=_HERE), replace(DENSE, window=64), {}, "flash-attn 2"),
    (replace(BLACKWELL, flash_attn_4=_HERE), DENSE, {"grad": False}, "flash-attn 4"),
    (replace(HOPPER_TORCH, capability=(10, 0)), DENSE, {}, "torch flash"),
    (replace(HOPPER_TORCH, capability=(10, 0)), DENSE, {"grad": False}, "torch cudnn"),
    (replace(HOPPER_TORCH, capability=(10, 0)), DENSE, {"grad": False, "kv_heads": 4}, "torch flash"),
    (AMPERE, DENSE, {}, "flash-attn 2"),
    (AMPERE, CAPPED, {}, "flash-attn 2"),
    (replace(AMPERE, flash_attn_2=Library((2, 5, 9))), DENSE, {}, "torch flash"),
    (AMPERE, DENSE, {"dtype": torch.float32, "width": 66}, "triton"),
    (ADA_TORCH, DENSE, {}, "torch flash"),
    (ADA_TORCH, DENSE, {"width": 256}, "triton"),
    (ADA_TORCH, DENSE, {"width": 256, "grad": False}, "torch flash"),
    (TURING, DENSE, {"dtype": torch.float16}, "torch efficient"),
    (TURING, DOCUMENTS, {"dtype": torch.float32}, "torch efficient"),
    (TURING, DENSE, {}, "blockwise"),
]


@pytest.mark.parametrize(("machine", "spec", "changes", "name"), TABLE)
def test_choices(
    machine: Machine, spec: AttentionSpec, changes: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    explanation = chosen(machine, monkeypatch, spec, **changes)
    assert explanation.chosen.name == name, explanation
    assert all(reason for _, reason in explanation.rejected)
    told = {rejected for rejected, _ in explanation.rejected} | set(explanation.later) | {name}
    assert told == {i.name for i in OPERATIONS["attention"].implementations}


def test_tokens_are_counted_in_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unsupported, match="q has B x S = 65536 x 32768 tokens"):
        chosen(HOPPER, monkeypatch, DENSE, batch=1 << 16, length=1 << 15)
    assert chosen(HOPPER, monkeypatch, DENSE, batch=(1 << 16) - 2, length=1 << 15).chosen is not None


def test_torch_set_to_be_deterministic_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    spec = replace(DENSE, deterministic=True)
    assert chosen(HOPPER_TORCH, monkeypatch, spec).chosen.name == "torch flash"
    assert chosen(HOPPER_TORCH, monkeypatch, replace(spec, lengths=DOCUMENTS.lengths)).chosen.name == "torch varlen"


def test_explanations_say_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(HOPPER, flash_attn_3=Library(problem="does not load: ImportError: undefined symbol: _ZN3c10"))
    text = str(chosen(broken, monkeypatch, DENSE, length=4160))
    assert text.startswith("attention: flash-attn 4\n  not flash-attn 3: does not load: ImportError: undefined symbol")
    text = str(chosen(HOPPER_TORCH, monkeypatch, DENSE, length=4160))
    assert "not torch cudnn: NaN in the gradient of q" in text and "pytorch/issues/196678" in text


def _case(**changes: Any) -> Case:
    usual: dict[str, Any] = {
        "machine": HOPPER, "dtype": torch.bfloat16, "count": 2, "length": 4096, "varied": False, "heads": 32,
        "kv_heads": 8, "width": 128, "grad": True, "causal": True, "windowed": False, "softcap": False,
        "repeatable": False, "strict": False,
    }  # fmt: skip
    return Case(**(usual | changes))


def test_known_faults_are_data() -> None:
    names = {i.name for i in OPERATIONS["attention"].implementations}
    harmless = [_case(), _case(machine=AMPERE), _case(machine=HOPPER, length=4096 + 32)]
    for entry in KNOWN_WRONG:
        assert entry.backend in names and entry.link.startswith("https://github.com/") and entry.reason
        assert not any(entry.when(case) for case in harmless)
    flex = _case(softcap=True, length=100)
    assert "153799" in (known_wrong("torch flex", flex) or "")
    assert known_wrong("torch flex", replace(flex, length=128)) is None


def test_every_order_names_every_back_end() -> None:
    names = {i.name for i in OPERATIONS["attention"].implementations}
    for machine in (CPU, HOPPER, BLACKWELL, AMPERE, TURING):
        for varied in (False, True):
            found = order(_case(machine=machine, varied=varied))
            assert set(found) == names and len(found) == len(names)
            assert machine.device == "cpu" or found.index("blockwise") > found.index("torch efficient")


def test_probing_finds_broken_and_missing_libraries(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cases._library("nothing", "no_such_library.inside", "f").problem == "is not installed"
    (tmp_path / "broken_attention").mkdir()
    (tmp_path / "broken_attention" / "__init__.py").write_text("raise OSError('undefined symbol: x\\nsecond line')")
    monkeypatch.syspath_prepend(str(tmp_path))
    problem = cases._library("broken", "broken_attention", "f").problem
    assert problem == "does not load: OSError: undefined symbol: x"
    assert cases._numbers("4.0.0b11") == (4, 0, 0) and cases._numbers("2.13.0+cpu") == (2, 13, 0)
    found = cases._library("torch", "torch.nn.attention.varlen", "varlen_attn")
    assert found.problem is None and {"scale", "window_size"} <= found.options


# --- The libraries' ways of being called, by stand-ins that compute.


class FlashLibrary(ModuleType):
    """flash-attn's functions by plain operations: windows count the tokens before and behind a query."""

    def __init__(self, name: str, everything: int | None) -> None:
        super().__init__(name)
        self.everything, self.calls = everything, []

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return self.flash_attn_varlen_func(q, k, v, None, None, **options)

    def flash_attn_varlen_func(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any, **options: Any
    ) -> Any:
        self.calls.append(options)
        before, behind = options["window_size"]
        assert behind in (0, self.everything) and (before is self.everything or options["causal"])
        lengths = None
        if cu_seqlens_q is not None:
            assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q is cu_seqlens_k
            lengths = tuple(cu_seqlens_q.diff().tolist())
            assert options.get("max_seqlen_q", max(lengths)) == max(lengths)
            q, k, v = (t.unsqueeze(0) for t in (q, k, v))
        window = None if before == self.everything else before + 1
        cap = options.get("softcap") or None
        y = plain(q, k, v, AttentionSpec(options["causal"], window, options["softmax_scale"], cap, lengths))
        y = y.squeeze(0) if lengths else y
        return (y, None) if self.everything is None else y


LIBRARIES = {
    "flash-attn 2": ("flash_attn.flash_attn_interface", -1, flash_attn.run_2),
    "flash-attn 3": ("flash_attn_interface", -1, flash_attn.run_3),
    "flash-attn 4": ("flash_attn.cute", None, flash_attn.run_4),
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["127", "129 without order", "window", "documents", "equal documents", "everything"])
def test_flash_attn_is_called_as_it_wants(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, everything, run = LIBRARIES[library]
    stand_in = FlashLibrary(module, everything)
    monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.setattr(flash_attn, "machine", lambda device: BLACKWELL)
    shape, spec = CASES[name]
    q, k, v, _ = tensors(shape)
    wanted = plain(q, k, v, spec)
    assert torch.allclose(run(q, k, v, replace(spec, deterministic=True)), wanted, rtol=0, atol=1e-12)
    (options,) = stand_in.calls
    assert options.get("deterministic", False) == (library != "flash-attn 3")


def test_flash_attn_is_traced_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, **options: Any) -> Tensor:
        return q * cu_seqlens_q[1]

    module = ModuleType("flash_attn_interface")
    vars(module).update(flash_attn_func=varlen, flash_attn_varlen_func=varlen)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    q, k, v, _ = tensors((1, 10, 2, 1, 8))
    spec = AttentionSpec(lengths=(3, 7))
    torch.compiler.reset()
    compiled = torch.compile(lambda *qkv: flash_attn.run_3(*qkv, spec), backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), q * 3)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("name", ["127", "129 without order", "window", "documents"])
def test_varlen_is_called_as_it_wants(name: str, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.nn.attention.varlen

    options = frozenset({"scale", "window_size"}) | ({"enable_gqa"} if grouped else set())
    monkeypatch.setattr(torch_varlen, "machine", lambda device: replace(HOPPER, varlen=Library((2,), None, options)))

    def stand_in(q, k, v, bounds, bounds_k, longest, longest_k, *, scale, window_size, enable_gqa=False):
        assert enable_gqa == (q.shape[1] != k.shape[1])
        causal = window_size[1] == 0
        library = FlashLibrary("stand-in", -1)
        return library.flash_attn_varlen_func(
            q, k, v, bounds, bounds_k, max_seqlen_q=longest, causal=causal, softmax_scale=scale, window_size=window_size
        )

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", stand_in)
    shape, spec = CASES[name]
    q, k, v, _ = tensors(shape)
    assert torch.allclose(torch_varlen.run(q, k, v, spec), plain(q, k, v, spec), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["127", "129 without order", "documents", "equal documents"])
def test_sdpa_is_called_as_it_wants(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, spec = CASES[name]
    q, k, v, _ = tensors(shape)
    asked = []

    def stand_in(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: Any, enable_gqa: bool) -> Tensor:
        assert enable_gqa == (q.shape[1] != k.shape[1])
        asked.append(torch.nn.attention._cur_sdpa_kernel_backends())
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return plain(q, k, v, AttentionSpec(is_causal, scale=scale)).transpose(1, 2)

    monkeypatch.setattr(torch_sdpa.F, "scaled_dot_product_attention", stand_in)
    kernels = torch.nn.attention.SDPBackend
    for run, kernel in (
        (torch_sdpa.run_cudnn, kernels.CUDNN_ATTENTION),
        (torch_sdpa.run_flash, kernels.FLASH_ATTENTION),
        (torch_sdpa.run_efficient, kernels.EFFICIENT_ATTENTION),
    ):
        asked.clear()
        assert torch.allclose(run(q, k, v, spec), plain(q, k, v, spec), rtol=0, atol=1e-12)
        assert all(only == [kernel] for only in asked) and asked


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("spec", [
    AttentionSpec(), AttentionSpec(causal=False, lengths=(300, 1, 83)), AttentionSpec(window=130, lengths=(384,)),
    AttentionSpec(window=3, softcap=2.0, lengths=(100, 28, 256)), AttentionSpec(lengths=(128, 128, 128)),
])  # fmt: skip
def test_flex_attention_sees_blocks(spec: AttentionSpec) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v, _ = (t.float() for t in tensors((1, 384, 2, 1, 16)))
    wanted, got = plain(q, k, v, spec), torch_flex.attend(flex_attention, q, k, v, spec)
    assert torch.allclose(got, wanted, rtol=0, atol=1e-5)
    # A block is listed where a token of it is seen, as one in whole where all are.
    lengths = spec.lengths or (384,)
    mask = torch_flex.block_mask(lengths, spec.causal, spec.window, torch.device("cpu"))
    ones = torch.ones(1, 384, 2, 16)
    seen = plain(ones, ones, torch.eye(384)[None, :, None].expand(1, -1, 2, -1), replace(spec, softcap=None))
    blocks = (seen[0, :, 0] > 0).view(3, 128, 3, 128)
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks.any(3).any(1))
    assert mask.full_kv_num_blocks[0, 0].tolist() == blocks.all(3).all(1).sum(1).tolist()


def test_bounds_of_documents_outlive_inference() -> None:
    device = torch.device("cpu")
    with torch.inference_mode():
        bounds = cu_seqlens((3, 1, 7), device)
        starts, ends = starts_and_ends((3, 1, 7), device)
    assert not bounds.is_inference() and not starts.is_inference()
    assert bounds.tolist() == [0, 3, 4, 11] and bounds.dtype == starts.dtype == ends.dtype == torch.int32
    assert starts.tolist() == [0] * 3 + [3] + [4] * 7 and ends.tolist() == [3] * 3 + [4] + [11] * 7
