"""A layout: where and in what order a model is computed, as a string such as `tp=2,pp=2,schedule=zb-v`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

from megapt.config import Config, from_tree
from megapt.errors import UserError
from megapt.prove.small import LAYERS, Shape
from megapt.rules import check_world

CHUNKS = {"interleaved": 2, "zb-v": 2}  # of schedules with several model chunks per rank
KERNELS: dict[str, Any] = {
    "auto": "auto",
    "reference": "reference",
    # What PyTorch itself has fused, on every device and in every precision; weight gradients added by their product.
    "library": {"adamw": "library", "wgrad": "reference", "attention": "library"},
    "cuda": dict.fromkeys(("norm", "glu", "rope", "cross_entropy", "adamw"), "cuda"),
}


@dataclass(frozen=True)
class Layout:
    """tp, pp, dp: ranks on each axis; chunks: 0 for as many as the schedule needs; micro: samples of a micro-batch;
    sequence: sequence parallelism (of no effect with one tensor rank); recompute: its policy; zero: backend and stage;
    stages: `even`, `uneven`, or the layers of each virtual stage as in `1/3`; optimizer: its kind; vocabulary: rows per
    tensor rank are padded to a multiple of it; kernels: which kind of them computes, of `KERNELS`."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    schedule: str = "1f1b"
    chunks: int = 0
    micro: int = 2
    sequence: bool = True
    recompute: str = "none"
    zero: str = "native-0"
    compile: bool = False
    stages: str = "even"
    optimizer: str = ""
    vocabulary: int = 1
    kernels: str = "auto"

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def virtual_stages(self) -> int:
        return self.pp * (self.chunks or CHUNKS.get(self.schedule, 1))

    @property
    def layers(self) -> int:
        """Layers of the small model, which has one for every stage at least."""
        return max(LAYERS, self.virtual_stages)

    def __str__(self) -> str:
        plain = Layout()
        parts = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value != getattr(plain, field.name):
                shown = ("off", "on")[value] if isinstance(value, bool) else value
                parts.append(f"{field.name}={shown}")
        return ",".join(parts) or "tp=1"

    @staticmethod
    def parse(text: str) -> Layout:
        """The layout of a string of key=value, separated by commas; what is not named has its default."""
        kinds = {field.name: type(getattr(Layout(), field.name)) for field in fields(Layout)}
        values: dict[str, Any] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            key, equals, value = (s.strip() for s in part.partition("="))
            if key not in kinds:
                near = difflib.get_close_matches(key, kinds, n=1)
                hint = f"did you mean `{near[0]}`? " if near else ""
                raise UserError(f"layout {text!r}: unknown key `{key}`; {hint}Known: {', '.join(kinds)}")
            if not equals or not value:
                raise UserError(f"layout {text!r}: `{key}` needs a value, as in tp=2")
            if key in values:
                raise UserError(f"layout {text!r}: `{key}` is given twice")
            values[key] = _value(text, key, value, kinds[key])
        return Layout(**values)

    @staticmethod
    def parse_list(text: str) -> list[Layout]:
        """Layouts separated by semicolons."""
        layouts = [Layout.parse(part) for part in text.split(";") if part.strip()]
        if not layouts:
            raise UserError("no layout was given; an example of two: 'tp=2,pp=2;dp=4,zero=deepspeed-2'")
        return layouts

    def config(self, shape: Shape, precision: str = "fp64", layers: int = 0) -> Config:
        """The shape's small model in this layout, with `layers` layers or as many as the layout wants.

        UserError where the rules of configurations forbid it.
        """
        backend, _, stage = self.zero.rpartition("-")
        if not backend or not stage.isdigit():
            raise UserError(f"layout {str(self)!r}: zero={self.zero} is not a backend and a stage, as in deepspeed-2")
        parallel: dict[str, Any] = {
            "tensor": self.tp,
            "pipeline": self.pp,
            "data": self.dp,
            "sequence": self.sequence,
            "schedule": self.schedule,
            "chunks": self.chunks or CHUNKS.get(self.schedule, 1),
            "vocabulary_multiple": self.vocabulary,
        }
        if self.stages != "even":
            parallel["layers_per_stage"] = self._layers_per_stage()
        tree = shape.tree | {
            "precision": precision,
            "parallel": parallel,
            "zero": {"backend": backend, "stage": int(stage), "bucket": 4096},
            "recompute": {"policy": self.recompute} | ({"budget": 1.0} if self.recompute == "budget" else {}),
            "compile": self.compile,
            "kernels": self._kernels(shape),
            "model": shape.tree["model"] | {"layers": layers or self.layers},
            "batch": shape.tree["batch"] | {"micro": self.micro},
            "optimizer": shape.tree["optimizer"] | ({"kind": self.optimizer} if self.optimizer else {}),
        }
        try:
            config = from_tree(tree).config
            check_world(config, self.world)
        except UserError as error:
            raise UserError(f"layout {str(self)!r} of the small {shape.name} model: {error}") from None
        return config

    def _kernels(self, shape: Shape) -> Any:
        if self.kernels not in KERNELS:
            raise UserError(f"layout {str(self)!r}: kernels is one of {', '.join(KERNELS)}, not {self.kernels}")
        named = KERNELS[self.kernels]
        model = shape.tree["model"]
        if self.kernels == "library" and (model.get("window") or model.get("attention_softcap")):
            return {key: kind for key, kind in named.items() if key != "attention"}  # PyTorch has none for these
        return named

    def _layers_per_stage(self) -> list[int]:
        count = self.virtual_stages
        if self.stages == "uneven":
            if count == 1 or count >= self.layers:
                raise UserError(
                    f"layout {str(self)!r}: {self.layers} layers on {count} stages cannot be uneven; "
                    f"2 to {self.layers - 1} stages can"
                )
            return [1] * (count - 1) + [self.layers - count + 1]
        try:
            return [int(n) for n in self.stages.split("/")]
        except ValueError:
            legal = "even, uneven, or the layers of each stage as in 1/3"
            raise UserError(f"layout {str(self)!r}: stages={self.stages} is not {legal}") from None


def tightened(config: Config, data: int) -> Config:
    """With a budget of activations, if there is one, halfway between computing all of them again and keeping all."""
    if config.recompute.policy != "budget":
        return config
    from megapt.plan.memory import stage_memory

    def peak(policy: str) -> int:
        recompute = config.recompute.model_copy(update={"policy": policy, "budget": None})
        stages = stage_memory(config.model_copy(update={"recompute": recompute}), data, cpu=True)
        return max(stage.activations for stage in stages)

    budget = (peak("none") + peak("full")) / 2 / 2**30
    return config.model_copy(update={"recompute": config.recompute.model_copy(update={"budget": budget})})


def _value(text: str, key: str, value: str, kind: type) -> Any:
    if kind is bool:
        if value not in ("on", "off"):
            raise UserError(f"layout {text!r}: {key} is on or off, not {value!r}")
        return value == "on"
    if kind is int:
        if not value.isdigit() or int(value) < 1:
            raise UserError(f"layout {text!r}: {key} is a whole number from 1 on, not {value!r}")
        return int(value)
    return value
