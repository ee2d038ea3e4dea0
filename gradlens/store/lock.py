"""One writer for each rank of a run directory.

The lock is the operating system's: it ends with the process, however that ends. Forked children, such as the workers of a
data loader, let go of it at once: they may outlive the process that writes. Where the file system has no locks (Lustre that
is mounted without `flock`, some network drives), nobody is refused.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
import weakref
from pathlib import Path

from gradlens.errors import RunDirectoryError

#: What a file system without locks says.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}

_held: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """Held from when it is made to `release()`.

    Raises:
        RunDirectoryError: Another lens holds it.
    """

    def __init__(self, run: Path, rank: int) -> None:
        self._fd = os.open(_path(run, rank), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        for patience in (0.05, 0.2, 0.5, None):  # a reader that asks whether it is held holds it for a moment
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _held.add(self)
                return
            except BlockingIOError:
                if patience is not None:
                    time.sleep(patience)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return
                self.release()
                raise
        self.release()
        raise RunDirectoryError(
            f"another lens is writing to {run} (rank {rank}): close() it first, or give this one a directory of its own"
        )

    def release(self) -> None:
        """Let others have it. May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def held(run: Path, rank: int) -> bool:
    """Whether somebody is writing, or may be: where the file system has no locks, it cannot be known."""
    try:
        fd = os.open(_path(run, rank), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def _path(run: Path, rank: int) -> Path:
    return run / "segments" / f".rank{rank}.lock"


def _let_go() -> None:
    for each in list(_held):
        each.release()  # closes a copy of the descriptor: the parent's keeps the lock


os.register_at_fork(after_in_child=_let_go)
