"""What a conversion says at its end, and the folder that appears only if it went well."""

from __future__ import annotations

import fcntl
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
    """UserError for an output that already holds something, or that no finished folder could take the place of."""
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise UserError(f"{output} already exists and is not an empty folder; choose another output")
    if output.exists() and (os.path.ismount(output) or output.samefile(os.curdir)):
        raise UserError(f"{output} is a mount point or the current folder, and cannot be replaced; name one inside it")


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A hidden folder that becomes `output` when the `with` block ends, and vanishes if it raises.

    What a conversion that was killed left there goes away; UserError where another one is at work.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.partial")
    descriptor = _locked(temporary, output)
    try:
        check_output(output)  # again: another conversion may have ended since
        for left in temporary.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield temporary
        sync_folder(temporary)
        os.replace(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)
    sync_folder(output.parent)


def _locked(folder: Path, output: Path) -> int:
    """Make a folder that is this process's alone until the descriptor is closed, however the process ends."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    alone = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        alone = False
    except OSError:
        pass  # some shared file systems have no locks
    # One that has just ended has given its folder the final name, or removed it.
    if not alone or not folder.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
        os.close(descriptor)
        raise UserError(f"another conversion is writing {output}; wait for it, stop it, or choose another output")
    return descriptor
