"""Text from a trained checkpoint: one process and four ranks say the same, once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megapt import checkpoint
from megapt.config import OptimizerConfig, ZeroConfig, load
from megapt.errors import UserError
from megapt.generate import generate, inference_config, parse_parallel
from megapt.mesh import ParallelMesh
from megapt.rules import check_world
from tests.end_to_end import runs
from tests.end_to_end.runs import Ranks

PROMPTS = ("--prompt", "the model", "--prompt", "a")
MODES = {"greedy": ("--temperature", "0"), "sampled": ("--temperature", "1.5", "--top-k", "20", "--seed", "3")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    config = runs.write_config(root / "config.yaml", runs.corpus(root / "corpus"), train={"steps": 20})
    Ranks(root / "r", 1, ["--config", config]).finish()
    return root / "run"


def test_one_process_and_four_ranks_write_the_same_text(run: Path) -> None:
    layout = ("--parallel", "tensor=2", "--parallel", "pipeline=2")
    torchrun = ("torchrun", "--nproc-per-node", "4", "--master-port")
    texts: dict[tuple[str, int], str] = {}
    for mode, options in MODES.items():
        words = ("-m", "megapt", "generate", run, *PROMPTS, "--tokens", "24", *options)
        started = {
            1: runs.start(sys.executable, *words, PYTHONPATH=_path()),
            4: runs.start(*torchrun, runs.port(), *words, *layout, PYTHONPATH=_path()),
        }
        for world, process in started.items():
            output, errors = process.communicate(timeout=runs.TIMEOUT)
            assert process.returncode == 0, errors
            texts[mode, world] = output
    for mode in MODES:
        assert texts[mode, 1] == texts[mode, 4]
        assert texts[mode, 1].count("the model") == 1 and len(texts[mode, 1]) > 40
    assert texts["greedy", 1] != texts["sampled", 1]


def _path() -> str:
    return f"{runs.ROOT}:{runs.ROOT / 'kernels'}"


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("nowhere", {}, "there is no checkpoint nowhere"),
        ("{run}", {"tokenizer": "nowhere.json"}, "tokenizer nowhere.json does not exist"),
        ("{run}", {"parallel": {"pipeline": 2}}, "world of 1 ranks"),
    ],
)
def test_generate_refuses(run: Path, source: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        generate(source.format(run=run), ["a"], **options)


def test_how_a_checkpoint_was_trained_does_not_limit_where_it_is_read(tmp_path: Path) -> None:
    ramp = {"start": 6, "increment": 6, "samples": 60}
    path = runs.write_config(
        tmp_path / "config.yaml",
        tmp_path / "corpus",
        zero={"stage": 3, "backend": "deepspeed"},
        batch={"samples": 12, "micro": 3, "ramp": ramp},
    )
    one = ParallelMesh.create(1, 1, 1, torch.device("cpu"))
    trained = load(path).config
    saved = checkpoint.save(tmp_path / "checkpoints", 1, [], one, {"config": trained.model_dump()})
    config = inference_config(saved, 2, {"pipeline": 2})
    assert check_world(config, 2) == 1 and config.parallel.pipeline == 2
    assert (config.model, config.precision, config.data) == (trained.model, "fp32", trained.data)
    assert (config.batch.sequence, config.batch.micro, config.batch.ramp) == (16, 1, None)
    assert (config.zero, config.optimizer) == (ZeroConfig(), OptimizerConfig())


def test_the_layout_of_the_command_line() -> None:
    assert parse_parallel(["tensor=2", "pipeline=4"]) == {"tensor": 2, "pipeline": 4}
    for wrong in ("depth=2", "tensor", "tensor=two"):
        with pytest.raises(UserError, match=f"'{wrong}': give the layout as tensor=N"):
            parse_parallel([wrong])
