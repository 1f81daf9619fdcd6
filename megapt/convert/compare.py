"""Whether both sides of a conversion compute the same: logits on random tokens, in fp32, on the spot.

A model whose two copies do not fit into memory is compared by its first layers (with embedding, norm and head); of the
other layers, every tensor is then compared with its origin bit by bit, by the same rows of the mapping.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapt.batch import MicroBatch
from megapt.checkpoint.loading import Reader
from megapt.config import ModelConfig
from megapt.convert.mapping import Row
from megapt.convert.source import Source
from megapt.errors import UserError
from megapt.mesh import ParallelMesh
from megapt.model.decoder import DecoderChunk
from megapt.model.table import parameter_table
from megapt.parallel.tensor import ParameterFactory, TensorParallel
from megapt.parameters import ParameterTable

TOLERANCE = 1e-5  # of the largest logit
_ROWS, _SHORT, _LONG = 2, 64, 1024  # sequences; their length, and the longest chosen to reach windows and scalings
_SHARE = 0.8  # of the memory that is free
_SPARE = 1.1  # activations, and a tensor or two on their way


@dataclass(frozen=True)
class Request:
    """What to compare. tokens: length of the sequences, by default what reaches past the window where that is cheap."""

    tolerance: float = TOLERANCE
    tokens: int | None = None


@dataclass(frozen=True)
class Comparison:
    """absolute: largest difference of logits; largest: logit; tokens: lengths of the sequences; layers: compared, of
    all; version: of transformers; unreached: what such short sequences say nothing about."""

    absolute: float
    largest: float
    tolerance: float
    tokens: tuple[int, ...]
    layers: int
    of: int
    version: str
    unreached: tuple[str, ...] = ()

    @property
    def relative(self) -> float:
        return self.absolute / self.largest if self.absolute else 0.0

    def __str__(self) -> str:
        layers = f"all {self.of} layers"
        if self.layers < self.of:
            layers = f"embedding, the first {self.layers} of {self.of} layers, norm and head"
        sizes = " and ".join(f"{_ROWS} x {length}" for length in self.tokens)
        lines = [
            f"logits compared with transformers {self.version} in fp32 on {sizes} random tokens, "
            f"{layers}: largest difference {self.absolute:.3g}, {self.relative:.3g} of the largest logit "
            f"({self.largest:.3g}); tolerance {self.tolerance:.3g}"
        ]
        if self.layers < self.of:
            lines.append(
                f"the other {self.of - self.layers} layers did not fit into memory: their logits were NOT compared; "
                "each of their tensors was compared with its origin bit by bit"
            )
        if not self.largest:
            lines.append("all logits are 0: NOTHING is known of what comes before the head")
        lines += [f"not reached by so few tokens: {what}" for what in self.unreached]
        return "\n".join(lines)


def layers_that_fit(model: ModelConfig) -> int:
    """How many of the first layers are compared by logits: all if two copies in fp32 fit into the memory that is free,
    UserError if not even one layer does."""
    import psutil

    free = psutil.virtual_memory().available * _SHARE
    table = parameter_table(model).values()
    ends = sum(spec.numel for spec in table if spec.layer is None and spec.tied_to is None)
    layer = sum(spec.numel for spec in table if spec.layer == 0)
    fits = int((free / (2 * 4 * _SPARE) - ends) // layer)
    if fits < 1:
        raise UserError(
            f"{free / 1e9:.1f} GB of memory are free, too little to compare even one layer of both models "
            f"({2 * 4 * _SPARE * (ends + layer) / 1e9:.1f} GB); use a larger machine, or say --no-compare"
        )
    return min(fits, model.layers)


def compare(
    reader: Reader,
    source: Source,
    model: ModelConfig,
    rows: list[Row],
    dtype: torch.dtype,
    request: Request,
    layers: int,
) -> Comparison:
    """Compare a checkpoint with a Hugging Face folder that was made from it, or from which it was made.

    rows: the mapping between them, by the names in the folder; dtype: of the folder's weights, to which ours are
    rounded first where it is narrower; layers: as `layers_that_fit` says. Raises UserError beyond the tolerance, and
    where transformers does not find its weights in the folder.
    """
    import transformers

    lengths, unreached = _lengths(model, request.tokens)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, model.vocabulary, (_ROWS, length), generator=generator) for length in lengths]
    with torch.inference_mode():
        ours = _our_logits(reader, model.model_copy(update={"layers": layers}), batches, dtype)
        theirs = _their_logits(source.folder, layers, batches)
        largest = max(t.abs().max() for t in theirs).item()
        absolute = torch.stack([(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)]).max().item()
    found = Comparison(
        absolute, largest, request.tolerance, lengths, layers, model.layers, transformers.__version__, unreached
    )
    if not found.relative <= request.tolerance:  # NaN is beyond it too
        raise UserError(f"both sides do not compute the same, and nothing is kept: {found}")
    if layers < model.layers:
        _same_tensors(reader, source, [row for row in rows if _layer(row, model) >= layers], dtype)
    return found


def _layer(row: Row, model: ModelConfig) -> int:
    layer = parameter_table(model)[row.ours[0]].layer
    return -1 if layer is None else layer


def _lengths(model: ModelConfig, asked: int | None) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Of the sequences, and what they do not reach. longrope turns short and long ones differently: one of each."""
    beyond: dict[str, int] = {}
    if model.window is not None:
        beyond[f"the window of {model.window} tokens"] = model.window
    scaling = model.rope_scaling
    if scaling is not None and scaling.kind == "longrope":
        beyond[f"the long factors, used beyond {scaling.original_sequence} tokens"] = scaling.original_sequence
    wanted = max([_SHORT, *(past + past // 4 + 1 for past in beyond.values() if past < _LONG)])
    tokens = min(model.max_sequence, wanted if asked is None else asked)
    short = () if scaling is None or scaling.kind != "longrope" else (scaling.original_sequence,)
    lengths = (tokens, *(length for length in short if length < tokens))
    return lengths, tuple(what for what, past in beyond.items() if past >= tokens)


def _our_logits(reader: Reader, model: ModelConfig, batches: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Of our decoder in fp32, its weights rounded to `dtype` first: [rows x tokens, vocabulary] of each batch."""
    cpu = torch.device("cpu")
    # Constant initial values: all are about to be replaced, and drawing billions takes minutes.
    table = ParameterTable(replace(spec, std=None) for spec in parameter_table(model).values())
    tp = TensorParallel(ParallelMesh.create(1, 1, 1, cpu).tp)
    factory = ParameterFactory(table, tp, 0, torch.float32, cpu)
    chunk = DecoderChunk(model, factory, range(model.layers), True, True)
    for name, parameter in factory.made.items():
        reader.fill(name, "weight", parameter.data, [0] * parameter.dim())
        parameter.data.copy_(parameter.data.to(dtype))
    return [chunk(None, MicroBatch(ids, None))[:, : model.vocabulary] for ids in batches]


def _their_logits(folder: Path, layers: int, batches: list[Tensor]) -> list[Tensor]:
    """Of transformers' model of the first layers, in fp32: [rows x tokens, vocabulary] of each batch."""
    from transformers import AutoConfig, AutoModelForCausalLM

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with _quiet(), _theirs_to_say(folder):
        config = AutoConfig.from_pretrained(folder, **local)
        whole = layers == config.num_hidden_layers
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **local
        )
    wrong = {what: sorted(map(str, names)) for what, names in found.items() if names}
    if not whole:
        wrong.pop("unexpected_keys", None)
    if wrong:
        raise UserError(f"transformers does not find the model's weights in {folder}: {wrong}")
    model.eval()
    with _theirs_to_say(folder):
        return [model(ids, use_cache=False).logits.flatten(0, 1) for ids in batches]


@contextmanager
def _theirs_to_say(folder: Path) -> Iterator[None]:
    """Keys that change nothing of what is computed are not judged here; transformers may stumble over them all the
    same, with errors of any kind."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"transformers cannot use {folder}: {type(error).__name__}: {error}\n--no-compare would do without it"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and remarks."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _same_tensors(reader: Reader, source: Source, rows: list[Row], dtype: torch.dtype) -> None:
    for row in rows:
        ours = row.join([reader.whole(name) for name in row.ours]).to(dtype)
        theirs = source.read(row.theirs).to(dtype)
        if not torch.equal(ours, theirs):
            raise UserError(f"{row.theirs} of {source.folder} is not what the checkpoint holds; nothing is kept")
