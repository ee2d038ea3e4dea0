"""The face of gradlens: `watch`, and the questions that a user asks of what it saw."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradlens import activations, findings, frames, markup
from gradlens.analysis import rules as default_rules
from gradlens.analysis.diagnosis import Diagnosis
from gradlens.capture.attachment import Attachment, Target, locate, parts
from gradlens.capture.guards import Guard
from gradlens.capture.watcher import Watched, Watcher
from gradlens.errors import (
    ArgumentError,
    ClosedError,
    StepError,
)
from gradlens.noise import DECAY, NoiseScale, measured
from gradlens.records import Finding
from gradlens.schedules import Schedule
from gradlens.selection import Select
from gradlens.statistics.evidence import Evidence
from gradlens.statistics.memory import Plan
from gradlens.watching import process_group
from gradlens.watching import settings as arguments
from gradlens.watching.batch_sizes import BatchSizes
from gradlens.watching.budget import BudgetedSchedule
from gradlens.watching.failures import Failures
from gradlens.watching.live_questions import LiveQuestions
from gradlens.watching.outputs import run_writers
from gradlens.watching.outputs_read import read_output
from gradlens.watching.overhead import Meter, Overhead
from gradlens.watching.partials import record_partials
from gradlens.watching.recorder import Recorder
from gradlens.watching.settings import LensSettings
from gradlens.watching.stopwatch import Stopwatch
from gradlens.watching.tables import TableBuilder
from gradlens.watching.unavailable import unavailable
from gradlens.writers import report as page
from gradlens.writers.base import Writer

if TYPE_CHECKING:
    import pandas as pd

CLOSING = 60.0  #: seconds for which a second close() waits for the first

#: Lenses that are open. The package holds them, so that an unassigned `gradlens.watch(...)` works.
_open_lenses: set[Lens] = set()


class Lens:
    """A watched model. Made by `watch`; every question may be asked at any time, in the middle of a step too.

    On a thread other than the training thread, answers cover the steps that are over.
    """

    def __init__(self, target: Target, settings: LensSettings) -> None:
        attachment, first_step = Attachment(target, settings.select), settings.first_step
        foreign = arguments.foreign_parameters(settings.optimizers, attachment, first_step)
        self._settings = replace(settings, optimizers=())  # whose parameters are not kept by it
        self._failures, timed = Failures(), Stopwatch()
        self._plan = _plan(attachment, settings)
        self._failures.findings += foreign
        self._failures.findings += unavailable(
            settings.stages, settings.features, self._plan, process_group.count(), first_step
        )
        own = run_writers(settings, attachment, self._plan, self._failures.findings.append)
        self._store: Any = own[0] if own else None
        try:
            self._recorder = Recorder(settings.rules, [*own, *settings.writers], settings.on_finding, self._failures)
            self._tables = TableBuilder(self._recorder, self._plan, settings.possible, self._failures)
            self._meter = Meter(timed, self._recorder.background)
            watched = Watched(
                attachment,
                settings.optimizers,
                settings.wrapped,
                BudgetedSchedule(settings.schedule, settings.budget, self._meter, tell=self._floor_above_budget),
                settings.scaler,
                settings.stages,
                updates="updates" in settings.features,
                local=settings.local,
                first_step=first_step,
                read_output=read_output if "activations" in settings.features else None,
            )
            self._watcher = Watcher(watched, self._tables, Guard(self._failures, timed), may_raise=self._recorder.interrupt)
            self._live = LiveQuestions(self._watcher, self._tables, self._recorder)
            self._failures.step = lambda: self._watcher.step.number
            self._closed = False
            self._batch_sizes = BatchSizes()
            self._closing, self._ended = threading.Lock(), threading.Event()
            self._closer: threading.Thread | None = None
            self._partials = record_partials(settings, self._live.held, self._watcher, self._store, self._failures)
            self._watcher.attach()
        except BaseException:
            for writer in own:
                writer.close()
            raise
        self._finalizers = [weakref.finalize(part, _orphan, weakref.ref(self)) for part in attachment.everything()]
        for finalizer in self._finalizers:
            finalizer.atexit = False
        _open_lenses.add(self)

    # --- questions --------------------------------------------------------------------------------------------------

    def table(self, step: int | None = None, *, stage: str | None = None) -> pd.DataFrame:
        """One row a parameter: that step's last stage read, the latest step by default."""
        arguments.check_stage(stage)
        self._live.catch_up()
        return frames.table(self._live.snapshot_at(step, stage))

    def history(self) -> pd.DataFrame:
        """Long: one row a (step, backward, stage, parameter), of the snapshots in memory."""
        self._live.catch_up()
        return frames.frame(list(self._recorder.history))

    def findings(self) -> list[Finding]:
        """What the rules found so far, in order."""
        self._live.catch_up()
        return list(self._recorder.found)

    def activations(self) -> pd.DataFrame:
        """What each module made of the batches, of the passes in memory: one row a (step, backward, module).

        Columns `calls, entries, nonfinite, rms, spread, dead, saturated`; needs the feature `"activations"`.
        """
        if "activations" not in self._settings.features:
            raise ArgumentError('there are no activations without watch(features=(..., "activations"))')
        self._live.catch_up()
        return activations.frame(self._recorder.history.activations)

    def names(self) -> list[str]:
        """The parameters, in model order; a tied one once, by its first name."""
        return [held.name for held in self._live.held()]

    def gradient(self) -> Tensor:
        """All partials in one flat tensor, in the order of `names()`: the gradient. Parameters without one give zeros.

        On the parameters' common device, else the CPU; of their common dtype, else float32. An error where this rank holds
        pieces of it only.
        """
        return self._live.gradient()

    def weights(self, name: str | None = None, *, top: int | None = None, by: str = "sensitivity") -> pd.DataFrame:
        """One row a weight: `parameter, index, value, partial, direction, sensitivity, saliency`.

        In model order, or the `top` ones by falling `by` (`sensitivity`, `saliency`, `value`, `partial`; the signed ones by
        size). Read from `.grad` now: `attrs` say of which step and stage that is. When the gradients are gone, or another
        thread trains, `weights(top=k)` answers from what was kept, the 16 most sensitive weights of each parameter.

        `name` may be that of one weight, `"fc1.weight[3, 17]"`.

        With the feature `evidence` also `verdict, t, p, q`, over the backwards of the last step (two at least; at a false
        discovery rate of 0.1), and, over steps while the weights move, `agree` (lately, the share of steps with the more
        frequent sign), `flips` (the share where the sign turned) and `gsnr` (mean^2 / variance), which
        `attrs["over_steps"]` names: they are no test.

        Of a distributed tensor: the weights that this rank holds, by their index in the whole. `attrs["summands"]` names the
        parameters whose partials the ranks have yet to add.
        """
        return self._live.weights(name, top=top, by=by)

    def explain(self, name: str, index: int | Sequence[int] | None = None) -> str:
        """One paragraph on one weight: its partial, what that means, and how it compares.

        `explain("fc1.weight", (3, 17))` or, as reports print it, `explain("fc1.weight[3, 17]")`.
        """
        return self._live.explain(name, index)

    def noise_scale(
        self, *, decay: float = DECAY, sizes: Sequence[float] | None = None, weighted: bool = False
    ) -> NoiseScale:
        """How noisy the gradient of one micro-batch is: the batch size above which larger ones bring little.

        From the micro-batches of each step in memory, no gradient stored; in examples after `observe(batch_size=)`. A step's
        weight falls by `decay` with each one after it. Where nothing is known the result says why.

        `sizes`: the examples of each of a step's micro-batches, `[30, 2]`, where they are unequal and `observe` was not
        told; `weighted`: their losses counted by size, and not alike. Backwards that are not alike have no scale.
        """
        self._live.catch_up()
        return measured(self._recorder.history, decay=decay, sizes=sizes, weighted=weighted)

    def diagnosis(self) -> Diagnosis:
        """What is wrong with this training, as far as that can be said: the origin, and what follows from it."""
        self._live.catch_up()
        return self._recorder.diagnosis()

    def report(self) -> str:
        """The page that a person reads in a minute, about the whole run."""
        self._live.catch_up()
        recorder = self._recorder
        return page.text(
            recorder.history,
            recorder.found,
            overhead=str(self.overhead()),
            title=self._title(),
            diagnosis=recorder.diagnosis(),
            steps=recorder.history.course.steps,
            losses=recorder.history.course.losses(),
        )

    def overhead(self) -> Overhead:
        """What gradlens cost the training so far, measured."""
        return self._meter.overhead(self._settings.budget)

    def __str__(self) -> str:
        self._live.catch_up()
        return page.brief(self._recorder.history, self._recorder.found, diagnosis=self._recorder.diagnosis())

    def _repr_html_(self) -> str:
        self._live.catch_up()
        return markup.lens(
            self._title(), self._recorder.history, self._recorder.found, verdict=self._recorder.diagnosis().verdict
        )

    def plot(self, kind: str = "flow", *arguments: Any, **options: Any) -> Any:
        """A picture of `gradlens.plots`: `flow, directions, sizes, updates, histogram, weight`. Needs matplotlib."""
        from gradlens import plots

        return plots.plot(self, kind, *arguments, **options)

    def live(self, seconds: float = 1.0) -> Any:
        """In a notebook: an output that is replaced in place while this cell trains. Returns it; `stop()` ends it."""
        from gradlens.notebook import LiveView

        return LiveView(self, seconds)

    @property
    def closed(self) -> bool:
        """Whether it has seen its last step."""
        return self._closed

    def __reduce__(self) -> tuple[Any, tuple]:
        """None: a copy of a model is not watched, though the model has its lens as an attribute."""
        return type(None), ()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "watching"
        return f"<gradlens.Lens {state} {len(self._watcher.attachment.slots)} parameters, step {self._watcher.step.number}>"

    # --- steps and life ---------------------------------------------------------------------------------------------

    def observe(self, loss: Any = None, *, batch_size: int | None = None, **scalars: Any) -> None:
        """Attach values to the open step, or to the next where none is open. Tensors are taken without a device sync.

        `batch_size`: the examples of one backward, which makes examples the unit of the noise scale. Said for each
        backward of a step, it is recorded as their harmonic mean, which unequal ones amount to.
        """
        self._require_open("observe()")
        if loss is not None and not self._watcher.step.open:
            if self._watcher.roots.step_of(loss) is not None:
                loss = None  # it was the root of a backward whose step is over, and stands there
            else:
                self._watcher.auditor.observed(loss, self._watcher.step.number)
        size = self._batch_sizes.add(self._watcher.step.number, batch_size)
        given = {"loss": loss, "batch_size": size, **scalars}
        self._watcher.observe({name: arguments.number_of(name, value) for name, value in given.items() if value is not None})

    def step(self) -> None:
        """The step ends here: for loops without an optimizer."""
        self._require_open("step()")
        if self._watcher.optimizers.watched:
            raise StepError(
                "lens.step() beside an optimizer: its step() already ends the step. Remove lens.step(), or watch the model "
                "without the optimizer"
            )
        self._watcher.explicit_step()
        self._recorder.interrupt()

    def flush(self) -> None:
        """Everything captured so far is in memory, on disk and with the writers."""
        self._live.catch_up()

    def close(self) -> None:
        """Detach everything, write what is left, leave the model as it was.

        May be called again; while another thread closes it, as one does when the model has died, this waits for that one.
        From a rule, a writer or a callback it does not wait, since what closes the lens waits for these.
        """
        with self._closing:
            first, self._closed = not self._closed, True
            self._live.closed = True
            if first:
                self._closer = threading.current_thread()
        if first:
            self._close()
        elif self._closer is not threading.current_thread() and not self._recorder.is_current_thread():
            self._ended.wait(CLOSING)
            self._recorder.flush()  # closed from a callback, it writes its last records once that has returned

    def _close(self) -> None:
        try:
            self._watcher.close_skipped_step()
            if not self._watcher.elsewhere():
                self._watcher.release()
                self._tables.release_open({})
        finally:
            self._watcher.detach()
            self._tables.detached()
            if self._partials is not None:
                self._partials.close()
            for finalizer in self._finalizers:
                finalizer.detach()
            try:
                if self._store is not None:
                    self._store.annotate(overhead=str(self.overhead()), diagnosis=str(self._recorder.diagnosis()))
                self._recorder.close()
                self._say_verdict()
            finally:
                self._ended.set()
                _open_lenses.discard(self)

    def _say_verdict(self) -> None:
        """One line of what the run was like, by the first rank."""
        if self._recorder.history.newest() is not None and process_group.rank() == 0:
            diagnosis, run = self._recorder.diagnosis(), self._settings.run
            said = diagnosis.line() if run is None else diagnosis.line(f"gradlens report {run}")
            print(f"gradlens: {said}", file=sys.stderr)

    def __enter__(self) -> Lens:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- details ----------------------------------------------------------------------------------------------------

    def _floor_above_budget(self, share: float) -> None:
        self._failures.findings.append(
            findings.floor_above_budget(self._watcher.step.number, share, self._settings.budget or 0.0)
        )

    def _require_open(self, call: str) -> None:
        if self._closed:
            raise ClosedError(f"lens.{call} after close(): this lens sees nothing any more; call gradlens.watch() again")

    def _title(self) -> str:
        return "gradlens" if self._settings.run is None else f"gradlens: {self._settings.run}"


# --- watch ----------------------------------------------------------------------------------------------------------


def watch(
    target: Target,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    *,
    run: str | os.PathLike[str] | None = None,
    writers: Iterable[Writer] = (),
    schedule: int | Schedule = 1,
    select: Select = None,
    stage: str | Iterable[str] | None = None,
    scaler: Any = None,
    features: Iterable[str] = ("updates", "flips"),
    memory: int | str = "256MiB",
    rules: Iterable[Any] = default_rules.DEFAULT,
    on_finding: str | Callable[[Finding], None] = "record",
    budget: float | None = None,
    first_step: int = 0,
    keep: str | Iterable[str] | None = None,
    replace: bool = False,
) -> Lens:
    """Watch a model: capture dL/dw of every weight after every `backward()`, and what the optimizer does with it.

    Args:
        target: a module, or a mapping of names to modules and to plain tensors that require a gradient.
        optimizer: one or several; the last listed ends the step. None: a step is each backward, or `lens.step()`.
        run: a run directory, made if missing, for durable records and TensorBoard. None: the last 1,000 snapshots in memory.
        writers: more outputs, each with `write(record), flush(), close()`.
        schedule: n for each n-th step, or a callable `step -> bool`.
        select: glob patterns on names (`"*.weight"`, `"!*.bias"`), or a callable `(name, tensor) -> bool`.
        stage: which gradients to read: `backward, accumulated, reduced, used`. None: `backward` and `used` in one process,
            `reduced` and `used` over ranks.
        scaler: the `GradScaler`: captured values are unscaled, and skipped steps are seen.
        features: `"updates"`, `"flips"`, `"evidence"`: what needs buffers as large as the weights; `"activations"`: hooks on
            the modules, for what each makes of a batch.
        memory: what those buffers may take together; what does not fit works on a seeded sample.
        rules: callables `history -> findings`.
        on_finding: `"record"`, `"warn"`, `"raise"` (in the training thread, after an update), or a callable.
        budget: the share of the training time that gradlens may cost, such as 0.01; it stretches its schedule to keep it.
        first_step: the number of the first step, for a training that goes on from a checkpoint.
        keep: names or glob patterns of parameters whose whole partials are kept in the run directory, for heat maps: what
            the optimizer used and the weights before its step, at steps spread over the run, in 256 MiB at most.
        replace: close the open lenses on parameters of this model first: for a notebook cell that runs again.

    Raises:
        gradlens.GradlensError: an argument that cannot be meant; nothing is attached then.
    """
    settings = LensSettings.of(
        optimizer=optimizer,
        run=run,
        writers=writers,
        schedule=schedule,
        select=select,
        stage=stage,
        scaler=scaler,
        features=features,
        memory=memory,
        rules=rules,
        on_finding=on_finding,
        budget=budget,
        first_step=first_step,
        keep=keep,
    )
    shared = _watched_already(target)
    if replace:
        for other in shared:
            other.close()
        shared = {}
    lens = Lens(target, settings)
    if shared:
        names = list(dict.fromkeys(name for names in shared.values() for name in names))
        lens._failures.findings.append(findings.watched_already(first_step, names, len(shared)))
    _announce(lens, len(shared))
    return lens


def _watched_already(target: Target) -> dict[Lens, list[str]]:
    """The open lenses that watch parameters of this target, and their names of these."""
    ids = {id(tensor) for key, part in parts(target).items() for *_, tensor in locate(part, key)}
    found = {}
    for other in list(_open_lenses):
        attachment = other._watcher.attachment
        pairs = zip(attachment.slots, attachment.tensors(), strict=True)
        names = [slot.name for slot, tensor in pairs if tensor is not None and id(tensor) in ids]
        if names:
            found[other] = names
    return found


def _announce(lens: Lens, others: int = 0) -> None:
    held = lens._live.held()
    size = f"{len(held)} parameters, {sum(each.numel() for each in held):,} weights"
    run = lens._settings.run
    where = "" if run is None else f"; records go to {run}"
    print(f"gradlens: watching {size}{where}; {lens._plan.describe()}", file=sys.stderr)
    if others:
        lenses = "another open lens watches" if others == 1 else f"{others} other open lenses watch"
        print(f"gradlens: {lenses} parameters of this model; close() it, or watch(..., replace=True)", file=sys.stderr)


def _plan(attachment: Attachment, settings: LensSettings) -> Plan:
    features, stages = settings.possible, settings.stages
    buffers = ("updates" in features and "used" in stages) + ("flips" in features) * len(stages)
    named = [word for word in arguments.BUFFERED if word in features and (word != "updates" or "used" in stages)]
    more = Evidence.BYTES * ("evidence" in features)
    return Plan.of(attachment.parameters, settings.memory, buffers, more=more, what=" and ".join(named) or "nothing")


# --- the end --------------------------------------------------------------------------------------------------------


def _orphan(lens: weakref.ref[Lens]) -> None:
    """A part of the target died. When none is left, close from a thread of its own: this one may hold any lock."""
    alive = lens()
    if alive is not None and not alive._watcher.attachment.alive():
        threading.Thread(target=alive.close, name="gradlens-close", daemon=True).start()


@atexit.register
def _close_all() -> None:
    for lens in list(_open_lenses):
        with contextlib.suppress(Exception):
            lens.close()
