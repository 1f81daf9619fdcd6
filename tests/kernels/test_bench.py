"""The microbenchmark: its formulas against torch and literal figures, its verdicts on wrong implementations."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megapt_kernels import registry
from megapt_kernels.bench import measure, report, rows, work
from megapt_kernels.bench.__main__ import main
from megapt_kernels.bench.accuracy import Judge, compute, relative_error
from megapt_kernels.bench.cases import Case, cases
from megapt_kernels.bench.measure import CpuClock, CudaClock, NotCapturable, Times
from megapt_kernels.bench.presets import PRESETS, Preset
from megapt_kernels.registry import Implementation, Operation

TINY = Preset("tiny", 32, 48, 4, 2, 8, 96, tokens=12, sequence=6, shard=65, experts=4, top_k=2)
FAST = ("--tokens", "16", "--parameters", "64", "--seconds", "0.0005", "--device", "cpu")


@pytest.fixture(autouse=True, scope="module")
def _quick_ceilings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(measure.LARGEST, "cpu", (1 << 20, 64))
        yield


def tiny(op: str, name: str = "", dtype: torch.dtype = torch.float64) -> Case:
    return next(case for case in cases([op], TINY, dtype) if case.name == name)


def inputs_of(case: Case) -> dict[str, Any]:
    return case.make(torch.Generator().manual_seed(0), torch.device("cpu"))


def measured(path: Path) -> list[dict[str, Any]]:
    return [row for row in rows.read(path) if row["record"] == "measurement"]


# Least work


@pytest.mark.parametrize(
    ("op", "name", "forward", "backward"),
    [
        ("rms_norm", "", 4, 6),
        ("rms_norm", "residual", 8, 8),
        ("rope_", "", 4, 4),
        ("swiglu", "", 6, 10),
        ("geglu", "", 6, 10),
        ("vocab_parallel_cross_entropy", "", 2, 4),
        ("adamw_step_", "", 30, None),
        ("adamw_step_", "norm", 34, None),
    ],
)
def test_least_bytes_per_element_in_bf16(op: str, name: str, forward: int, backward: int | None) -> None:
    case = tiny(op, name, torch.bfloat16)
    elements = {
        "rms_norm": 12 * 32, "rope_": 12 * 6 * 8, "swiglu": 12 * 48, "geglu": 12 * 48, "adamw_step_": 65,
        "vocab_parallel_cross_entropy": 12 * 96,
    }[op]  # fmt: skip
    assert work.least_bytes(op, name, "fwd", case.shape, 2) == forward * elements
    if backward is not None:
        assert work.least_bytes(op, name, "bwd", case.shape, 2) == backward * elements
        assert work.least_bytes(op, name, "fwd+bwd", case.shape, 2) == (forward + backward) * elements


def test_matrix_flops_are_the_usual_counts() -> None:
    shape = {"B": 2, "S": 10, "A": 3, "G": 1, "D": 4}
    assert work.matrix_flops("attention", "fwd", shape) == 4 * 2 * 3 * 10**2 * 4 // 2
    assert work.matrix_flops("attention", "bwd", shape) == 2.5 * work.matrix_flops("attention", "fwd", shape)
    assert work.matrix_flops("linear_cross_entropy", "fwd+bwd", {"T": 5, "V": 7, "H": 11}) == 6 * 5 * 7 * 11
    assert work.matrix_flops("wgrad_accumulate_", "fwd", {"T": 5, "O": 7, "K": 11}) == 2 * 5 * 7 * 11
    assert work.matrix_flops("rms_norm", "fwd", {}) == 0


def test_every_operation_has_cases_and_every_case_formulas() -> None:
    found = cases(registry.operations(), TINY, torch.float32)
    assert {case.op for case in found} == set(registry.operations())
    assert {(case.op, case.name) for case in found} == set(work.BYTES)
    for op, name, which in work.TARGETS:
        assert which in tiny(op, name).passes


def test_presets_divide_among_their_devices() -> None:
    for preset in PRESETS.values():
        for size in (preset.heads, preset.kv_heads, preset.ffn, preset.vocabulary):
            assert size % preset.tensor == 0
        assert preset.tokens % preset.sequence == 0
    sized = PRESETS["llama-8b"].sized(1000, 300)
    assert (sized.tokens, sized.sequence) == (900, 300)
    assert PRESETS["llama-8b"].sized(100).sequence == 100


# The plain formulas are what everything is judged by


def _oracle(op: str, i: dict[str, Any]) -> Tensor:
    if op == "rms_norm":
        return F.rms_norm(i["x"], (32,), i["weight"], 1e-5)
    if op == "layer_norm":
        return F.layer_norm(i["x"], (32,), i["weight"], i["bias"], 1e-5)
    if op == "attention":
        q, k, v = (i[name].transpose(1, 2) for name in "qkv")
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    if op == "linear_cross_entropy":
        return F.cross_entropy(F.linear(i["h"], i["weight"]), i["target"], reduction="sum")
    if op == "rope_":
        angle = torch.complex(i["cos"].double(), i["sin"].double()).repeat(2, 1)[:, None]
        turned = torch.complex(i["x"][..., :4], i["x"][..., 4:]) * angle
        return torch.cat((turned.real, turned.imag), -1)
    rows_of = {row: slot for slot, row in enumerate(i["order"].tolist())}
    weighted = [sum(i["weights"][t, j] * i["rows"][rows_of[2 * t + j]] for j in range(2)) for t in range(12)]
    return torch.stack(weighted)


@pytest.mark.parametrize(
    "op", ["rms_norm", "layer_norm", "attention", "linear_cross_entropy", "rope_", "moe_unpermute"]
)
def test_plain_formulas_agree_with_torch(op: str) -> None:
    case = tiny(op)
    inputs = inputs_of(case)
    torch.testing.assert_close(case.plain(inputs)[0], _oracle(op, inputs), rtol=1e-6, atol=1e-6)


def test_plain_adamw_agrees_with_torch() -> None:
    case = tiny("adamw_step_", dtype=torch.bfloat16)
    inputs = inputs_of(case)
    inputs["step"] = torch.tensor(1.0)
    for name in ("exp_avg", "exp_avg_sq"):
        inputs[name] = [torch.zeros_like(t) for t in inputs[name]]
    parameters = [torch.nn.Parameter(m.clone()) for m in inputs["master"]]
    decays = (0.1, 0.1, 0.1, 0.0, 0.0)
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(parameters, decays, strict=True)]
    for parameter, grad in zip(parameters, inputs["grad"], strict=True):
        parameter.grad = grad / 2
    torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8).step()
    case.plain(inputs)
    for parameter, master, weight in zip(parameters, inputs["master"], inputs["weights"], strict=True):
        torch.testing.assert_close(master, parameter.detach(), rtol=1e-5, atol=1e-8)
        assert torch.equal(weight, master.bfloat16())


@pytest.mark.parametrize("op", ["attention", "linear_cross_entropy"])
def test_exact_results_by_pieces_are_the_whole_ones(op: str) -> None:
    case = tiny(op)
    assert case.exact is not None
    whole, pieces = (compute(case, run, inputs_of(case)) for run in (case.plain, case.exact))
    for one, other in zip((*whole.outputs, *whole.gradients), (*pieces.outputs, *pieces.gradients), strict=True):
        torch.testing.assert_close(one, other)


def test_relative_error() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0.0
    assert relative_error(torch.tensor([float("nan"), 4.0]), exact) != relative_error(exact, exact)


# Verdicts


def _reference(case: Case, change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda xy: change(case.plain({"xy": xy})[0])


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 1.01 * gradient


def _raise(xy: Tensor) -> Tensor:
    raise RuntimeError("broken on purpose")


def _overwrite(xy: Tensor) -> Tensor:
    with torch.no_grad():
        result = F.silu(xy[:, :1408]) * xy[:, 1408:]
        xy.fill_(float("nan"))
    return result


def _swiglu(monkeypatch: pytest.MonkeyPatch, **runs: Callable[..., Tensor]) -> None:
    """The operation with these implementations alone."""
    from megapt_kernels import glu

    real = glu.OPERATIONS["swiglu"]
    made = [Implementation("library", name, lambda xy: None, run) for name, run in runs.items()]
    made.append(Implementation("library", "never", lambda xy: f"not for {xy.dtype}", _raise))
    monkeypatch.setitem(glu.OPERATIONS, "swiglu", Operation("swiglu", real.check, made))


def test_wrong_and_broken_implementations_are_rows_and_a_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = tiny("swiglu")
    nan = torch.tensor(float("nan"))
    _swiglu(
        monkeypatch,
        overwrites=_overwrite,
        right=_reference(case, lambda y: y),
        wrong=_reference(case, lambda y: 1.01 * y),
        gradient=_reference(case, _WrongGradient.apply),
        invalid=_reference(case, lambda y: torch.where(y > 2, nan, y)),
        shape=_reference(case, lambda y: y[:, 1:]),
        broken=_raise,
    )
    out = tmp_path / "rows.jsonl"
    assert main(["swiglu", *FAST, "--impl", "library", "--pass", "fwd,bwd", "--out", str(out)]) == 1
    found = {(row["impl"], row["pass"]): row for row in measured(out)}
    status = {key: row["status"] for key, row in found.items()}
    assert status["right", "fwd"] == status["right", "bwd"] == "ok"
    assert status["wrong", "fwd"] == status["wrong", "bwd"] == "failed"
    assert (status["gradient", "fwd"], status["gradient", "bwd"]) == ("ok", "failed")
    assert status["invalid", "fwd"] == "failed"
    assert "shape" in found["shape", None]["reason"] and status["shape", None] == "failed"
    assert "broken on purpose" in found["broken", None]["reason"] and status["broken", None] == "failed"
    assert found["never", None]["reason"] == "not for torch.float32" and status["never", None] == "skipped"
    assert found["overwrites", None]["status"] == "failed"  # its result takes no part in autograd
    for key in (("right", "fwd"), ("wrong", "bwd")):
        assert found[key]["p20_us"] <= found[key]["p50_us"] <= found[key]["p80_us"]
        assert found[key]["bytes"] == 4 * {"fwd": 3, "bwd": 5}[key[1]] * 16 * 1408
    _swiglu(monkeypatch, right=_reference(case, lambda y: y))
    assert main(["swiglu", *FAST, "--impl", "library"]) == 0


def test_a_device_that_answers_no_more_ends_the_run_after_its_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(self: CpuClock) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(CpuClock, "synchronize", gone)
    _swiglu(monkeypatch, broken=_raise, right=_reference(tiny("swiglu"), lambda y: y))
    out = tmp_path / "rows.jsonl"
    assert main(["swiglu", *FAST, "--impl", "library", "--out", str(out)]) == 3
    (row,) = measured(out)
    assert row["status"] == "failed" and "answers no more" in row["reason"] and "on purpose" in row["reason"]
    assert "stopped: swiglu, broken" in capsys.readouterr().out


def test_a_budget_skips_what_is_left_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = tiny("swiglu")
    calls: list[None] = []

    def first(xy: Tensor) -> Tensor:
        calls.append(None)
        return case.plain({"xy": xy})[0]

    # A minute goes by while the first one is timed in its first pass.
    clock = SimpleNamespace(perf_counter=lambda: 60.0 if len(calls) > 3 else 0.0)
    monkeypatch.setattr("megapt_kernels.bench.run.time", clock)
    _swiglu(monkeypatch, first=first, second=first)
    out = tmp_path / "rows.jsonl"
    assert main(["swiglu", *FAST, "--impl", "library", "--pass", "fwd,bwd", "--budget", "30", "--out", str(out)]) == 0
    found = {(row["impl"], row["pass"]): row for row in measured(out)}
    assert found["first", "fwd"]["status"] == "ok"
    for late in (("first", "bwd"), ("second", None)):
        assert found[late]["status"] == "skipped" and "30 s for this case were over" in found[late]["reason"]


def test_the_judge_keeps_nothing_of_what_implementations_do_to_inputs() -> None:
    case = tiny("vocab_parallel_cross_entropy", dtype=torch.float32)
    judge = Judge(case, lambda: inputs_of(case), None)

    def consuming(i: dict[str, Any]) -> tuple[Tensor, ...]:
        made = case.plain(i | {"logits": i["logits"] * 1})
        i["logits"].data.zero_()
        return made

    for _ in range(2):
        errors = judge.errors(compute(case, consuming, inputs_of(case)))
        assert errors["fwd+bwd"] is not None and errors["fwd+bwd"].within


# Every operation, the file of rows, and one run beside another


@pytest.fixture(scope="module")
def all_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "all.jsonl"
    picture = out.with_suffix(".png")
    arguments = ["all", *FAST, "--impl", "reference,eager", "--out", str(out), "--plot", str(picture)]
    assert main(arguments) == 0
    return out


def test_every_operation_is_measured_in_every_pass(all_rows: Path) -> None:
    found = measured(all_rows)
    for case in cases(registry.operations(), TINY, torch.float32):
        here = [row for row in found if (row["op"], row["case"]) == (case.op, case.name)]
        timed = {(row["kind"], row["pass"]) for row in here if row["status"] == "ok"}
        assert {("eager", which) for which in case.passes} <= timed, case.title
        assert {("reference", which) for which in case.passes} <= timed, case.title
    for row in found:
        assert row["status"] == "ok" or row["reason"]
        assert tuple(row) == rows.COLUMNS
        if row["status"] == "ok":
            assert row["error"] <= row["error_allowed"] and row["error_against"] == "fp64"
            assert row["gb_per_s"] > 0 and row["percent_of_limit"] > 0 and row["timing"] == "wall clock"
            assert row["tflops"] > 0 or row["op"] not in work.FLOPS
    ceilings = [row for row in rows.read(all_rows) if row["record"] == "ceiling"]
    assert [row["op"] for row in ceilings] == ["copy", "gemm"]
    assert ceilings[0]["gb_per_s"] > 0 and ceilings[1]["tflops"] > 0
    assert all_rows.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_an_existing_file_is_only_added_to_on_request(
    all_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_bytes(all_rows.read_bytes())
    arguments = ["moe_permute", *FAST, "--impl", "eager", "--pass", "fwd", "--out", str(out)]
    assert main(arguments) == 2
    assert "--append" in capsys.readouterr().err and out.read_bytes() == all_rows.read_bytes()
    assert main([*arguments, "--append"]) == 0
    assert out.read_bytes().startswith(all_rows.read_bytes()) and len(rows.read(out)) > len(rows.read(all_rows))
    out.write_bytes(all_rows.read_bytes()[:-5])
    assert main([*arguments, "--append"]) == 2


def _old(path: Path, **changes: Any) -> list[str]:
    """A file of rows as of an earlier run with these changes, and the run to compare with it."""
    arguments = ["moe_permute", *FAST, "--impl", "eager", "--pass", "fwd"]
    if not path.exists():
        assert main([*arguments, "--out", str(path)]) == 0
    found = [row | {name: change(row) for name, change in changes.items()} for row in rows.read(path)]
    changed = path.with_name("changed.jsonl")
    changed.write_text("".join(json.dumps(row) + "\n" for row in found))
    return [*arguments, "--compare", str(changed), "--tolerance", "50%"]


def test_compare_fails_on_what_became_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.jsonl"
    assert main(_old(path, p50_us=lambda row: row["p50_us"] / 100)) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert main(_old(path, p50_us=lambda row: row["p50_us"] * 100)) == 0
    assert "faster" in capsys.readouterr().out
    assert main(_old(path, name=lambda row: "another processor")) == 2
    assert "another processor" in capsys.readouterr().err
    assert main(_old(path, shape=lambda row: row["shape"] | {"T": 17})) == 2
    assert "17" in capsys.readouterr().err
    assert main(_old(path, impl=lambda row: "gone")) == 0


def test_compare_counts_a_row_that_was_lost() -> None:
    old: dict[str, Any] = dict.fromkeys(rows.COLUMNS)
    old |= {"record": "measurement", "status": "ok", "p50_us": 1.0, "op": "a"}
    lines, worse = rows.compare([old], [old | {"status": "failed", "reason": "it broke"}], 0.05)
    assert worse and "it broke" in lines[0]
    assert rows.compare([old], [old | {"p50_us": 1.04}], 0.05)[1] is False
    assert rows.compare([old], [old | {"p50_us": 1.06}], 0.05)[1] is True


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rms_nrom"], "rms_nrom"),
        (["rms_norm", "--pass", "forward"], "forward"),
        (["rms_norm", "--impl", "warp", "--device", "cpu"], "warp"),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_the_emulator_is_timed_on_request_and_marked(device: str, tmp_path: Path) -> None:
    if device == "cuda":
        pytest.skip("with a GPU the kernels are not emulated")
    out = tmp_path / "rows.jsonl"
    arguments = ["swiglu", "--tokens", "2", "--device", "cpu", "--seconds", "0.0005", "--pass", "fwd"]
    assert main([*arguments, "--impl", "cuda", "--out", str(out)]) == 0
    (row,) = measured(out)
    assert row["emulated"] is True and row["status"] == "ok" and row["registers"] is None
    assert main([*arguments, "--out", str(out), "--append", "--impl", "all", "--budget", "0.0001"]) == 0
    assert any(row["kind"] == "cuda" and "emulator" in (row["reason"] or "") for row in measured(out))


# Time and the device


def test_percentiles() -> None:
    assert Times.of([n * 1e-6 for n in range(100, -1, -1)]) == Times(
        pytest.approx(20.0), pytest.approx(50.0), pytest.approx(80.0), 101
    )


def test_what_is_done_before_takes_no_part_in_the_time() -> None:
    times = CpuClock(torch.device("cpu")).time("eager", lambda: time.sleep(0.01), lambda _: None, 0.001)
    assert times.repeats >= 5 and times.p80 < 5e3


class _Gpu:
    """What CudaClock asks of torch.cuda, as a log; an event's time is the number of works before it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.works, self.capturing, self.refuse = 0, False, False
        gpu = self

        class Context:
            def __init__(self, *_: Any, **__: Any) -> None: ...

            def __enter__(self) -> None: ...

            def __exit__(self, *_: Any) -> None: ...

        class Stream(Context):
            def synchronize(self) -> None:
                gpu.log.append("wait")

        class Graph(Context):
            def __enter__(self) -> None:
                gpu.log.append("capture")
                gpu.capturing = True

            def __exit__(self, *_: Any) -> None:
                gpu.capturing = False
                if gpu.refuse:
                    raise RuntimeError("operation not permitted when stream is capturing")

        class Event:
            def __init__(self, enable_timing: bool) -> None: ...

            def record(self) -> None:
                gpu.log.append("event")
                self.at = gpu.works

            def elapsed_time(self, end: Any) -> float:
                return float(end.at - self.at)

        class CUDAGraph:
            def replay(self) -> None:
                gpu.work(None)

        fakes = {"Stream": Stream, "stream": Context, "device": Context, "graph": Graph, "Event": Event}
        fakes |= {"CUDAGraph": CUDAGraph, "synchronize": lambda *_: None}
        fakes["get_device_properties"] = lambda _: SimpleNamespace(L2_cache_size=1 << 20)
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        self.clock = CudaClock(torch.device("cpu"))
        real = self.clock._cold
        self.clock._cold = SimpleNamespace(zero_=lambda: self.log.append("flush"), bytes=real.numel())  # type: ignore[assignment]

    def work(self, given: Any) -> Any:
        self.works += not self.capturing
        self.log.append("recorded" if self.capturing else "work")
        return given


def test_a_gpu_is_timed_on_cold_caches_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = _Gpu(monkeypatch)
    assert gpu.clock._cold.bytes == 1 << 28  # type: ignore[attr-defined]
    times = gpu.clock.time("eager", lambda: gpu.log.append("before"), gpu.work, 0.0)
    assert (times.p50, times.repeats) == (1e3, 10)  # one work of "1 ms" between each two events
    cycle = ["before", "flush", "event", "work", "event"]
    assert gpu.log == ["before", "work"] * 2 + ["wait"] + cycle * 10 + ["wait"]


def test_a_graph_is_recorded_after_a_warm_up_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = _Gpu(monkeypatch)
    times = gpu.clock.time("cudagraph", lambda: gpu.log.append("before"), gpu.work, 0.0)
    assert times.p50 == 1e3
    assert gpu.log[:7] == ["before", "work", "before", "work", "before", "wait", "capture"]
    assert gpu.log[7] == "recorded" and gpu.log.count("recorded") == 1
    assert "before" not in gpu.log[8:] and gpu.log[-6:] == ["event", "flush", "event", "work", "event", "wait"]
    gpu.refuse = True
    with pytest.raises(NotCapturable, match="not permitted"):
        gpu.clock.time("cudagraph", None, gpu.work, 0.0)


def test_copies_of_a_size_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.Ceilings, "_gemm", lambda self, size: Times(1, 1, 1, 1))
    asked: list[int] = []

    def copy(self: measure.Ceilings, moved: int) -> Times:
        asked.append(moved)
        return Times(0, moved / 1e3, 0, 1)  # 1 GB/s at any size

    monkeypatch.setattr(measure.Ceilings, "_copy", copy)
    top = measure.Ceilings(CpuClock(torch.device("cpu")), torch.float32, 0.001)
    assert top.copy_rate == pytest.approx(1e9)
    assert top.copy_of(500_000) == top.copy_of(500_000) == pytest.approx(500)
    assert len(asked) == 2 and 1.0 <= asked[1] / 500_000 <= 2**0.25


def test_targets_are_shown_for_the_machines_they_are_of() -> None:
    row = {"op": "rms_norm", "case": "", "pass": "fwd", "name": "NVIDIA H200"}
    assert report.target(row) == "97 % copy"
    assert report.target(row | {"name": "NVIDIA H100 80GB HBM3"}) == "97 % copy"
    assert report.target(row | {"name": "NVIDIA A100-SXM4-80GB"}) == ""
    assert report.target(row | {"pass": "fwd+bwd"}) == ""


def test_impl_all_leaves_the_emulator_out() -> None:
    from megapt_kernels.bench.rivals import Rival

    rival = Rival("cuda", "cuda", lambda i: (), lambda i: None, ours=True)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not rival.wanted(("all",), cpu) and rival.wanted(("all",), cuda)
    assert rival.wanted(("cuda",), cpu) and rival.wanted(("cuda",), cpu)
    assert not replace(rival, kind="triton", name="triton").wanted(("cuda",), cpu)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"[1, 2]\n", "line 1 is a list"),
        (b"{}\n", "line 1 lacks record"),
        (b"\x94\xff", "can't decode"),
        (b'{"op": "rms', "Unterminated string"),
    ],
)
def test_compare_names_a_file_of_something_else(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "old.jsonl"
    path.write_bytes(content)
    with pytest.raises(rows.Refused, match=words):
        rows.read(path)


@pytest.mark.parametrize("wrong", [["--seconds", "nan"], ["--plot", "picture.nope"]])
def test_wrong_arguments_end_before_anything_is_measured(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["rms_norm", *wrong])
    assert ended.value.code == 2
