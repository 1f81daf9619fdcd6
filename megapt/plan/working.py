"""What a layer, the embedding and the head allocate and free as they run: the most bytes at a time.

Each pass is written down as the model's code carries it out, as what it makes and what it frees of what. `kept` is what
a forward leaves for its backward.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache

from megapt.config import ModelConfig
from megapt.model.blocks import ELEMENTS
from megapt.model.recompute import Policy
from megapt.model.table import parameter_table
from megapt.parallel.loss import BLOCK_ELEMENTS

