"""What torch compiles between the parallel layers: the same numbers, once for all layers, or a clear refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megapt.config import from_tree
from megapt.engine import Engine
from megapt.errors import UserError
from megapt.mesh import ParallelMesh
from megapt.model import compiled
from megapt.model.decoder import DecoderChunk
from megapt.parallel.pipeline.stages import build_chunks
from megapt.parallel.tensor import TensorParallel
from megapt.parameters import Parameter
from tests.model.test_recompute import FAMILIES, MODELS, POLICIES, SEQUENCE, batch_of

ONE = ParallelMesh.create(1, 1, 1, torch.device("cpu"))


def tree(model: dict[str, Any], compile: bool) -> dict[str, Any]:
    batch = {"sequence": SEQUENCE, "samples": 2, "micro": 2}
    rest = {"data": {"train": "x"}, "train": {"steps": 1}, "batch": batch, "zero": {"backend": "native"}}
    return {"precision": "fp64", "compile": compile, "model": model, **rest}


def chunk_of(model: str, layers: int, policy: str, compile: bool) -> tuple[DecoderChunk, list[Parameter]]:
    config = from_tree(tree((MODELS | FAMILIES)[model] | {"layers": layers}, compile)).config
    (chunk,), parameters = build_chunks(config, ONE, TensorParallel(ONE.tp), policies=[[policy] * layers])  # type: ignore
    return chunk, parameters


def gradients(model: str, layers: int, policy: str, compile: bool) -> dict[str, Tensor]:
    chunk, parameters = chunk_of(model, layers, policy, compile)
    chunk(None, batch_of(documents=True)).backward()
    return {p.spec.name: p.grad for p in parameters}  # type: ignore[misc]


@pytest.mark.parametrize("model", [*MODELS, "gemma"])
def test_compiled_layers_compute_the_same_and_are_compiled_once(model: str) -> None:
    torch._dynamo.reset()
    graphs: list[int] = []
    for layers in (1, 3):
        for policy in POLICIES:
            expected = gradients(model, layers, "none", False)
            found = gradients(model, layers, policy, True)
            for name, gradient in expected.items():
                largest = float(gradient.abs().max())
                assert float((found[name] - gradient).abs().max()) <= 1e-12 * max(largest, 1), (policy, name)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1] == graphs[0], "more layers are no more to compile"


def test_without_a_compiler_nothing_starts() -> None:
    import torch._inductor.config as inductor

    with (
        inductor.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(UserError, match=r"compile = true needs a C\+\+ compiler .* on cpu.*set compile = false"),
    ):
        Engine(from_tree(tree(MODELS["llama"], True)).config, 1, torch.device("cpu"))


def test_a_compiler_is_found() -> None:
    compiled.check_compiler(torch.device("cpu"))
