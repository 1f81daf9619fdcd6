"""The whole way once, from text to a model that transformers loads: what `launch/quickstart.sh` runs.

Every stage leaves its result in the working folder and is passed over when that is there, so that an interrupted
run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megapt.config import Config, load
from megapt.errors import UserError
from megapt.files import write_whole
from megapt.launcher import local_port, visible_devices

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "quickstart.yaml"
PROMPTS = ("def __init__(self, ", "import os\n\n", "    return ")
VOCABULARY = 512
_PIECE = 1 << 14  # characters of a document cut from a longer text
_TOLERANCE = 1e-4  # largest difference of fp32 logits between transformers and us


def run(workdir: str | Path, text: str | Path | None = None) -> dict[str, Any]:
    """Tokenizer, data, training on all ranks, baselines, export, completions, curve; returns the summary.

    text: a file or folder of text; default: the sources of Python's standard library on this machine. Raises UserError
    if a stage fails or the model does not beat the bigram baseline.
    """
    folder = Path(workdir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    corpus = _corpus(folder, text)
    tokenizer = _tokenizer(folder, corpus)
    prefix = _data(folder, corpus, tokenizer)
    overrides, ranks = _overrides(folder, prefix, tokenizer)
    config = load(CONFIG, overrides).config
    _train(config, overrides, ranks)
    results = _training_results(config, ranks)
    results |= _baselines(config)
    results |= _export(folder, config, tokenizer)
    results["completions"] = _completions(config, tokenizer)
    results |= _pictures(folder, config, results)
    results["paths"] |= {"tokenizer": str(tokenizer), "data": str(prefix)}
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_whole(folder / "summary.json", json.dumps(results, indent=2).encode() + b"\n")
    _report(folder, results)
    return results


# Text, tokenizer, data


def _say(text: str) -> None:
    print(f"quickstart: {text}", flush=True)


def _corpus(folder: Path, text: str | Path | None) -> Path:
    """The documents, one JSON line each."""
    source = Path(text).resolve() if text is not None else Path(sysconfig.get_paths()["stdlib"])
    corpus, note = folder / "corpus.jsonl", folder / "corpus.source"
    if corpus.exists() and note.exists():
        if note.read_text(encoding="utf-8") != str(source):
            raise UserError(
                f"{folder} holds a quickstart on {note.read_text(encoding='utf-8')}, not on {source}; name another "
                "--workdir, or remove that folder"
            )
        _say(f"text: {corpus} is there")
        return corpus
    if not source.exists():
        raise UserError(f"the text {source} does not exist")
    documents = list(_documents(source, library=text is None))
    size = sum(len(d) for d in documents)
    if size < 200_000:
        raise UserError(f"{source} holds {size} characters of text; training needs 200,000 at least")
    write_whole(corpus, "".join(json.dumps({"text": d}) + "\n" for d in documents).encode())
    write_whole(note, str(source).encode())
    _say(f"text: {size / 1e6:.1f} million characters in {len(documents)} documents from {source}")
    return corpus


def _documents(source: Path, library: bool) -> Iterator[str]:
    """Texts below a path. Files of the library come in an order that has nothing to do with their names, so that the
    validation part, the last of them, is like the rest; other texts keep their order and are cut at line ends."""
    if library:
        skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
        files = [p for p in source.rglob("*.py") if not skipped & set(p.relative_to(source).parts)]
        files.sort(key=lambda p: hashlib.blake2b(str(p.relative_to(source)).encode()).digest())
    else:
        files = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file())
    for path in files:
        content = path.read_text(encoding="utf-8", errors="replace")
        yield from [content] if library and content else _pieces(content)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.rfind("\n", start, start + _PIECE) + 1 if start + _PIECE < len(text) else len(text)
        end = end if end > start else start + _PIECE
        yield text[start:end]
        start = end


def _texts(corpus: Path) -> Iterator[str]:
    with open(corpus, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _tokenizer(folder: Path, corpus: Path) -> Path:
    from megapt.data.tokenizers import train_bpe

    path = folder / "tokenizer.json"
    if path.exists():
        _say(f"tokenizer: {path} is there")
    else:
        _say(f"tokenizer: training byte-level BPE with {VOCABULARY} tokens")
        train_bpe(_texts(corpus), VOCABULARY, path)
    return path


def _data(folder: Path, corpus: Path, tokenizer: Path) -> Path:
    from megapt.data.build import build

    prefix = folder / "data" / "text"
    if prefix.with_suffix(".idx").exists() and prefix.with_suffix(".bin").exists():
        _say(f"data: {prefix}.bin and .idx are there")
        return prefix
    prefix.parent.mkdir(exist_ok=True)
    report = build([corpus], prefix, tokenizer, workers=min(4, os.cpu_count() or 1))
    _say(f"data: {report.tokens:,} tokens in {report.documents:,} documents")
    return prefix


# Training


def _overrides(folder: Path, prefix: Path, tokenizer: Path) -> tuple[list[str], int]:
    """What differs from the preset on this machine, and the number of ranks."""
    from megapt.data.tokenizers import load as load_tokenizer

    overrides = [
        f"data.train={prefix}",
        f"data.tokenizer={tokenizer}",
        f"run.folder={folder / 'run'}",
        f"model.vocabulary={load_tokenizer(tokenizer).vocabulary}",
    ]
    devices = len(visible_devices(os.environ))
    if devices == 0:
        return overrides, 8
    # The preset's layout where it fits, else as much of it as there are devices.
    layouts = ((2, 2, 2), (1, 2, 2), (1, 2, 1), (1, 1, 1))
    data, tensor, pipeline = next(sizes for sizes in layouts if math.prod(sizes) <= devices)
    layout = [f"parallel.data={data}", f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    return [*overrides, *layout, "precision=bf16"], data * tensor * pipeline


def _train(config: Config, overrides: Sequence[str], ranks: int) -> None:
    """`deepspeed launch/pretrain.sh` as a user would type it."""
    from megapt import checkpoint

    newest = checkpoint.find_latest(Path(config.run.folder) / "checkpoints")
    if newest is not None and checkpoint.read_index(newest).step == config.train.steps:
        _say(f"training: {newest} is there")
        return
    environment = dict(os.environ)
    if not visible_devices(environ=environment):
        environment["DS_ACCELERATOR"] = "cpu"
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    deepspeed = shutil.which("deepspeed", path=environment["PATH"])
    if deepspeed is None:
        raise UserError("the deepspeed command is not installed beside this Python; run `bash launch/quickstart.sh`")
    script = ROOT / "launch" / "pretrain.sh"
    command = [sys.executable, deepspeed, "--num_gpus", str(ranks), "--master_port", str(local_port(environment))]
    command += [str(script), "--config", str(CONFIG), *overrides]
    _say("training: deepspeed " + " ".join(command[2:]))
    code = subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode
    if code:
        raise UserError(f"training ended with status {code}; its output above says why. Run again to go on from there")


def _training_results(config: Config, ranks: int) -> dict[str, Any]:
    from megapt.model.table import parameter_table
    from megapt.monitor.metrics import read_metrics

    lines = read_metrics(Path(config.run.folder) / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    speeds = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
    parallel = config.parallel
    return {
        "layout": {
            "ranks": ranks,
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "data": ranks // (parallel.tensor * parallel.pipeline),
            "zero": f"{config.zero.backend} stage {config.zero.stage}",
            "precision": config.precision,
        },
        "steps": len(losses),
        "parameters": parameter_table(config.model).count(),
        "first_train_loss": losses[0],
        "last_train_loss": losses[-1],
        "valid_loss": [line["valid_loss"] for line in lines if "valid_loss" in line][-1],
        "tokens_per_second": round(speeds[len(speeds) // 2], 1),
    }


# What the model is worth


def _baselines(config: Config) -> dict[str, Any]:
    """Entropies of the very tokens that the validation loss is taken over."""
    import numpy as np

    from megapt.data.baselines import token_entropies
    from megapt.data.dataset import TokenDataset

    data, batch = config.data, config.batch
    assert isinstance(data.train, str)
    valid = TokenDataset(data.train, "valid", data.split, batch.sequence, config.seed)
    available = valid.num_samples_per_epoch // batch.global_samples
    batches = min(max(1, config.train.validate_samples // batch.global_samples), available)
    samples = valid.sample(np.arange(batches * batch.global_samples))
    # Neighbours share a token: one stream. The last sample of all may be padded.
    tokens = np.append(samples[:, :-1].reshape(-1), samples[-1, -1])[:valid.num_tokens]
    found = token_entropies(tokens, config.model.vocabulary)
    return {"baselines": {"unigram": found.unigram, "bigram": found.bigram, "tokens": int(tokens.size)}}


def _export(folder: Path, config: Config, tokenizer: Path) -> dict[str, Any]:
    """To Hugging Face, back through transformers, and both forwards beside each other."""
    from megapt import checkpoint
    from megapt.convert import to_hf

    source = checkpoint.resolve(config.run.folder)
    output = folder / f"hf-{source.name}"
    if not output.exists():
        to_hf(source, output, tokenizer=str(tokenizer))
    difference = logit_difference(source, output)
    _say(f"export: {output}; largest logit difference to transformers {difference:.2e}")
    if difference > _TOLERANCE:
        raise UserError(f"the exported model's logits differ by {difference:.2e}, more than {_TOLERANCE:.0e}")
    paths = {"run": config.run.folder, "checkpoint": str(source), "hugging_face": str(output)}
    return {"logit_difference": difference, "paths": paths}


def logit_difference(checkpoint: Path, exported: Path, sequences: int = 4) -> float:
    """Largest absolute difference of fp32 logits on random tokens between our forward and transformers'."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from megapt.generate import inference_config, load_engine

    config = inference_config(checkpoint)
    engine = load_engine(checkpoint, config, 1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    shape = (sequences, config.batch.sequence)
    tokens = torch.randint(0, config.model.vocabulary, shape, generator=generator)
    ours = engine.pipeline.logits(tokens)
    assert ours is not None
    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    with torch.no_grad():
        return float((theirs(tokens).logits - ours).abs().max())


def _completions(config: Config, tokenizer: Path) -> list[str]:
    from megapt.generate import generate

    texts = generate(config.run.folder, PROMPTS, tokens=48, seed=config.seed, tokenizer=tokenizer)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        _say(f"completion of {prompt!r}:\n" + "\n".join(f"    | {line}" for line in text.splitlines()))
    return texts


def _pictures(folder: Path, config: Config, results: dict[str, Any]) -> dict[str, Any]:
    from megapt.monitor.metrics import plot_loss

    curve = folder / "loss.png"
    baselines = {name: results["baselines"][name] for name in ("unigram", "bigram")}
    plot_loss(Path(config.run.folder) / "metrics.jsonl", curve, baselines)
    return {"paths": results["paths"] | {"loss_curve": str(curve), "summary": str(folder / "summary.json")}}


def _report(folder: Path, results: dict[str, Any]) -> None:
    valid, baselines = results["valid_loss"], results["baselines"]
    _say(
        f"validation loss {valid:.4f} nats per token; the same tokens' entropy is {baselines['unigram']:.4f} by "
        f"unigrams and {baselines['bigram']:.4f} by bigrams"
    )
    _say(f"training loss {results['first_train_loss']:.4f} -> {results['last_train_loss']:.4f}, "
         f"{results['tokens_per_second']:.0f} tokens/s, {results['seconds']:.0f} s in all")
    _say(f"summary: {folder / 'summary.json'}; curve: {results['paths']['loss_curve']}")
    if valid >= baselines["bigram"]:
        raise UserError(
            f"the model's validation loss {valid:.4f} is not below the bigram entropy {baselines['bigram']:.4f}; with "
            "little or unusual text, train longer (configs/quickstart.yaml, train.steps)"
        )
