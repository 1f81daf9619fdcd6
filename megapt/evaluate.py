"""How well a checkpoint predicts text: loss per token, perplexity and bits per byte, in any layout.

Each document is read in windows of `sequence` tokens that begin `stride` tokens apart. A window scores the tokens that
no window before it has scored: every token is scored once, after at least sequence - stride others of its document, or
all that there are.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megapt import checkpoint as checkpoints
from megapt.batch import MicroBatch
from megapt.config import Config, from_tree
from megapt.data import tokenizers
from megapt.data.tokenizers import Tokenizer
from megapt.data.vocabulary import Vocabulary
from megapt.data.windows import Account, Corpus, micro_batch, pack, windows
from megapt.distributed import join, leave
from megapt.engine import Engine
from megapt.errors import UserError
from megapt.files import StrPath
from megapt.launcher import rank_environment
from megapt.rules import check_world
from megapt.zero.base import Fragment

Progress = Callable[[int, int, int | None], None]  # tokens scored, bytes of input read, bytes of all input if known
Precision = Literal["fp32", "bf16", "fp16", "fp64"]

_TOKENS = 8192  # of a micro-batch, about


@dataclass(frozen=True)
class Request:
    """What to evaluate, and how.

    checkpoint: a run folder, its checkpoints folder, or a step's folder.
    data: prefixes of .bin/.idx pairs; text, .jsonl (also .gz, .zst) and .parquet files, or folders of them.
    tokenizer: what `tokenizers.load` takes; default: the one that the checkpoint's config names.
    sequence: tokens that the model reads at once; default: as in training.
    stride: tokens from one window to the next; default: `sequence`, so that windows do not overlap.
    start_token: put in front of each document, so that its first token is scored too: a token's name, or "none".
        Default: the tokenizer's end of a document, which stands there in training, unless whole documents were packed
        there (`data.packing`).
    samples: score only the first so many windows.
    precision: of weights and activations.
    parallel: {"tensor": T, "pipeline": P}, how ranks share the model; the data-parallel ones share the windows.
    micro: rows of a micro-batch, rounded up where tensor ranks could not share it evenly; default: about 8192 tokens.
    text_key: of the text in JSON lines, or its column in Parquet.
    """

    checkpoint: StrPath
    data: Sequence[StrPath]
    tokenizer: StrPath | None = None
    sequence: int | None = None
    stride: int | None = None
    start_token: str | None = None
    samples: int | None = None
    precision: Precision = "fp32"
    parallel: dict[str, Any] | None = None
    micro: int | None = None
    text_key: str = "text"


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    tokens: scored; unscored: first tokens of documents, which had no context; bytes: of the UTF-8 text that the scored
    tokens stand for, and bits_per_byte: the bits that they take, both None for the reason in `no_bytes`. start_token:
    its id, None where nothing is put in front. perplexity: infinite where it is beyond a double.
    """

    checkpoint: str
    step: int | None
    data: list[str]
    tokenizer: str | None
    precision: str
    sequence: int
    stride: int
    start_token: int | None
    documents: int
    windows: int
    tokens: int
    unscored: int
    nats_per_token: float
    perplexity: float
    bits_per_byte: float | None
    bytes: int | None
    no_bytes: str | None
    seconds: float


def evaluate(request: Request, progress: Progress = lambda tokens, read, total: None) -> Evaluation:
    """Score data with a checkpoint, as one process or as the ranks of a launcher: the same in every layout to rounding.

    Every rank reads the data and returns the result. progress: called after each step. Raises UserError for what is
    missing or does not fit together, as far as possible before the ranks meet.
    """
    environment = rank_environment(dict(os.environ))
    job = Job(request, environment.world)
    environment, device = join(environment)
    result = job.run(device, progress)
    leave()
    return result


class Job:
    """A request that was checked and can run in a world of so many ranks."""

    def __init__(self, request: Request, world: int) -> None:
        self.world, self.samples = world, request.samples
        self.checkpoint = checkpoints.resolve(Path(request.checkpoint))
        meta = checkpoints.read_index(self.checkpoint).meta
        self.step: int | None = meta.get("step")
        self.config = self._config(request, meta["config"])
        check_world(self.config, world)
        model, trained = self.config.model, meta["config"]["data"]
        named = request.tokenizer or trained.get("tokenizer")
        self.tokenizer = None if named is None else tokenizers.load(named)
        if self.tokenizer is not None and self.tokenizer.vocabulary > model.vocabulary:
            raise UserError(
                f"the tokenizer {named} has {self.tokenizer.vocabulary} tokens, but the model in {self.checkpoint} "
                f"knows {model.vocabulary}; name the tokenizer that it was trained with (--tokenizer)"
            )
        self.start = _start_token(self.tokenizer, request.start_token, trained)
        self.corpus = Corpus(request.data, self.tokenizer, model.vocabulary, request.text_key)
        if next(windows(self.corpus.pieces(), self.config.batch.sequence, self.stride, self.start), None) is None:
            raise UserError(f"{', '.join(self.corpus.names)}: there is no token in it that has another before it")

    def run(self, device: torch.device, progress: Progress = lambda tokens, read, total: None) -> Evaluation:
        """Collective; the ranks have met."""
        engine = self._load(device)
        account = Account(self.corpus, self.start)
        began = time.monotonic()
        total, before = 0.0, torch.zeros(())
        for batch in self._steps(account, engine):
            loss = engine.pipeline.evaluate([one.to(device) for one in batch])
            total += float(before)  # one step late: the device has work while the host reads on
            before = loss
            progress(account.tokens, account.read, self.corpus.total)
        part = (total + float(before)) / account.tokens
        (nats,) = engine.mean_losses([torch.tensor(part, dtype=torch.float64, device=device)])
        if not math.isfinite(nats):
            raise UserError(
                f"the loss is {nats}: the weights in {self.checkpoint} are not finite, or {self.config.precision} does "
                "not hold what the model computes (--precision fp32)"
            )
        return self._result(account, nats, time.monotonic() - began)

    def _config(self, request: Request, trained: dict[str, Any]) -> Config:
        """The model in the layout and precision asked for; how it was trained does not limit where it is read."""
        model = checkpoints.model_config(self.checkpoint)
        if model.attention != "causal" or trained["objective"] == "masked_lm":
            raise UserError(
                f"{self.checkpoint} was trained to fill in masked tokens: it gives a text no probability, and so no "
                "perplexity"
            )
        for name in ("sequence", "stride", "samples", "micro"):
            value = getattr(request, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value} evaluates nothing; legal: 1 or more")
        sequence = request.sequence or min(trained["batch"]["sequence"], model.max_sequence)
        if sequence > model.max_sequence:
            raise UserError(
                f"--sequence {sequence} is longer than the {model.max_sequence} tokens that the model in "
                f"{self.checkpoint} reads (model.max_sequence)"
            )
        self.stride = request.stride or sequence
        if self.stride > sequence:
            raise UserError(f"--stride {self.stride} would leave tokens out: it is at most --sequence, {sequence}")
        parallel = request.parallel or {}
        # Sequence parallelism wants whole shares of a micro-batch's tokens. Sizes that cannot be are refused below.
        tensor = parallel.get("tensor", 1)
        unit = tensor // math.gcd(sequence, tensor) if tensor in range(1, self.world + 1) else 1
        rows = -(-(request.micro or max(1, _TOKENS // sequence)) // unit) * unit
        tree = {
            "precision": request.precision,
            "model": model.model_dump(),
            "parallel": parallel,
            "data": {"train": "none"},  # a config must name data and a length; nothing is trained
            "batch": {"sequence": sequence, "micro": rows, "samples": rows * self.world},
            "train": {"steps": 1},
        }
        return from_tree(tree).config

    def _load(self, device: torch.device) -> Engine:
        """The model, its fp32 masters rounded to the precision asked for. Collective."""
        engine = Engine(self.config, self.world, device, optimize=False)
        masters: list[Tensor] = [p.data.to(torch.promote_types(p.dtype, torch.float32)) for p in engine.parameters]
        pairs = list(zip(engine.parameters, masters, strict=True))
        fragments = [Fragment(p, 0, p.numel(), {"weight": master.view(-1)}) for p, master in pairs]
        checkpoints.load(self.checkpoint, fragments, engine.mesh, self.config.model, weights_only=True)
        for parameter, master in pairs:
            parameter.data.copy_(master)
        return engine

    def _steps(self, account: Account, engine: Engine) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches step by step: as many, and as large, on every rank."""
        sequence, size, mesh = self.config.batch.sequence, self.config.batch.micro, engine.mesh
        at_once = 1 if mesh.pp.size == 1 else 4 * mesh.pp.size  # a pipeline fills and drains once per step
        found = windows(account.watch(self.corpus.pieces()), sequence, self.stride, self.start)
        rows = pack(account.score(itertools.islice(found, self.samples)), sequence)
        while block := list(itertools.islice(rows, at_once * size * mesh.dp.size)):
            parts = [block[at : at + size] for at in range(0, len(block), size)]
            parts += [[]] * (-len(parts) % mesh.dp.size)
            yield [micro_batch(part, size, sequence) for part in parts[mesh.dp.rank :: mesh.dp.size]]

    def _result(self, account: Account, nats: float, seconds: float) -> Evaluation:
        size, reason = account.size(), None
        if not size:
            reason = "the scored tokens stand for no text"
            if size is None:
                reason = "no tokenizer is named (--tokenizer), which would say what text the tokens stand for"
        return Evaluation(
            checkpoint=str(self.checkpoint),
            step=self.step,
            data=self.corpus.names,
            tokenizer=None if self.tokenizer is None else self.tokenizer.path,
            precision=self.config.precision,
            sequence=self.config.batch.sequence,
            stride=self.stride,
            start_token=self.start,
            documents=account.documents,
            windows=account.windows,
            tokens=account.tokens,
            unscored=account.unscored,
            nats_per_token=nats,
            perplexity=math.exp(nats) if nats < 700 else math.inf,
            bits_per_byte=nats * account.tokens / math.log(2) / size if size else None,
            bytes=size or None,
            no_bytes=reason,
            seconds=seconds,
        )


def _start_token(tokenizer: Tokenizer | None, named: str | None, data: dict[str, Any]) -> int | None:
    if named == "none":
        return None
    if tokenizer is None:
        if named is not None:
            raise UserError(f"--start-token {named} needs the tokenizer that knows it (--tokenizer)")
        return None
    if named is not None:
        return Vocabulary.of(tokenizer).id(named, "--start-token")
    # Of whole documents that were packed, no first token was ever predicted.
    return tokenizer.eod if data.get("packing", "concatenate") == "concatenate" else None
