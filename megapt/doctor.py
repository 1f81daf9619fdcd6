"""`megapt doctor`: what this machine has, what training runs on, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import sys
from typing import Any

from megapt import __version__

# setup.py reads these two as well, so that what is installed and what is checked cannot differ.
PYTHON = ">=3.11,<3.13"
REQUIREMENTS = (
    "torch>=2.11,<2.15",
    "deepspeed>=0.19.6,<0.20",
    "numpy",
    "sentencepiece",
    "tokenizers",
    "tiktoken",
    "transformers",
    "safetensors",
    "tensorboard",
    "pydantic>=2",
    "PyYAML",
    "typer",
    "rich",
    "matplotlib",
    "packaging",
    "psutil",
    "fsspec",
)
ISA_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "bf16")


def main(as_json: bool = False) -> int:
    """Print the report; 0 when training can run here, 1 when a required part is missing or out of range."""
    found = report()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _render(found)
    return 0 if found["ok"] else 1


def report() -> dict[str, Any]:
    """All findings, ready for JSON: ok, problems, megapt, python, packages, devices, torch, optional.

    Never raises for something missing or broken: that is a finding.
    """
    from packaging.specifiers import SpecifierSet

    problems: list[str] = []
    python = platform.python_version()
    if not SpecifierSet(PYTHON).contains(python, prereleases=True):
        problems.append(f"Python {python} is outside {PYTHON}: make the environment with Python 3.11 or 3.12")
    packages = [_package(requirement) for requirement in REQUIREMENTS]
    problems += [p["problem"] for p in packages if p["problem"]]
    torch_build, cuda = _torch(problems)
    optional = _optional(problems)
    return {
        "ok": not problems,
        "problems": problems,
        "megapt": __version__,
        "python": {"version": python, "required": PYTHON, "executable": sys.executable},
        "packages": packages,
        "torch": torch_build,
        "devices": {"platform": platform.platform(), "cpu": _cpu(), "cuda": cuda},
        "optional": optional,
    }


def _package(text: str) -> dict[str, Any]:
    """One requirement against what is installed; the package is not imported."""
    from packaging.requirements import Requirement
    from packaging.version import InvalidVersion

    requirement = Requirement(text)
    required, problem, version = text.removeprefix(requirement.name), None, None
    try:
        version = importlib.metadata.version(requirement.name)
        try:
            # A container's own build such as 2.13.0a0 counts as its release.
            inside = requirement.specifier.contains(version, prereleases=True)
        except InvalidVersion:
            inside = False
        if not inside:
            problem = f"{requirement.name} {version} is outside {required}: pip install '{text}'"
    except importlib.metadata.PackageNotFoundError:
        problem = f"{requirement.name} is not installed: pip install '{text}'"
    return {"name": requirement.name, "version": version, "required": required, "problem": problem}


def _torch(problems: list[str]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """How torch was built, and the CUDA devices it sees."""
    try:
        import torch
        import torch.distributed as dist
    except Exception as error:  # a broken build raises anything; a missing one is told with the packages
        if importlib.util.find_spec("torch") is not None:
            problems.append(f"torch is installed but cannot be imported: {error}")
        return None, []
    gloo = dist.is_available() and dist.is_gloo_available()
    nccl = dist.is_available() and dist.is_nccl_available()
    try:
        cuda = [_cuda_device(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())]
    except RuntimeError as error:
        problems.append(f"the CUDA devices cannot be used: {error}")
        cuda = []
    if not gloo:
        problems.append(
            "this build of torch has no gloo backend: install a torch built with torch.distributed"
        )
    if cuda and not nccl:
        problems.append(
            "this build of torch sees CUDA devices but has no NCCL backend: install a CUDA build of torch"
        )
    build = {
        "cuda": torch.version.cuda,
        "gloo": gloo,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    return build, cuda


def _cuda_device(properties: Any) -> dict[str, Any]:
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }


def _cpu() -> dict[str, Any]:
    """Cores this process may use, memory in bytes, and instruction sets that speed up training."""
    from megapt.launcher import usable_cores

    total = available = None
    try:
        import psutil

        memory = psutil.virtual_memory()
        total, available = memory.total, memory.available
    except ImportError:
        pass
    flags: set[str] = set()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            flags = next(
                (set(line.split()) for line in lines if line.lower().startswith(("flags", "features"))), set()
            )
    except OSError:
        pass
    return {
        "machine": platform.machine(),
        "cores": usable_cores(),
        "memory_bytes": total,
        "memory_available_bytes": available,
        "isa": [feature for feature in ISA_FEATURES if feature in flags],
    }


def _optional(problems: list[str]) -> list[dict[str, Any]]:
    try:
        from megapt_kernels import capabilities
    except ImportError:
        problems.append(
            "megapt_kernels is not importable: install the project with pip install -c constraints.txt -e ."
        )
        return []
    from dataclasses import asdict

    return [asdict(capability) for capability in capabilities()]


def _render(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("package", "version", "required", title=f"megapt {found['megapt']}", title_justify="left")
    python = found["python"]
    table.add_row("python", python["version"], python["required"])
    for package in found["packages"]:
        version = package["version"] or "missing"
        table.add_row(
            package["name"], f"[red]{version}[/red]" if package["problem"] else version, package["required"]
        )
    console.print(table)

    table = Table("device", "memory", "details", title="devices", title_justify="left")
    cpu = found["devices"]["cpu"]
    details = [f"{cpu['cores']} cores", *cpu["isa"]]
    table.add_row(f"CPU ({cpu['machine']})", _gib(cpu["memory_bytes"]), ", ".join(details))
    for index, device in enumerate(found["devices"]["cuda"]):
        details = [
            f"compute capability {device['compute_capability']}",
            f"{device['multiprocessors']} multiprocessors",
        ]
        table.add_row(f"CUDA {index}: {device['name']}", _gib(device["memory_bytes"]), ", ".join(details))
    console.print(table)
    if not found["devices"]["cuda"]:
        console.print("No CUDA device: training runs on the CPU, with gloo between ranks.\n")

    table = Table(
        "optional part", "found", "used on a GPU", "a GPU runs", title="optional parts", title_justify="left"
    )
    for part in found["optional"]:
        state = (part["version"] or "yes") if part["found"] else "no"
        table.add_row(
            part["name"],
            state,
            "yes" if part["used"] else "no",
            part["name"] if part["used"] else part["instead"],
        )
    console.print(table)

    for problem in found["problems"]:
        console.print(f"problem: {problem}", style="red", markup=False)
    console.print(
        "Training can run here." if found["ok"] else "Training cannot run here until this is mended."
    )


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
