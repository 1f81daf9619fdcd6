"""What a conversion says at its end, and the folder that appears only if it went well."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megapt.convert.compare import Comparison
from megapt.errors import UserError
from megapt.files import sync_folder


@dataclass(frozen=True)
class Report:
    """output: what was written; family: of Hugging Face models; comparison: None if nothing was compared; notes: what
    the other side says that is left out; config: YAML to go on with, for a checkpoint."""

    output: Path
    family: str
    comparison: Comparison | None
    notes: tuple[str, ...] = ()
    config: str = ""

    def __str__(self) -> str:
        compared = "NOTHING WAS COMPARED: whether both sides compute the same is not known (--no-compare)"
        lines = [f"family: {self.family}", *(f"note: {note}" for note in self.notes)]
        lines.append(str(self.comparison) if self.comparison else compared)
        return "\n".join([*lines, *([self.config.rstrip()] if self.config else []), f"written: {self.output}"])


def check_output(output: Path) -> None:
    """UserError for an output that already holds something."""
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise UserError(f"{output} already exists and is not empty; choose another output")


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A hidden folder that becomes `output` when the `with` block ends, and vanishes if it raises."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.partial")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        os.replace(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(output.parent)
