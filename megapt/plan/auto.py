"""`parallel: auto`: the layout that a training run takes is the planner's best for the ranks that were started."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megapt.config import Config, Loaded
from megapt.errors import UserError
from megapt.plan import hardware
from megapt.plan.advice import nothing_fits
from megapt.plan.candidates import Layout, Wanted
from megapt.plan.hardware import Hardware

if TYPE_CHECKING:
    import torch

    from megapt.plan.search import Plan

ORIGIN = "planner"
"""Where the values that the planner has chosen come from."""

DETECT = "detect"
"""`parallel.auto` of a plain `parallel: auto`."""


def detect(device: torch.device) -> Hardware:
    """The hardware that comes with the package and is of this kind. UserError where there is none."""
    if device.type == "cpu":
        return hardware.load("cpu")
    import torch

    given = torch.cuda.get_device_name(device)
    found = named(given)
    if found is None:
        raise UserError(
            f"parallel: auto does not know the GPU {given!r}; measure it once with `megapt plan calibrate gpu.yaml` "
            f"and write `parallel: {{auto: gpu.yaml}}`, or name one of {', '.join(hardware.names())}"
        )
    return hardware.load(found)


def named(device: str) -> str | None:
    """The hardware whose name's parts all stand in the name that CUDA gives a device; the longest of several."""
    text = device.lower()
    found = [name for name in hardware.names() if all(part in text for part in name.split("-"))]
    return max(found, key=len, default=None)


def resolve(loaded: Loaded, world: int, device: torch.device) -> Loaded:
    """The config with the planner's layout in place of `parallel: auto`; any other config as it is.

    What the file states of the layout itself (parallel.tensor, batch.micro, zero.stage, recompute.policy and so on)
    stays as it stands. The same on every rank: nothing but the config, `world` and the kind of device decides.

    Raises UserError where no layout of `world` ranks is legal or fits, for unknown hardware, and for
    parallel.layers_per_stage, which belongs to one layout.
    """
    config = loaded.config
    auto = config.parallel.auto
    if auto is None:
        return loaded
    if config.parallel.layers_per_stage is not None:
        raise UserError("parallel.layers_per_stage belongs to one layout: leave it out, or write the layout for auto")
    chosen = detect(device) if auto == DETECT else hardware.load(auto)
    given = stated(config)
    backend = config.zero.backend if "backend" in config.zero.model_fields_set else None
    plan = _search(config, world, chosen, backend, Wanted(given) if given else None)
    if not plan.ranked:
        raise UserError(f"parallel: auto: {nothing_fits(plan)}")
    made = plan.best.layout.checked(config)
    chosen_here = {key: ORIGIN for key in plan.best.layout.values() if _value(made, key) != _value(config, key)}
    return replace(loaded, config=made, origins=loaded.origins | chosen_here)


def _search(config: Config, world: int, chosen: Hardware, backend: str | None, only: Wanted | None) -> Plan:
    """Native layouts alone, unless another backend is asked for or none of them is legal and fits: the planner thinks
    better of DeepSpeed's stage 3 than measurements do."""
    from megapt.plan.search import search

    if backend is None:
        try:
            plan = search(config, world, chosen, backend="native", only=only, best_alone=True)
        except UserError:  # none is legal
            pass
        else:
            if plan.ranked:
                return plan
    return search(config, world, chosen, backend=backend, only=only, best_alone=True)


def describe(before: Loaded, after: Loaded, world: int) -> str | None:
    """One line about what the planner chose; None where it was not asked."""
    if before.config.parallel.auto is None:
        return None
    parallel = after.config.parallel
    layout = Layout.of(after.config, world // (parallel.tensor * parallel.pipeline))
    return f"parallel: auto for {world} ranks: {layout}"


def stated(config: Config) -> dict[str, Any]:
    """What a config says itself of its layout, by the keys of layouts."""
    has, own = Layout.of(config, 1), config.parallel.model_fields_set
    given: dict[str, Any] = {}
    for name, key in (("tensor", "tp"), ("pipeline", "pp"), ("schedule", "schedule"), ("chunks", "chunks")):
        if name in own:
            given[key] = getattr(has, key)
    if config.parallel.data is not None:
        given["dp"] = config.parallel.data
    if config.parallel.sequence is not None:
        given["sequence"] = config.parallel.sequence
    if "micro" in config.batch.model_fields_set:
        given["micro"] = config.batch.micro
    if "stage" in config.zero.model_fields_set:
        given["zero"] = has.zero
    if "policy" in config.recompute.model_fields_set:
        given["recompute"] = has.recompute
    return given


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
