"""Conversion of checkpoints to and from the formats of other tools."""

from __future__ import annotations

from megapt.convert.compare import Request
from megapt.convert.export import to_hf
from megapt.convert.importing import from_hf

__all__ = ["Request", "from_hf", "to_hf"]
