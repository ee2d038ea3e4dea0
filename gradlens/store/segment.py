"""What is known of a segment as a whole: its settings, and what the numbers in its rows refer to. A small JSON file.

Files of others are not trusted: their size is bounded, and each value is checked.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gradlens import fields
from gradlens.errors import CorruptRunError, RunDirectoryError
from gradlens.records import PARTIAL, Finding, Severity
from gradlens.store.tables import FORMAT, SCHEMA, STAGES, STATUSES, Key, files

MAX_BYTES = 32 << 20  #: 10,000 parameters take 1 MB
MAX_SCALARS = 1000  #: names of observed scalars that a segment keeps apart
MAX_MODULES = 100_000  #: outputs of modules

#: name, shape, dtype, piece of a parameter
Entry = tuple[str, tuple[int, ...], str, str]

_BLOCK = r"(\d{1,18}:\d{1,18}|~\d{1,18})"
_PIECE = re.compile(rf"@\d{{1,18}}:\d{{1,18}}|{_BLOCK}(,{_BLOCK})*")


@dataclass
class Segment:
    """What one lens wrote on one rank."""

    key: Key
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    started: float
    first_step: int | None = None  #: of what was recorded; None: nothing yet
    parameters: list[Entry] = field(default_factory=list)
    scalars: list[str] = field(default_factory=list)
    modules: list[tuple[str, str]] = field(default_factory=list)  #: outputs: name, and the module's class

    @property
    def ranks(self) -> int | None:
        """How many ranks there were, where that is known."""
        ranks = self.settings.get("ranks")
        return ranks if type(ranks) is int and ranks > 0 else None

    def names(self, table: str) -> list[str]:
        """What the entries of a table's rows are called."""
        if table == "scalars":
            return self.scalars
        return [name for name, *_ in (self.modules if table == "activations" else self.parameters)]

    def check(self, path: Path, table: str, rows: Mapping[str, np.ndarray]) -> None:
        """What rows refer to has to be there.

        Raises:
            CorruptRunError: It is not.
        """
        limits = {
            "entry": len(self.names(table)),
            "stage": len(STAGES),
            "status": len(STATUSES),
            "bucket": 2 * fields.BUCKETS,
        }
        for name in limits.keys() & rows.keys():
            low, high = (rows[name].min(), rows[name].max()) if len(rows[name]) else (0, -1)
            if low < 0 or high >= limits[name]:
                worst = int(low if low < 0 else high)
                raise CorruptRunError(f"{path} has the {name} {worst} of {limits[name]}. Move it away to read the rest")

    def write(self, folder: Path) -> None:
        """Replace the segment's file."""
        content = {"schema": SCHEMA, "segment": self.key.segment, "rank": self.key.rank}
        content |= {name: getattr(self, name) for name in _CONTENT}
        content = json.loads(_text_of(content))  # as a reader will have it
        replace(folder / f"{self.key}.json", {**content, "checksum": _checksum(content)})


_CONTENT = ("settings", "versions", "started", "first_step", "parameters", "scalars", "modules")
_FILE = re.compile(r"(\d{4,9})-rank(\d{1,9})\.json")


def _checksum(content: Mapping[str, Any]) -> int:
    """Of what a reader makes of it. A file that was edited by hand may do without."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _text_of(content: Any) -> str:
    return json.dumps(content, default=str)


def replace(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(_text_of(content))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def mark(run: Path, content: Mapping[str, Any]) -> None:
    """Write `run.json`, which says that the directory is a run."""
    replace(run / "run.json", {"format": FORMAT, "schema": SCHEMA, **content})


def marked(run: Path) -> dict[str, Any]:
    """`run.json`.

    Raises:
        RunDirectoryError: There is none, or a newer gradlens has written it.
        CorruptRunError: It does not read.
    """
    path = run / "run.json"
    if not path.is_file():
        what = "is not there" if not run.exists() else "is no directory" if not run.is_dir() else "has no run.json"
        raise RunDirectoryError(f"{run} is not a run of gradlens: it {what}. A run is what watch(run=...) was given")
    content = load(path)
    if content.get("format") != FORMAT or not isinstance(content.get("schema"), int):
        raise CorruptRunError(f"{path} is not that of a run of gradlens")
    if content["schema"] > SCHEMA:
        raise RunDirectoryError(
            f"{run} was written by a newer gradlens (schema {content['schema']}); update gradlens to read it"
        )
    return content


def load(path: Path) -> dict[str, Any]:
    """A JSON object from a file that nobody vouches for."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES >> 20} MB")
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except FileNotFoundError:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        raise CorruptRunError(f"{path} does not read: {error}") from None
    return content


def segments(run: Path) -> list[Segment]:
    """All segments, oldest first.

    Raises:
        RunDirectoryError: The run was removed.
        CorruptRunError: One does not read.
    """
    if not (run / "segments").is_dir():
        raise RunDirectoryError(f"{run} has no segments/: the run was removed, or is not one")
    found = []
    for path in files(run / "segments"):
        match = _FILE.fullmatch(path.name)
        if match:
            is_now = path.stat()
            version = (is_now.st_ino, is_now.st_mtime_ns, is_now.st_size)
            found.append(_segment(path, Key(int(match[1]), int(match[2])), version))
    return sorted(found, key=lambda segment: segment.key)


@functools.lru_cache(maxsize=64)
def _segment(path: Path, key: Key, version: tuple[int, int, int]) -> Segment:
    """A file is replaced and never changed; of 10,000 parameters it takes 50 ms to check."""
    content = load(path)
    try:
        if "checksum" in content and content.pop("checksum") != _checksum(content):
            raise ValueError("its checksum is another; without one it would be believed")
        parameters = [checked_entry(*entry) for entry in content["parameters"]]
        first = content["first_step"]
        settings, versions = content["settings"], content["versions"]
        modules = [(_text(name), _text(kind)) for name, kind in content.get("modules", [])]
        scalars = [_text(name) for name in content["scalars"]]
        if not (isinstance(settings, dict) and isinstance(versions, dict) and (first is None or type(first) is int)):
            raise ValueError("settings, versions or first_step are not what they should be")
        return Segment(key, settings, versions, float(content["started"]), first, parameters, scalars, modules)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise CorruptRunError(f"{path} does not describe a segment: {type(error).__name__}: {error}") from None


def checked_entry(name: object, shape: object, dtype: object, piece: object) -> Entry:
    """A parameter as a file describes it.

    Raises:
        ValueError: There is no such shape, or no such piece of it.
    """
    if not isinstance(shape, list) or len(shape) > 31 or not all(type(n) is int and 0 <= n < 1 << 62 for n in shape):
        raise ValueError(f"{shape!r:.80} is no shape")
    if math.prod(max(n, 1) for n in shape) >= 1 << 62:
        raise ValueError(f"no tensor has the shape {shape!r:.80}")
    if piece not in ("", PARTIAL) and not (isinstance(piece, str) and _PIECE.fullmatch(piece) and _within(piece, shape)):
        raise ValueError(f"{piece!r:.80} is no piece of {shape!r:.80}")
    return _text(name), tuple(shape), _text(dtype), _text(piece)


def _within(piece: str, shape: Sequence[int]) -> bool:
    if piece.startswith("@"):
        return _fits(piece[1:], math.prod(shape))
    blocks = piece.split(",")
    return len(blocks) == len(shape) and all(map(_fits, blocks, shape))


def _fits(block: str, n: int) -> bool:
    if block.startswith("~"):
        return int(block[1:]) <= n
    start, stop = map(int, block.split(":"))
    return start <= stop <= n


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.80} is no text")
    return value


# --- findings -------------------------------------------------------------------------------------------------------

_FINDING = ("rule", "step", "severity", "seen", "parameter", "causes", "remedy", "stage", "value", "parameters")


def finding_line(finding: Finding) -> str:
    """A finding as one line of JSON. What is not finite is null: not every reader knows NaN."""
    content = {name: getattr(finding, name) for name in _FINDING}
    if content["value"] is not None and not math.isfinite(content["value"]):
        content["value"] = None
    return json.dumps(content, default=str) + "\n"


def findings(path: Path) -> tuple[list[Finding], int]:
    """The findings of a file, and how many bytes of a torn line follow them."""
    if not path.is_file():
        return [], 0
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES)
    whole, _, torn = data.rpartition(b"\n")
    return [_finding(path, line) for line in whole.splitlines()], len(torn)


def _finding(path: Path, line: bytes) -> Finding:
    try:
        content = json.loads(line)
        value, step = content["value"], content["step"]
        if type(step) is not int or not (value is None or isinstance(value, int | float)):
            raise ValueError("step or value is no number")
        optional: dict[str, Any] = {
            name: None if content[name] is None else _text(content[name]) for name in ("parameter", "stage")
        }
        several: dict[str, Any] = {name: tuple(map(_text, content[name])) for name in ("causes", "parameters")}
        texts: dict[str, Any] = {name: _text(content[name]) for name in ("rule", "seen", "remedy")}
        return Finding(step=step, severity=Severity(content["severity"]), value=value, **texts, **several, **optional)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptRunError(f"{path} has a line that is no finding: {error}") from None
