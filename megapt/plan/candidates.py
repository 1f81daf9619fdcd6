"""Layouts as strings such as `tp=4,pp=8,schedule=zb-v`, and every one that a model, a batch and a world allow."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from megapt.config import Config, from_tree
from megapt.errors import UserError
from megapt.model.recompute import Policy
from megapt.rules import check_world

POLICIES: tuple[Policy, ...] = ("none", "selective", "full")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v")
DEFAULT_CHUNKS = {"interleaved": 2, "zb-v": 2}
_RECOMPUTE = re.compile(r"none|selective(?::\d+)?|full(?::\d+)?|budget:\d+(?:\.\d+)?")
_ZERO = re.compile(r"(native|deepspeed)-([0-3])(-offload)?")


@dataclass(frozen=True, order=True)
class Layout:
    """tp, pp, dp: ranks on each axis; chunks: model chunks per rank; micro: samples of a micro-batch; zero: backend and
    stage; recompute: none, selective, full (`full:3`: of the first three layers of each chunk) or `budget:GiB`;
    sequence: sequence parallelism (of no effect with one tensor rank)."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    micro: int = 1
    zero: str = "native-1"
    recompute: str = "none"
    sequence: bool = True

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def cell(self) -> tuple[int, int]:
        """What layouts share that only differ in how they run on the same axes."""
        return self.tp, self.pp

    def __str__(self) -> str:
        parts = [f"tp={self.tp}", f"pp={self.pp}", f"dp={self.dp}"]
        if self.pp > 1:
            parts.append(f"schedule={self.schedule}")
        if self.chunks > 1:
            parts.append(f"chunks={self.chunks}")
        parts += [f"micro={self.micro}", f"zero={self.zero}"]
        if self.recompute != "none":
            parts.append(f"recompute={self.recompute}")
        if self.tp > 1 and not self.sequence:
            parts.append("sequence=off")
        return ",".join(parts)

    @staticmethod
    def of(config: Config, data: int) -> Layout:
        """The layout that a config states, in a world of `data` data-parallel ranks."""
        parallel, recompute, zero = config.parallel, config.recompute, config.zero
        policy: str = recompute.policy
        if policy == "budget":
            policy = f"budget:{recompute.budget:g}"
        elif recompute.layers is not None and policy != "none":
            policy += f":{recompute.layers}"
        return Layout(
            tp=parallel.tensor,
            pp=parallel.pipeline,
            dp=data,
            schedule=parallel.schedule,
            chunks=parallel.chunks,
            micro=config.batch.micro,
            zero=f"{zero.backend}-{zero.stage}" + ("-offload" if zero.offload else ""),
            recompute=policy,
            sequence=parallel.sequence_parallel or parallel.tensor == 1,
        )

    def values(self) -> dict[str, Any]:
        """What the layout says, by the dotted keys of a config."""
        backend, stage, *rest = self.zero.split("-")
        policy, _, amount = self.recompute.partition(":")
        return {
            "parallel.tensor": self.tp,
            "parallel.pipeline": self.pp,
            "parallel.data": None,
            "parallel.auto": None,
            "parallel.schedule": self.schedule,
            "parallel.chunks": self.chunks,
            "parallel.sequence": None if self.sequence or self.tp == 1 else False,
            "parallel.layers_per_stage": None,
            "zero.stage": int(stage),
            "zero.backend": backend,
            "zero.offload": bool(rest),
            "batch.micro": self.micro,
            "recompute.policy": policy,
            "recompute.layers": int(amount) if amount and policy != "budget" else None,
            "recompute.budget": float(amount) if policy == "budget" else None,
        }

    def on(self, config: Config) -> Config:
        """The config in this layout, not checked."""
        sections: dict[str, dict[str, Any]] = {}
        for key, value in self.values().items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value
        return config.model_copy(
            update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
        )

    def checked(self, config: Config) -> Config:
        """The config in this layout. UserError where the rules forbid it."""
        made = from_tree(self.on(config).model_dump()).config
        check_world(made, self.world)
        return made


@dataclass(frozen=True)
class Wanted:
    """A layout of which only some values are given: `tp=4,pp=8`."""

    given: dict[str, Any]

    @staticmethod
    def parse(text: str) -> Wanted:
        """Values of key=value, separated by commas. UserError for unknown keys and values that none can have."""
        kinds = {field.name: type(getattr(Layout(), field.name)) for field in fields(Layout)}
        given: dict[str, Any] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            key, equals, value = (s.strip() for s in part.partition("="))
            if key not in kinds:
                near = difflib.get_close_matches(key, kinds, n=1)
                hint = f"did you mean `{near[0]}`? " if near else ""
                raise UserError(f"layout {text!r}: unknown key `{key}`; {hint}Known: {', '.join(kinds)}")
            if not equals or not value:
                raise UserError(f"layout {text!r}: `{key}` needs a value, as in tp=2")
            if key in given:
                raise UserError(f"layout {text!r}: `{key}` is given twice")
            given[key] = _value(text, key, value, kinds[key])
        if not given:
            raise UserError("no layout was given; an example: tp=4,pp=8,recompute=full")
        return Wanted(given)

    def __str__(self) -> str:
        return ",".join(f"{k}={('off', 'on')[v] if isinstance(v, bool) else v}" for k, v in self.given.items())

    def allows(self, layout: Layout) -> bool:
        for key, value in self.given.items():
            have = getattr(layout, key)
            if key == "recompute" and value != "none" and ":" not in value:
                have = have.partition(":")[0]
            if have != value:
                return False
        return True

    def onto(self, layout: Layout) -> Layout:
        """The layout with these values in place of its own, and the fewest other changes that they ask for."""
        made = replace(layout, **self.given)
        schedule = "1f1b" if made.pp == 1 and "schedule" not in self.given else made.schedule
        chunks = made.chunks
        if "chunks" not in self.given and (schedule != layout.schedule or (chunks > 1) != (schedule in DEFAULT_CHUNKS)):
            chunks = DEFAULT_CHUNKS.get(schedule, 1)
        return replace(made, schedule=schedule, chunks=chunks)


def _value(text: str, key: str, value: str, kind: type) -> Any:
    if kind is bool:
        if value not in ("on", "off"):
            raise UserError(f"layout {text!r}: {key} is on or off, not {value!r}")
        return value == "on"
    if kind is int:
        if not (value.isascii() and value.isdigit()) or int(value) < 1:
            raise UserError(f"layout {text!r}: {key} is a whole number from 1 on, not {value!r}")
        return int(value)
    legal = {
        "schedule": (value in SCHEDULES, ", ".join(SCHEDULES)),
        "zero": (bool(_ZERO.fullmatch(value)), "a backend and a stage, as in native-1 or deepspeed-2-offload"),
        "recompute": (bool(_RECOMPUTE.fullmatch(value)), "none, selective, full, full:3 or budget:12.5 (GiB)"),
    }[key]
    if not legal[0]:
        raise UserError(f"layout {text!r}: {key}={value} is not legal; legal: {legal[1]}")
    return value


@lru_cache(maxsize=256)
def divisors(number: int) -> tuple[int, ...]:
    """In rising order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def tensor_degrees(config: Config, world: int) -> list[int]:
    """Tensor-parallel sizes that the model allows and that divide the world."""
    model = config.model
    kv = model.num_kv_heads
    return [
        t for t in divisors(world)
        if not (model.heads % t or model.ffn % t or (kv % t and t % kv))
    ]  # fmt: skip


def sample_unit(config: Config) -> int:
    """What micro-batch x data has to divide: the batch, and the sizes that a ramp goes through."""
    batch = config.batch
    ramp = (batch.ramp.start, batch.ramp.increment) if batch.ramp else ()
    return math.gcd(batch.global_samples, *ramp)


def cells(config: Config, world: int) -> Iterator[tuple[int, int, int]]:
    """(tp, pp, dp) of all legal sizes of the axes."""
    unit = sample_unit(config)
    for tp in tensor_degrees(config, world):
        for pp in divisors(world // tp):
            if pp <= config.model.layers and unit % (world // tp // pp) == 0:
                yield tp, pp, world // tp // pp


def schedules(config: Config, pp: int, micro_batches: int) -> Iterator[tuple[str, int]]:
    """(schedule, chunks) that are legal on `pp` stages; without a pipeline all are the same."""
    if pp == 1:
        yield "1f1b", 1
        return
    layers, batch = config.model.layers, config.batch
    yield "1f1b", 1
    yield "zb-h1", 1
    yield "gpipe", 1
    if layers >= 2 * pp:
        yield "zb-v", 2
    # A ramp's sizes would have to be looked at one by one: start and increment are each multiples of the unit.
    whole = micro_batches % pp == 0
    if batch.ramp is not None:
        per = batch.global_samples // micro_batches
        whole = whole and batch.ramp.start // per % pp == 0 and batch.ramp.increment // per % pp == 0
    if whole:
        for chunks in range(2, layers // pp + 1):
            yield "interleaved", chunks


def zero_stages(config: Config, pp: int, backend: str | None, offload: bool | None = None) -> list[str]:
    """Backends and stages that are legal.

    backend: the only one to be taken; None for native, and deepspeed where it alone can. offload: default as the config
    says.
    """
    optimizer = config.optimizer
    deepspeed = not (config.precision == "fp16" or optimizer.kind == "muon" or optimizer.stochastic_rounding)
    if config.zero.offload if offload is None else offload:
        return [f"deepspeed-{stage}-offload" for stage in (1, 2, 3)] if pp == 1 and deepspeed else []
    if backend == "deepspeed" and not deepspeed:
        return []
    name = backend or "native"
    found = [f"{name}-{stage}" for stage in ((0, 1) if pp > 1 else (0, 1, 2))]
    if pp == 1 and deepspeed and backend != "native":
        found.append("deepspeed-3")
    return found


def distinct_zero_stages(config: Config, pp: int, dp: int, backend: str | None) -> list[str]:
    """Of these, the ones that differ: with one data-parallel rank native stages are all the same."""
    found = zero_stages(config, pp, backend)
    return [name for name in found if name == f"{backend or 'native'}-1"] or found if dp == 1 else found


def sequence_choices(config: Config, tp: int, micro: int) -> tuple[bool, ...]:
    """With and without sequence parallelism, as far as it is legal."""
    if tp == 1:
        return (True,)
    return (True, False) if micro * config.batch.sequence % tp == 0 else (False,)
