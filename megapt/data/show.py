"""What a run read or will read at a step, looked up from its config alone; and what it takes of each source."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megapt.batch import IGNORE
from megapt.config import Config, load
from megapt.data import tokenizers
from megapt.data.blend import Blend, BlendLike, PhasedBlend
from megapt.data.composite import CompositeDataset
from megapt.data.open import open_train, schedule
from megapt.data.receipt import Receipt
from megapt.errors import UserError


@dataclass(frozen=True)
class Part:
    """Tokens [column, column + length) of a sample, which are those from `offset` on of a document of `size` tokens."""

    document: int
    column: int
    length: int
    offset: int
    size: int


@dataclass(frozen=True)
class ShownSample:
    """One sample of a step. tokens, labels: [sequence], as the model gets them; parts: where they lie in the source,
    before the objective rearranged or masked any."""

    id: int
    source: str
    epoch: int
    ordinal: int
    parts: tuple[Part, ...]
    tokens: tuple[int, ...]
    labels: tuple[int, ...]


def config_of(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file, or of a run folder: the one it was last started with."""
    path = Path(path)
    if path.is_dir():
        found = {int(match[1] or 0): file for file in path.iterdir()
                 if (match := re.fullmatch(r"config(?:\.(\d+))?\.yaml", file.name))}  # fmt: skip
        if not found:
            raise UserError(f"{path} is no run folder: it holds no config.yaml; give one, or a config file")
        path = found[max(found)]
    return load(path, overrides).config


def read_step(config: Config, step: int, sample: int | None = None) -> Iterator[ShownSample]:
    """The samples of step `step`, counted from 1 as in the run's metrics, in the order of the global batch.

    sample: only this one, by its place in the global batch. UserError if there is no such step or sample.
    """
    batches, steps = schedule(config)
    if not 1 <= step <= steps:
        raise UserError(f"step {step}: this run has steps 1 to {steps}")
    first, size = batches.first_sample(step - 1), batches.size(step - 1)
    if sample is not None and not 0 <= sample < size:
        raise UserError(f"sample {sample}: the global batch of step {step} has samples 0 to {size - 1}")
    data = open_train(config, batches.first_sample(steps))
    chosen = range(size) if sample is None else [sample]
    return (_look_up(data, first + place) for place in chosen)


def show(
    config: Config, step: int, sample: int | None = None, text: bool = False, tokenizer: str | None = None
) -> None:
    """Print the samples of a step (see `read_step`), with their text if asked for."""
    named = tokenizer or config.data.tokenizer
    if text and named is None:
        raise UserError("the config names no tokenizer to make text with; set data.tokenizer=...")
    decode = tokenizers.load(named).decode if text and named is not None else None
    for found in read_step(config, step, sample):
        print(f"sample {found.id}: {found.source}, epoch {found.epoch}, sample {found.ordinal} of this source")
        for part in found.parts:
            last = part.offset + part.length - 1
            print(f"  columns {part.column}-{part.column + part.length - 1}: document {part.document}, "
                  f"tokens {part.offset}-{last} of {part.size}")  # fmt: skip
        print("  tokens:", *found.tokens)
        if _follow(found):
            print("  labels: each the next token, the last", found.labels[-1])
        else:
            print("  labels:", *("." if label == IGNORE else label for label in found.labels))
        if decode is not None:
            filled = max(part.column + part.length for part in found.parts)  # padding has no text
            print("  text:", repr(decode(found.tokens[:filled])))


def check_run(folder: Path, config: Config) -> None:
    """UserError if the data is no longer what the run of this folder read, as its newest checkpoint says: what it read
    then cannot be looked up. Without a checkpoint nothing is known."""
    from megapt import checkpoint as checkpoints

    newest = checkpoints.find_latest(folder / "checkpoints")
    if newest is not None:
        batches, steps = schedule(config)
        data = open_train(config, batches.first_sample(steps))
        Receipt.from_dict(checkpoints.read_index(newest).meta["receipt"]).check(data)


def verify_receipt(config: Config, checkpoint: str | Path) -> str:
    """Compute a checkpoint's receipt again from its first sample; says what was found. UserError if it differs."""
    from megapt import checkpoint as checkpoints

    batches, steps = schedule(config)
    index = checkpoints.read_index(checkpoint)
    receipt = Receipt.from_dict(index.meta["receipt"])
    receipt.verify(open_train(config, batches.first_sample(steps)))
    used = ", ".join(f"{name} {count:,} tokens" for name, count in receipt.source_tokens.items())
    return f"step {index.step}: {receipt.samples:,} samples ({used}) are what this config reads; chain {receipt.chain}"


def print_sources(data: CompositeDataset, total_samples: int) -> None:
    """A table of what a run of so many samples takes of each source."""
    from rich.console import Console
    from rich.table import Table

    phases = _phases(data.blend)
    error = max((blend.error for _, blend in phases), default=0.0)
    caption = f"shares are rounded by at most {error:.1e}" if error else None
    table = Table(title="sources", title_justify="left", caption=caption)
    for name in ("source", "share", "samples", "tokens", "of", "epochs"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for use in data.describe(total_samples):
        numbers = (f"{use.samples:,}", f"{use.tokens:,}", f"{use.available:,}", f"{use.epochs:.2f}")
        table.add_row(use.name, f"{100 * use.share:.2f} %", *numbers)
    console = Console(width=120, highlight=False)
    console.print(table)
    for first, blend in phases if len(phases) > 1 else []:
        shares = ", ".join(f"{name} {100 * w:.2f} %" for name, w in zip(blend.names, blend.weights, strict=True) if w)
        late = "" if first < total_samples else "; not reached in this run"
        console.print(f"phase from token {first * data.sequence:,}: {shares}{late}", markup=False, soft_wrap=True)


def _phases(blend: BlendLike | None) -> list[tuple[int, Blend]]:
    """(first sample, shares) of each phase; none for what has no constant shares."""
    if isinstance(blend, PhasedBlend):
        return list(zip(blend.firsts, blend.blends, strict=True))
    return [(0, blend)] if isinstance(blend, Blend) else []


def _look_up(data: CompositeDataset, number: int) -> ShownSample:
    ids = np.array([number])
    tokens, labels = (np.empty((1, data.sequence), np.int64) for _ in range(2))
    data.fill(ids, tokens, labels)
    source, ordinal, epoch, _ = data.records(ids)[0].tolist()
    name = list(data.sources)[source]
    return ShownSample(
        number, name, epoch, ordinal, _parts(data, name, ordinal), tuple(tokens[0].tolist()), tuple(labels[0].tolist())
    )


def _parts(data: CompositeDataset, name: str, ordinal: int) -> tuple[Part, ...]:
    source: Any = data.sources[name]
    pieces = source.pieces(np.array([ordinal]), documents=True).within(data.sequence)
    documents = source.boundaries.locate(pieces.start)
    offsets = pieces.start - source.boundaries.starts(documents)
    sizes = np.asarray(source.reader.lengths[documents])
    columns = np.stack([documents, pieces.column, pieces.length, offsets, sizes], axis=1)
    return tuple(Part(*row) for row in columns.tolist())


def _follow(sample: ShownSample) -> bool:
    """Whether every label is the token after it."""
    return sample.labels[:-1] == sample.tokens[1:]
