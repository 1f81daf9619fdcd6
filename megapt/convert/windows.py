"""Sliding windows in config.json: one for all layers, or layer by layer as `layer_types`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megapt.config import ModelConfig
from megapt.convert.keys import COUNT, FLAG, LAYERS, NAMES, Key, Reading, optional

SLIDING, FULL = "sliding_attention", "full_attention"


def uniform(default: int | None) -> Key:
    """All layers have the window, or none has."""
    return Key("sliding_window", "window", optional(COUNT), default)


@dataclass(frozen=True)
class QwenWindow:
    """Switched on by a flag, from layer `max_window_layers` on or where `layer_types` says so; here in all layers or
    in none."""

    def read(self, reading: Reading) -> dict[str, Any]:
        used = reading.take("use_sliding_window", FLAG, False)
        window = reading.take("sliding_window", optional(COUNT), 4096) if used else None
        reading.taken.add("sliding_window")
        first = reading.take("max_window_layers", LAYERS, 28)
        given = reading.take("layer_types", optional(NAMES), None)
        layers = reading.tree.get("num_hidden_layers")
        if reading.problems or layers is None:
            return {}
        types = given or [SLIDING if window is not None and layer >= first else FULL for layer in range(layers)]
        if len(set(types)) > 1:
            name, value = ("layer_types", given) if given else ("max_window_layers", first)
            reading.refuse(name, value, "what gives every layer a window, or none")
            return {}
        return _read(reading, types, layers, window)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        window = model.window if model.window_of(0) is not None else None
        return {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": model.layers if window is None else 0,
            "layer_types": [FULL if window is None else SLIDING] * model.layers,
        }


@dataclass(frozen=True)
class AlternatingWindow:
    """Every second layer, the first included, unless `layer_types` says otherwise."""

    default: int = 4096

    def read(self, reading: Reading) -> dict[str, Any]:
        window = reading.take("sliding_window", optional(COUNT), self.default)
        given = reading.take("layer_types", optional(NAMES), None)
        layers = reading.tree.get("num_hidden_layers")
        if reading.problems or layers is None:
            return {}
        types = given or [FULL if (layer + 1) % 2 == 0 else SLIDING for layer in range(layers)]
        return _read(reading, types, layers, window)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        windows = [model.window_of(layer) for layer in range(model.layers)]
        return {
            "sliding_window": model.window or model.max_sequence,  # a number even where no layer has it
            "layer_types": [FULL if window is None else SLIDING for window in windows],
        }


def _read(reading: Reading, types: Sequence[str], layers: int, window: int | None) -> dict[str, Any]:
    """The window and its pattern, where one of ours says the same of every layer."""
    unknown = [name for name in types if name not in (SLIDING, FULL)]
    if unknown or len(types) != layers:
        reading.refuse("layer_types", list(types), f"{layers} of {SLIDING!r} and {FULL!r}")
        return {}
    slides = [name == SLIDING for name in types]
    if not any(slides):
        return {"window": None}
    if window is None:
        reading.refuse("sliding_window", None, f"the tokens that layers of {SLIDING!r} attend to")
        return {}
    for pattern in range(1, layers + 1):
        if slides == [pattern == 1 or (layer + 1) % pattern != 0 for layer in range(layers)]:
            return {"window": window, "window_pattern": pattern}
    reading.refuse("layer_types", list(types), f"{SLIDING!r} in every layer, or in all but each n-th")
    return {}
