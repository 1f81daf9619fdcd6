"""Packaging: `pip install -c constraints.txt -e .` compiles nothing and needs no compiler.

A wheel carries the kernels' sources, for `megapt kernels build`. With MEGAPT_BUILD_KERNELS=1 in the environment it
carries the compiled library instead of leaving that to its users; it then belongs to this kind of machine:
`MEGAPT_BUILD_KERNELS=1 pip wheel --no-build-isolation --no-deps .`
"""

import ast
import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def constant(file: str, name: str):
    """The literal that a module assigns to `name`, read without importing the module (and so torch)."""
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in node.targets
        ):
            return ast.literal_eval(node.value)
    raise RuntimeError(f"{file} does not assign {name}")


COMPILED = os.environ.get("MEGAPT_BUILD_KERNELS", "0") not in ("", "0")


class BuildPackages(build_py):
    """Python files, and what the kernels are compiled from; compiled too where that was asked for."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib, "megapt_kernels")
        for folder in ("csrc", "emu"):
            shutil.copytree(ROOT / "kernels" / folder, package / folder, dirs_exist_ok=True)
        if COMPILED:
            sys.path.insert(0, str(ROOT / "kernels"))
            from megapt_kernels.build import build

            build("cuda", out=package / "lib", verbose=True)


class Wheel(bdist_wheel):
    """Named for every Python 3 on this kind of machine if a library is in it, else for every machine."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = not COMPILED

    def get_tag(self):
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if COMPILED else tag


setup(
    name="megapt",
    version=constant("megapt/__init__.py", "__version__"),
    description="Pretraining of large language models with tensor, pipeline and data parallelism",
    packages=[
        *find_packages(".", include=["megapt", "megapt.*"]),
        *find_packages("kernels", include=["megapt_kernels", "megapt_kernels.*"]),
    ],
    package_dir={"megapt": "megapt", "megapt_kernels": "kernels/megapt_kernels"},
    package_data={"megapt.plan": ["hardware/*.yaml"]},
    python_requires=constant("megapt/doctor.py", "PYTHON"),
    install_requires=list(constant("megapt/doctor.py", "REQUIREMENTS")),
    extras_require={
        # Inputs of `megapt data build` in .zst and .parquet, and token files behind http.
        "data": ["zstandard", "pyarrow", "aiohttp"],
        "test": [
            "zstandard",
            "pyarrow",
            "aiohttp",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "accelerate",
            "peft",
            # Its interpreter and its compiler, which need no GPU. Where torch is for CUDA it brought its own.
            "triton; platform_system == 'Linux'",
        ],
        # For the last part of docs/huggingface.md; it brings scipy, scikit-learn, pandas and more, 430 MB in all.
        "compat": ["lm-eval"],
        # Never needed; flash-attn builds itself from source where it has no wheel for the installed torch.
        "gpu": ["triton; platform_system == 'Linux'", "flash-attn>=2.7"],
    },
    cmdclass={"build_py": BuildPackages, "bdist_wheel": Wheel},
    entry_points={"console_scripts": ["megapt = megapt.cli:main"]},
)
