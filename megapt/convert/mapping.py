"""What a family of Hugging Face models is called and shaped like, as data that reads in both directions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megapt.config import ModelConfig
from megapt.convert.keys import COMMON, FLAG, NAMES, SILENT, Key, Part, Reading, optional
from megapt.convert.positions import Rope
from megapt.errors import UserError
from megapt.parameters import ParameterTable

QUANTISED = ("quantization_config", "compression_config")  # keys that say that weights are quantised


@dataclass(frozen=True)
class Row:
    """One tensor of theirs: our tensors joined along dimension 0, then transposed where they store [in, out].

    `{layer}` in the names stands for a layer's index. Biases are vectors, which no transposition touches.
    interleaved: joined head by head (q, k, v of head 0, then those of head 1) rather than one after the other.
    shapes, head: of our tensors, and the rows of one head; known once `at` has met the table of a model.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False
    shapes: tuple[tuple[int, ...], ...] = ()
    head: int = 1

    def at(self, layer: int, table: ParameterTable) -> Row:
        ours = tuple(name.format(layer=layer) for name in self.ours)
        specs = [table[name] for name in ours]
        head = specs[0].split.unit if specs[0].split is not None else 1
        shapes = tuple(spec.shape for spec in specs)
        return replace(self, theirs=self.theirs.format(layer=layer), ours=ours, shapes=shapes, head=head)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of their tensor."""
        joined = (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])
        return tuple(reversed(joined)) if self.transposed else joined

    def join(self, ours: Sequence[Tensor]) -> Tensor:
        """Their tensor from ours, contiguous."""
        if self.interleaved:
            return torch.stack([t.unflatten(0, (-1, self.head)) for t in ours], dim=1).flatten(0, 2)
        joined = ours[0] if len(ours) == 1 else torch.cat(list(ours))
        return joined.T.contiguous() if self.transposed else joined

    def split(self, theirs: Tensor) -> list[Tensor]:
        """Our tensors from theirs, as views where that is possible."""
        if self.interleaved:
            heads = theirs.unflatten(0, (-1, len(self.ours), self.head))
            return [part.flatten(0, 1) for part in heads.unbind(1)]
        turned = theirs.T if self.transposed else theirs
        return list(turned.split([shape[0] for shape in self.shapes]))


def linear(theirs: str, *ours: str, transposed: bool = False, interleaved: bool = False) -> tuple[Row, Row]:
    """The rows of a projection's, or of a norm's, weight and bias."""
    return (
        Row(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), transposed, interleaved),
        Row(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours), interleaved=interleaved),
    )


@dataclass(frozen=True)
class Family:
    """Models of one class of transformers.

    fixed: fields of ModelConfig that all of them share; parts: what config.json says of the others, in both
    directions; silent: keys that do not change what is computed, beyond those of every family; rows: all tensors that
    its variants have; prefix: in front of the names of the model without its head, which files of that one leave out;
    buffers: tensors that files may hold although no weight is in them; tied: whether embedding and head are one where
    config.json does not say; whole_heads: whether the class wants the hidden size to be a multiple of the heads even
    where the head dimension is given.
    """

    name: str
    model_type: str
    architecture: str
    fixed: dict[str, Any]
    parts: tuple[Part, ...]
    rows: tuple[Row, ...]
    prefix: str
    silent: frozenset[str] = frozenset()
    buffers: tuple[str, ...] = ()
    tied: bool = False
    whole_heads: bool = False

    def config(self, model: ModelConfig) -> dict[str, Any]:
        """What config.json says of a model in the family's own words; `write` adds what all families say alike."""
        tree: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for part in self.parts:
            tree |= part.write(model)
        return tree

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """All of config.json that says what is computed."""
        tree = self.config(model)
        for part in self._common():
            tree |= part.write(model)
        return tree

    def _common(self) -> tuple[Part, ...]:
        return (*COMMON, Key("tie_word_embeddings", "tied_embeddings", FLAG, self.tied))

    def read(self, tree: dict[str, Any], where: str = "config.json") -> tuple[dict[str, Any], list[str]]:
        """The fields of ModelConfig that a config.json says, and what of it training here leaves out.

        Raises UserError naming every key that is unknown or has a value that this model cannot compute. What
        `family_of_config` decides by is taken as decided.
        """
        reading = Reading(tree)
        fields = dict(self.fixed)
        for part in (*self._common(), *self.parts):
            fields |= part.read(reading)
        named = reading.take("architectures", optional(NAMES), None) or []
        if any(name != self.architecture for name in named):
            reading.refuse("architectures", named, repr(self.architecture))
        known = {*reading.taken, *SILENT, *self.silent, "model_type", "auto_map", *QUANTISED}
        for key in tree:
            if key not in known:
                reading.problems.append(
                    f"{key} is {tree[key]!r}: no such key is known for {self.name}; legal: to leave it out, if it "
                    "changes nothing"
                )
        if reading.problems:
            raise UserError(f"{where} says what cannot be computed here ({self.name}):\n" + "\n".join(reading.problems))
        return fields, reading.notes

    def refusals(self, model: ModelConfig) -> list[str]:
        """Why a model cannot be written as this family, field by field; empty if what is written reads back as it."""
        try:
            fields, _ = self.read(self.write(model))
        except UserError as error:
            return str(error).splitlines()[1:]
        given, read = _meaning(model), _meaning(ModelConfig.model_validate(fields))
        found = []
        if given["rope_scaling.kind"] != read["rope_scaling.kind"]:
            kinds = next((part.kinds for part in self.parts if isinstance(part, Rope)), ())
            legal = ", ".join(map(repr, (None, *kinds)))
            found.append(f"model.rope_scaling.kind is {given['rope_scaling.kind']!r} (legal: {legal})")
            given = {key: value for key, value in given.items() if not key.startswith("rope_scaling")}
        for key, value in given.items():
            if key in read and value != read[key]:
                found.append(f"model.{key} is {value!r} (legal: {read[key]!r})")
        if self.whole_heads and model.hidden % model.heads:
            found.append(f"model.hidden is {model.hidden} (legal: a multiple of model.heads = {model.heads})")
        return found

    def expand(self, model: ModelConfig, table: ParameterTable) -> list[Row]:
        """The rows of one model in the table's order; every parameter is in exactly one of them."""
        own = {name: at for at, (name, spec) in enumerate(table.items()) if spec.tied_to is None}
        rows = [
            row.at(layer, table)
            for row in self.rows
            for layer in range(model.layers if "{layer}" in row.theirs else 1)
            if row.ours[0].format(layer=layer) in own
        ]
        rows.sort(key=lambda row: own[row.ours[0]])
        mapped = [name for row in rows for name in row.ours]
        assert sorted(mapped) == sorted(own), f"{self.name} does not map {set(own) ^ set(mapped)}"
        return rows

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor of a file is one of the buffers that hold no weight."""
        return any(re.fullmatch(re.escape(b).replace(r"\{layer\}", r"\d+"), name) for b in self.buffers)


def _meaning(model: ModelConfig) -> dict[str, Any]:
    """A model's fields as they are computed with, by dotted name: what is derived from others is filled in."""
    fields = model.model_dump() | {
        "kv_heads": model.num_kv_heads,
        "head_dim": model.head_width,
        "rotary_dim": None if model.rotary_width == model.head_width else model.rotary_dim,
        "attention_scale": None if model.attention_scale == model.head_width**-0.5 else model.attention_scale,
    }
    windows = [model.window_of(layer) for layer in range(model.layers)]
    fields["window"] = windows[0] if len(set(windows)) == 1 else windows
    scaling = fields.pop("rope_scaling")
    for name in ("window_pattern", *(_OF_ROPE if model.position != "rope" else ())):
        del fields[name]
    fields["rope_scaling.kind"] = scaling and scaling["kind"]
    for name in _OF_SCALING[scaling["kind"]] if scaling else ():
        fields[f"rope_scaling.{name}"] = scaling[name]
    return fields


_OF_ROPE = ("rope_theta", "rotary_dim")

# Fields of RopeScaling that each kind computes with.
_OF_SCALING = {
    "linear": ("factor",),
    "llama3": ("factor", "low_frequency_factor", "high_frequency_factor", "original_sequence"),
    "yarn": ("factor", "original_sequence", "beta_fast", "beta_slow", "attention_factor"),
    "longrope": ("factor", "original_sequence", "attention_factor", "short_factors", "long_factors"),
}
