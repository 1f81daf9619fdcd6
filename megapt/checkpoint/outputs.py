"""Folders of tensors that appear under their name only when whole, written one tensor at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from megapt.checkpoint.tensorfile import Slot, TensorFile
from megapt.errors import UserError
from megapt.files import sync_folder, temporary_name


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `output` when the `with` block ends, and disappears if it raises.

    UserError if `output` exists.
    """
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} already exists; choose another output, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{temporary_name(output).name}")
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(output.parent)


def write_tensors(
    folder: Path,
    slots: Sequence[Slot],
    name: Callable[[int, int], str],
    tensor: Callable[[Slot], Tensor],
    limit: int,
) -> Iterator[tuple[Slot, str, str]]:
    """Write tensors into safetensors files of at most `limit` bytes (or one tensor); yields each slot with its file and
    its checksum. name: of a file, by its number and how many there are; tensor: what belongs into a slot."""
    groups = list(_groups(slots, limit))
    for number, group in enumerate(groups):
        file = TensorFile(folder / name(number, len(groups)), group)
        try:
            for slot in group:
                yield slot, file.path.name, file.write(tensor(slot))
            file.close()
        finally:
            file.abandon()


def _groups(slots: Sequence[Slot], limit: int) -> Iterator[list[Slot]]:
    group: list[Slot] = []
    size = 0
    for slot in slots:
        if group and size + slot.nbytes > limit:
            yield group
            group, size = [], 0
        group.append(slot)
        size += slot.nbytes
    if group:
        yield group
