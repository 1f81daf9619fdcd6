"""The doctor's findings: their form, and what counts as a problem."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import megapt_kernels
from megapt import doctor


def _pretend(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Let packages seem installed in these versions (None: not at all)."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name not in versions:
            return real(name)
        found = versions[name]
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_json_report(capsys: pytest.CaptureFixture[str]) -> None:
    status = doctor.main(as_json=True)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert status == (0 if found["ok"] else 1)
    assert list(found) == [
        *("ok", "problems", "megapt", "python", "packages", "torch", "devices", "optional"),
    ]
    assert found["ok"] == (found["problems"] == [])
    assert found["python"]["version"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert {"torch", "deepspeed", "numpy", "transformers"} <= {
        package["name"] for package in found["packages"]
    }
    for package in found["packages"]:
        assert set(package) == {"name", "version", "required", "problem"}
    cpu = found["devices"]["cpu"]
    assert cpu["cores"] >= 1 and cpu["memory_bytes"] > 2**20 and isinstance(cpu["isa"], list)
    for device in found["devices"]["cuda"]:
        assert set(device) == {"name", "memory_bytes", "compute_capability", "multiprocessors"}
    for part in found["optional"]:
        assert set(part) == {"name", "found", "version", "where", "used", "instead"}
        assert part["instead"]
    names = [part["name"] for part in found["optional"]]
    assert names[:4] == ["flash-attn 2", "flash-attn 3", "flash-attn 4", "NVIDIA apex"]


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"deepspeed": None}, "deepspeed is not installed: pip install 'deepspeed>=0.19.6,<0.20'"),
        ({"deepspeed": "0.20.1"}, "deepspeed 0.20.1 is outside >=0.19.6,<0.20"),
        ({"torch": "2.10.0+cu130"}, "torch 2.10.0+cu130 is outside >=2.11,<2.15"),
        ({"pydantic": "custom"}, "pydantic custom is outside >=2"),
    ],
)
def test_what_is_missing_is_a_problem_with_its_name(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    versions: dict[str, str | None],
    words: str,
) -> None:
    _pretend(monkeypatch, **versions)
    assert doctor.main() == 1
    output = " ".join(capsys.readouterr().out.split())
    assert f"problem: {words}" in output
    assert "Training cannot run here" in output


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.14.0a0+git1234.nv26.1", "2.14.9"])
def test_versions_inside_the_range_are_no_problem(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    _pretend(monkeypatch, torch=version)
    torch = next(package for package in doctor.report()["packages"] if package["name"] == "torch")
    assert torch == {"name": "torch", "version": version, "required": ">=2.11,<2.15", "problem": None}


def test_an_unsupported_python_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.14.0")
    found = doctor.report()
    assert not found["ok"] and "Python 3.14.0 is outside >=3.11,<3.13" in found["problems"][0]


def test_a_torch_that_does_not_load_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises ImportError
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    problems: list[str] = []
    assert doctor._torch(problems) == (None, [])
    assert len(problems) == 1 and problems[0].startswith("torch is installed but cannot be imported")


def test_optional_parts_are_found_without_importing_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    explosive = "raise RuntimeError('imported')"
    for module in ("flash_attn", "transformer_engine", "triton"):
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text(explosive)
    (tmp_path / "flash_attn" / "cute").mkdir()
    (tmp_path / "amp_C.py").write_text(explosive)
    (tmp_path / "g++").write_text("#!/bin/sh\necho 'g++ (Some 1) 14.2.1'\n")
    (tmp_path / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    for program in ("g++", "nvcc"):
        (tmp_path / program).chmod(0o755)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)

    found = {part.name: part for part in megapt_kernels.capabilities()}
    # flash-attn 2 and 4 share a package: only the part with `cute` in it is there.
    assert (found["flash-attn 2"].found, found["flash-attn 4"].found) == (False, True)
    assert found["NVIDIA apex"].where == str(tmp_path / "amp_C.py")
    assert found["Transformer Engine"].found and found["triton"].found
    assert found["g++"].version == "14.2.1"
    assert (found["nvcc"].found, found["nvcc"].version, found["nvcc"].used) == (False, None, False)
    # Where it is used, what computes instead is not shown.
    assert found["triton"].used and not found["Transformer Engine"].used
