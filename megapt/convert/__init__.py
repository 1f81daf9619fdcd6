"""Conversion of checkpoints to the formats of other tools."""

from __future__ import annotations

from megapt.convert.export import to_hf

__all__ = ["to_hf"]
