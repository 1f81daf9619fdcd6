"""The summary names what really computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megapt.config import from_tree
from megapt.errors import UserError
from megapt.kernel_choice import check_kernels
from megapt.mesh import Axis, ParallelMesh
from megapt.plan.memory import stage_memory
from megapt.summary import _recompute, kernels, layout_text, print_summary
from megapt_kernels import library
from megapt_kernels.library import LibraryError
from megapt_kernels.registry import use
from tests.distributed.layouts import GPT2, LLAMA, tree


def _kernels(model: dict[str, Any], device: str, named: Any = "auto", **more: Any) -> str:
    one = Axis(0, 1, None)
    mesh = ParallelMesh(one, one, one, one, 0, 1, torch.device(device))
    return "; ".join(kernels(from_tree(tree(model, **more) | {"kernels": named}).config, mesh))


def test_kernels_of_the_cpu() -> None:
    text = _kernels(LLAMA, "cpu", precision="bf16")
    assert "flash kernel for CPUs in bf16, rotary positions on the way in" in text
    assert "RMSNorm: reference" in text and "MLP's gated silu: reference" in text and "softmax in fp32" in text
    assert "update: torch" in text and "weight gradients" not in text


def test_kernels_that_are_named() -> None:
    named = {"attention": "library", "rope": "reference", "wgrad": "reference", "adamw": "reference"}
    text = _kernels(LLAMA, "cpu", named=named, precision="fp32")
    assert "rotary positions reference" in text and "update: reference" in text
    assert "weight gradients added by their product: reference" in text


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where none is loaded, whatever ran in this process before."""
    monkeypatch.setattr(library, "loaded", lambda: None)
    monkeypatch.setattr(library, "missing", lambda device: f"CUDA kernels run on CUDA devices, not on {device}")


@pytest.mark.usefixtures("no_library")
def test_what_is_not_here_is_refused_with_the_reason() -> None:
    config = from_tree(tree(LLAMA, precision="fp32") | {"kernels": {"norm": "cuda"}}).config
    with pytest.raises(UserError, match=r"kernels\.norm = cuda .* not on cpu.*kernels\.norm=auto"):
        check_kernels(config, torch.device("cpu"))
    config = from_tree(tree(LLAMA, precision="fp32") | {"kernels": {"attention": "flash-attn 9"}}).config
    with pytest.raises(UserError, match=r"kernels\.attention: attention: impl is one of .*not 'flash-attn 9'"):
        check_kernels(config, torch.device("cpu"))


def test_words_for_kernels() -> None:
    assert from_tree(tree(LLAMA) | {"kernels": {"wgrad": False}}).config.kernels.wgrad == "off"  # as YAML reads `off`
    with pytest.raises(UserError, match="should be auto or reference for all operations"):
        from_tree(tree(LLAMA) | {"kernels": "cuda"})


@pytest.mark.usefixtures("no_library")
def test_kernels_by_a_wrong_environment_or_library(monkeypatch: pytest.MonkeyPatch) -> None:
    config = from_tree(tree(LLAMA, precision="fp32")).config
    monkeypatch.setenv("MEGAPT_KERNELS", "cuda")
    with use("cuda"), pytest.raises(UserError, match="MEGAPT_KERNELS=cuda is set: without it"):
        check_kernels(config, torch.device("cpu"))

    def missing(device: torch.device) -> str | None:
        raise LibraryError("MEGAPT_KERNELS_LIBRARY: gone.so: No such file or directory")

    monkeypatch.setattr(library, "missing", missing)
    with pytest.raises(UserError, match="kernels.norm: MEGAPT_KERNELS_LIBRARY: gone.so"):
        check_kernels(config, torch.device("cpu"))


def test_kernels_of_windows_and_capped_scores() -> None:
    windowed = LLAMA | {"window": 8}
    assert "flash kernel for CPUs, windows by blocks of queries in fp32" in _kernels(windowed, "cpu", precision="fp32")
    capped = _kernels(LLAMA | {"attention_softcap": 50.0}, "cpu", precision="bf16")
    assert "capped scores) in bf16, rotary positions on the way in" in capped


def test_kernels_of_a_gpt() -> None:
    text = _kernels(GPT2, "cpu", precision="fp64")
    assert "LayerNorm: reference" in text and "MLP's gelu_tanh: torch" in text and "softmax in fp64" in text
    assert "rotary" not in text and "gated" not in text


@pytest.mark.parametrize(
    ("precision", "zero", "reduced"),
    [("bf16", ("native", 1), "fp32"), ("fp64", ("native", 1), "fp64"), ("fp64", ("deepspeed", 1), "fp32")],
)
def test_precision_of_the_reduction(precision: str, zero: tuple[str, int], reduced: str) -> None:
    assert _kernels(LLAMA, "cpu", precision=precision, zero=zero).find(f"gradient reduction: {reduced}") > 0


def test_compiled_chains_are_named() -> None:
    mesh = ParallelMesh(*[Axis(0, 1, None)] * 4, 0, 1, torch.device("cpu"))
    text = "; ".join(kernels(from_tree(tree(LLAMA) | {"compile": True}).config, mesh))
    assert "rotary positions torch, compiled" in text and "RMSNorm: torch, compiled" in text
    assert "MLP's gated silu: torch, compiled" in text and "megapt, in blocks of rows" not in text


def test_the_split_is_printed_as_it_can_be_given() -> None:
    config = from_tree(tree(LLAMA | {"layers": 9}, pp=4, layers_per_stage="3, 2,2*2")).config
    assert layout_text(config) == "3,2*3"
    balanced = from_tree(tree(LLAMA | {"layers": 9}, pp=4)).config
    again = from_tree(tree(LLAMA | {"layers": 9}, pp=4, layers_per_stage=layout_text(balanced))).config
    assert layout_text(again) == layout_text(balanced)


def test_what_is_computed_again_is_printed_by_rank() -> None:
    plain = tree(LLAMA | {"layers": 9}, pp=4, layers_per_stage="3,2*3") | {"recompute": {"policy": "full", "layers": 2}}
    config = from_tree(plain).config
    assert _recompute(config, stage_memory(config, 1)) == "full; layers: 2 full + 1 none on rank 0, 2 full on ranks 1-3"


def test_the_optimizer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    made = tree(LLAMA)
    mesh = ParallelMesh(*[Axis(0, 1, None)] * 4, 0, 1, torch.device("cpu"))
    for kind, words in (("adamw", "AdamW, lr"), ("muon", "Muon (other than matrices: AdamW), lr")):
        config = from_tree(made | {"optimizer": made["optimizer"] | {"kind": kind}}).config
        print_summary(config, mesh, "", parameters=1, start="", samples_per_epoch=1, total_samples=1, peak="")
        assert words in capsys.readouterr().out
