"""Where tests find the one way of starting ranks."""

from __future__ import annotations

from megapt.prove.ranks import run_ranks

__all__ = ["run_ranks"]
