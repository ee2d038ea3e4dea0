"""Which runs lie under the log directory, and whether a name may be served.

A run is served if its directory, and every file of it, lies under the log directory after all symbolic links are followed.
Names are relative paths as the search found them: a name that was not found is not served, so `..` and absolute paths lead
nowhere. The search is bounded in depth, entries and time.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from pathlib import Path

from gradlens.errors import GradlensError, RunDirectoryError, nearest
from gradlens.store import partials, tables

MAX_DEPTH, MAX_ENTRIES, MAX_RUNS = 8, 50_000, 2000
SECONDS = 2.0  #: that a search may take
FRESH = 2.0  #: seconds for which a search stands

FOLDERS = ("segments", "findings", partials.FOLDER, *tables.TABLES)


class UnknownRunError(GradlensError, LookupError):
    """A name that is no run under the log directory."""


class Catalog:
    """The runs under a log directory."""

    def __init__(self, logdir: str | os.PathLike[str]) -> None:
        self.logdir = Path(logdir).expanduser()
        self._root = Path(os.path.realpath(self.logdir))
        self._guard = threading.Lock()
        self._names: list[str] = []
        self._searched = -FRESH
        self.complete = True  #: whether the last search saw everything

    def names(self) -> list[str]:
        """Relative paths of all runs, sorted; `.` is the log directory itself."""
        with self._guard:
            if time.monotonic() - self._searched >= FRESH:
                self._names = self._search()
                self._searched = time.monotonic()
            return self._names

    def path(self, name: str) -> Path:
        """The directory of a run.

        Raises:
            UnknownRunError: There is no such run here.
            RunDirectoryError: A link in it leads out of the log directory.
        """
        names = self.names()
        if name not in names:
            raise UnknownRunError(f"there is no run {name!r:.200} under {self.logdir}{nearest(name[:200], names[:200])}")
        path = self._root if name == "." else self._root / name
        if not self._inside(path):
            raise UnknownRunError(f"the run {name!r:.200} has gone")
        return path

    def version(self, path: Path) -> str:
        """Another text whenever a file of the run was changed, added or removed.

        Raises:
            RunDirectoryError: A link in it leads out of the log directory.
        """
        digest = hashlib.blake2b(digest_size=12)
        for folder in (path, *(path / name for name in FOLDERS)):
            if folder != path and folder.is_symlink():
                self._check(folder)
            for entry in _entries(folder):
                if entry.is_symlink():
                    self._check(Path(entry.path))
                try:
                    found = entry.stat()
                except OSError:
                    continue  # a writer has merged it meanwhile, or it is a link to nothing
                if stat.S_ISREG(found.st_mode) and _of_the_run(entry.name):
                    digest.update(f"{entry.name}\0{found.st_ino}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _check(self, link: Path) -> None:
        if not self._inside(link):
            raise RunDirectoryError(
                f"{link.name} in the run {link.parent.name!r} is a link out of the log directory; start "
                "TensorBoard on a directory that holds what the link leads to"
            )

    def _inside(self, path: Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self._root)

    def _search(self) -> list[str]:
        end, left = time.monotonic() + SECONDS, MAX_ENTRIES
        found: list[str] = []
        waiting = [(self._root, 0)]
        seen: set[str] = set()
        self.complete = True
        while waiting:
            folder, depth = waiting.pop()
            entries = _entries(folder)
            left -= len(entries)
            if left < 0 or len(found) >= MAX_RUNS or time.monotonic() > end:
                self.complete = False
                break
            if any(entry.name == "run.json" and entry.is_file() for entry in entries):
                found.append(os.path.relpath(folder, self._root))
            below = [] if depth >= MAX_DEPTH else [entry for entry in entries if _is_folder(entry)]
            for entry in below:
                real = os.path.realpath(entry.path)
                if entry.name in FOLDERS or real in seen or not self._inside(Path(real)):
                    continue
                seen.add(real)
                waiting.append((Path(entry.path), depth + 1))
        return sorted(name for name in found if _can_be_told(name))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir() and not entry.name.startswith(".")
    except OSError:
        return False


def _of_the_run(name: str) -> bool:
    return name.endswith((".json", ".jsonl", ".parquet", ".tail", ".partials"))


def _can_be_told(name: str) -> bool:
    """Whether a name can be written into a request: bytes that are no text cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
