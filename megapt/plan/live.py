"""Bytes of live tensors, followed storage by storage while a program runs."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megapt.operations import OPERATIONS
from megapt.prove.collectives import Recorder


class LiveBytes(Recorder):
    """While it is entered, counts every storage that an operation makes until it is freed, of real or fake tensors.

    now: bytes alive; peak: the most since `restart`; at_peak: those bytes by what the process did when it made them, or
    by the name that `name` gave them; peak_action: what it did at the peak; peaks: by what it did, the most. What
    operations allocate and free within themselves is not seen. Collectives and transfers are recorded in `operations`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.items: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.peak_action = ""
        self.peaks: dict[str, int] = {}
        self._live: dict[int, tuple[int, str, weakref.ref[torch.UntypedStorage]]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if isinstance(result, Tensor):
            self._see(result)
        elif isinstance(result, list | tuple):
            for one in result:
                if isinstance(one, Tensor):
                    self._see(one)
        return result

    def restart(self) -> None:
        """The peak counts from here."""
        self.peak, self.at_peak, self.peak_action = self.now, self.items.copy(), OPERATIONS.action
        self.peaks.clear()

    def name(self, tensors: Iterable[Tensor], item: str) -> None:
        """What these tensors' memory counts as from now on; memory that has a name keeps it."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            size, before, storage = self._live.get(key, (0, item, None))
            if storage is not None and before.startswith("made in"):
                self.items[before] -= size
                self.items[item] += size
                self._live[key] = size, item, storage

    def counts(self, storage: torch.UntypedStorage) -> bool:
        """Whether this storage is memory."""
        return storage.device.type != "meta"

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if self.counts(storage) else 0
        known = self._live.get(key)
        if known is not None:
            if known[0] != size:
                self._add(size - known[0], known[1])
                self._live[key] = size, known[1], known[2]
            return
        item = f"made in {_phase()}"
        self._live[key] = size, item, weakref.ref(storage, partial(self._freed, key))
        self._add(size, item)

    def _freed(self, key: int, _: object) -> None:
        size, item, _ = self._live.pop(key)
        self._add(-size, item)

    def _add(self, size: int, item: str) -> None:
        self.now += size
        self.items[item] += size
        if size > 0:
            phase = _phase()
            self.peaks[phase] = max(self.now, self.peaks.get(phase, 0))
        if self.now > self.peak:
            self.peak, self.at_peak, self.peak_action = self.now, self.items.copy(), OPERATIONS.action


def _phase() -> str:
    return OPERATIONS.action.partition(" of micro-batch")[0] or "the program"
