"""One job at a time writes to a checkpoints folder."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from pathlib import Path

from megapt.checkpoint import folders
from megapt.errors import UserError

NAME = ".lock"
PATIENCE = 5.0  # seconds: the writers of a run that was killed end a moment after it
_AGAIN = 0.05


class FolderLock:
    """Holds a checkpoints folder, which is made where it is missing. For rank 0; its writer inherits `descriptor`.

    The lock is the kernel's (flock): it ends with the last process that has it open, however that process ends, so
    that none is ever stale. Raises UserError if another run holds it. On a file system without locks it says so on
    stderr and goes on.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        folders.make(folder)
        deadline = time.monotonic() + PATIENCE
        while (descriptor := self._attempt()) is None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"another run is writing to {folder}; wait for it, stop it{self._holder()}, or name another folder"
                )
            time.sleep(_AGAIN)
        self.descriptor = descriptor
        self._sign()

    def _attempt(self) -> int | None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:  # some shared file systems have no locks, and a run must still be possible there
            message = f"checkpoints: {self.path.parent} cannot be locked here ({error.strerror})"
            print(f"{message}; start no second run that writes to it", file=sys.stderr)
            return descriptor
        if _same(descriptor, self.path):
            return descriptor
        os.close(descriptor)  # its last holder has just taken the file away
        return None

    def _sign(self) -> None:
        """Who holds it, for the message of whoever does not get it."""
        try:
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        except OSError:
            pass  # a full disk is no reason not to hold the lock

    def _holder(self) -> str:
        try:
            signature = self.path.read_text(errors="replace")
        except OSError:
            return ""
        return f" ({signature})" if signature else ""

    @property
    def held(self) -> bool:
        """Whether the folder is still the one that was locked: it may have been removed meanwhile."""
        return _same(self.descriptor, self.path)

    def close(self) -> None:
        """Give it back and leave no file, unless the folder has become read-only meanwhile."""
        try:
            if self.held:
                self.path.unlink()
        except OSError:
            pass  # the lock is the kernel's, and ends with the descriptor
        finally:
            os.close(self.descriptor)


def _same(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except OSError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
