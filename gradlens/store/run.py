"""The reader of a run directory, also of one that is being written.

    files -> rows that a question needs -> the newest of each (step, backward, stage, parameter) -> ranks merged -> columns

Nothing is kept between questions: each sees the run as it then is. Row groups that cannot hold what is asked for are not
read, nor columns that no answer needs; derived columns are computed here.

A segment that resumed at step s replaces what earlier ones say of s and later steps. Their rows stay in the files, and
`history(superseded=True)` shows them. Where ranks hold disjoint pieces of a parameter, their rows merge as `fields` says
(quantiles are empty then); of copies the lowest rank's row is taken.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gradlens import fields, markup, noise
from gradlens.activations import SUMS
from gradlens.analysis.diagnosis import Diagnosis, diagnose
from gradlens.analysis.trend import State, Trend, judged
from gradlens.errors import (
    ArgumentError,
    CorruptRunError,
    GradlensError,
    GradlensWarning,
    NothingCapturedError,
    choice,
    nearest,
)
from gradlens.noise import DECAY, NoiseScale
from gradlens.pooling import pool
from gradlens.progress import tracked
from gradlens.records import Finding, Snapshot
from gradlens.store import answers, partials, rows, segment
from gradlens.store.answers import Columns
from gradlens.store.filters import Filter, Names, Steps, listed
from gradlens.store.partials import Partials
from gradlens.store.ranks import merged
from gradlens.store.rows import Found
from gradlens.store.segment import Segment
from gradlens.store.tables import STAGES

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

ORDERS = ("sensitivity", "saliency", "value", "partial")
REPLAYED = 400_000  #: rows that are in memory together: some 300 MB. Fewer, and large files are read more often


class _Writer(Protocol):
    def write(self, record: Any) -> None: ...
    def flush(self) -> None: ...


def open_run(path: str | os.PathLike[str]) -> Run:
    """A run directory that `watch(run=...)` has written, or is writing. Imports no torch.

    Raises:
        RunDirectoryError: It is not there, or no run.
        CorruptRunError: Its files are damaged.
    """
    return Run(path)


class Run:
    """What was recorded. Questions are those of a lens, with filters that are applied while reading.

    `parameters` are names or glob patterns, `columns` names of `gradlens.fields.FRAME`, `steps` a number, several,
    a range, or a slice, which ends before its stop.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int | None = None) -> None:
        self.path, self._max_bytes = Path(path), max_bytes
        self.created = segment.marked(self.path).get("created")
        self.notes = rows.torn(self.path)  #: what a crash has left incomplete
        for note in self.notes:
            warnings.warn(GradlensWarning(note), stacklevel=3)

    def __repr__(self) -> str:
        return f"<gradlens.Run {self.path}>"

    def _repr_html_(self) -> str:
        losses = self.scalar("loss")[1].tolist()
        verdict = self.diagnosis().verdict
        return markup.run(str(self.path), self.steps(), self.names(), losses, self.findings(), verdict=verdict)

    # --- questions ----------------------------------------------------------------------------------------------------

    def history(
        self,
        *,
        columns: Iterable[str] | None = None,
        parameters: Names = None,
        steps: Steps = None,
        stage: str | None = None,
        rank: int | None = None,
        superseded: bool = False,
    ) -> pd.DataFrame:
        """Long: one row a (step, backward, stage, parameter), in the order in which they were recorded.

        `rank` gives one rank's own rows, unmerged. `superseded` adds the rows that a resumed run has replaced, and columns
        `segment` and `superseded` that tell them.
        """
        asked = Columns(columns)
        found = self._find("history", asked.stored, Filter(parameters, steps, stage, rank, superseded))
        if rank is None and not superseded:
            found = merged(found, asked.stored)
        result = asked.frame(found)
        if superseded:
            result["segment"], result["superseded"] = found.columns["segment"], found.columns["superseded"]
        return result

    def table(
        self,
        step: int | None = None,
        *,
        stage: str | None = None,
        columns: Iterable[str] | None = None,
        parameters: Names = None,
    ) -> pd.DataFrame:
        """One row a parameter, in model order: that step's last stage read, the latest step by default."""
        asked = Columns(fields.TABLE if columns is None else columns)
        wanted = self._last_step("history", stage) if step is None else step
        found = self._find("history", asked.stored, Filter(parameters, wanted, stage))
        if len(found):
            return asked.frame(answers.latest(merged(found, asked.stored)))
        if step is None and wanted != self._last_step("history", stage):  # a resumed run has just replaced it
            return self.table(stage=stage, columns=columns, parameters=parameters)
        raise self._nothing_on(wanted, stage, invented=step is None and parameters is None)

    def weights(
        self, name: str | None = None, *, top: int | None = None, by: str = "sensitivity", step: int | None = None
    ) -> pd.DataFrame:
        """One row a weight: the most sensitive of each parameter, at the last step (or `step`) of which they were kept.

        Columns as of `lens.weights()`. `attrs` say which step and stage it is.
        """
        if by not in ORDERS:
            raise choice("by", by, ORDERS)
        if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
            raise ArgumentError(f"top is a whole number of weights of at least 1, not {top!r}")
        wanted = self._last_step("weights") if step is None else step
        return answers.weights(self._find("weights", ["index", "partial", "value"], Filter(name, wanted)), top, by)

    def signs(self, parameters: Names = None, *, stage: str) -> dict[tuple[str, int], tuple[int, int]]:
        """By name and flat index: at how many of the steps that kept a weight its partial was above 0, and below."""
        return answers.signs(self._find("weights", ["index", "partial"], Filter(parameters, stage=stage)))

    def partials(self, name: str, step: int | None = None, *, stage: str | None = None) -> Partials:
        """All partials and weights of a parameter that `watch(keep=)` named, at the last step that was kept, or the last at
        or before `step`. `kept()` says which there are."""
        there = [
            place for place in self._partial_places() if place[2]["name"] == name and stage in (None, place[2]["stage"])
        ]
        if not there:
            known = sorted(self.kept())
            hint = nearest(name, known) if known else "; name parameters in watch(keep=[...])"
            raise NothingCapturedError(f"no whole partials of {name!r} were kept in {self.path}{hint}")
        steps = sorted({at for _, at, _ in there})
        chosen = max((at for at in steps if step is None or at <= step), default=steps[0])
        last = [place for place in there if place[1] == chosen]
        return partials.load([place for place in last if place[2]["stage"] == last[-1][2]["stage"]])

    def kept(self) -> dict[str, list[int]]:
        """The parameters whose whole partials were kept, and at which steps."""
        found: dict[str, list[int]] = {}
        for _, step, entry in self._partial_places():
            steps = found.setdefault(entry["name"], [])
            if not steps or steps[-1] != step:
                steps.append(step)
        return found

    def _partial_places(self) -> list[Any]:
        return partials.places(self.path, rows.replaced(self._segments()))

    def findings(self) -> list[Finding]:
        """What the rules found, in the order of steps; those that a resumed run has replaced are left out."""
        segments = segment.segments(self.path)
        until = rows.replaced(segments)
        found: list[Finding] = []
        for each in segments:
            listed, _ = segment.findings(self.path / "findings" / f"{each.key}.jsonl")
            stop = until[each.key]
            found += [finding for finding in listed if stop is None or finding.step < stop]
        return sorted(found, key=lambda finding: finding.step)

    def diagnosis(self) -> Diagnosis:
        """What is wrong with this training, as far as that can be said: the origin, and what follows from it."""
        return diagnose(self.findings(), _trend(*self.scalar("loss"), segment.segments(self.path)))

    def activations(
        self, *, modules: Names = None, steps: Steps = None, rank: int | None = None, superseded: bool = False
    ) -> pd.DataFrame:
        """What each module made of the batches: one row a (step, backward, module), where the feature was asked for.

        Columns of `gradlens.activations.COLUMNS`. `modules` are names or glob patterns. Ranks have batches of their own:
        their sums are added.
        """
        found = self._find("activations", ["calls", *SUMS], Filter(None, steps, None, rank, superseded))
        return answers.modules(found, listed(modules))

    def scalars(self, *, steps: Steps = None) -> pd.DataFrame:
        """Observed numbers: one row a step, one column a name (`loss`, ...)."""
        return answers.scalars(self._find("scalars", ["value"], Filter(steps=steps)))

    def scalar(self, name: str, *, steps: Steps = None) -> tuple[np.ndarray, np.ndarray]:
        """One observed number as arrays, `(steps, values)`; both empty where it was never observed. Needs no pandas."""
        return answers.scalar(self._find("scalars", ["value"], Filter(steps=steps)), name)

    def noise_scale(
        self,
        *,
        steps: Steps = None,
        decay: float = DECAY,
        sizes: Sequence[float] | None = None,
        weighted: bool = False,
    ) -> NoiseScale:
        """How noisy the gradient of one micro-batch is: the batch size above which larger ones bring little.

        From the micro-batches of each step, of all ranks (whose stages have to be `backward` and `reduced`); in examples
        where `batch_size` was observed. A step's weight falls by `decay` with each one after it.

        `sizes`: the examples of each of a step's micro-batches, `[30, 2]`, where they are unequal and `observe` was not
        told; `weighted`: their losses counted by size, and not alike. Backwards that are not alike have no scale.
        """
        asked, nothing = Filter(steps=steps), Filter(steps=())
        found = answers.snapshots(
            self._find("history", [*noise.COLUMNS, "time"], asked),
            self._find("scalars", ["value"], asked),
            self._find("histograms", [], nothing),
            self._find("weights", [], nothing),
        )
        found.sort(key=lambda snapshot: snapshot.step)
        ranks = max((each.ranks or 1 for each in self._segments()), default=1)
        return noise.measured(found, decay=decay, ranks=ranks, sizes=sizes, weighted=weighted)

    def histograms(self, *, parameters: Names = None, steps: Steps = None, stage: str | None = None) -> pd.DataFrame:
        """Long: `step, backward, stage, parameter, bucket, count`, where they were kept; empty buckets have no row.

        Buckets are numbered as in `gradlens.fields.HISTOGRAM`.
        """
        import pandas as pd

        found = self._find("histograms", ["bucket", "count"], Filter(parameters, steps, stage))
        names, at = found.names()
        c = found.columns
        long = {
            "step": c["step"],
            "backward": c["backward"],
            "stage": answers.texts(STAGES, c["stage"]),
            "parameter": answers.texts(names, at),
            "bucket": c["bucket"],
            "count": c["count"],
        }
        return pd.DataFrame(long).groupby(list(long)[:-1], sort=False)["count"].sum().reset_index()

    def snapshots(
        self, *, steps: Steps = None, parameters: Names = None, stage: str | None = None, rank: int | None = None
    ) -> list[Snapshot]:
        """The records as rules and writers take them, in order; of one rank, or those of all ranks pooled.

        Histograms and the most sensitive weights are there where they were kept.
        """
        asked = Filter(parameters, steps, stage, rank)
        history = self._find("history", [*answers.STORED, "time"], asked)
        observed = self._find("scalars", ["value"], Filter(None, steps, stage, rank))
        histograms = self._find("histograms", ["bucket", "count"], asked)
        tops = self._find("weights", ["index", "partial", "value"], asked)
        found = answers.snapshots(history, observed, histograms, tops)
        if rank is not None or len({snapshot.rank for snapshot in found}) < 2:
            return found
        found.sort(key=_moment)
        return [pool(list(group)) for _, group in groupby(found, key=_moment)]

    def replay(
        self,
        writer: _Writer,
        *,
        steps: Steps = None,
        parameters: Names = None,
        stage: str | None = None,
        rank: int | None = None,
        progress: bool | None = None,
    ) -> None:
        """Hand the records to a writer, as a lens would have done: `run.replay(gradlens.writers.CSV("all.csv"))`.

        Snapshots in order, of one rank or those of all ranks pooled, and findings behind those of their step. Some hundred
        thousand rows at a time are in memory. The writer is flushed, and stays open.
        """
        asked = Filter(steps=steps)
        there = [step for step in self.steps(stage) if asked.has(step)]
        findings = [finding for finding in self.findings() if asked.has(finding.step)]
        together = max(1, REPLAYED // max(2 * len(self.names()), 1))
        places = range(0, len(there), together)
        for first in tracked(places, "replaying", len(places), progress):
            part = there[first : first + together]
            records: list[Snapshot | Finding] = []
            records += self.snapshots(steps=part, parameters=parameters, stage=stage, rank=rank)
            until = part[-1] if first + together < len(there) else sys.maxsize
            records += [finding for finding in findings if finding.step <= until]
            findings = [finding for finding in findings if finding.step > until]
            for record in sorted(records, key=lambda record: record.step):
                writer.write(record)
        writer.flush()

    def plot(self, kind: str = "flow", *arguments: Any, **options: Any) -> Any:
        """A picture of `gradlens.plots`: `flow, directions, sizes, updates, histogram, weight`. Needs matplotlib."""
        from gradlens import plots

        return plots.plot(self, kind, *arguments, **options)

    def steps(self, stage: str | None = None) -> list[int]:
        """The steps of which there are rows, rising."""
        return rows.steps(self.path, "history", stage)

    def extent(self) -> tuple[int, int, int] | None:
        """How many rows were recorded, replaced ones included, and the first and last step; None: nothing yet. Files tell it
        without being read, where `steps()` reads them."""
        return rows.extent(self.path, "history")

    def names(self) -> list[str]:
        """The parameters, in model order."""
        return list(dict.fromkeys(name for each in self._segments() for name, *_ in each.parameters))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Each parameter's shape, in model order."""
        return {name: shape for each in self._segments() for name, shape, *_ in each.parameters}

    @property
    def settings(self) -> dict[str, Any]:
        """What the last lens was told."""
        segments = self._segments()
        return dict(segments[-1].settings) if segments else {}

    def ranks(self) -> list[int]:
        """The ranks that wrote."""
        return sorted({each.key.rank for each in self._segments()})

    # --- reading ------------------------------------------------------------------------------------------------------

    def _segments(self) -> list[Segment]:
        return segment.segments(self.path)

    def _find(self, table: str, values: Sequence[str], asked: Filter) -> Found:
        return rows.find(self.path, table, values, asked, self._max_bytes)

    def _last_step(self, table: str, stage: str | None = None) -> int:
        last = rows.last_step(self.path, table, stage)
        if last is None:
            raise NothingCapturedError(f"there is nothing in {self.path / table} yet")
        return last

    def _nothing_on(self, step: int, stage: str | None, invented: bool) -> GradlensError:
        if invented:
            return CorruptRunError(f"a file in {self.path / 'history'} says that it has step {step}, and has not")
        steps = self.steps(stage)
        if not steps:
            return NothingCapturedError(f"there are no records in {self.path} yet")
        near = min(steps, key=lambda s: abs(s - step))
        there = f": there are {len(steps)}, from {steps[0]} to {steps[-1]}; the nearest is {near}" if near != step else ""
        return ArgumentError(f"there is nothing on step {step}{there}")


def _moment(snapshot: Snapshot) -> tuple[int, int, int]:
    return snapshot.step, snapshot.backward, STAGES.index(snapshot.stage)


def _trend(steps: np.ndarray, losses: np.ndarray, segments: Sequence[segment.Segment]) -> Trend:
    """What the loss did; that of several optimizers measures no progress."""
    if not len(losses):
        return Trend(State.UNKNOWN)
    optimizers = [each.settings.get("optimizers") for each in segments]
    return judged(steps, losses, several=any(isinstance(own, list) and len(own) > 1 for own in optimizers))
