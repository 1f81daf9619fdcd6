"""`megapt plan` and `megapt tune` as they are typed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from megapt.cli import app
from megapt.config import load
from megapt.errors import UserError
from megapt.plan.search import search
from megapt.plan.table import WIDTH, printed, ranking, whole_width
from megapt.rules import check_world
from tests.plan.planning import MODEL, config, gpu


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    tree: dict[str, Any] = {
        "precision": "bf16",
        "model": MODEL,
        "data": {"train": "data/none"},
        "batch": {"sequence": 2048, "samples": 64},
        "optimizer": {"lr": 3e-4},
        "train": {"tokens": "1e12"},
    }
    text = yaml.safe_dump(tree, sort_keys=False).replace("'1e12'", "1e12")
    path.write_text(f"# A small model.\n# It is for tests.\n{text}")
    return path


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "118"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_table_and_what_goes_with_it(file: Path, tmp_path: Path) -> None:
    out, html, pictures = tmp_path / "plan.json", tmp_path / "r.html", tmp_path / "pictures"
    printed = run(
        *("plan", file, "--gpus", 8, "--tokens", "1e12", "--budget-hours", "1e5", "--json", out, "--html", html),
        *("--pictures", pictures, "--explain", "tp=2,pp=2", "--explain", "tp=3", "--what-if", "network=200Gb"),
        *("--only", "pp=2", "--top", 4),
    )
    made = json.loads(out.read_text())
    best = made["ranked"][0]
    assert len(made["ranked"]) <= 4 and made["world"] == 8 and made["memory_margin"] == 0.05
    assert f"{best['tokens_per_second']:,.0f}" in printed and f"{best['mfu']:.1%}" in printed
    hours = 1e12 / best["tokens_per_second"] / 3600
    assert f"1,000,000,000,000 tokens take {hours / 24:,.1f} days, {hours * 8:,.0f} GPU-hours" in printed
    assert "GPU-hours to spare" in printed or "GPU-hours too few" in printed
    assert "tp=3 is not legal" in printed and "with network=200Gb: " in printed
    assert sum(best["memory_items"].values()) == best["memory_bytes"] == max(best["memory_per_stage"])
    assert sum(best["time_items"].values()) == pytest.approx(best["step_seconds"])
    names = sorted(path.name for path in pictures.iterdir())
    assert names == ["memory.png", "scaling.png", "timeline.png"]
    assert all((pictures / name).read_bytes().startswith(b"\x89PNG") for name in names)
    page = html.read_text()
    Tags.check(page)
    assert page.count("data:image/png;base64,") == 3 and "<script" not in page
    assert all(link.startswith("data:") for link in re.findall(r"""(?:src|href)=["']?([^"'> ]{5})""", page))
    assert f"{best['tokens_per_second']:,.0f}" in page and "tp=3 is not legal" in page


class Tags(HTMLParser):
    """That every tag of a page is closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    @staticmethod
    def check(page: str) -> None:
        parser = Tags()
        parser.feed(page)
        assert parser.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_what_is_written_loads_and_is_stable(file: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first.yaml", tmp_path / "again.yaml"
    printed = run("plan", file, "train.tokens=2e12", "--gpus", 8, "--pick", 2, "--write", first)
    before, made = load(file, ["train.tokens=2e12"]).config, load(first).config
    assert made.model == before.model and made.optimizer == before.optimizer and made.train == before.train
    assert check_world(made, 8) and f"{first}: the config of tp={made.parallel.tensor}," in printed
    text = first.read_text()
    assert text.startswith("# A small model.\n# It is for tests.\n#\n# Chosen by `megapt plan ")
    assert "# Number 2 is this file's." in text and "tokens: 2e12" in text
    assert max(map(len, text.splitlines()[4:])) <= 120
    # A preset that is planned again keeps its own words and nothing of the older table.
    run("plan", first, "--gpus", 8, "--pick", 2, "--write", again)
    rest = again.read_text().replace(str(first), str(file)).replace("--gpus", "train.tokens=2e12 --gpus")
    assert rest == text


def test_calibrate_is_a_command_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        CliRunner().invoke(app, ["plan", "calibrate", str(tmp_path / "no/cpu.yaml")], catch_exceptions=False)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--gpus", "8", "--hardware", "h1000"], "hardware 'h1000' is not known; did you mean h100"),
        (["--gpus", "8", "--what-if", "network=fast"], "'fast' is not a number with a unit"),
        (["--gpus", "8", "--what-if", "netwrk=1"], "is not of the form name=value"),
        (["--gpus", "8", "--explain", "tp=0"], "tp is a whole number from 1 on, not '0'"),
        (["--gpus", "7000"], "no layout of 7,000 ranks is legal"),
        (["batch.samples=7", "--gpus", "11"], "numbers of ranks that work: 10 or 12"),
        (["--gpus", "8", "--pick", "99"], "--pick 99: the table has"),
        (["--gpus", "8", "--write", "no/folder/x.yaml"], "no/folder is no folder"),
        ([], "say how many ranks: --gpus 512"),
        (["--dry-run"], "say how many ranks: --world 4096"),
        (["--dry-run", "--world", "8", "--rank", "last"], "give all-stages, or numbers of ranks"),
        (["--gpus", "8", "parallel.tensor=3"], "3 must divide model.heads"),
    ],
)
def test_bad_input(file: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(app, ["plan", str(file), *words], catch_exceptions=False)
    assert message in str(caught.value)


@pytest.mark.parametrize("words", ["--gpus -1", "--gpus 0", "--gpus many", "--gpus 8 --top 0"])
def test_bad_numbers(file: Path, words: str) -> None:
    result = CliRunner().invoke(app, ["plan", str(file), *words.split()])
    assert result.exit_code == 2 and words.split()[-2] in result.output and "Traceback" not in result.output


def test_the_smallest_cluster_holds_the_model_and_smaller_ones_do_not(file: Path) -> None:
    words = ["model.hidden=8192", "model.ffn=28672", "model.heads=64", "model.layers=16", "batch.samples=16"]
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(app, ["plan", str(file), *words, "--gpus", "1"], catch_exceptions=False)
    text = str(caught.value)
    found = re.search(r"would do has ([\d,]+): tp=", text)
    assert found and "GiB more than there are" in text
    assert "needs least (tp=1,pp=1,dp=1,micro=1,zero=native-1,recompute=full)" in text
    world = int(found[1].replace(",", ""))
    assert "tokens/s" in run("plan", file, *words, "--gpus", world)
    assert world > 2
    with pytest.raises(UserError, match="fits in no layout"):
        CliRunner().invoke(app, ["plan", str(file), *words, "--gpus", str(world // 2)], catch_exceptions=False)


def test_no_figure_is_cut_off() -> None:
    plan = search(config(), 8, gpu(), best_alone=True)
    wide = {"dp": 1024, "pp": 4, "schedule": "interleaved", "chunks": 14, "zero": "deepspeed-3-offload"}
    option = replace(plan.best, layout=replace(plan.best.layout, recompute="selective:56", **wide))
    table = ranking(plan, [option])
    assert whole_width(table) > WIDTH and "…" in printed(table)
    assert "…" not in printed(table, whole_width(table))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--html", "."], "is a folder; name a file in it"),
        (["--pictures", __file__], "is a file; name a folder"),
        (["--tokens", "inf"], "--tokens inf: give a number"),
        (["--only", "recompute=budget:0.00001"], "no layout of 8 ranks keeps recompute=budget:0.00001"),
        (["--only", "micro=5"], "micro is one of 1, 2, 4, 8, 16, 32, 64"),
        (["precision=fp16", "--backend", "deepspeed"], "fp16, Muon and stochastic rounding need the native backend"),
    ],
)
def test_what_cannot_be_is_refused_in_words(file: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(app, ["plan", str(file), "--gpus", "8", *words], catch_exceptions=False)


def test_dry_run_beside_the_estimate(file: Path) -> None:
    words = ["model.hidden=64", "model.ffn=128", "model.vocabulary=512", "batch.sequence=64", "batch.samples=8"]
    layout = ["precision=fp32", "parallel.tensor=2", "parallel.pipeline=2", "--hardware", "cpu"]
    printed = run("plan", file, *words, *layout, "--dry-run", "--world", 8)
    errors = re.findall(r"^ *(\d+) +\d+ +0 +0 +[\d.]+ +[\d.]+ +([-+][\d.]+)%", printed, re.M)
    assert [rank for rank, _ in errors] == ["0", "4"], printed
    assert all(abs(float(error)) < 5 for _, error in errors)
    assert re.search(r"all-gather +tp +2 +\d+", printed) and re.search(r"send +pp +2 +4 ", printed)
    one = run("plan", file, *words, *layout, "--dry-run", "--world", 8, "--rank", "5")
    assert re.search(r"^ *5 +1 +0 +1 ", one, re.M)
