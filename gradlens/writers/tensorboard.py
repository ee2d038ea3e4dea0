"""TensorBoard's own dashboards, for someone who has ten seconds: which layers are ill, and which want to move where.

    a step's snapshots  ->  one event: about 12 numbers of the model, 2 of each of a few weights
    now and then        ->  the same event holds two pictures (layer by step), and histograms
    a new finding       ->  a page of text, rewritten

A step is written when the next begins: several snapshots make one (a backward's and the used gradient's, or the parts that
two optimizers own). Size and direction are those of the loss's own gradient, before clipping; updates those of the used one.

What a run costs is bounded, whatever its length: a screen shows a thousand points. Numbers are written at each of the
first 200 observed steps, then at steps that lie a thousandth of the run apart, and a two-hundredth of its time or `LONGEST`
seconds, and at each with a finding: some 8,000 points of a million steps. Pictures are drawn again when the run has grown by
a tenth, but not within `interval` seconds; histograms when it has grown by a quarter. Nothing here grows with the run but
the file; the largest part is the pictures' table, 1.5 MB. A step of which nothing is written costs its share of that table,
taken for many steps at once, as are the numbers (`gradlens.writers.numbers`).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event

from gradlens import fields
from gradlens.activations import Activations, extremes
from gradlens.analysis.history import History
from gradlens.analysis.rules.base import judged
from gradlens.blocks import Block, block_of
from gradlens.errors import ArgumentError, RunDirectoryError
from gradlens.moments import Moment, Moments, as_moments
from gradlens.noise import NoiseScaleEstimator
from gradlens.records import Finding, Severity, Snapshot, Stage
from gradlens.schedules import next_grown
from gradlens.writers import events, heatmap, markdown, numbers, tags
from gradlens.writers.events import EventFile
from gradlens.writers.grid import Grid, joined

CHOSEN = 8
OBSERVED = 20  #: scalars that a user observes and that are shown
FOUND = 1000  #: findings that are kept for the page
EACH = 200  #: observed steps, whose numbers are written each
SHARE = 1 / 200  #: of the run's time that lies between two steps with numbers after these;
SHORTEST, LONGEST = 0.02, 1.0  #: seconds, at least and at most
DETAIL = 10  #: histograms tell apart what is within 2**DETAIL of the largest partial


@dataclass
class GeometricSchedule:
    """Due when the count has grown by a factor since it was last due: every time at first, ever more seldom later."""

    factor: float
    _next: int = 1

    def due(self, count: int) -> bool:
        """Whether it is; if so, it counts as done."""
        if count < self._next:
            return False
        self._next = next_grown(count, self.factor)
        return True


#: Which stage shows a whole step's gradient, of one backward and of several.
_ONE = (Stage.REDUCED, Stage.ACCUMULATED, Stage.BACKWARD, Stage.USED)
_SEVERAL = (Stage.REDUCED, Stage.ACCUMULATED, Stage.USED, Stage.BACKWARD)
_NO_LOOKS = (False, False)


class _Step:
    """What has come of one step: the last snapshot of each stage, or the last of each part of it."""

    def __init__(self, step: int, *, due: bool, looks: tuple[bool, bool] | None = None) -> None:
        self.step, self.time = step, 0.0
        self.due = due  # whether its numbers are written
        self.looks = looks  # whether histograms and pictures are, once that is known
        self.over = False  # nothing is left to do of it
        self.written: set[str] = set()  # tags
        self._last: dict[tuple[str, tuple[str, ...]], tuple[Block, int]] = {}
        self._backwards = 0
        self._alone: list[tuple[Block, int]] = []  # moments that the noise scale has not got, while one backward came

    def take(self, block: Block, at: int, time_: float, backward: int, estimator: NoiseScaleEstimator) -> None:
        """The next moment. The noise scale wants those of steps with several backwards alone."""
        self._last[block.stage, block.names] = block, at
        self._backwards = max(self._backwards, backward + 1)
        self.time = time_
        self._alone.append((block, at))
        if self._backwards > 1:
            for other, place in self._alone:
                estimator.take(other.snapshot(place))
            self._alone = []
        del self._alone[:-8]

    def of(self, stage: Stage) -> Moment | None:
        """A stage, one row a parameter, parts behind each other."""
        there = [moment for (of, _), moment in self._last.items() if of == stage]
        if len(there) < 2:
            return there[0] if there else None
        history, names = History(), list[str]()
        for block, at in there:
            history.append(block.snapshot(at))
            names = joined(names, block.names)
        whole = history.at()
        return block_of(whole.take([whole.parameters.position[name] for name in names])), 0

    def _stage(self) -> Stage | None:
        """That of the whole step's gradient of the loss, before it was clipped, where it was read; else the nearest."""
        there = {stage for stage, _ in self._last}
        return next((stage for stage in (_ONE if self._backwards == 1 else _SEVERAL) if stage in there), None)

    def gradient(self) -> Moment | None:
        """The whole step's gradient."""
        stage = self._stage()
        return None if stage is None else self.of(stage)


def _steps(came: Moments, newest: int) -> Iterator[tuple[int, list[int], int]]:
    """The steps from the newest on: number, places of their moments, and the place of the one that shows the gradient.

    That is -1 where it takes a closer look: of several backwards, of parts, or of the last step, which may go on.
    """
    steps = came.step
    kept = np.flatnonzero(steps == np.maximum.accumulate(np.concatenate([[newest], steps]))[1:])
    if not len(kept):
        return
    starts = np.flatnonzero(np.diff(steps[kept], prepend=-2))
    ranks = {stage: rank for rank, stage in enumerate(_ONE)}
    rank = np.array([ranks.get(Stage(block.stage), len(_ONE)) for block in came.blocks])[came.number[kept]]
    sizes = np.diff(starts, append=len(kept))
    first = rank == np.repeat(np.minimum.reduceat(rank, starts), sizes)
    plain = (np.add.reduceat(first.astype(int), starts) == 1) & (np.maximum.reduceat(came.backward[kept], starts) == 0)
    shown = np.where(plain, np.maximum.reduceat(np.where(first, kept, -1), starts), -1)
    shown[-1] = -1
    places, stops = kept.tolist(), (starts + sizes).tolist()
    for step, start, stop, at in zip(steps[kept][starts].tolist(), starts.tolist(), stops, shown.tolist(), strict=True):
        yield step, places[start:stop], at


@dataclass
class _Waiting:
    """An event, and the moments that its numbers are of."""

    event: Event
    written: set[str]
    gradient: Moment | None
    used: Moment | None
    noise_scale: float

    def blocks(self) -> tuple[int, int]:
        """Which blocks they are in."""
        return 0 if self.gradient is None else id(self.gradient[0]), 0 if self.used is None else id(self.used[0])


def _together(moments: Sequence[Moment | None]) -> Block | None:
    """Moments of one block."""
    there = [moment for moment in moments if moment is not None]
    return numbers.taken(there[0][0], [at for _, at in there]) if there else None


class TensorBoard:
    """A writer of one event file in a directory that TensorBoard is pointed at.

    Args:
        logdir: The run's directory, made if missing. TensorBoard reads the event files of a directory one after the other,
            so another writer (a `SummaryWriter`) should have its own.
        purge_step: For a run that is resumed at this step: what earlier files say of it and later steps is dropped.
        chosen: How many weights have numbers of their own. They are chosen at the first step, evenly along the model, its
            first and last included.
        interval: Seconds between two drawings of the pictures, at least. A drawing takes about 40 ms of a background thread.

    Raises:
        RunDirectoryError: The directory cannot be written.
    """

    def __init__(
        self, logdir: str | os.PathLike[str], *, purge_step: int | None = None, chosen: int = CHOSEN, interval: float = 10.0
    ) -> None:
        if chosen < 0:
            raise ArgumentError(f"chosen={chosen} must be 0 or more weights that have numbers of their own")
        try:
            self._file = EventFile(Path(logdir), purge_step)
        except OSError as error:
            raise RunDirectoryError(
                f"no event file can be written to {os.fspath(logdir)!r} ({error}); give a directory that can be written"
            ) from error
        self._how_many, self._interval = chosen, interval
        self._open = _Step(-1, due=False)
        self._count = 0  # steps that were observed, the open one included
        self._grid = Grid()
        self._noise = NoiseScaleEstimator()
        self._waiting: list[_Waiting] = []
        self._unplotted: list[Moment] = []  # of steps that are over, and not in the pictures' table
        self._made: dict[int, dict[str, float]] = {}  # by step, what stands out in what modules made
        self._found: dict[tuple[object, ...], Finding] = {}
        self._news = False  # findings that no page has shown
        self._chosen: dict[str, str] = {}  # names, and what they are in tags
        self._described: set[str] = set()  # tags whose meaning is in the file
        self._numbers, self._histograms, self._pictures = (GeometricSchedule(factor) for factor in (1.001, 1.25, 1.1))
        self._begun = math.inf
        self._numbered_at = -math.inf
        self._drawn_at = self._told_at = -math.inf

    @property
    def path(self) -> Path:
        """The event file."""
        return self._file.path

    def write(self, record: Snapshot | Finding) -> None:
        """Take a record. Snapshots of a step that was left behind are not shown."""
        if isinstance(record, Finding):
            self._remember(record)
        else:
            self.write_moments([(block_of(record), 0)])

    def write_moments(self, moments: Sequence[tuple[Block, int]]) -> None:
        """Take moments, each a block and a place in it."""
        came = as_moments(moments)
        times, backwards = came.time.tolist(), came.backward.tolist()
        for step, of, shown in _steps(came, self._open.step):
            if step > self._open.step:
                self._finish()
                self._count += 1
                due = self._due(times[of[0]])
                looks = self._looks(times[of[-1]]) if shown >= 0 else None
                if looks == _NO_LOOKS and not (due or self._tells(times[of[-1]])):  # nothing is written of it
                    self._unplotted.append(came[shown])
                    self._open.step, self._open.over = step, True
                    continue
                self._open = _Step(step, due=due, looks=looks)
            for at in of:
                self._open.take(*came[at], times[at], backwards[at], self._noise)
        self._plot()
        self._write(self._waiting)

    def write_activations(self, passes: Sequence[Activations]) -> None:
        """Take what modules made, before the moments of the same steps. Of a step the first pass counts."""
        self._made = {step: values for step, values in self._made.items() if step >= self._open.step}
        for each in passes:
            if each.step not in self._made:
                values = extremes(each)
                self._made[each.step] = {f"{tags.HEALTH}/activations_{name}": value for name, value in values.items()}

    def _due(self, now: float) -> bool:
        """Whether the numbers of the next step are written."""
        self._begun = min(self._begun, now)
        apart = min(max(SHARE * (now - self._begun), SHORTEST), LONGEST)
        rested = self._count <= EACH or not 0 <= now - self._numbered_at < apart
        if not (rested and self._numbers.due(self._count)):
            return False
        self._numbered_at = now
        return True

    def _plot(self) -> None:
        """Count the steps that are over into the pictures' table."""
        for _, run in groupby(self._unplotted, key=lambda moment: id(moment[0])):
            members = list(run)
            self._grid.add_moments(members[0][0], [at for _, at in members])
        self._unplotted = []

    def flush(self) -> None:
        """Write the open step's numbers, and the findings. What the step gets later is written later."""
        waiting = self._waiting_for(self._event())
        self._add_page(waiting.event, at_once=True)
        self._write([waiting])

    def close(self) -> None:
        """Write the last step, with pictures and histograms as they are now, and close the file. May be called again."""
        try:
            if not self._file.closed:
                self._finish(last=True)
                self._write(self._waiting)
        finally:
            self._file.close()

    def _remember(self, finding: Finding) -> None:
        key = (finding.rule, finding.parameter, finding.parameters)
        self._found.pop(key, None)
        self._found[key] = finding
        if len(self._found) > FOUND:
            del self._found[next(iter(self._found))]
        self._news = self._open.due = True

    # --- one event a step -------------------------------------------------------------------------------------------

    def _finish(self, last: bool = False) -> None:
        if self._open.over:
            return
        noise, place = self._noise.end(), self._open.gradient()
        if place is not None:
            self._unplotted.append(place)
        histograms, pictures = (True, True) if last else self._open.looks or self._looks(self._open.time)
        if not (self._open.due or self._tells(self._open.time) or histograms or pictures):
            return
        waiting, gradient = self._waiting_for(self._event(), math.nan if noise is None else noise.noise_scale), place
        if gradient is not None:
            self._add_help(waiting.event)
            if histograms or pictures:
                self._plot()
            if histograms:
                self._add_histograms(waiting.event, gradient[0].snapshot(gradient[1]))
            if pictures:
                self._drawn_at = self._open.time
                self._add_pictures(waiting.event)
            self._news |= last and self._told_at == -math.inf  # a healthy run says so at its end
        self._add_page(waiting.event, at_once=last)
        self._waiting.append(waiting)

    def _waiting_for(self, event: Event, noise_scale: float = math.nan) -> _Waiting:
        """The open step's event, and what its numbers are of, where they are to be written."""
        gradient = self._open.gradient() if self._open.due else None
        used = None if gradient is None else self._open.of(Stage.USED)
        return _Waiting(event, self._open.written, gradient, used, noise_scale)

    def _looks(self, now: float) -> tuple[bool, bool]:
        """Whether histograms and pictures of the open step are due; asked once a step."""
        return self._histograms.due(self._count), self._rested(self._drawn_at, now) and self._pictures.due(self._count)

    def _rested(self, since: float, now: float) -> bool:
        """Whether `interval` seconds have passed, or the clock was set back."""
        return not 0 <= now - since < self._interval

    def _tells(self, now: float) -> bool:
        """Whether the page of findings is written again."""
        return self._news and self._rested(self._told_at, now)

    def _event(self) -> Event:
        if self._open.step < 0:  # findings alone
            steps = [finding.step for finding in self._found.values()]
            return Event(step=max(steps, default=0), wall_time=time.time())
        return Event(step=self._open.step, wall_time=self._open.time)

    def _write(self, waiting: Sequence[_Waiting]) -> None:
        """The events in order, with their numbers."""
        self._waiting = []
        self._add_numbers(waiting)
        for each in waiting:
            if each.event.summary.value:
                self._file.write(each.event)

    def _about(self, tag: str) -> str:
        """What a tag means, the first time that it is written."""
        if tag in self._described:
            return ""
        self._described.add(tag)
        return tags.about(tag)

    def _add_help(self, event: Event) -> None:
        if tags.HELP not in self._described:
            self._described.add(tags.HELP)
            events.add_text(event, tags.HELP, tags.page())
            events.add_layout(event, tags.layout())

    # --- numbers ----------------------------------------------------------------------------------------------------

    def _add_numbers(self, waiting: Sequence[_Waiting]) -> None:
        """To the events that wait; those of one block are computed at once."""
        with_numbers = [each for each in waiting if each.gradient is not None]
        for _, run in groupby(with_numbers, key=_Waiting.blocks):
            members = list(run)
            gradient = _together([each.gradient for each in members])
            used = _together([each.used for each in members])
            assert gradient is not None
            if not self._chosen:
                self._chosen = numbers.choose(gradient, self._how_many)
            columns = numbers.of_model(gradient) | numbers.of_chosen(gradient, tags.RMS, "rms", self._chosen)
            if used is not None:
                columns |= numbers.of_update(used) | numbers.of_chosen(used, tags.RATIO, "update_ratio", self._chosen)
            for at, each in enumerate(members):
                observed = _observed(gradient.scalars[at], {} if used is None else used.scalars[at])
                made = self._made.pop(each.event.step, {})
                self._add_scalars(each, {tag: float(values[at]) for tag, values in columns.items()} | made | observed)

    def _add_scalars(self, to: _Waiting, values: dict[str, float]) -> None:
        if not math.isnan(to.noise_scale):
            values[f"{tags.HEALTH}/noise_scale"] = to.noise_scale
        for tag, value in values.items():
            if not math.isnan(value) and tag not in to.written:
                to.written.add(tag)
                events.add_scalar(to.event, tag, value, self._about(tag))

    # --- now and then -----------------------------------------------------------------------------------------------

    def _add_histograms(self, event: Event, gradient: Snapshot) -> None:
        if gradient.histogram is None:
            return
        own = judged(gradient)
        rows, n = self._grid.at(gradient.names)[own], len(self._grid.labels)
        counts = _summed(rows, fields.ascending(gradient.histogram, gradient.columns["zero"])[own], n)
        low, high = np.full((2, n), np.nan)
        np.fmin.at(low, rows, gradient.columns["min"][own])
        np.fmax.at(high, rows, gradient.columns["max"][own])
        for row in np.flatnonzero(counts.any(axis=1)).tolist():
            tag = f"{tags.PARTIALS}/{tags.numbered(row, self._grid.labels[row])}"
            events.add_histogram(event, tag, buckets(counts[row], low[row], high[row]), self._about(tag))

    def _add_pictures(self, event: Event) -> None:
        worst = sorted(self._found.values(), key=lambda finding: (finding.severity.rank, finding.step))
        marks = {
            parameter: finding.rule
            for finding in worst
            if finding.severity != Severity.INFO
            for parameter in finding.parameters or (str(finding.parameter),)
        }
        for name, chart in (("gradient_rms", heatmap.MAGNITUDE), ("increase_share", heatmap.DIRECTION)):
            tag = f"{tags.LAYERS}/{name}"
            events.add_image(event, tag, *heatmap.draw(chart, self._grid, marks), self._about(tag))

    def _add_page(self, event: Event, at_once: bool) -> None:
        if self._news and (at_once or self._tells(self._open.time)):
            self._news, self._told_at = False, self._open.time
            events.add_text(event, tags.FINDINGS, markdown.findings(self._found.values()))


def _observed(gradient: Mapping[str, float], used: Mapping[str, float]) -> dict[str, float]:
    """What a user observed at a step."""
    scalars = {**gradient, **used}
    # The noise scale is among them where several ranks have it together.
    result = {f"{tags.HEALTH}/{name}": float(scalars.pop(name, math.nan)) for name in ("loss", "noise_scale")}
    for name in list(scalars)[:OBSERVED]:
        result[f"{tags.OBSERVED}/{tags.escape(name)}"] = float(scalars[name])
    return result


# --- histograms -----------------------------------------------------------------------------------------------------

#: Of each bucket, in the order of `fields.ascending`, the left and the right edge.
_EDGES = np.stack(
    [
        np.concatenate([-fields.POWERS[1:][::-1], [0.0], fields.POWERS[:-1]]),
        np.concatenate([-fields.POWERS[:-1][::-1], [0.0], fields.POWERS[1:]]),
    ],
    axis=1,
)


def _summed(rows: np.ndarray, counts: np.ndarray, n: int) -> np.ndarray:
    """`[n, buckets]` the counts of each row, added up where several have the same one."""
    result = np.zeros((n, counts.shape[1]))
    if len(rows):
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        result[ordered[starts]] = np.add.reduceat(counts[order], starts, axis=0)
    return result


def buckets(counts: np.ndarray, low: float, high: float) -> np.ndarray:
    """Counts in the order of `fields.ascending` as `[k, 3]`: left edge, right edge, count, by rising value.

    What is smaller than the largest by a factor of `2**DETAIL` or more could not be told from 0 on a linear axis: it is one
    bucket, the zeros included. The outer edges are the extremes. Empty buckets at the ends are left out.
    """
    (there,) = counts.nonzero()
    first, last, middle = int(there[0]), int(there[-1]), fields.BUCKETS
    merged = max(last - middle, middle - first) - DETAIL  # octaves above the smallest
    left, right = middle - max(merged, 0), middle + max(merged, 0)
    if last < left or first > right:
        result = np.column_stack([_EDGES[first : last + 1], counts[first : last + 1]])
    else:
        first, last, small = min(first, left), max(last, right), _EDGES[right, 1]
        below = left - first
        result = np.empty((below + 1 + last - right, 3))
        result[:below, :2], result[:below, 2] = _EDGES[first:left], counts[first:left]
        result[below] = -small, small, counts[left : right + 1].sum()
        result[below + 1 :, :2], result[below + 1 :, 2] = _EDGES[right + 1 : last + 1], counts[right + 1 : last + 1]
    result[0, 0], result[-1, 1] = low, high
    return result
