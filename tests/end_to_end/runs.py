"""Runs of the real command on tiny models: a corpus, a config, and ranks that no launcher watches over.

`Ranks` starts launch/pretrain.sh once per rank, as its variables would make any launcher do it, and does nothing
more: if a rank dies, only the others can notice. The processes are forked from one that has torch and DeepSpeed loaded
already, because importing them costs seconds of CPU per rank.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from megapt import checkpoint
from megapt.checkpoint.loading import open_reader
from megapt.data.indexed import IndexedWriter
from megapt.monitor.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "pretrain.sh")
TIMEOUT = 150.0
VOCABULARY = 257  # bytes and the end of a document

WORDS = "the a model of tokens learns to predict next word from many before it and then some more".split()


def environment(**more: str) -> dict[str, str]:
    """No launcher's variables, this interpreter first on the PATH, the CPU, one thread per rank."""
    launchers = ("SLURM_", "OMPI_", "PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX", "MASTER_", "LOCAL_", "CUDA_")
    names = {"RANK", "WORLD_SIZE"}
    clean = {k: v for k, v in os.environ.items() if k not in names and not k.startswith(launchers)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    # RES_OPTIONS: c10d looks up the names of its peers, which must not take seconds where no name service is.
    fixed = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RES_OPTIONS": "timeout:1 attempts:1"}
    return {**clean, "PATH": path, **fixed, **more}


def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def corpus(prefix: Path, documents: int = 80, seed: int = 0) -> Path:
    """Pseudo-text as bytes: about 60 tokens per document."""
    words = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            text = " ".join(words.choice(WORDS, size=words.integers(4, 20)))
            writer.add_document([*text.encode(), 256])
    return prefix


def write_config(path: Path, data: Path, **sections: Mapping[str, Any]) -> Path:
    """A tiny Llama on `data`; its run folder lies beside the config. `sections` add to and replace values."""
    tree: dict[str, Any] = {
        "precision": "fp32",
        "model": {
            "layers": 4, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "vocabulary": VOCABULARY,
            "max_sequence": 64, "tied_embeddings": True,
        },
        "parallel": {"vocabulary_multiple": 8},
        "zero": {"stage": 1, "backend": "native"},
        "data": {"train": str(data), "split": "80,20,0", "tokenizer": "bytes"},
        "batch": {"sequence": 16, "samples": 8, "micro": 2},
        "optimizer": {"lr": 1e-2, "warmup_steps": 3},
        "train": {"steps": 20, "validate_samples": 8},
        "checkpoint": {"every": 4},
        "run": {"folder": str(path.parent / "run"), "log_every": 1, "tensorboard": False},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] |= values
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "torch.distributed.device_mesh", "safetensors.torch", "deepspeed"])


def _rank(
    variables: dict[str, str], arguments: list[str], out: str, err: str, before: Callable[[], None] | None
) -> None:
    for descriptor, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)  # torch was loaded before it could read OMP_NUM_THREADS
    sys.argv = [SCRIPT, *arguments]
    if before is not None:
        before()
    runpy.run_path(SCRIPT, run_name="__main__")


class Ranks:
    """The ranks of one start of the command; `folder` takes what each of them says.

    before: what some of the ranks do first, by rank: functions of a module, which break something in their process.
    """

    def __init__(
        self,
        folder: Path,
        world: int,
        arguments: Sequence[str | Path],
        before: Mapping[int, Callable[[], None]] | None = None,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        words = [str(a) for a in arguments]
        common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
        self.processes = []
        for rank in range(world):
            variables = environment(RANK=str(rank), LOCAL_RANK=str(rank), **common)
            for stream in ("out", "err"):
                self._file(rank, stream).write_text("")
            files = (str(self._file(rank, stream)) for stream in ("out", "err"))
            first = (before or {}).get(rank)
            process = _FORKS.Process(target=_rank, args=(variables, words, *files, first), daemon=True)
            process.start()
            self.processes.append(process)

    def _file(self, rank: int, stream: str) -> Path:
        return self.folder / f"{stream}.{rank}"

    def out(self, rank: int = 0) -> str:
        return self._file(rank, "out").read_text()

    def err(self, rank: int) -> str:
        return self._file(rank, "err").read_text()

    def errors(self) -> str:
        return "".join(self.err(rank) for rank in range(len(self.processes)))

    def signal(self, number: int, *ranks: int) -> None:
        for rank in ranks:
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, number)

    def wait(self, timeout: float = TIMEOUT) -> list[int | None]:
        """The exit status of every rank; those that hang are killed and have None."""
        deadline = time.monotonic() + timeout
        codes = []
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            codes.append(process.exitcode)
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def finish(self) -> Ranks:
        """Wait until all ranks have ended well."""
        codes = self.wait()
        assert codes == [0] * len(codes), f"{codes}\n{self.out()}\n{self.errors()}"
        return self


def until(condition: Callable[[], bool], what: str, timeout: float = TIMEOUT) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.002)


def reached(folder: Path, step: int) -> bool:
    """Whether a run has logged this step."""
    metrics = folder / "metrics.jsonl"
    return metrics.exists() and f'"step": {step},' in metrics.read_text()


def start(*command: str | Path, cwd: Path = ROOT, **more: str) -> subprocess.Popen[str]:
    """A real command, in a process group of its own."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd, env=environment(**more), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def curve(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics without what a clock or a memory gauge measured, nor how saves went."""
    measured = ("tokens_per_second", "memory", "mfu")
    lines = [
        {name: value for name, value in line.items() if name not in measured and not name.startswith("save_")}
        for line in read_metrics(folder / "metrics.jsonl")
    ]
    return [line for line in lines if line.keys() != {"step"}]


def tensors(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Everything that the newest checkpoint of a run holds."""
    reader = open_reader(folder)
    return {(n, k): reader.whole(n, k) for n, t in reader.index.tensors.items() for k in t.kinds}


def meta(folder: Path) -> dict[str, Any]:
    return checkpoint.read_index(folder).meta


def assert_same_run(one: Path, other: Path) -> None:
    """Equal metrics and equal final checkpoints, bit for bit."""
    assert curve(one) == curve(other)
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert not different
    for key in ("step", "updates", "skipped", "receipt"):
        assert json.dumps(meta(one)[key]) == json.dumps(meta(other)[key])
