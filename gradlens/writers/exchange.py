"""The tables of all ranks in one dashboard, while they train.

    rank 1, 2, ...:  Sender   snapshot -> bytes -> the process group's key-value store
    rank 0:          Pooled   its own table, and what has come -> pooling.pool -> a writer, such as TensorBoard's

Both are writers, and run on background threads. Nobody waits for anybody: a sender sets keys, the first rank looks whether
they are there. A table whose fellows do not come within `PATIENCE` seconds is pooled without them, and a rank that did not
come is not waited for again until it does; `ranks` says from how many a table was pooled.

Little travels. A rank's rows that are copies of another's (the gradients that data parallelism has averaged) stay where they
are: the first rank says which rows it wants. When what comes is more than `RATE` bytes a second, it asks for every second
step, then every fourth. Each rank has `SLOTS` places in the store, which it writes over, and a share of `LIMIT` bytes: the
store does not grow. Numbers travel as they are in memory, between processes of one job; none of it is ever executed.

Of each rank's own gradients, before averaging, the squared norms travel too: beside the norm of the average they give the
noise scale, which goes with the tables as the scalar `noise_scale`.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from gradlens import fields, findings
from gradlens.errors import GradlensWarning
from gradlens.noise import NoiseScaleEstimator
from gradlens.pooling import pool
from gradlens.records import Finding, Parameters, Record, Snapshot, Stage, Status, Top
from gradlens.writers.base import Writer

PATIENCE = 5.0  #: seconds that a table waits for those of the other ranks
PARTING = 2.0  #: the same, when the run ends
SLOTS = 64  #: tables of a rank that the store holds
PART = 4 << 20  #: bytes of a value; the store's server takes 8 MiB
LIMIT = 256 << 20  #: bytes that the store may hold of all ranks
RATE = 16 << 20  #: bytes a second that the first rank takes
PENDING = 64  #: tables of its own that the first rank keeps for others to come
NOTICE = 8  #: steps between asking for fewer steps and having fewer
LOST = 8  #: tables in a row that are left out because a rank's part of them was lost; then it is odd, and pooled without

#: What the noise scale wants of each rank's own gradients.
ALONE = ("numel", "sum", "abs_sum", "square_sum")

_STAGES, _STATUSES = list(Stage), list(Status)
Moment = tuple[int, int, int]


class Store(Protocol):
    """A key-value store, as torch.distributed has it."""

    def set(self, key: str, value: bytes) -> Any:
        """Write; waits for nothing."""

    def get(self, key: str) -> bytes:
        """Read; waits until the key is there, so it is asked for what is there only."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""


def _there(store: Store, key: str) -> bytes | None:
    return bytes(store.get(key)) if store.check([key]) else None


def _moment(snapshot: Snapshot) -> Moment:
    return snapshot.step, snapshot.backward, _STAGES.index(Stage(snapshot.stage))


# --- tables as bytes ------------------------------------------------------------------------------------------------


def _describe(parameters: Parameters) -> dict[str, Any]:
    return {name: list(getattr(parameters, name)) for name in ("names", "shapes", "dtypes", "pieces")}


def _parameters(content: Mapping[str, Any]) -> Parameters:
    shapes = tuple(tuple(map(int, shape)) for shape in content["shapes"])
    return Parameters(tuple(content["names"]), shapes, tuple(content["dtypes"]), tuple(content["pieces"]))


def pack(snapshot: Snapshot, rows: Sequence[int]) -> tuple[dict[str, Any], bytes]:
    """A head that JSON can say, and the numbers of the given rows."""
    table = snapshot.take(rows)
    arrays = {"status": _codes(table.status), "scale": np.asarray(table.scale, np.float64)}
    arrays |= {field.name: np.asarray(table.columns[field.name], field.dtype) for field in fields.SCALARS}
    if table.histogram is not None:
        at = np.flatnonzero(table.histogram)
        arrays |= {"histogram_at": at.astype(np.int64), "histogram": table.histogram.reshape(-1)[at].astype(np.int64)}
    if table.top is not None:
        arrays |= {
            "top_index": table.top.index.astype(np.int64),
            "top_partial": table.top.partial.astype(np.float64),
            "top_value": table.top.value.astype(np.float64),
        }
    if snapshot.stage == Stage.BACKWARD and len(rows) < len(snapshot):
        arrays["alone_status"] = _codes(snapshot.status)
        arrays |= {f"alone_{name}": np.asarray(snapshot.columns[name], np.float64) for name in ALONE}
    head = {
        "step": snapshot.step,
        "backward": snapshot.backward,
        "stage": str(snapshot.stage),
        "time": snapshot.time,
        "rank": snapshot.rank,
        "scalars": {name: float(value) for name, value in snapshot.scalars.items()},
        "rows": None if len(rows) == len(snapshot) else [int(row) for row in rows],
        "arrays": [[name, str(array.dtype), list(array.shape)] for name, array in arrays.items()],
    }
    return head, b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())


def unpack(head: Mapping[str, Any], body: bytes, parameters: Parameters) -> tuple[Snapshot, Snapshot]:
    """The rows that `pack` was given; and all rows as far as the noise scale wants them."""
    arrays, start = dict[str, np.ndarray](), 0
    for name, dtype, shape in head["arrays"]:
        arrays[name] = np.frombuffer(body, np.dtype(dtype), math.prod(shape), start).reshape(shape)
        start += arrays[name].nbytes
    kept = parameters if head["rows"] is None else parameters.take(head["rows"])
    columns = {field.name: arrays[field.name] for field in fields.SCALARS}
    histogram = None
    if "histogram" in arrays:
        histogram = np.zeros((len(kept), 2 * fields.BUCKETS), np.int64)
        histogram.reshape(-1)[arrays["histogram_at"]] = arrays["histogram"]
        columns.update(fields.quantiles(histogram, columns))
    rows = Snapshot(
        **{name: head[name] for name in ("step", "backward", "stage", "time", "scalars", "rank")},
        parameters=kept,
        status=_words(arrays["status"]),
        scale=arrays["scale"],
        columns=columns,
        histogram=histogram,
        top=Top(*(arrays[f"top_{name}"] for name in Top.__annotations__)) if "top_index" in arrays else None,
    )
    if "alone_status" not in arrays:
        return rows, rows
    alone = {name: arrays[f"alone_{name}"] for name in ALONE}
    return rows, replace(
        rows,
        parameters=parameters,
        status=_words(arrays["alone_status"]),
        scale=np.ones(len(parameters)),
        columns=alone,
        histogram=None,
        top=None,
    )


def _codes(words: np.ndarray) -> np.ndarray:
    return np.array([_STATUSES.index(Status(word)) for word in words], np.int8)


def _words(codes: np.ndarray) -> np.ndarray:
    return np.array([_STATUSES[code].value for code in codes], object)


# --- one rank's place in the store ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pace:
    """Which steps are pooled: each `stride`-th, from step `since` on; before that each `before`-th."""

    stride: int = 1
    since: int = 0
    before: int = 1

    def takes(self, step: int) -> bool:
        return step % (self.stride if step >= self.since else self.before) == 0


def _put(store: Store, rank: int, number: int, head: Mapping[str, Any], body: bytes) -> list[str]:
    """Message `number` of a rank; it counts once its head is there, which is written last. Returns the keys."""
    place, mark = f"{rank}/table/{number % SLOTS}", number.to_bytes(8, "little")
    keys = [f"{place}/{part}" for part in range(math.ceil(len(body) / PART))]
    for part, key in enumerate(keys):
        store.set(key, mark + body[part * PART : (part + 1) * PART])
    store.set(place, json.dumps({**head, "number": number, "size": len(body)}).encode())
    return [*keys, place]


def _head(store: Store, rank: int, number: int) -> dict[str, Any] | None:
    """The head that is where message `number` of a rank goes: that of an earlier or later one, perhaps."""
    head = _there(store, f"{rank}/table/{number % SLOTS}")
    return None if head is None else json.loads(head)


def _body(store: Store, rank: int, head: Mapping[str, Any]) -> bytes | None:
    """What belongs to this head; None where it was written over."""
    place, mark, parts = f"{rank}/table/{head['number'] % SLOTS}", head["number"].to_bytes(8, "little"), []
    for part in range(math.ceil(head["size"] / PART)):
        value = _there(store, f"{place}/{part}")
        if value is None or value[:8] != mark:
            return None
        parts.append(value[8:])
    return b"".join(parts)


class Sender:
    """A writer that puts this rank's tables where the first rank finds them; it connects when it first writes."""

    def __init__(self, connect: Callable[[], Store], rank: int, ranks: int) -> None:
        self._connect, self._rank = connect, rank
        self._limit = LIMIT // max(ranks - 1, 1)
        self._sent: deque[tuple[int, list[str]]] = deque()  # sizes and keys of what the store has
        self._number = self._layouts = 0
        self._known: deque[tuple[Parameters, int]] = deque(maxlen=8)
        self._said, self._pace, self._left = b"", _Pace(), dict[int, set[int]]()
        self._off = False

    def write(self, record: Record) -> None:
        """Send a snapshot, as far as it is wanted. The first failure is named, and ends it."""
        if self._off or not isinstance(record, Snapshot):
            return
        try:
            self._send(record)
        except Exception as error:  # noqa: BLE001 - the first rank may be gone; this one's own records go on
            self._off = True
            text = f"rank {self._rank} is no longer in the first rank's dashboard: {type(error).__name__}: {error}"
            warnings.warn(GradlensWarning(f"{text:.300}. Its own records go on"), stacklevel=2)

    @cached_property
    def _store(self) -> Store:
        return self._connect()

    def _send(self, snapshot: Snapshot) -> None:
        layout = self._layout(snapshot.parameters)
        self._ask()
        if not self._pace.takes(snapshot.step):
            return
        left = self._left.get(layout, set())
        head, body = pack(snapshot, [row for row in range(len(snapshot)) if row not in left])
        self._make_room(len(body))
        keys = _put(self._store, self._rank, self._number, {**head, "layout": layout}, body)
        self._sent.append((len(body), keys))
        self._number += 1

    def _ask(self) -> None:
        """What the first rank wants of this one."""
        said = _there(self._store, f"wants/{self._rank}") or b""
        if said and said != self._said:
            self._said, wants = said, json.loads(said)
            self._pace = _Pace(**wants["pace"])
            self._left = {int(number): set(rows) for number, rows in wants["left"].items()}

    def _make_room(self, size: int) -> None:
        """Older messages make way for one of this size."""
        if size > self._limit:
            raise ValueError(
                f"a table of {size >> 20} MiB, where the store has room for {self._limit >> 20} MiB of each rank"
            )
        while self._sent and (len(self._sent) >= SLOTS or sum(sent for sent, _ in self._sent) + size > self._limit):
            oldest = self._number - len(self._sent)
            *parts, place = self._sent.popleft()[1]
            self._store.set(place, json.dumps({"number": oldest, "gone": True}).encode())
            for part in parts:
                self._store.set(part, b"")

    def _layout(self, parameters: Parameters) -> int:
        for known, number in self._known:
            if known is parameters or known == parameters:
                return number
        number = self._layouts
        self._layouts += 1
        content = json.dumps({"layout": number, **_describe(parameters)}).encode()
        self._store.set(f"{self._rank}/layout/{number % SLOTS}", content)
        self._known.append((parameters, number))
        return number

    def flush(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        """Nothing is sent any more."""
        self._off = True


class _Peer:
    """What has come of another rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.late = False
        self.last: Moment = (-1, 0, 0)
        self.layouts: dict[int, Parameters] = {}
        self.tables: dict[Moment, tuple[Snapshot, Snapshot]] = {}
        self._next = 0

    def collect(self, store: Store) -> int:
        """Take what is there; how many bytes that was."""
        size = 0
        while (head := _head(store, self.rank, self._next)) is not None and head["number"] >= self._next:
            if head["number"] > self._next:  # it was written over; what is there begins behind it
                self._next = head["number"] - SLOTS + 1
                continue
            self._next += 1
            body = None if "gone" in head else _body(store, self.rank, head)
            parameters = None if body is None else self._layout(store, head["layout"])
            if body is not None and parameters is not None:
                size += len(body)
                tables = unpack(head, body, parameters)
                self.last = max(self.last, _moment(tables[0]))
                self.tables[_moment(tables[0])] = tables
        while len(self.tables) > PENDING:
            del self.tables[min(self.tables)]
        return size

    def forget(self, moment: Moment) -> None:
        """What came too late."""
        for old in [key for key in self.tables if key <= moment]:
            del self.tables[old]

    def _layout(self, store: Store, number: int) -> Parameters | None:
        if number not in self.layouts:
            content = json.loads(_there(store, f"{self.rank}/layout/{number % SLOTS}") or b"{}")
            if content.get("layout") != number:
                return None  # written over since
            self.layouts[number] = _parameters(content)
            for old in sorted(self.layouts)[:-8]:
                del self.layouts[old]
        return self.layouts[number]


class Pooled:
    """A writer that hands the tables of all ranks, each moment's as one, to another writer."""

    def __init__(self, writer: Writer, connect: Callable[[], Store], ranks: int, *, patience: float | None = None) -> None:
        self._writer, self._connect = writer, connect
        self._patience = PATIENCE if patience is None else patience
        self._peers = [_Peer(rank) for rank in range(1, ranks)]
        self._own: deque[tuple[float, Snapshot]] = deque()
        self._pace = _Pace()
        self._bytes, self._measured = 0, time.monotonic()
        self._said: dict[int, bytes] = {}
        self._lost = 0
        self._noise = NoiseScaleEstimator(ranks=ranks)
        self._alone = False

    def write(self, record: Record) -> None:
        """Take a record of this rank, and what has come of the others."""
        if isinstance(record, Snapshot):
            self._own.append((time.monotonic(), record))
            self._go_on(self._patience)
        else:
            self._writer.write(record)

    def flush(self) -> None:
        """Hand on what is complete."""
        self._go_on(self._patience)
        self._writer.flush()

    def close(self) -> None:
        """Hand on everything; what is on its way is waited for a little."""
        end = time.monotonic() + PARTING
        self._go_on(self._patience)
        while self._own and time.monotonic() < end:
            time.sleep(0.02)
            self._go_on(self._patience)
        self._go_on(0.0)
        self._writer.close()

    def _go_on(self, patience: float) -> None:
        if not self._alone:
            try:
                self._collect()
            except Exception as error:  # noqa: BLE001 - the store broke; this rank's own records go on
                self._alone = True
                text = f"the dashboard shows the first rank alone: {type(error).__name__}: {error}"
                warnings.warn(GradlensWarning(f"{text:.300}"), stacklevel=2)
        for record in self._ready(patience):
            self._writer.write(record)

    # --- what has come ------------------------------------------------------------------------------------------------

    @cached_property
    def _store(self) -> Store:
        return self._connect()

    def _collect(self) -> None:
        for peer in self._peers:
            self._bytes += peer.collect(self._store)
            peer.late = peer.late and not (self._own and peer.last >= _moment(self._own[0][1]))
        self._set_pace()
        self._say_wants()

    def _set_pace(self) -> None:
        """Ask for fewer steps when too much comes, and for more when there is room."""
        now = time.monotonic()
        newest = self._own[-1][1].step if self._own else -1
        if now - self._measured < 1.0 or newest < self._pace.since:
            return
        rate, stride = self._bytes / (now - self._measured), self._pace.stride
        self._bytes, self._measured = 0, now
        if rate > RATE:
            self._pace = _Pace(stride * 2, newest + NOTICE, stride)
        elif stride > 1 and rate < RATE / 8:
            self._pace = _Pace(stride // 2, newest + NOTICE, stride)

    def _say_wants(self) -> None:
        """Tell each rank which rows to leave out: those that a rank before it has, too."""
        held = set(_rows(self._own[-1][1].parameters)) if self._own else None
        for peer in self._peers if held is not None else ():
            left = {
                number: [row for row, key in enumerate(_rows(parameters)) if key in held]  # type: ignore[operator]
                for number, parameters in peer.layouts.items()
            }
            if not peer.late:
                held.update(*map(_rows, peer.layouts.values()))  # type: ignore[union-attr]
            wants = json.dumps({"pace": vars(self._pace), "left": left}).encode()
            if self._said.get(peer.rank) != wants:
                self._said[peer.rank] = wants
                self._store.set(f"wants/{peer.rank}", wants)

    # --- what is complete ---------------------------------------------------------------------------------------------

    def _ready(self, patience: float) -> Iterator[Record]:
        while self._own:
            since, own = self._own[0]
            moment = _moment(own)
            if self._pace.takes(own.step):
                waiting = [peer for peer in self._peers if not peer.late and peer.last < moment]
                if waiting and not (self._alone or len(self._own) > PENDING or time.monotonic() - since >= patience):
                    return
                yield from self._give_up(own, waiting, patience)
                if self._whole(own, moment):
                    yield self._pooled(own, moment)
            self._own.popleft()
            for peer in self._peers:
                peer.forget(moment)

    def _give_up(self, own: Snapshot, waiting: Sequence[_Peer], patience: float) -> Iterator[Finding]:
        """These ranks are not waited for until they come again."""
        if waiting and patience:
            if not self._alone:
                yield findings.ranks_missing(own.step, [peer.rank for peer in waiting], patience)
            for peer in waiting:
                peer.late = True

    def _whole(self, own: Snapshot, moment: Moment) -> bool:
        """Whether no rank's part was lost on the way: it would be missed in sums. A rank that goes on so is odd."""
        if self._alone:
            return not any(own.parameters.pieces)
        lost = any(not peer.late and moment not in peer.tables for peer in self._peers)
        self._lost = self._lost + 1 if lost else 0
        return not lost or self._lost > LOST

    def _pooled(self, own: Snapshot, moment: Moment) -> Snapshot:
        there = [peer.tables[moment] for peer in self._peers if moment in peer.tables]
        pooled = pool([own, *(table for table, _ in there)])
        if any(own.parameters.pieces):
            return pooled
        for snapshot in [own, *(alone for _, alone in there)] if own.stage == Stage.BACKWARD else [pooled]:
            self._noise.take(snapshot)
        row = self._noise.end() if own.stage == Stage.USED else None
        return pooled if row is None else replace(pooled, scalars={**pooled.scalars, "noise_scale": row.noise_scale})


def _rows(parameters: Parameters) -> list[tuple[str, str]]:
    return [(name, parameters.piece(row)) for row, name in enumerate(parameters.names)]
