"""Scores of a checkpoint: each token once, as transformers scores it, and the same in every layout."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from megapt import checkpoint
from megapt.batch import IGNORE
from megapt.cli import app
from megapt.config import from_tree
from megapt.convert import to_hf
from megapt.data import tokenizers
from megapt.data import windows as module
from megapt.data.indexed import IndexedWriter
from megapt.data.windows import Piece, micro_batch, pack, windows
from megapt.errors import UserError
from megapt.evaluate import Evaluation, Job, Request, evaluate
from megapt.mesh import ParallelMesh
from megapt.parallel.pipeline.stages import build_chunks
from megapt.parallel.tensor import TensorParallel
from megapt.prove.ranks import run_ranks
from megapt.zero.base import Fragment
from tests.end_to_end import runs

CPU = torch.device("cpu")
SEQUENCE = 16
LLAMA = {"layers": 4, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "vocabulary": 300, "max_sequence": 64}
GPT2 = {
    "layers": 2, "hidden": 32, "heads": 4, "ffn": 80, "vocabulary": 300, "max_sequence": 64, "norm": "layer_norm",
    "activation": "gelu_tanh", "gated": False, "position": "learned", "bias": "all", "tied_embeddings": True,
}  # fmt: skip
TEXTS = [
    "a model of tokens learns to predict the next word from many words before it – naïve café, ünïcödé " * 3,
    "",
    "short",
    "日本語のテキスト and then some more words of the model, a few of them many times over",
    "ä",
    *("the next word is a word" for _ in range(5)),
]


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", dict(os.environ) | {"DS_ACCELERATOR": "cpu"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, texts as JSON lines and as a pair, and a checkpoint of each model."""
    root = tmp_path_factory.mktemp("evaluate")
    tokenizer = tokenizers.train_bpe(TEXTS, 300, root / "tokenizer.json")
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (root / "one.txt").write_text(TEXTS[0])
    with IndexedWriter(root / "pair", np.uint16) as writer:
        for text in TEXTS:
            writer.add_document([*tokenizer.encode(text), tokenizer.eod or 0])
    for name, model in {"llama": LLAMA, "gpt2": GPT2}.items():
        save(root / name, model, {"tokenizer": str(root / "tokenizer.json")})
    return root


def save(folder: Path, model: dict[str, Any], data: dict[str, Any], masked: bool = False) -> Path:
    """A checkpoint whose every tensor is random, so that no two tokens are alike likely."""
    tree = {"precision": "fp32", "model": model, "data": {"train": "x"}, "train": {"steps": 1}}
    config = from_tree(tree | {"batch": {"sequence": SEQUENCE, "samples": 1}}).config
    mesh = ParallelMesh.create(1, 1, 1, CPU)
    _, parameters = build_chunks(config, mesh, TensorParallel(mesh.tp))
    generator = torch.Generator().manual_seed(5)
    fragments = []
    for parameter in parameters:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + parameter.spec.fill)
        fragments.append(Fragment(parameter, 0, parameter.numel(), {"weight": parameter.data.flatten()}))
    stored = config.model_dump()
    stored["data"] |= data
    if masked:
        stored["objective"], stored["model"]["attention"] = "masked_lm", "bidirectional"
    return checkpoint.save(folder / "checkpoints", 7, fragments, mesh, {"config": stored, "step": 7})


def pieces_of(documents: list[list[int]], cuts: Callable[[int], int] = lambda length: length) -> list[Piece]:
    """Documents in pieces of lengths that `cuts` says, given what is left."""
    made = []
    for ids in documents:
        at = 0
        while True:
            end = at + max(0, min(cuts(len(ids) - at), len(ids) - at))
            made.append(Piece(np.array(ids[at:end], np.int64), at == 0, end == len(ids), 0, 0))
            if end == len(ids):
                break
            at = end
    return made


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=8),
    sequence=st.integers(1, 12),
    overlap=st.integers(0, 11),
    start=st.sampled_from([None, 0]),
    seed=st.integers(0, 1000),
)
def test_every_token_is_scored_once_with_its_context(
    lengths: list[int], sequence: int, overlap: int, start: int | None, seed: int
) -> None:
    stride = max(1, sequence - overlap)
    numbers = itertools.count(1)  # every token another, so that each says where it stands
    documents = [[next(numbers) for _ in range(length)] for length in lengths]
    cut = np.random.default_rng(seed)
    found = list(windows(pieces_of(documents, lambda left: int(cut.integers(1, 9))), sequence, stride, start))
    wholes = [ids if start is None else [start, *ids] for ids in documents]
    scored = [int(token) for window in found for token in window.tokens[len(window.tokens) - window.scored :]]
    assert scored == [token for ids in wholes for token in ids[1:]]
    place = {token: (ids, at) for ids in wholes for at, token in enumerate(ids) if token != start}
    for window in found:
        ids, at = place[int(window.tokens[-1])]
        assert list(window.tokens) == ids[at + 1 - len(window.tokens) : at + 1] and len(window.tokens) <= sequence + 1
        first_scored = len(window.tokens) - window.scored
        assert first_scored >= min(at + 1 - window.scored, sequence - stride + 1)
    rows = list(pack(found, sequence))
    assert sorted(int(w.tokens[-1]) for row in rows for w in row) == sorted(int(w.tokens[-1]) for w in found)
    batch = micro_batch(rows, len(rows) + 1, sequence)
    assert batch.labels is not None
    pairs = list(zip(batch.tokens.flatten().tolist(), batch.labels.flatten().tolist(), strict=True))
    before = {token: ids[at - 1] for token, (ids, at) in place.items() if at}
    assert sorted(pair for pair in pairs if pair[1] != IGNORE) == sorted((b, t) for t, b in before.items())
    if batch.documents is not None:
        assert sum(batch.documents.lengths) == batch.tokens.numel() == int(batch.documents.cu_seqlens[-1])
        starts = [0, *itertools.accumulate(batch.documents.lengths)][:-1]
        assert all(batch.documents.positions[at] == 0 for at in starts)
        assert int(batch.documents.positions.max()) == max(batch.documents.lengths) - 1


def reference(model: Any, documents: list[list[int]], sequence: int, stride: int) -> tuple[float, int]:
    """The loop of transformers' page on perplexity, with a label for each input: nats per token, and tokens."""
    total, count = 0.0, 0
    for ids in documents:
        before = 1
        for begin in range(0, len(ids) - 1, stride):
            end = min(begin + sequence, len(ids) - 1)
            with torch.no_grad():
                logits = model(torch.tensor([ids[begin:end]])).logits[0].double()
            labels = torch.tensor(ids[begin + 1 : end + 1])
            new = end + 1 - before
            total += float(torch.nn.functional.cross_entropy(logits[-new:], labels[-new:], reduction="sum"))
            count, before = count + new, end + 1
            if end == len(ids) - 1:
                break
    return total / count, count


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_same_perplexity_as_transformers(folder: Path, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    to_hf(folder / name, tmp_path / "hf", request=None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    text = tokenizers.load(folder / "tokenizer.json")
    encoded = [text.encode(document) for document in TEXTS]
    assert text.eod is not None and max(map(len, encoded)) > 4 * SEQUENCE
    for stride, start in ((SEQUENCE, None), (SEQUENCE // 2, None), (6, "none")):
        request = Request(folder / name, [folder / "texts.jsonl"], stride=stride, start_token=start, micro=5)
        found = evaluate(request)
        documents = encoded if start else [[text.eod, *ids] for ids in encoded]
        nats, count = reference(model, documents, SEQUENCE, stride)
        assert nats > 3
        assert found.nats_per_token == pytest.approx(nats, rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(nats), rel=1e-4)
        assert (found.tokens, found.stride, found.sequence, found.step) == (count, stride, SEQUENCE, 7)
        assert found.unscored == (sum(map(bool, encoded)) if start else 0)
    whole = evaluate(Request(folder / name, [folder / "texts.jsonl"], sequence=64, stride=8, micro=9))
    nats, _ = reference(model, [[text.eod, *ids] for ids in encoded], 64, 8)
    assert whole.nats_per_token == pytest.approx(nats, rel=1e-5)


def test_bytes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(len(text.encode()) for text in TEXTS)
    request = Request(folder / "llama", [folder / "texts.jsonl"], micro=8)
    found = evaluate(request)
    assert (found.bytes, found.documents, found.no_bytes) == (size, len(TEXTS), None)
    assert found.bits_per_byte == pytest.approx(found.nats_per_token * found.tokens / math.log(2) / size)
    # A pair stands for the same text, however it is read, and its documents' ends are scored as well.
    monkeypatch.setattr(module, "_CHUNK", 7)
    pair = evaluate(replace(request, data=[folder / "pair"]))
    assert (pair.bytes, pair.tokens, pair.documents) == (size, found.tokens + len(TEXTS), len(TEXTS))
    both = evaluate(replace(request, data=[folder / "texts.jsonl", str(folder / "pair") + ".bin"]))
    assert both.bytes == 2 * size
    assert both.nats_per_token * both.tokens == pytest.approx(
        found.nats_per_token * found.tokens + pair.nats_per_token * pair.tokens
    )
    # What is not scored is not counted: first tokens without context, and what lies beyond the last window.
    text = tokenizers.load(folder / "tokenizer.json")
    first = [text.decode(text.encode(t)[:1]).rstrip("\ufffd") for t in TEXTS]
    bare = evaluate(replace(request, start_token="none"))
    assert bare.bytes == size - sum(len(t.encode()) for t in first) and bare.unscored == len(TEXTS) - 1
    cut = evaluate(replace(request, samples=3))
    assert (cut.windows, cut.tokens) == (3, 3 * SEQUENCE)
    assert cut.bytes == len(text.decode(text.encode(TEXTS[0])[: 3 * SEQUENCE]).rstrip("\ufffd").encode())
    save(tmp_path, LLAMA, {})
    unknown = evaluate(Request(tmp_path, [folder / "pair"], micro=8))
    assert (unknown.bytes, unknown.bits_per_byte, unknown.start_token) == (None, None, None)
    assert unknown.no_bytes is not None and "no tokenizer is named" in unknown.no_bytes


def test_the_start_token(folder: Path, tmp_path: Path) -> None:
    request = Request(folder / "llama", [folder / "texts.jsonl"], micro=8, samples=8)
    named = {"tokenizer": str(folder / "tokenizer.json")}
    assert evaluate(request).start_token == 0  # the end of a document
    assert evaluate(replace(request, start_token="a")).start_token not in (None, 0)
    # Of packed documents the first tokens are never predicted in training; of joined ones they are.
    save(tmp_path / "packed", LLAMA, named | {"packing": "best_fit"})
    assert evaluate(replace(request, checkpoint=tmp_path / "packed")).start_token is None
    save(tmp_path / "joined", LLAMA, named | {"documents": True})
    assert evaluate(replace(request, checkpoint=tmp_path / "joined")).start_token == 0


def test_precisions(folder: Path) -> None:
    request = Request(folder / "llama", [folder / "texts.jsonl"], micro=8)
    exact = evaluate(replace(request, precision="fp64")).nats_per_token
    assert evaluate(request).nats_per_token == pytest.approx(exact, rel=1e-5)
    rounded = evaluate(replace(request, precision="bf16")).nats_per_token
    assert 1e-6 < abs(rounded / exact - 1) < 2e-2


LAYOUTS: list[dict[str, int]] = [{"tensor": 2, "pipeline": 2}, {"pipeline": 2}, {"tensor": 4}]


def in_layouts(rank: int, world: int, folder: str) -> list[Evaluation]:
    requests = [
        Request(f"{folder}/llama", [f"{folder}/texts.jsonl"], stride=5, sequence=15, micro=2, parallel=layout)
        for layout in LAYOUTS
    ]
    return [Job(request, world).run(CPU) for request in requests]


def test_every_layout_gives_the_same(folder: Path) -> None:
    one = evaluate(Request(folder / "llama", [folder / "texts.jsonl"], stride=5, sequence=15, micro=8))
    for found in itertools.chain(*run_ranks(4, in_layouts, str(folder))):
        assert found.nats_per_token == pytest.approx(one.nats_per_token, rel=1e-6)
        same = {name: value for name, value in asdict(one).items() if name in ("tokens", "windows", "bytes")}
        assert {name: getattr(found, name) for name in same} == same


def test_the_command_in_ranks_of_torchrun(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    words = ("-m", "megapt", "eval", folder / "llama", folder / "one.txt", "--json", out, "--parallel", "pipeline=2")
    started = runs.start(
        Path(sys.executable).with_name("torchrun"), "--nproc-per-node", "2", "--master-port", runs.port(), *words,
        PYTHONPATH=f"{runs.ROOT}:{runs.ROOT / 'kernels'}",
    )  # fmt: skip
    output, errors = started.communicate(timeout=runs.TIMEOUT)
    assert started.returncode == 0, errors
    one = evaluate(Request(folder / "llama", [folder / "one.txt"]))
    found = json.loads(out.read_text())
    assert found["nats_per_token"] == pytest.approx(one.nats_per_token, rel=1e-6)
    assert found["bytes"] == len(TEXTS[0].encode())
    (line,) = [line for line in output.splitlines() if line.startswith("nats per token")]
    assert f"perplexity {found['perplexity']:.6g}" in line and f"bits per byte {found['bits_per_byte']:.6f}" in line


def test_the_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "result.json"
    words = ["eval", folder / "llama" / "checkpoints", folder / "pair", "--stride", 8, "--samples", 4, "--json", out]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert (found["stride"], found["windows"], found["tokenizer"]) == (8, 4, str(folder / "tokenizer.json"))
    assert "40 tokens in 4 windows of 16, 8 apart" in result.stdout


def test_a_result_that_cannot_be_written_is_not_lost(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["eval", str(folder / "llama"), str(folder / "pair"), "--samples", "1", "--json"]
    result = CliRunner().invoke(app, [*words, str(tmp_path)])
    assert isinstance(result.exception, UserError) and f"--json {tmp_path} cannot be written" in str(result.exception)
    assert "tokens" not in result.stdout  # before anything was computed

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device", "result.json")

    monkeypatch.setattr("megapt.commands.evaluate._write", full)
    result = CliRunner().invoke(app, [*words, str(tmp_path / "result.json")])
    assert isinstance(result.exception, OSError) and "nats per token" in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"checkpoint": "nowhere"}, "there is no checkpoint nowhere"),
        ({"data": ["nowhere.txt"]}, "nowhere.txt does not exist"),
        ({"data": ["{folder}/empty.txt"]}, "no token in it that has another before it"),
        ({"data": ["-"]}, "standard input cannot"),
        ({"tokenizer": "nowhere.json"}, "tokenizer nowhere.json does not exist"),
        ({"tokenizer": "{folder}/large.json"}, "has 320 tokens, but the model in .* knows 300"),
        ({"checkpoint": "{folder}/bare"}, "names no tokenizer"),
        ({"checkpoint": "{folder}/masked"}, "fill in masked tokens"),
        ({"data": ["{folder}/pair"], "tokenizer": "bytes"}, "holds tokens .* tokenizer bytes has 257"),
        ({"sequence": 65}, "--sequence 65 is longer than the 64 tokens"),
        ({"stride": 17}, "--stride 17 would leave tokens out: it is at most --sequence, 16"),
        ({"stride": -1}, "--stride -1 evaluates nothing; legal: 1 or more"),
        ({"sequence": 0}, "--sequence 0 evaluates nothing"),
        ({"samples": 0}, "--samples 0 evaluates nothing"),
        ({"micro": 0}, "--micro 0 evaluates nothing"),
        ({"parallel": {"tensor": 0}}, "parallel.tensor"),
        ({"start_token": "<s>"}, "--start-token: the tokenizer .* has no token '<s>'"),
        ({"parallel": {"pipeline": 2}}, "world of 1 ranks"),
    ],
)  # fmt: skip
def test_refusals(folder: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    (folder / "empty.txt").write_text("")
    if not (folder / "bare").exists():
        save(folder / "bare", LLAMA, {})
        save(folder / "masked", LLAMA, {}, masked=True)
        tokenizers.train_bpe([" ".join(TEXTS)], 320, folder / "large.json")
    filled = {
        name: [v.format(folder=folder) for v in value] if name == "data" else
        value.format(folder=folder) if isinstance(value, str) else value
        for name, value in options.items()
    }  # fmt: skip
    request = replace(Request(folder / "llama", [folder / "texts.jsonl"]), **filled)
    with pytest.raises(UserError, match=words):
        evaluate(request)


def test_weights_that_are_not_finite_are_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(Request(folder / "llama", [folder / "one.txt"]), 1)
    load = job._load

    def broken(device: torch.device) -> Any:
        engine = load(device)
        engine.parameters[0].data.fill_(math.nan)
        return engine

    monkeypatch.setattr(job, "_load", broken)
    with pytest.raises(UserError, match="the loss is nan"):
        job.run(CPU)
