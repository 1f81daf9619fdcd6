"""The config: what is read, where it comes from, and every rule with its message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megapt.config import BatchRamp, dump, from_tree, load, show
from megapt.errors import UserError
from megapt.model.table import parameter_table
from megapt.rules import check_world

ROOT = Path(__file__).parents[1]
TEXT = """\
seed: 7
model:
  layers: 4
  hidden: 32
  heads: 4
  kv_heads: 2
  ffn: 48
  vocabulary: 64
  max_sequence: 64
data: {train: corpus}
batch:
  sequence: 16
  samples: 8
optimizer: {lr: 1e-3}
train: {steps: 10}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(TEXT)
    return path


def _refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as refusal:
        load(path, overrides)
    return str(refusal.value)


# Reading.


def test_values_origins_and_defaults(file: Path) -> None:
    loaded = load(file, ["model.layers=6", "parallel.tensor=2", "data.tokenizer=bytes"])
    assert loaded.config.model.layers == 6 and loaded.config.seed == 7
    assert loaded.config.parallel.sequence_parallel  # follows tensor > 1
    assert loaded.config.precision == "bf16" and loaded.config.zero.stage == 1
    assert loaded.config.model.head_width == 8 and loaded.config.optimizer.floor == pytest.approx(1e-4)
    assert loaded.origins["seed"] == f"{file}:1"
    assert loaded.origins["model.hidden"] == f"{file}:4"
    assert loaded.origins["data.train"] == f"{file}:10"
    assert loaded.origins["model.layers"] == loaded.origins["parallel.tensor"] == "override"
    assert "precision" not in loaded.origins


def test_show_names_the_origin_of_every_value(file: Path) -> None:
    shown = {line.split(":")[0].strip(): line for line in show(file, ["seed=9"]).splitlines()}
    assert shown["seed"].split() == ["seed:", "9", "#", "override"]
    assert shown["hidden"].split() == ["hidden:", "32", "#", f"{file}:4"]
    assert shown["precision"].split()[-1] == "default"
    assert "#" not in shown["model"]


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_numbers_as_everyone_writes_them(file: Path, text: str) -> None:
    assert load(file, [f"optimizer.lr={text}"]).config.optimizer.lr == 1e-4


@pytest.mark.parametrize(("text", "value"), [("1e9", 10**9), ("1_000", 1000), ("5", 5)])
def test_whole_numbers_may_be_written_as_powers(file: Path, text: str, value: int) -> None:
    assert load(file, ["train.steps=null", f"train.tokens={text}"]).config.train.tokens == value


def test_overrides_may_hold_lists_and_sections(file: Path) -> None:
    ramp = "batch.ramp={start: 2, increment: 2, samples: 40}"
    loaded = load(file, ["optimizer.betas=[0.8, 0.9]", ramp, "model.rope_scaling.kind=linear",
                         "model.rope_scaling.factor=2"])  # fmt: skip
    assert loaded.config.optimizer.betas == [0.8, 0.9]
    assert loaded.config.batch.ramp == BatchRamp(start=2, increment=2, samples=40)
    assert loaded.config.model.rope_scaling and loaded.config.model.rope_scaling.factor == 2


def test_an_override_of_a_section_is_the_origin_of_all_below_it(file: Path) -> None:
    file.write_text(TEXT + "parallel: {pipeline: 2, tensor: 1}\n")
    origins = load(file, ["parallel={tensor: 2}", "batch.ramp={start: 2, increment: 2, samples: 40}"]).origins
    assert {key: value for key, value in origins.items() if key.startswith("parallel")} == {
        "parallel": "override", "parallel.tensor": "override",
    }  # fmt: skip
    assert origins["batch.ramp.samples"] == "override"
    shown = {line.split(":")[0].strip(): line for line in show(file, ["parallel={tensor: 2}"]).splitlines()}
    assert shown["tensor"].endswith("# override") and shown["pipeline"].endswith("# default")


def test_a_batch_in_tokens(file: Path) -> None:
    batch = load(file, ["batch.samples=null", "batch.tokens=4096"]).config.batch
    assert batch.global_samples == 4096 // 16


def test_dump_and_load_round_trip(tmp_path: Path, file: Path) -> None:
    for source in (file, *sorted((ROOT / "configs").glob("*.yaml"))):
        config = load(source).config
        (tmp_path / "dumped.yaml").write_text(dump(config))
        assert load(tmp_path / "dumped.yaml").config == config
        assert from_tree(config.model_dump()).config == config


# Files and overrides that cannot be read.


def test_a_file_that_is_not_there(file: Path) -> None:
    assert _refusal(file.with_name("d.yaml")) == (
        f"config file {file.with_name('d.yaml')} does not exist; in that folder: c.yaml"
    )


def test_a_file_that_is_not_yaml(file: Path) -> None:
    file.write_text("model: [1")
    assert f"{file} is not valid YAML" in _refusal(file)
    file.write_bytes(b"\xff\xfe\x00")
    assert f"{file} is not valid YAML" in _refusal(file)
    file.write_text("- 1")
    assert "must hold sections" in _refusal(file)


def test_a_key_given_twice_is_refused(file: Path) -> None:
    file.write_text(TEXT + "optimizer: {betas: [0.8, 0.9]}\n")
    last = TEXT.count("\n") + 1
    assert _refusal(file) == (
        f"{file} is not valid YAML: key `optimizer` is given twice, in lines {last - 2} and {last}; keep one"
    )
    file.write_text(TEXT.replace("  heads: 4\n", "  heads: 4\n  hidden: 64\n"))
    assert "key `hidden` is given twice, in lines 4 and 6; keep one" in _refusal(file)


def test_tabs_and_impossible_dates_are_one_message(file: Path) -> None:
    for text in ("model:\n\tlayers: 4\n", "seed: 2020-13-45\n"):
        file.write_text(text)
        assert _refusal(file).startswith(f"{file} is not valid YAML: ")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.layers", "must have the form key.sub=value"),
        ("=3", "must have the form key.sub=value"),
        ("model.layers=[", "'[' is not a YAML value"),
        ("model.layers=four", "override: `model.layers`: input should be a valid integer (given: 'four')"),
        ("model.layers=4.5", "`model.layers`: input should be a valid integer"),
        ("model.tied_embeddings=1", "`model.tied_embeddings`: input should be a valid boolean (given: 1)"),
        ("precision=fp8", "`precision`: input should be 'fp32', 'bf16', 'fp16' or 'fp64' (given: 'fp8')"),
        ("model.heads=0", "`model.heads`: input should be greater than or equal to 1 (given: 0)"),
        ("optimizer.betas=[0.9]", "`optimizer.betas`"),
        ("optimizer.betas=[0.9, 1.5]", "`optimizer.betas.1`: input should be less than 1"),
        ("optimizer.betas=[1, 0.95]", "`optimizer.betas.0`: input should be less than 1 (given: 1)"),
        ("batch.ramp={start: 1, start: 2}", "key `start` is given twice, in lines 1 and 1"),
        ("seed=2020-13-45", "is not a YAML value"),
        ("optimizer.lr=.inf", "`optimizer.lr`: input should be a finite number"),
        ("zero.stage=4", "`zero.stage`: input should be less than or equal to 3"),
        ("paralel.tensor=2", "unknown key `paralel`; did you mean `parallel`? Known here: seed, precision"),
        ("model.layer=2", "unknown key `model.layer`; did you mean `layers`?"),
        ("batch.ramp={begin: 1}", "unknown key `batch.ramp.begin`"),
    ],
)
def test_values_that_do_not_fit(file: Path, override: str, words: str) -> None:
    assert words in _refusal(file, override)


def test_every_problem_is_named_with_its_place(file: Path) -> None:
    file.write_text(TEXT.replace("layers: 4", "layers: x").replace("  vocabulary: 64\n", "").replace("seed", "sead"))
    assert sorted(_refusal(file).splitlines()) == sorted(
        [
            f"{file}:1: unknown key `sead`; did you mean `seed`? Known here: "
            "seed, precision, loss_scale, objective, model, parallel, recompute, compile, kernels, zero, data, batch, "
            "optimizer, train, checkpoint, run",
            f"{file}:3: `model.layers`: input should be a valid integer (given: 'x')",
            f"{file}:2: `model.vocabulary` is missing and has no default",
        ]
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.train=[{path: a, weight: -1}]", "`data.train.0.weight`: input should be greater than 0 (given: -1)"),
        ("data.train=[{path: a}, {paht: b}]", "unknown key `data.train.1.paht`; did you mean `path`?"),
        ("data.train=5", "`data.train`: input should be a valid string (given: 5)"),
    ],
)
def test_where_text_or_a_list_may_stand_only_what_was_meant_is_told(file: Path, override: str, words: str) -> None:
    lines = _refusal(file, override).splitlines()
    assert any(words in line for line in lines) and not any("valid list" in line for line in lines)
    assert sum("valid string" in line for line in lines) == ("valid string" in words)


# Rules between values: (overrides, key, parts of the message: the values, and the nearest legal ones).

RULES: dict[str, tuple[list[str], str, list[str]]] = {
    "hidden by heads": (["model.hidden=34"], "model.hidden", ["34", "model.heads = 4", "nearest: 32 or 36"]),
    "kv heads": (["model.kv_heads=3"], "model.kv_heads", ["3 does not divide model.heads = 4", "legal: 1, 2, 4"]),
    "odd rope": (["model.head_dim=7"], "model.head_dim", ["even head dimension, not 7"]),
    "scaling without rope": (
        ["model.position=learned", "model.rope_scaling={kind: linear, factor: 2}"],
        "model.rope_scaling", ["needs model.position = rope"],
    ),
    "tensor": (
        ["parallel.tensor=3", "parallel.sequence=false"],
        "parallel.tensor", ["3 must divide model.heads = 4 and model.ffn = 48", "2 kv heads", "legal: 1, 2, 4"],
    ),
    "sequence parallel": (
        ["parallel.tensor=4", "batch.sequence=18", "batch.micro=1"],
        "batch.sequence", ["1 x 18", "tensor = 4", "nearest sequence: 16 or 20"],
    ),
    "chunks": (["parallel.chunks=2"], "parallel.chunks", ["2 chunks", "the 1f1b schedule has 1"]),
    "interleaved": (
        ["parallel.schedule=interleaved", "parallel.pipeline=2", "parallel.chunks=1"],
        "parallel.chunks", ["1 chunks", "has 2 or more"],
    ),
    "interleaved without a pipeline": (
        ["parallel.schedule=interleaved", "parallel.chunks=2"], "parallel.schedule", ["pipeline of 2 or more, not 1"],
    ),
    "chunks of zb-v": (
        ["parallel.schedule=zb-v", "parallel.pipeline=2", "parallel.chunks=4", "model.layers=8"],
        "parallel.chunks", ["4 chunks", "zb-v schedule has 2"],
    ),
    "layers per stage": (
        ["parallel.pipeline=2", "parallel.layers_per_stage=[1, 2]"],
        "parallel.layers_per_stage", ["'1,2'", "2 virtual stages", "4 layers", "an even one: 2,2"],
    ),
    "an empty stage": (
        ["parallel.pipeline=2", "parallel.layers_per_stage=[4, 0]"], "parallel.layers_per_stage", ["the fewest 0"],
    ),
    "no layout": (
        ["parallel.pipeline=2", "parallel.layers_per_stage=a*b"], "parallel.layers_per_stage", ["got 'a*b'"],
    ),
    "a timeline after the end": (
        ["run.timeline_step=7", "train.steps=6"], "run.timeline_step", ["7 never comes", "6 steps"],
    ),
    "few layers": (["parallel.pipeline=5"], "parallel.pipeline", ["4 layers", "5 stages", "at most 4 stages"]),
    "ZeRO 2 with a pipeline": (
        ["zero.stage=2", "zero.backend=deepspeed", "parallel.pipeline=2"],
        "zero.stage", ["deepspeed ZeRO 2 with pipeline = 2", "stage 0 or 1"],
    ),
    "native ZeRO 2 with a pipeline": (
        ["zero.stage=2", "zero.backend=native", "parallel.pipeline=2"],
        "zero.stage", ["native ZeRO 2 with pipeline = 2", "stage 0 or 1"],
    ),
    "native ZeRO 3": (
        ["zero.stage=3", "zero.backend=native"], "zero.stage", ["stages 0 to 2, not 3", "zero.backend = deepspeed"],
    ),
    "two batches": (["batch.tokens=128"], "batch", ["either in `samples` or in `tokens`"]),
    "no batch": (["batch.samples=null"], "batch", ["either in `samples` or in `tokens`"]),
    "tokens": (
        ["batch.samples=null", "batch.tokens=100"], "batch.tokens", ["100", "sequences of 16", "nearest: 96 or 112"],
    ),
    "long sequence": (["batch.sequence=65"], "batch.sequence", ["65", "model.max_sequence = 64"]),
    "two lengths": (["train.tokens=1000"], "train", ["either in `steps` or in `tokens`"]),
    "no length": (["train.steps=null"], "train", ["either in `steps` or in `tokens`"]),
    "ramp with tokens": (
        ["train.steps=null", "train.tokens=1000", "batch.ramp={start: 2, increment: 2, samples: 8}"],
        "train.tokens", ["batch ramp", "`steps`"],
    ),
    "floor": (["optimizer.min_lr=0.1"], "optimizer.min_lr", ["0.1 is above optimizer.lr = 0.001"]),
    "floor of a constant": (
        ["optimizer.schedule=constant", "optimizer.min_lr=0.0001"], "optimizer.min_lr", ["no effect on the constant"],
    ),
    "wsd": (["optimizer.schedule=wsd"], "optimizer.decay_steps", ["wsd"]),
    "decay without wsd": (["optimizer.decay_steps=3"], "optimizer.decay_steps", ["wsd"]),
    "offload": (["zero.offload=true", "zero.backend=native"], "zero.offload", ["not native, 1 and 1"]),
    "fp16": (["precision=fp16", "zero.backend=deepspeed"], "precision", ["zero.backend = native"]),
    "loss scale": (["loss_scale.window=5"], "loss_scale.window", ["no effect on precision = bf16", "fp16"]),
    "smallest loss scale": (
        ["precision=fp16", "zero.backend=native", "loss_scale.initial=2", "loss_scale.smallest=4"],
        "loss_scale.smallest", ["4.0 is above loss_scale.initial = 2.0"],
    ),
    "muon's settings": (
        ["optimizer.muon.momentum=0.9"], "optimizer.muon.momentum", ["no effect on optimizer.kind = adamw"],
    ),
    "muon": (["optimizer.kind=muon", "zero.backend=deepspeed"], "optimizer.kind", ["zero.backend = native"]),
    "stochastic rounding": (
        ["optimizer.stochastic_rounding=true", "precision=fp32", "zero.backend=native"],
        "optimizer.stochastic_rounding", ["precision is fp32"],
    ),
    "budget": (["recompute.policy=budget"], "recompute.policy", ["budget needs `recompute.budget`"]),
    "budget of another policy": (["recompute.budget=2"], "recompute.budget", ["no effect on the none policy"]),
    "more recomputed layers than there are": (
        ["recompute.policy=full", "recompute.layers=1000"], "recompute.layers", ["1000 are more than", "leave it out"],
    ),
    "split beside validation data": (
        ["data.valid=v", "data.split=90,10,0"], "data.split", ["90,10,0 has no effect"],
    ),
    "phases of a blend of one": (
        ["data.train=[{path: a}]", "data.phases=[{from_token: 10, weights: {a: 1}}]"], "data.phases", ["one corpus"],
    ),
    "recomputed layers": (["recompute.layers=2"], "recompute.layers", ["no effect on the none policy"]),
    "layer costs": (["parallel.layer_costs=[1, 2]"], "parallel.layer_costs", ["2 costs for model.layers = 4"]),
    "masks": (["objective=masked_lm", "model.attention=bidirectional"], "data.masked_lm", ["needs it"]),
    "direction": (["model.attention=bidirectional"], "model.attention", ["next_token needs causal"]),
    "masks without the objective": (["data.masked_lm={mask: x}"], "data.masked_lm", ["objective = masked_lm"]),
    "masks beyond one": (
        ["objective=masked_lm", "model.attention=bidirectional",
         "data.masked_lm={mask: x, random: 0.7, keep: 0.7}"], "data.masked_lm", ["more than 1"],
    ),
    "infilling": (
        ["objective=masked_lm", "model.attention=bidirectional",
         "data.masked_lm={mask: x}", "data.fim={prefix: a, middle: b, suffix: c}"],
        "data.fim", ["not masked_lm"],
    ),
    "packed in megatron's order": (
        ["data.order=megatron", "data.packing=best_fit"], "data.packing", ["concatenate, not best_fit"],
    ),
    "no sources": (["data.train=[]"], "data.train", ["no sources"]),
    "equal names": (["data.train=[{path: a/x}, {path: b/x}]"], "data.train", ["x, x", "`name:`"]),
    "weights and budgets": (
        ["data.train=[{path: a, weight: 1}, {path: b, tokens: 100}]"], "data.train", ["not both"],
    ),
    "some weights": (["data.train=[{path: a, weight: 1}, {path: b}]"], "data.train", ["to all, or to none"]),
    "phases of one corpus": (
        ["data.phases=[{from_token: 10, weights: {a: 1}}]"], "data.phases", ["one corpus"],
    ),
    "phases in disorder": (
        ["data.train=[{path: a}, {path: b}]",
         "data.phases=[{from_token: 10, weights: {a: 1}}, {from_token: 5, weights: {b: 1}}]"],
        "data.phases", ["[10, 5]"],
    ),
    "unknown source": (
        ["data.train=[{path: a}, {path: b}]", "data.phases=[{from_token: 10, weights: {c: 1}}]"],
        "data.phases", ["c: no such source", "a, b"],
    ),
    "weightless phase": (
        ["data.train=[{path: a}, {path: b}]", "data.phases=[{from_token: 10, weights: {a: 0}}]"],
        "data.phases", ["gives no source a weight"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rules(file: Path, name: str) -> None:
    overrides, key, words = RULES[name]
    lines = _refusal(file, *overrides).splitlines()
    assert len(lines) == 1, lines
    assert f"{key}: " in lines[0] and (lines[0].startswith("override: ") or lines[0].startswith(str(file)))
    for word in words:
        assert word in lines[0]


# Rules that need the world.

WORLDS: dict[str, tuple[int, list[str], list[str]]] = {
    "cell": (
        6, ["parallel.tensor=4"],
        ["6 ranks is not divisible by tensor x pipeline = 4 x 1 = 4", "tensor=1 pipeline=1 (data=6)",
         "tensor=2 pipeline=3 (data=1)", "start 4 or 8 ranks"],
    ),
    "data": (4, ["parallel.data=2"], ["parallel.data is 2", "4 / (1 x 1) = 4", "set it to 4, or start 2 ranks"]),
    "batch": (
        3, ["batch.micro=2"],
        ["batch.samples = 8", "micro-batch x data = 2 x 3 = 6", "nearest that fit: 6 or 12"],
    ),
    "ramp": (
        4, ["batch.ramp={start: 2, increment: 2, samples: 8}"],
        ["batch.ramp.start = 2", "1 x 4 = 4", "nearest that fit: 4"],
    ),
    "interleaved": (
        2, ["parallel.pipeline=2", "parallel.chunks=2", "parallel.schedule=interleaved", "batch.samples=7"],
        ["batch.samples 7 / (micro 1 x data 1) = 7", "divisible by pipeline = 2", "nearest sizes: 6 or 8"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORLDS)
def test_rules_that_need_the_world(file: Path, name: str) -> None:
    world, overrides, words = WORLDS[name]
    with pytest.raises(UserError) as refusal:
        check_world(load(file, overrides).config, world)
    for word in words:
        assert word in str(refusal.value)


def test_the_data_degree_is_what_remains(file: Path) -> None:
    assert check_world(load(file, ["parallel.tensor=2", "parallel.pipeline=2"]).config, 8) == 2


# Presets.


@pytest.mark.parametrize(
    ("name", "parameters", "world"),
    [
        ("gpt2-124m", 124_439_808, 8),
        ("llama-1b", 1_235_814_400, 8),
        ("llama-8b", 8_030_261_248, 32),
        ("llama-70b", 70_553_706_496, 256),
        ("llama-405b", 405_853_388_800, 1024),
    ],
)
def test_presets(name: str, parameters: int, world: int) -> None:
    config = load(ROOT / "configs" / f"{name}.yaml").config
    assert parameter_table(config.model).count() == parameters
    assert check_world(config, world) >= 1


def test_every_preset_loads() -> None:
    names = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
    assert len(names) >= 6
    for name in names:
        tree: dict[str, Any] = yaml.safe_load((ROOT / "configs" / name).read_text())
        assert load(ROOT / "configs" / name).config.model.layers == tree["model"]["layers"]
