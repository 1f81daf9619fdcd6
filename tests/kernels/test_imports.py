"""What importing brings in: a CPU user pays for nothing that only a GPU's user has."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("triton", "torch._dynamo", "torch._inductor", "liger_kernel", "flash_attn", "amp_C", "apex", "quack")


def loaded_after(statement: str, names: tuple[str, ...]) -> list[str]:
    """Which modules are there in a fresh process after a statement."""
    program = f"import sys; {statement}; print(*[name for name in {names!r} if name in sys.modules])"
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {program}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.split()


def test_the_package_imports_no_torch() -> None:
    assert loaded_after("import megapt_kernels; megapt_kernels.capabilities()", ("torch", *HEAVY)) == []
    assert loaded_after("import torch", ("torch",)) == ["torch"], "or the line above shows nothing"


def test_the_trainer_imports_no_library_of_kernels_and_no_compiler() -> None:
    assert loaded_after("import megapt.engine, megapt.kernel_choice, megapt.summary", HEAVY) == []
