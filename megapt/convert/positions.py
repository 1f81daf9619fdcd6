"""Rotary positions in config.json: `rope_parameters` of newer files, `rope_theta` and `rope_scaling` of older ones.

Both are read. The older form is written, which transformers 4 and 5 both read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megapt.config import ModelConfig, RopeScaling
from megapt.convert.keys import COUNT, NUMBER, NUMBERS, TREE, Key, Kind, Reading, one_of, optional

# Per kind of scaling: their key, our field, legal values, what is meant where it is missing (absent: must be there).
_FIELDS: dict[str, tuple[Key, ...]] = {
    "linear": (Key("factor", "factor", NUMBER),),
    "llama3": (
        Key("factor", "factor", NUMBER),
        Key("low_freq_factor", "low_frequency_factor", NUMBER),
        Key("high_freq_factor", "high_frequency_factor", NUMBER),
        Key("original_max_position_embeddings", "original_sequence", COUNT),
    ),
    "yarn": (
        Key("factor", "factor", NUMBER),
        Key("original_max_position_embeddings", "original_sequence", optional(COUNT), None),
        Key("beta_fast", "beta_fast", optional(NUMBER), None),
        Key("beta_slow", "beta_slow", optional(NUMBER), None),
        Key("attention_factor", "attention_factor", optional(NUMBER), None),
    ),
    "longrope": (
        Key("original_max_position_embeddings", "original_sequence", optional(COUNT), None),
        Key("short_factor", "short_factors", NUMBERS),
        Key("long_factor", "long_factors", NUMBERS),
        Key("factor", "factor", optional(NUMBER), None),
        Key("attention_factor", "attention_factor", optional(NUMBER), None),
    ),
}
# Variations that are not computed here.
_YARN_ONLY: tuple[tuple[str, Kind], ...] = (
    ("mscale", one_of(None)),
    ("mscale_all_dim", one_of(None)),
    ("truncate", one_of(True)),
)


@dataclass(frozen=True)
class Rope:
    """theta, share: keys of the base and of the share of a head that turns, all of which must agree; the first is
    written. kinds: scalings that the family's class computes; also: older names of the first of them."""

    theta: tuple[str, ...] = ("rope_theta",)
    share: tuple[str, ...] = ()
    share_default: float = 1.0
    kinds: tuple[str, ...] = ("linear", "llama3", "yarn")
    also: tuple[str, ...] = ()

    def read(self, reading: Reading) -> dict[str, Any]:
        at, tree = self._object(reading)
        inner = Reading(tree, f"{at}.")
        kind = self._kind(inner)
        judged = not inner.problems  # of an unknown kind, nobody can say which keys it has
        outer = [reading.take(name, NUMBER, None) for name in self.theta]
        theta = self._agreed(reading, [*outer, inner.take("rope_theta", NUMBER, None)], "rope_theta", 10000.0)
        outer = [reading.take(name, NUMBER, None) for name in self.share]
        given = inner.take("partial_rotary_factor", NUMBER if self.share else one_of(1.0, 1), None)
        share = self._agreed(reading, [*outer, given], "partial_rotary_factor", self.share_default)
        fields: dict[str, Any] = {"rope_theta": theta, "rope_scaling": self._scaling(kind, inner, reading)}
        for key in tree:
            if judged and key not in inner.taken:
                inner.refuse(key, tree[key], f"to leave it out of a scaling of type {kind!r}")
        reading.problems += inner.problems
        if self.share and not reading.problems and share != 1:
            width = reading.tree["hidden_size"] // reading.tree["num_attention_heads"]
            fields["rotary_dim"] = int(width * share)
        return fields

    def write(self, model: ModelConfig) -> dict[str, Any]:
        tree: dict[str, Any] = {self.theta[0]: model.rope_theta}
        if self.share:
            tree[self.share[0]] = model.rotary_width / model.head_width
        scaling = model.rope_scaling
        known = scaling is not None and scaling.kind in self.kinds
        return {**tree, "rope_scaling": self.write_scaling(scaling) if known and scaling is not None else None}

    def write_scaling(self, scaling: RopeScaling) -> dict[str, Any]:
        values = ((key.theirs, getattr(scaling, key.ours)) for key in _FIELDS[scaling.kind])
        return {"rope_type": scaling.kind, **{name: value for name, value in values if value is not None}}

    def _object(self, reading: Reading) -> tuple[str, dict[str, Any]]:
        """The one object that says how positions turn, and its key; empty where there is none."""
        old = reading.take("rope_scaling", optional(TREE), None)
        new = reading.take("rope_parameters", optional(TREE), None)
        if old and new and old != new:
            reading.refuse("rope_scaling", old, f"what rope_parameters says, {new!r}")
        return ("rope_scaling", old) if old else ("rope_parameters", new or {})

    def _kind(self, inner: Reading) -> str:
        legal = one_of("default", *self.kinds, *self.also)
        old = inner.take("type", legal, None)
        kind = inner.take("rope_type", legal, old or "default") or "default"
        if old is not None and old != kind:
            inner.refuse("type", old, f"what rope_type says, {kind!r}")
        return self.kinds[0] if kind in self.also else str(kind)

    def _scaling(self, kind: str, inner: Reading, reading: Reading) -> dict[str, Any] | None:
        if kind == "default":
            return None
        fields: dict[str, Any] = {"kind": kind}
        for key in _FIELDS[kind]:
            fields |= {name: value for name, value in key.read(inner).items() if value is not None}
        if kind == "yarn":
            fields.setdefault("original_sequence", reading.tree.get("max_position_embeddings"))
            for name, legal in _YARN_ONLY:
                inner.take(name, legal, None)
        return fields

    @staticmethod
    def _agreed(reading: Reading, values: list[float | None], name: str, default: float) -> float:
        found = sorted({value for value in values if value is not None})
        if len(found) > 1:
            reading.problems.append(f"{name} is given as {' and as '.join(map(repr, found))}; legal: one value")
        return found[0] if found else default


@dataclass(frozen=True)
class LongRope(Rope):
    """Phi-3's: the original sequence is a key of its own, and the factor is what remains of the longest sequence."""

    kinds: tuple[str, ...] = ("longrope",)
    also: tuple[str, ...] = ("su", "yarn")

    def read(self, reading: Reading) -> dict[str, Any]:
        original = reading.take("original_max_position_embeddings", COUNT, 4096)
        fields = super().read(reading)
        if fields["rope_scaling"] is not None and not reading.problems:
            longest, scaling = reading.tree["max_position_embeddings"], fields["rope_scaling"]
            if scaling.get("original_sequence", original) != original:
                legal = f"what rope_scaling says, {scaling['original_sequence']}"
                reading.refuse("original_max_position_embeddings", original, legal)
            fields["rope_scaling"] = {"factor": longest / original, **scaling, "original_sequence": original}
        return fields

    def write(self, model: ModelConfig) -> dict[str, Any]:
        scaling = model.rope_scaling
        known = scaling is not None and scaling.kind == "longrope"
        original = scaling.original_sequence if known and scaling is not None else model.max_sequence
        return {**super().write(model), "original_max_position_embeddings": original}

    def write_scaling(self, scaling: RopeScaling) -> dict[str, Any]:
        # transformers 4 wants these three keys and no other.
        short, long = list(scaling.short_factors or ()), list(scaling.long_factors or ())
        return {"type": "longrope", "short_factor": short, "long_factor": long}
