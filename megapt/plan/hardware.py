"""What a cluster can do: small YAML files of datasheet figures, and the few constants that turn peaks into times."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megapt.errors import UserError

FOLDER = Path(__file__).parent / "hardware"

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Memory(Section):
    """Of one device. share: of the bandwidth that a large copy reaches, bytes read and written both counted."""

    gib: Positive = Field(description="what programs can allocate")
    bandwidth: Positive = Field(description="GB/s")
    share: Share = 0.9


class Gemm(Section):
    """How near a matrix product comes to the dense peak.

    share: at the best shape, in a benchmark's burst; sustained: of that in hours of training, where power and heat
    lower the clock; units: processors that work on one tile each (streaming multiprocessors, compute units; 1 where a
    product is not cut into tiles); depth: elements of the inner dimension in whose time a tile starts and ends.
    """

    share: Share
    sustained: Share = 1.0
    units: Count
    depth: NotNegative = 128


class Attention(Section):
    """Of a fused kernel with 128 dimensions per head, as shares of the dense peak, over pairs that are attended to.

    half_at: tokens at which half of it is reached.
    """

    forward: Share
    backward: Share
    half_at: NotNegative = 300


class Link(Section):
    """bandwidth: GB/s of one device in each direction; latency: seconds of one hop of a collective, software included;
    share: of the bandwidth that collectives reach."""

    bandwidth: Positive
    latency: NotNegative
    share: Share = 0.85


class Node(Link):
    """Devices that reach each other without the network."""

    devices: Count = 8


class Network(Link):
    """Between nodes.

    topology: `rail` joins the devices of one number of many nodes in one switch, `tree` all devices of few nodes.
    ports: of a leaf switch, half of which face devices; oversubscription: bandwidth below a leaf over that above it.
    """

    topology: Literal["rail", "tree"] = "rail"
    ports: Count = 64
    oversubscription: Annotated[float, Field(ge=1)] = 1.0


class Hardware(Section):
    """A kind of cluster. Seconds, GB/s and dense TFLOP/s, all of one device unless said otherwise.

    in_step: speed of kernels within a training step over that in a benchmark of their own: the kernel before leaves
    nothing of use in the caches, collectives take processors, and the slowest of many ranks counts. launch: seconds in
    which the host starts one kernel. host: GB/s between a device and its host. storage: GB/s that a node writes, and
    that the file system takes from all nodes at most.
    """

    name: str
    peak: dict[Literal["bf16", "fp16", "fp32", "fp64", "fp8"], Positive]
    memory: Memory
    gemm: Gemm
    attention: Attention
    in_step: Share = 1.0
    launch: NotNegative
    node: Node
    network: Network
    host: Positive
    storage: Positive
    storage_total: Positive

    def __hash__(self) -> int:
        return hash((self.name, self.gemm, self.memory, self.node, self.network, self.in_step))

    def peak_flops(self, precision: str) -> float:
        """FLOP/s. UserError for a dtype that the file states no peak of."""
        found = self.peak.get(precision)  # type: ignore[call-overload]
        if found is None:
            raise UserError(f"{self.name} has no peak for {precision}; its file states {', '.join(self.peak)}")
        return float(found) * 1e12

    @property
    def copy_rate(self) -> float:
        """Bytes per second, read and written ones both counted."""
        return self.memory.bandwidth * 1e9 * self.memory.share

    @property
    def memory_bytes(self) -> int:
        return int(self.memory.gib * 2**30)

    @property
    def nodes_per_leaf(self) -> int:
        """Nodes among which no traffic leaves its leaf switch."""
        facing = max(1, self.network.ports // 2)
        return facing if self.network.topology == "rail" else max(1, facing // self.node.devices)

    def what_if(self, changes: Sequence[str]) -> Hardware:
        """With other figures: `network=200Gb`, `node.devices=4`, `memory=141GiB`, `gemm.share=0.7`.

        A link or the memory without a field's name means its bandwidth, or with a GiB its size. Units: Gb and GB (per
        second), GiB, us. Raises UserError for unknown names and values out of range.
        """
        tree = self.model_dump()
        for change in changes:
            _change(tree, change)
        return _checked(tree, f"changed by {', '.join(changes)}")


# Units of a kind of figure, each as a multiple of what the files use. Small and capital b are bits and bytes.
_RATES = {"GB": 1.0, "GB/s": 1.0, "TB/s": 1e3} | dict.fromkeys(("Gb", "Gb/s", "Gbit", "Gbit/s", "Gbps"), 1 / 8)
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_UNITS = dict.fromkeys(("bandwidth", "host", "storage", "storage_total"), _RATES)
_UNITS |= {"launch": _SECONDS, "latency": _SECONDS, "gib": {"GiB": 1.0, "TiB": 1024.0}}
_UNITS |= dict.fromkeys(("bf16", "fp16", "fp32", "fp64", "fp8"), {"TFLOP/s": 1.0})
_VALUE = re.compile(r"([-+0-9.eE]+)\s*([A-Za-z/]*)")


def _change(tree: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    here: Any = tree
    *path, last = key.strip().split(".")
    for part in path:
        here = here.get(part) if isinstance(here, dict) else None
    if not equals or not isinstance(here, dict) or last not in here:
        known = [*(name for name, value in tree.items() if isinstance(value, dict)), *_names(tree)]
        near = difflib.get_close_matches(key.strip(), known, n=1) if equals else []
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{change!r} is not of the form name=value, with a name out of {', '.join(_names(tree))}{hint}")
    text = text.strip()
    if isinstance(here[last], dict):
        if "bandwidth" not in here[last]:
            several = ", ".join(f"{key}.{name}" for name in here[last])
            raise UserError(f"{key} has several figures: name one of {several}")
        here, last = here[last], "gib" if "gib" in here[last] and text.endswith("iB") else "bandwidth"
    here[last] = _value(change, text, here[last], _UNITS.get(last, {}))


def _value(change: str, text: str, before: Any, known: dict[str, float]) -> Any:
    if isinstance(before, str):
        return text
    match = _VALUE.fullmatch(text)
    factor = ({"": 1.0} | known).get(match.group(2)) if match else None
    try:
        value = float(match.group(1)) if match else None
    except ValueError:
        value = None
    if value is None or factor is None:
        units = f" with a unit out of {', '.join(known)} or none" if known else " without a unit"
        raise UserError(f"{change!r}: {text!r} is not a number{units}")
    value *= factor
    return int(value) if isinstance(before, int) and not isinstance(before, bool) and value.is_integer() else value


def _names(tree: dict[str, Any]) -> list[str]:
    return [
        f"{name}.{inner}" if inner else name
        for name, value in tree.items()
        for inner in (value if isinstance(value, dict) else [""])
    ]


def names() -> list[str]:
    """The hardware that comes with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name_or_path: str | Path) -> Hardware:
    """Hardware by its name (`names()`), or from a file such as `megapt plan calibrate` writes.

    Raises UserError for an unknown name, listing those that exist, and for a file that does not say what it must.
    """
    given = str(name_or_path)
    path = Path(given)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"hardware file {given} does not exist; without a file, name one of {', '.join(names())}")
        return read(path)
    if given.lower() not in names():
        near = difflib.get_close_matches(given.lower(), names(), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UserError(f"hardware {given!r} is not known{hint} Known: {', '.join(names())}; or a path to a YAML file")
    return read(FOLDER / f"{given.lower()}.yaml")


@lru_cache(maxsize=64)
def _parsed(path: Path, changed: float) -> Hardware:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold the figures of a kind of hardware, not {type(tree).__name__}")
    return _checked(tree, str(path))


def read(path: Path) -> Hardware:
    """A hardware file. Raises UserError where it does not hold what it must."""
    return _parsed(path, path.stat().st_mtime)


def _checked(tree: dict[str, Any], where: str) -> Hardware:
    try:
        return Hardware.model_validate(tree)
    except ValidationError as error:
        found = "; ".join(f"`{'.'.join(map(str, item['loc']))}`: {item['msg']}" for item in error.errors())
        raise UserError(f"hardware {where}: {found}") from None
