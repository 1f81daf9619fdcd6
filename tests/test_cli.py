"""The command line: what it loads, what it hands to the jobs, and how it fails."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megapt import cli
from megapt.convert import Request
from megapt.data.documents import read_texts
from megapt.errors import UserError

ROOT = Path(__file__).parents[1]
HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "deepspeed",
    "tokenizers",
    "sentencepiece",
    "matplotlib",
)
Job = Callable[[str, str], list[Any]]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands complete their environment, which is to stay as it is for other tests."""
    monkeypatch.setattr("os.environ", dict(os.environ) | {"DS_ACCELERATOR": "cpu"})


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Job:
    """Puts a recording function in the place of a job's; the list fills with (arguments, keywords)."""

    def replace(module: str, function: str, returns: Any = None) -> list[Any]:
        real = importlib.import_module(module)
        signature = inspect.signature(getattr(real, function))
        calls: list[Any] = []

        def record(*arguments: Any, **keywords: Any) -> Any:
            signature.bind(*arguments, **keywords)  # a TypeError where the job does not take them
            calls.append((arguments, keywords))
            if isinstance(returns, BaseException):
                raise returns
            return returns

        monkeypatch.setattr(real, function, record)
        return calls

    return replace


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("arguments", [["--help"], ["data", "build", "--help"], ["pretrain", "--help"]])
def test_help_loads_no_job(arguments: list[str]) -> None:
    code = (
        "import sys; from megapt.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print('STATUS', end.code)\n"
        f"print('LOADED', [name for name in {HEAVY} if name in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert "Usage" in ran.stdout and ran.stdout.splitlines()[-2:] == ["STATUS 0", "LOADED []"]


def test_help_names_every_command() -> None:
    output = _run("--help")
    commands = "doctor config pretrain tokenizer data convert checkpoint eval plan tune generate bench quickstart"
    for command in commands.split():
        assert command in output


def test_pretrain(job: Job) -> None:
    calls = job("megapt.pretrain", "main")
    _run("pretrain", "--config", "c.yaml", "a.b=1", "c=[1, 2]")
    assert calls == [((["--config", "c.yaml", "a.b=1", "c=[1, 2]"],), {})]


def test_pretrain_passes_the_status_on(job: Job) -> None:
    job("megapt.pretrain", "main", returns=3)
    assert CliRunner().invoke(cli.app, ["pretrain", "--config", "c.yaml"]).exit_code == 3


def test_convert(job: Job) -> None:
    calls = job("megapt.convert", "to_hf", returns=Path("out"))
    _run("convert", "to-hf", "run", "out")
    _run("convert", "to-hf", "run", "out", "--tokenizer", "t.json", "--dtype", "bf16")
    more = {"shard_bytes": 5_000_000_000, "family": None, "request": Request(1e-5, None)}
    assert calls == [
        ((Path("run"), Path("out")), {"tokenizer": None, "dtype": "fp32"} | more),
        ((Path("run"), Path("out")), {"tokenizer": "t.json", "dtype": "bf16"} | more),
    ]


def test_generate(job: Job) -> None:
    calls = job("megapt.generate", "generate", returns=["one", "two"])
    output = _run("generate", "run", "--prompt", "a", "--prompt", "b", "--tokens", "5", "--seed", "7")
    assert output.splitlines() == ["one", "two"]
    assert calls == [((Path("run"), ["a", "b"], 5, 0.8, 50, 7, None, {}), {})]
    _run("generate", "run", "--prompt", "a", "--parallel", "tensor=2", "--parallel", "pipeline=3")
    assert calls[1][0][-1] == {"tensor": 2, "pipeline": 3}


def test_bench(job: Job) -> None:
    calls = job("megapt.bench", "train")
    _run("bench", "train", "c.yaml", "a=1", "--steps", "3", "--warmup", "0", "--json", "out.json")
    assert calls == [((Path("c.yaml"), ["a=1"], 3, 0, Path("out.json")), {})]


def test_quickstart(job: Job) -> None:
    calls = job("megapt.quickstart", "run")
    _run("quickstart", "--workdir", "w", "--text", "t.txt")
    assert calls == [((Path("w"),), {"text": Path("t.txt")})]


def test_doctor_exits_with_its_status(job: Job) -> None:
    calls = job("megapt.doctor", "main", returns=1)
    assert CliRunner().invoke(cli.app, ["doctor", "--json"]).exit_code == 1
    assert calls == [((), {"as_json": True})]


def test_from_text_to_tokens(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(Path(cli.__file__).read_text())
    (tmp_path / "texts" / "b.jsonl").write_text("".join(json.dumps({"body": w}) + "\n" for w in ("x y", "z")))
    texts, tokens = str(tmp_path / "texts"), str(tmp_path / "tokens")
    keyed = ["--text-key", "body"]
    for kind, vocabulary, name in (("bpe", 300, "tokenizer.json"), ("unigram", 400, "tokenizer.model")):
        file = str(tmp_path / name)
        arguments = ["--vocabulary", str(vocabulary), "--output", file, "--kind", kind, *keyed]
        assert f"{name}: " in _run("tokenizer", "train", texts, *arguments)
        output = _run("data", "build", texts, "--output", tokens, "--tokenizer", file, *keyed, "--overwrite")
        assert "3 documents" in output
    inspected = _run("data", "inspect", tokens)
    assert "uint16" in inspected and "fingerprint" in inspected


def test_config_show(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "model: {layers: 2, hidden: 8, heads: 2, ffn: 16, vocabulary: 32}\n"
        "batch: {sequence: 8, samples: 4}\ndata: {train: corpus}\ntrain: {steps: 1}\n"
    )
    shown = _run("config", "show", str(config), "seed=9")
    assert any(line.split() == ["seed:", "9", "#", "override"] for line in shown.splitlines())


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["megapt", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_a_broken_rule_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(monkeypatch, "config", "show", "/nowhere/c.yaml") == 2
    captured = capsys.readouterr()
    assert (
        captured.out == "" and captured.err == "megapt: error: config file /nowhere/c.yaml does not exist\n"
    )


def test_an_empty_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no text files"):
        list(read_texts([tmp_path], "text"))


def test_an_interruption_ends_with_130(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job("megapt.quickstart", "run", returns=KeyboardInterrupt())
    assert _main(monkeypatch, "quickstart") == 130


def test_a_wrong_option_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(monkeypatch, "doctor", "--wrong") == 2
    assert "--wrong" in capsys.readouterr().err


def test_python_dash_m() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "megapt", "--help"], cwd=ROOT, text=True, capture_output=True, timeout=60
    )
    assert ran.returncode == 0 and "pretrain" in ran.stdout


def test_a_path_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "file"
    text.write_text("some text\n" * 100)
    file.write_text("")
    command = [sys.executable, "-m", "megapt", "data", "build", str(text), "--output", str(file / "t")]
    done = subprocess.run([*command, "--tokenizer", "bytes"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("megapt: error: ")
    assert str(file) in done.stderr and "Traceback" not in done.stderr
