"""launch/gpu_check.sh: what it refuses, and that no part costs another one's results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megapt import gpu_check
from megapt.gpu_check import Check, _counted, check, main
from megapt_kernels.bench import rows
from megapt_kernels.registry import operations

SCRIPT = gpu_check.ROOT / "launch" / "gpu_check.sh"


def here(tmp_path: Path, seconds: float = 60.0) -> Check:
    (tmp_path / "work").mkdir()
    (tmp_path / "out").mkdir()
    made = Check(tmp_path / "out", tmp_path / "work", True, tmp_path / "out" / "log.txt")
    made.deadline = time.monotonic() + seconds
    return made


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path: Path) -> None:
    out = tmp_path / "a folder"
    environ = {**os.environ, "PYTHON": sys.executable}
    ran = subprocess.run(["sh", SCRIPT, out], env=environ, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert ran.returncode == 2 and "no CUDA device" in ran.stderr and "--cpu" in ran.stderr
    assert not out.exists()


def test_another_python_is_refused_in_words(tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    environ = {**os.environ, "PYTHON": str(other)}
    ran = subprocess.run(["sh", SCRIPT, tmp_path / "out"], env=environ, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2 and "Python 3.11 or 3.12 is needed" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--parts", "kernel"], "no part 'kernel'"), (["--cpu"], "is not empty")]
)
def test_wrong_arguments(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), *arguments])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_script_runs_a_part_and_writes_its_results(tmp_path: Path) -> None:
    out = tmp_path / "out"
    environ = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["sh", SCRIPT, "out", "--cpu", "--parts", "environment"]
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((out / "summary.json").read_text())
    assert found["rehearsal"] is True and found["parts"]["environment"]["torch"] == torch.__version__
    assert "Rehearsal" in (out / "summary.md").read_text() and "CUDA kernels run on CUDA devices" in ran.stdout
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "summary.json", "summary.md"]


def test_a_part_that_fails_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, Any]] = []
    out = tmp_path / "out"

    def broken(_: Check) -> dict[str, Any]:
        raise OSError("no room")

    def last(_: Check) -> dict[str, Any]:
        written.append(json.loads((out / "summary.json").read_text())["parts"])  # as a run that ends here leaves it
        return {"status": "ok", "message": "a | b"}

    def skipped(_: Check) -> dict[str, Any]:
        raise AssertionError("its packages are missing")

    monkeypatch.setattr(gpu_check, "_WORK", {"environment": broken, "tests": skipped, "kernels": last})
    monkeypatch.setitem(gpu_check.NEEDS, "tests", ("no_such_package",))
    assert check(out, ["environment", "tests", "kernels"], 60, True) == 1
    found = json.loads((out / "summary.json").read_text())["parts"]
    assert {part: result["status"] for part, result in found.items()} == {
        "environment": "failed", "tests": "skipped", "kernels": "ok"
    }  # fmt: skip
    assert found["environment"]["message"] == "OSError: no room"
    assert "no_such_package" in found["tests"]["message"]
    assert list(written[0]) == ["environment", "tests"]
    assert "a \\| b" in (out / "summary.md").read_text()
    monkeypatch.setattr(gpu_check, "_WORK", {"tests": skipped})
    assert check(tmp_path / "other", ["tests"], 60, True) == 0


def test_a_command_that_hangs_ends_with_its_children(tmp_path: Path) -> None:
    made = here(tmp_path)
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    started = time.monotonic()
    code, text = made.python("-c", child, limit=3)
    assert code is None and time.monotonic() - started < 30
    process = int(text.split()[0])
    deadline = time.monotonic() + 10
    while _alive(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(process)
    assert "cut off after 3 s" in made.log.read_text()
    assert made.python("-c", "import sys; sys.exit(7)")[0] == 7


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_of_a_pytest_run_are_counted_though_it_was_cut_off() -> None:
    text = """
tests/kernels/test_a.py::test_one PASSED                     [ 10%]
tests/kernels/test_a.py::test_two[bf16 x] FAILED             [ 20%]
[gw1] [ 30%] PASSED tests/kernels/test_b.py::test_three[a]
[gw0] [ 40%] ERROR tests/kernels/test_b.py::test_four
tests/kernels/test_b.py::test_five SKIPPED (no GPU)          [ 50%]
tests/kernels/test_b.py::test_six
"""
    counts, failures = _counted(text)
    assert counts == {"passed": 2, "failed": 1, "error": 1, "skipped": 1, "xfailed": 0}
    assert failures == ["tests/kernels/test_a.py::test_two[bf16 x]", "tests/kernels/test_b.py::test_four"]
    assert _counted(text + "=== short test summary info ===\nFAILED tests/a.py::b - x")[0] == counts


def _row(op: str, status: str = "ok") -> dict[str, Any]:
    columns: dict[str, Any] = dict.fromkeys(rows.COLUMNS)
    columns |= {"record": "measurement", "status": status, "op": op, "case": "", "impl": "megapt cuda", "kind": "cuda"}
    columns |= {"pass": "fwd", "mode": "cudagraph", "dtype": "bf16", "shape": {"T": 1}, "name": "a GPU"}
    columns["reason"] = None if status == "ok" else "why"
    return columns | ({"p50_us": 2.0, "percent_of_limit": 50.0, "preset": "x"} if status == "ok" else {})


class _Bench:
    """Stands for the benchmark's processes: each writes the rows of these operations and ends with that status."""

    def __init__(self, check: Check, runs: list[tuple[list[dict[str, Any]], int | None]]) -> None:
        self.check, self.runs, self.asked = check, runs, []

    def __call__(self, *arguments: str, **_: Any) -> tuple[int | None, str]:
        self.asked.append(arguments[2])
        made, code = self.runs.pop(0)
        with open(self.check.out / "bench.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in made)
        return code, "Segmentation fault"


def test_benchmarks_go_on_behind_an_operation_that_broke_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, all_of = here(tmp_path), operations()
    bench = _Bench(made, [([_row(all_of[0]), _row(all_of[1])], -11), ([], -11), ([_row(all_of[3], "failed")], 1)])
    monkeypatch.setattr(made, "python", bench)
    result = gpu_check.kernels(made)
    assert bench.asked == [",".join(all_of), ",".join(all_of[2:]), ",".join(all_of[3:])]
    assert result["status"] == "failed" and all_of[1] in result["message"] and all_of[2] in result["message"]
    assert any("why" in line for line in result["failures"])
    summary = gpu_check.markdown({"kernels": result | {"seconds": 1}}, made.out, False)
    assert f"| {all_of[0]} | fwd | megapt cuda | 2.0 | 50 % |" in summary and "![bench](bench.png)" in summary


def test_benchmarks_whose_arguments_are_refused_are_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = here(tmp_path)
    bench = _Bench(made, [([], 2)])
    monkeypatch.setattr(made, "python", bench)
    assert gpu_check.kernels(made)["status"] == "failed"


def test_training_is_measured_without_with_all_and_with_each_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megapt.config import KernelsConfig

    made = here(tmp_path)
    made.rehearsal = False
    asked: dict[str, list[str]] = {}

    def train(*arguments: str, **_: Any) -> tuple[int | None, str]:
        into = Path(arguments[-1])
        asked[into.stem] = [word for word in arguments if word.startswith("kernels.")]
        if into.stem == "rope-alone":
            return 1, "it broke"
        found = {"tokens_per_second": 1e4, "mfu": 0.4, "step_seconds": {"median": 1.0}, "gemm_share": 0.5}
        found |= {"peak_memory_bytes": 2**30, "config": "c", "precision": "bf16", "tokens_per_step": 8}
        into.write_text(json.dumps(found))
        return 0, ""

    monkeypatch.setattr(made, "python", train)
    result = gpu_check.training(made)
    names = tuple(KernelsConfig.model_fields)
    assert gpu_check.KERNELS == names
    off = dict.fromkeys(names, "reference") | {"attention": "torch flash", "wgrad": "off"}
    assert asked["reference"] == [f"kernels.{name}={off[name]}" for name in names]
    assert asked["auto"] == [f"kernels.{name}=auto" for name in names]
    for name in names:
        assert asked[f"{name}-alone"] == [f"kernels.{n}={'auto' if n == name else off[n]}" for n in names]
    assert result["status"] == "failed" and result["failures"] == ["rope alone: status 1: it broke"]
    assert "MFU 40.0 %" in result["message"] and len(result["variants"]) == len(names) + 1
    assert (made.out / "training.png").exists()
    assert "| auto | 10,000 | 1.000 x | 1,000.0 | 40.0 % | 50 % | 1.00 |" in gpu_check.markdown(
        {"training": result | {"seconds": 1}}, made.out, False
    )
