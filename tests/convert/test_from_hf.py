"""What a Hugging Face folder becomes, and which folders are refused, by name and with nothing left behind."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megapt import checkpoint, config
from megapt.convert import Request, from_hf, importing, to_hf
from megapt.convert.mapping import Family
from megapt.errors import UserError
from tests.convert import models


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small Llama, with a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder = models.save("llama", tmp_path_factory.mktemp("llama") / "llama")
    words = {word: at for at, word in enumerate(["<|endoftext|>", "unknown", "some", "more"])}
    Tokenizer(WordLevel(words, unk_token="unknown")).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "theirs"))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder: Path, **change: Any) -> None:
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | change))


def shard(folder: Path, parts: int = 3) -> dict[str, str]:
    """As several files with an index; returns its map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{n % parts + 1:05d}-of-{parts:05d}.safetensors" for n, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in places if places[name] == file}, folder / file)
    tree = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(tree))
    return places


def test_the_output_is_a_checkpoint_a_tokenizer_and_a_config(copy: Path, tmp_path: Path) -> None:
    report = from_hf(copy, tmp_path / "ours")
    assert {path.name for path in report.output.iterdir()} == {
        "checkpoints", "config.yaml", "tokenizer.json", "generation_config.json"
    }  # fmt: skip
    assert checkpoint.resolve(report.output).name == "step-00000000"
    assert (report.output / "config.yaml").read_text() == report.config and report.config in str(report)
    loaded = config.load(report.output / "config.yaml").config
    assert loaded.model == checkpoint.model_config(report.output)
    assert loaded.checkpoint.load == str(report.output) and loaded.batch.sequence == models.LONGEST
    assert loaded.data.tokenizer == str(report.output / "tokenizer.json")
    meta = checkpoint.read_index(report.output).meta
    assert config.from_tree(meta["config"]).config.data.tokenizer == loaded.data.tokenizer
    assert "largest difference" in str(report) and "NOT" not in str(report)
    back = to_hf(report.output, tmp_path / "back", request=None)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (back.output / name).read_bytes() == (copy / name).read_bytes()
    assert json.loads((back.output / "config.json").read_text())["eos_token_id"] == 2
    assert "NOTHING WAS COMPARED" in str(back)


def test_a_model_of_several_files_in_half_precision(copy: Path, tmp_path: Path) -> None:
    rewrite(copy, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    whole = load_file(copy / "model.safetensors")
    shard(copy)
    report = from_hf(copy, tmp_path / "ours")
    assert report.comparison is not None
    assert all(tensor.dtype == torch.float32 for _, tensor in checkpoint.load_weights(report.output))
    back = to_hf(report.output, tmp_path / "back", dtype="bf16", shard_bytes=10_000)
    assert back.comparison is not None and back.comparison.relative <= 1e-5
    found = {}
    for file in back.output.glob("model-*.safetensors"):
        found |= load_file(file)
    assert found.keys() == whole.keys() and all(torch.equal(whole[name], found[name]) for name in whole)


def test_old_files(tmp_path: Path) -> None:
    """Without the prefix of the whole model, with masks, with a head that is tied all the same."""
    folder = models.save("gpt2", tmp_path / "theirs")
    mask = torch.ones(1, 1, 64, 64)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors |= {f"h.{layer}.attn.bias": mask.clone() for layer in range(models.LAYERS)}
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    rewrite(folder, change)
    report = from_hf(folder, tmp_path / "ours")
    assert report.comparison is not None and len(checkpoint.read_index(report.output).tensors) == 16 * models.LAYERS + 4


def _bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _without_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def _index_lies(folder: Path) -> None:
    places = shard(folder)
    places["lm_head.weight"] = places["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def _index_escapes(folder: Path) -> None:
    places = shard(folder)
    places["lm_head.weight"] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def _both(folder: Path) -> None:
    shutil.copyfile(folder / "model.safetensors", folder / "kept")
    shard(folder)
    (folder / "kept").rename(folder / "model.safetensors")


def _index_climbs(folder: Path) -> None:
    places = shard(folder)
    places["lm_head.weight"] = ".."
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def _link_to_nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "blobs" / "unfinished")


def _cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def _renamed(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.gate.weight"] = tensors.pop("model.layers.0.mlp.gate_proj.weight")
    tensors["model.norm.weight"] = torch.ones(7)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)


def _not_finite(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.3.mlp.up_proj.weight"][3, 5] = float("nan")


REFUSED: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no folder": (shutil.rmtree, ["is not a folder here; nothing is fetched from the network"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["holds no config.json"]),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json is not valid JSON"]),
    "pickles": (
        _bin,
        ["holds neither model.safetensors", "pytorch_model.bin would be read by pickle", "save_pretrained"],
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), ["holds an adapter", "merge it"]),
    "a missing shard": (_without_shard, ["lacks 1 of 3 shards: model-00002-of-00003.safetensors"]),
    "an index that lies": (_index_lies, ["lacks what model.safetensors.index.json says it holds: lm_head.weight"]),
    "an index that escapes": (_index_escapes, ["places lm_head.weight in '../elsewhere.safetensors'"]),
    "one file and several": (_both, ["holds both model.safetensors and model.safetensors.index.json"]),
    "a file cut short": (_cut, ["model.safetensors is damaged"]),
    "an index that climbs": (_index_climbs, ["places lm_head.weight in '..'; legal: the name of a file beside it"]),
    "a link to nothing": (_link_to_nothing, ["model.safetensors are links to files that are not there"]),
    "a pointer of Git LFS": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ["model.safetensors only points to its content: run `git lfs pull`"],
    ),
    "JSON without a bottom": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        ["config.json is not valid JSON"],
    ),
    "a generation config that is none": (
        lambda f: (f / "generation_config.json").write_text("[]"),
        ["generation_config.json must hold an object, not list"],
    ),
    "what transformers stumbles over": (
        lambda f: reconfigure(f, eos_token_id="end"),
        ["transformers cannot use", "eos_token_id", "--no-compare"],
    ),
    "an architecture that is no name": (
        lambda f: reconfigure(f, architectures=5),
        ["architectures is 5; legal: a list of names"],
    ),
    "a kind that is no name": (lambda f: reconfigure(f, model_type=["llama"]), ["model_type ['llama'] is not known"]),
    "other tensors": (
        lambda f: rewrite(f, _renamed),
        [
            "missing: model.layers.0.mlp.gate_proj.weight",
            "not of a Llama model of this config.json: model.layers.0.mlp.gate.weight",
            "of another shape: model.norm.weight (stored [7], by config.json [32])",
            "of a dtype that is not read (legal: F32, BF16, F16): lm_head.weight (I8)",
        ],
    ),
    "numbers that are none": (
        lambda f: rewrite(f, _not_finite),
        ["model.layers.3.mlp.up_proj.weight holds values that are not finite"],
    ),
    "a tie that is none": (
        lambda f: reconfigure(f, tie_word_embeddings=True),
        ["ties lm_head.weight to model.embed_tokens.weight, but they differ"],
    ),
    "quantised weights": (
        lambda f: reconfigure(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        ["quantised (quant_method 'gptq')", "legal: fp32, bf16 and fp16"],
    ),
    "code of its own": (
        lambda f: reconfigure(f, auto_map={"AutoModelForCausalLM": "modeling_x.Model"}),
        ["auto_map", "is not run here", "--ignore-auto-map"],
    ),
    "another kind of model": (
        lambda f: reconfigure(f, model_type="t5"),
        ["model_type 't5' is not known; legal: llama,"],
    ),
    "another architecture": (
        lambda f: reconfigure(f, architectures=["LlamaModel"]),
        ["architectures is ['LlamaModel']; legal: 'LlamaForCausalLM'"],
    ),
    "experts": (lambda f: reconfigure(f, model_type="mixtral"), ["'mixtral' is a mixture of experts"]),
    "an unknown key": (
        lambda f: reconfigure(f, alibi=True),
        ["config.json says what cannot", "alibi is True: no such key"],
    ),
    "heads that do not fit": (
        lambda f: reconfigure(f, num_key_value_heads=3),
        ["model.kv_heads: 3 does not divide model.heads = 4"],
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name_with_nothing_left(copy: Path, tmp_path: Path, what: str) -> None:
    change, messages = REFUSED[what]
    change(copy)
    with pytest.raises(UserError) as caught:
        from_hf(copy, tmp_path / "ours")
    for message in messages:
        assert message in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir() if path != copy) == []


@pytest.mark.parametrize(
    "change", [{"rope_theta": 9000.0}, {"norm_eps": 1e-3}, {"window": 40}, {"activation": "gelu"}], ids=str
)
def test_what_computes_something_else_is_found_by_its_logits(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """Our side is changed behind the conversion's back."""
    read = Family.read
    monkeypatch.setattr(Family, "read", lambda *a: (lambda fields, notes: ({**fields, **change}, notes))(*read(*a)))
    with pytest.raises(UserError, match="do not compute the same, and nothing is kept: logits compared"):
        from_hf(copy, tmp_path / "ours")
    assert [path for path in tmp_path.iterdir() if path != copy] == []


def test_code_of_its_own_can_be_ignored(copy: Path, tmp_path: Path) -> None:
    reconfigure(copy, auto_map={"AutoModelForCausalLM": "modeling_x.Model"})
    assert from_hf(copy, tmp_path / "ours", ignore_auto_map=True).comparison


def test_what_does_not_fit_is_compared_by_its_first_layers(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 3.0e5  # bytes: two layers of both sides

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    report = from_hf(copy, tmp_path / "ours")
    assert report.comparison and report.comparison.layers == 2 and report.comparison.relative <= 1e-5
    assert "the first 2 of 4 layers" in str(report) and "their logits were NOT compared" in str(report)
    assert to_hf(report.output, tmp_path / "back").comparison

    def swap(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.3.mlp.up_proj.weight"][3, 5] += 1e-6

    write = importing._write
    monkeypatch.setattr(importing, "_write", lambda *a: (write(*a), rewrite(copy, swap)))
    with pytest.raises(UserError, match="model.layers.3.mlp.up_proj.weight of .* is not what the checkpoint holds"):
        from_hf(copy, tmp_path / "again")
    Memory.available = 1e4
    with pytest.raises(UserError, match="too little to compare even one layer of both models"):
        from_hf(copy, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_logits_of_zero_say_nothing(copy: Path, tmp_path: Path) -> None:
    rewrite(copy, lambda tensors: tensors["lm_head.weight"].zero_())
    assert "all logits are 0: NOTHING is known" in str(from_hf(copy, tmp_path / "ours"))


def test_windows_that_are_not_reached_are_told(tmp_path: Path) -> None:
    folder = models.save("mistral", tmp_path / "theirs")
    reconfigure(folder, sliding_window=60)
    report = from_hf(folder, tmp_path / "ours", request=Request(tokens=50))
    assert "not reached by so few tokens: the window of 60 tokens" in str(report)
    assert from_hf(folder, tmp_path / "again").comparison.unreached == ()  # type: ignore[union-attr]


_MEMORY = """
import sys, torch
from pathlib import Path
from megapt.convert import from_hf, to_hf
torch.set_num_threads(1)
def measured(step):
    Path("/proc/self/clear_refs").write_text("5")
    status = lambda key: int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) / 1e3
    before = status("VmRSS:")
    step()
    return status("VmHWM:") - before
folder = Path(sys.argv[1])
from_hf(folder / "small", folder / "small-ours", request=None)  # imports
to_hf(folder / "small-ours", folder / "small-back", request=None)
print(measured(lambda: from_hf(folder / "theirs", folder / "ours", request=None)))
print(measured(lambda: to_hf(folder / "ours", folder / "back", request=None, dtype="bf16")))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory")
def test_a_large_model_streams_through_little_memory(saved: Path, tmp_path: Path) -> None:
    """0.5 GB of bf16 become 1 GB of fp32 and come back; the largest tensor is 34 MB in fp32."""
    from transformers import AutoConfig

    hidden, layers = 2048, 6
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    tree = AutoConfig.from_pretrained(saved).to_dict() | sizes | {"vocab_size": 4096, "head_dim": 128}
    tree |= {"num_attention_heads": 16, "num_key_value_heads": 16}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(tree))
    shapes = {"model.embed_tokens": (4096, hidden), "lm_head": (4096, hidden), "model.norm": (hidden,)}
    for at in (f"model.layers.{layer}" for layer in range(layers)):
        shapes |= {f"{at}.self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj": (2 * hidden, hidden) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj": (hidden, 2 * hidden)}
        shapes |= {f"{at}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    row = torch.randn(hidden * 4096).bfloat16()
    tensors = {f"{name}.weight": row[: math.prod(shape)].view(shape).clone() for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    assert nbytes > 0.5e9
    del tensors
    shutil.copytree(saved, tmp_path / "small")
    run = [sys.executable, "-c", _MEMORY, str(tmp_path)]
    there, back = map(float, subprocess.run(run, check=True, capture_output=True, text=True).stdout.split())
    print(f"growth of memory: {there:.0f} MB from, {back:.0f} MB to Hugging Face; in fp32 {2 * nbytes / 1e6:.0f} MB")
    assert there < 150 and back < 150
    theirs, ours = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "back"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)
