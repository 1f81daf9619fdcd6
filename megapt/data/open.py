"""The data that a config names, opened: training samples in their blend, and the validation sets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megapt.config import Config, DataConfig, SourceConfig
from megapt.data import tokenizers
from megapt.data.batches import BatchSchedule
from megapt.data.blend import Blend, BlendLike, BudgetBlend, PhasedBlend
from megapt.data.composite import CompositeDataset, Objective
from megapt.data.dataset import Ids, Int64, TokenDataset
from megapt.data.objectives import FillInTheMiddle, MaskedLm
from megapt.data.vocabulary import Vocabulary
from megapt.errors import UserError

Split = Literal["train", "valid"]


@dataclass(frozen=True)
class ValidationSet:
    """One source's validation samples. weight: its part in the overall validation loss; they sum to 1."""

    name: str
    weight: float
    data: CompositeDataset


class MegatronBlend:
    """Megatron's BlendedDataset, index for index: two arrays of `size` entries."""

    def __init__(self, names: list[str], weights: list[float], size: int) -> None:
        from megapt.data.megatron_order import megatron_blend, megatron_blend_sizes

        self.names = tuple(names)
        normal, used, self.sizes = megatron_blend_sizes(weights, size)
        self._source, self._ordinal = megatron_blend(normal, sum(used))
        self.fingerprint = f"megatron-1:{size}:{','.join(f'{weight:.17g}' for weight in normal)}"

    def locate(self, sample_ids: Ids) -> tuple[Int64, Int64]:
        """As Blend.locate."""
        ids = np.asarray(sample_ids, np.int64)
        return self._source[ids].astype(np.int64), self._ordinal[ids]

    def counts(self, samples: int) -> Int64:
        """As Blend.counts."""
        return np.bincount(self._source[:samples], minlength=len(self.names)).astype(np.int64)


def cache_folder(config: Config) -> Path:
    """Where sample indices and blocks of remote files are kept."""
    return Path(config.data.cache or Path(config.run.folder) / "cache")


def schedule(config: Config) -> tuple[BatchSchedule, int]:
    """The global batches of a run, and its number of steps."""
    batch, train = config.batch, config.train
    ramp = (batch.ramp.start, batch.ramp.increment, batch.ramp.samples) if batch.ramp else None
    steps = train.steps or math.ceil((train.tokens or 0) / (batch.global_samples * batch.sequence))
    return BatchSchedule(batch.global_samples, ramp), steps


def open_train(config: Config, total_samples: int) -> CompositeDataset:
    """The training samples of a run that takes `total_samples` of them.

    UserError for data that is missing, damaged or too small, for tokens of the objective that the tokenizer or the
    model does not know, and for budgets that the run's length does not meet.
    """
    data, sources = config.data, _listed(config.data.train)
    if len(sources) == 1 and sources[0].tokens is not None:
        raise UserError(
            f"data.train: `tokens` shares the run out among sources, but {sources[0].label} is the only one; leave it "
            "out, or name others"
        )
    objective = _objective(config, fim=True)
    split = data.split if data.valid is None else "1,0,0"
    if data.order == "megatron":
        try:
            return _open_megatron(config, sources, split, total_samples, objective)
        except MemoryError as error:
            raise UserError(
                f"data.order = megatron keeps all {total_samples:,} samples of the run in memory, which this machine "
                "does not have; set data.order=arithmetic, which keeps none, or make the run shorter"
            ) from error
    opened = {source.label: _open_source(config, source, "train", split) for source in sources}
    blend = None if len(sources) == 1 else _blend(config, sources, opened, total_samples)
    return CompositeDataset(opened, config.model.vocabulary, blend, objective)


def open_valid(config: Config) -> list[ValidationSet]:
    """The validation samples of every source: of data.valid where it is given, else the split's second part of each.

    They are weighted as in training (without phases), those of a data.valid of their own by their own weights.
    """
    data = config.data
    sources = _listed(data.train if data.valid is None else data.valid)
    split = data.split if data.valid is None else "0,1,0"
    objective = _objective(config, fim=False)
    opened = {source.label: _open_source(config, source, "valid", split) for source in sources}
    weights = _weights(sources, opened)
    total = sum(weights.values())
    return [
        ValidationSet(
            name, weights[name] / total, CompositeDataset({name: source}, config.model.vocabulary, None, objective)
        )
        for name, source in opened.items()
    ]


def _listed(given: str | list[SourceConfig]) -> list[SourceConfig]:
    return [SourceConfig(path=given)] if isinstance(given, str) else given


def _open_source(
    config: Config, source: SourceConfig, name: Split, split: str, total: int | None = None
) -> TokenDataset:
    data = config.data
    return TokenDataset(
        source.path,
        name,
        split,
        config.batch.sequence,
        config.seed,
        packing=data.packing,
        order=data.order,
        total_samples=total,
        cache=cache_folder(config),
        cache_bytes=data.cache_bytes,
    )


def _open_megatron(
    config: Config, sources: list[SourceConfig], split: str, total: int, objective: Objective
) -> CompositeDataset:
    if config.data.phases:
        raise UserError("data.phases: Megatron's blends keep their weights; use data.order = arithmetic")
    if len(sources) == 1:
        opened = {sources[0].label: _open_source(config, sources[0], "train", split, total)}
        return CompositeDataset(opened, config.model.vocabulary, None, objective)
    if any(source.weight is None for source in sources):
        raise UserError("data.train: a blend with data.order = megatron needs a `weight` for every source")
    names, weights = [source.label for source in sources], [source.weight or 0.0 for source in sources]
    blend = MegatronBlend(names, weights, total)
    opened = {
        source.label: _open_source(config, source, "train", split, size)
        for source, size in zip(sources, blend.sizes, strict=True)
    }
    return CompositeDataset(opened, config.model.vocabulary, blend, objective)


def _weights(sources: list[SourceConfig], opened: dict[str, TokenDataset]) -> dict[str, float]:
    """The weights or budgets given; else the tokens that each source has, so that all end together."""
    given = {source.label: source.weight or source.tokens for source in sources}
    if None in given.values():
        return {name: float(max(1, round(_tokens(data)))) for name, data in opened.items()}
    return {name: float(weight or 0) for name, weight in given.items()}


def _tokens(data: TokenDataset) -> float:
    """Room that one epoch takes, in tokens: whole samples, padding included."""
    return data.sequence / data.epochs(1)


def _blend(
    config: Config, sources: list[SourceConfig], opened: dict[str, TokenDataset], total_samples: int
) -> BlendLike:
    data, sequence = config.data, config.batch.sequence
    budgets = any(source.tokens for source in sources)
    weighted = any(source.weight for source in sources)
    weights = _weights(sources, opened)
    if data.phases:
        if budgets:
            raise UserError(
                "data.phases: phases change weights as the run goes on, so no source can have a budget of `tokens` as "
                "well; give every source a `weight`"
            )
        later = [(-(-phase.from_token // sequence), phase.weights) for phase in data.phases]
        return PhasedBlend([(0, weights), *later])
    if weighted:
        return Blend(weights)
    blend = BudgetBlend({name: int(tokens) for name, tokens in weights.items()}, sequence)
    # Steps are whole batches, and a budget is rounded to whole samples.
    if budgets and abs(blend.total - total_samples) > config.batch.global_samples + len(sources):
        wanted, run = blend.total * sequence, total_samples * sequence
        raise UserError(
            f"data.train: the sources' budgets make {wanted:,} tokens, but the run has {run:,}; set train.tokens="
            f"{wanted}, or give every source a `weight`"
        )
    return blend


def _objective(config: Config, fim: bool) -> Objective:
    data = config.data
    documents = data.separates_documents
    vocabulary = _vocabulary(config) if data.fim or data.masked_lm else None
    if vocabulary is None:
        return Objective(documents)
    if data.masked_lm is not None:
        masked = MaskedLm(data.masked_lm, vocabulary, config.seed)
        _check_ids(config, vocabulary, [masked.highest])
        return Objective(documents, masked=masked)
    assert data.fim is not None
    transform = FillInTheMiddle(data.fim, vocabulary, config.seed)
    _check_ids(config, vocabulary, transform.tokens)
    return Objective(documents, fim=transform if fim else None)


def _vocabulary(config: Config) -> Vocabulary:
    data: DataConfig = config.data
    if data.tokenizer is None:
        section = "data.masked_lm" if data.masked_lm is not None else "data.fim"
        raise UserError(f"{section} names tokens, so data.tokenizer must say whose they are")
    return Vocabulary.of(tokenizers.load(data.tokenizer))


def _check_ids(config: Config, vocabulary: Vocabulary, ids: list[int] | tuple[int, ...]) -> None:
    if max(ids) >= config.model.vocabulary:
        raise UserError(
            f"model.vocabulary = {config.model.vocabulary} is too small: the objective uses token id {max(ids)} of the "
            f"tokenizer {vocabulary.name}; set it to at least {vocabulary.size}"
        )
