"""An exported folder holds the same numbers, and transformers computes the same logits from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megapt import checkpoint
from megapt.batch import MicroBatch
from megapt.config import Config, ModelConfig, from_tree
from megapt.convert import to_hf
from megapt.errors import UserError
from megapt.mesh import ParallelMesh
from megapt.parallel.pipeline.stages import build_chunks
from megapt.parallel.tensor import TensorParallel
from megapt.zero.base import Fragment

ONE = ParallelMesh.create(1, 1, 1, torch.device("cpu"))
LLAMA = {
    "layers": 2,
    "hidden": 32,
    "heads": 4,
    "kv_heads": 2,
    "ffn": 48,
    "vocabulary": 67,
    "max_sequence": 64,
}
LLAMA3 = {"kind": "llama3", "factor": 4.0, "original_sequence": 16}
LINEAR = {"kind": "linear", "factor": 2.0}
GPT2 = {
    "layers": 2, "hidden": 32, "heads": 4, "ffn": 80, "vocabulary": 67, "max_sequence": 64,
    "norm": "layer_norm", "activation": "gelu_tanh", "gated": False, "position": "learned", "bias": "all",
    "tied_embeddings": True,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama3-tied": LLAMA | {"tied_embeddings": True, "rope_scaling": LLAMA3, "rope_theta": 500.0},
    "llama-linear-bias": LLAMA | {"bias": "all", "rope_scaling": LINEAR, "head_dim": 12},
    "qwen2": LLAMA | {"bias": "qkv", "norm_eps": 1e-6},
    "gpt2": GPT2,
    "gpt2-untied": GPT2 | {"tied_embeddings": False, "activation": "gelu"},
}


def config_of(model: dict[str, Any]) -> Config:
    tree = {"precision": "fp32", "model": model, "data": {"train": "x"}, "train": {"steps": 1}}
    return from_tree(tree | {"batch": {"sequence": 16, "samples": 1}}).config


def checkpoint_of(folder: Path, model: dict[str, Any]) -> tuple[Path, dict[str, Tensor], torch.nn.Module]:
    """A model whose every tensor is random (biases and norms too), its global weights, and its checkpoint."""
    config = config_of(model)
    (chunk,), parameters = build_chunks(config, ONE, TensorParallel(ONE.tp))
    generator = torch.Generator().manual_seed(5)
    fragments = []
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(noise * 0.15 + parameter.spec.fill)
        fragments.append(Fragment(parameter, 0, parameter.numel(), {"weight": parameter.data.flatten()}))
    path = checkpoint.save(folder / "checkpoints", 1, fragments, ONE, {"config": config.model_dump()})
    weights = {p.spec.name: p.shard.valid(p.data).clone() for p in parameters}
    return path, weights, chunk


def expected_state(weights: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Written out once more by hand, so that a wrong row of the mapping is seen."""
    if model.position == "learned":
        state = {"transformer.wte.weight": weights["embedding.weight"]}
        state["transformer.wpe.weight"] = weights["positions.weight"]
        state |= {f"transformer.ln_f.{part}": weights[f"norm.{part}"] for part in ("weight", "bias")}
        for n in range(model.layers):
            at, ours = f"transformer.h.{n}", f"layers.{n}"
            for part in ("weight", "bias"):
                state[f"{at}.ln_1.{part}"] = weights[f"{ours}.attention_norm.{part}"]
                state[f"{at}.ln_2.{part}"] = weights[f"{ours}.mlp_norm.{part}"]
                qkv = torch.cat([weights[f"{ours}.attention.{x}.{part}"] for x in "qkv"])
                state[f"{at}.attn.c_attn.{part}"] = qkv.t()
                state[f"{at}.attn.c_proj.{part}"] = weights[f"{ours}.attention.out.{part}"].t()
                state[f"{at}.mlp.c_fc.{part}"] = weights[f"{ours}.mlp.up.{part}"].t()
                state[f"{at}.mlp.c_proj.{part}"] = weights[f"{ours}.mlp.down.{part}"].t()
        state["lm_head.weight"] = weights.get("head.weight", weights["embedding.weight"])
        return state
    state = {
        "model.embed_tokens.weight": weights["embedding.weight"],
        "model.norm.weight": weights["norm.weight"],
    }
    state["lm_head.weight"] = weights.get("head.weight", weights["embedding.weight"])
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    names |= {f"attention.{ours}": f"self_attn.{ours[0]}_proj" for ours in ("q", "k", "v", "out")}
    names |= {f"mlp.{ours}": f"mlp.{ours}_proj" for ours in ("gate", "up", "down")}
    for name, value in weights.items():
        if name.startswith("layers."):
            _, n, rest = name.split(".", 2)
            module, part = rest.rsplit(".", 1)
            state[f"model.layers.{n}.{names[module]}.{part}"] = value
    return state


@pytest.mark.parametrize("name", MODELS)
def test_transformers_has_the_same_tensors_and_logits(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    path, weights, chunk = checkpoint_of(tmp_path, MODELS[name])
    model = checkpoint.model_config(path)
    output = to_hf(path, tmp_path / "hf").output
    theirs, report = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(report.values()), report
    state, expected = theirs.state_dict(), expected_state(weights, model)
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key
    assert theirs.config.tie_word_embeddings == model.tied_embeddings
    assert theirs.config.eos_token_id is None and theirs.generation_config.eos_token_id is None
    tokens = torch.randint(0, model.vocabulary, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = chunk(None, MicroBatch(tokens, None))[:, : model.vocabulary].view(2, 48, -1)
        reference = theirs.eval()(tokens).logits
    assert reference.abs().max() > 1
    assert ((ours - reference).abs().max() / reference.abs().max()).item() <= 1e-5


def test_shards_and_dtypes(tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    path, weights, _ = checkpoint_of(tmp_path, MODELS["llama"])
    output = to_hf(tmp_path, tmp_path / "deep" / "hf", dtype="bf16", shard_bytes=10_000).output
    files = sorted(f.name for f in output.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((output / "model.safetensors.index.json").read_text())
    total = 0
    for file in files:
        with safe_open(output / file, "pt") as content:
            assert content.metadata() == {"format": "pt"}
            assert {index["weight_map"][key] for key in content.keys()} == {file}
            sizes = [content.get_tensor(key).nbytes for key in content.keys()]
            assert sum(sizes) <= 10_000 or len(sizes) == 1
            total += sum(sizes)
    assert index["metadata"]["total_size"] == total
    state = AutoModelForCausalLM.from_pretrained(output).state_dict()
    expected = expected_state(weights, checkpoint.model_config(path))
    assert all(torch.equal(state[key], value.bfloat16()) for key, value in expected.items())
    with pytest.raises(UserError, match="'int8' is unknown; legal: fp32, bf16, fp16"):
        to_hf(path, tmp_path / "other", dtype="int8")


def test_models_that_no_family_computes_are_refused_by_field(tmp_path: Path) -> None:
    path, _, _ = checkpoint_of(tmp_path, LLAMA | {"norm": "layer_norm"})
    with pytest.raises(UserError) as caught:
        to_hf(path, tmp_path / "hf")
    assert "Llama: model.norm is 'layer_norm' (legal: 'rms_norm')" in str(caught.value)
    lines = {line.split(":")[0]: line for line in str(caught.value).splitlines()}
    assert "model.position is 'rope' (legal: 'learned')" in lines["GPT-2"] and "model.gated is True" in lines["GPT-2"]
    assert not (tmp_path / "hf").exists()


def test_output_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path, _, _ = checkpoint_of(tmp_path, LLAMA)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="full already exists and is not an empty folder"):
        to_hf(path, full)
    assert (full / "mine.txt").read_text() == "keep"
    (tmp_path / ".hf.partial").mkdir()  # left by an export that was killed
    (tmp_path / "hf").mkdir()
    (file,) = path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"{file.name}, weight of head.weight: its checksum"):
        to_hf(path, tmp_path / "hf")
    assert list((tmp_path / "hf").iterdir()) == [] and not (tmp_path / ".hf.partial").exists()
    data[-1] ^= 1
    file.write_bytes(data)
    assert to_hf(path, tmp_path / "hf").output == tmp_path / "hf"
    assert (tmp_path / "hf" / "model.safetensors").is_file() and not (tmp_path / ".hf.partial").exists()
