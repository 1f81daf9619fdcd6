"""Packaging: `pip install -c constraints.txt -e .` compiles nothing and needs no compiler."""

import ast
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def constant(file: str, name: str):
    """The literal that a module assigns to `name`, read without importing the module (and so torch)."""
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in node.targets
        ):
            return ast.literal_eval(node.value)
    raise RuntimeError(f"{file} does not assign {name}")


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
        ],
        # For the last part of docs/huggingface.md; it brings scipy, scikit-learn, pandas and more, 430 MB in all.
        "compat": ["lm-eval"],
        # Never needed; flash-attn builds itself from source where it has no wheel for the installed torch.
        "gpu": ["triton; platform_system == 'Linux'", "flash-attn>=2.7"],
    },
    entry_points={"console_scripts": ["megapt = megapt.cli:main"]},
)
