"""The face of gradlens: `watch`, and the questions that a user asks of what it saw."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gradlens import frames, ranks
from gradlens.analysis import rules as default_rules
from gradlens.capture.attachment import Attachment, Slot, Target
from gradlens.capture.clock import Clock
from gradlens.capture.live import Capture
from gradlens.capture.sharding import piece, summand
from gradlens.capture.updates import inner
from gradlens.errors import (
    ArgumentError,
    ArgumentTypeError,
    ClosedError,
    GradlensWarning,
    NothingCapturedError,
    StepError,
    choice,
    nearest,
)
from gradlens.meter import Meter, Overhead, Pace, Stopwatch
from gradlens.noise import DECAY, NoiseScale, measured
from gradlens.pipeline import Faults, Pipeline, plain, shielded
from gradlens.records import Finding, Parameters, Severity, Snapshot, Stage
from gradlens.schedules import Schedule, as_schedule
from gradlens.selection import Select
from gradlens.statistics.evidence import Evidence
from gradlens.statistics.memory import Plan, parse_bytes
from gradlens.statistics.streaming import Followed, Q, describe
from gradlens.unavailable import unavailable
from gradlens.writers import report as page
from gradlens.writers.background import Background
from gradlens.writers.base import Writer
from gradlens.writers.exchange import PARTING, PATIENCE, Pooled, Sender

if TYPE_CHECKING:
    import pandas as pd

FEATURES = ("updates", "flips", "evidence")
ON_FINDING = ("record", "warn", "raise")
ORDERS = ("sensitivity", "saliency", "value", "partial")
ROWS = 1_000_000  #: weights() gives no more rows than this without `top` or `name`: a DataFrame of them takes about 0.3 GB

#: Lenses that are open. The package holds them, so that an unassigned `gradlens.watch(...)` works.
_open_lenses: set[Lens] = set()


class Lens:
    """A watched model. Made by `watch`; every question may be asked at any time, in the middle of a step too."""

    def __init__(
        self,
        target: Target,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        run: Path | None,
        writers: Sequence[Writer],
        schedule: Schedule,
        select: Select,
        stages: frozenset[str],
        scaler: Any,
        features: frozenset[str],
        memory: int,
        rules: Sequence[Any],
        on_finding: str | Callable[[Finding], None],
        budget: float | None,
        first_step: int,
        local: bool,
    ) -> None:
        attachment = Attachment(target, select)
        _warn_of_strangers(optimizers, attachment, target)
        self._run = run
        self._faults = Faults()
        asked = features
        if Stage.BACKWARD not in stages:
            features = features - {"evidence"}
        self._plan = _plan(attachment, features, stages, memory)
        self._faults.findings += unavailable(stages, asked, self._plan, ranks.count(), first_step)
        settings = _settings(attachment, stages, features, self._plan, schedule, first_step)
        own = [] if run is None else _run_writers(run, settings, first_step, self._faults.findings.append)
        timed = Stopwatch()
        try:
            self._pipeline = Pipeline(
                plan=self._plan,
                features=features,
                rules=rules,
                writers=[*own, *writers],
                on_finding=on_finding,
                faults=self._faults,
                timed=timed,
            )
            self._meter, self._budget = Meter(timed, self._pipeline.busy), budget
            pace = Pace(schedule, budget, self._meter, tell=self._floor_above_budget)
            self._clock = Clock(pace, first_step, fault=self._faults)
            self._faults.step = lambda: self._clock.step
            self._capture = Capture(
                attachment,
                optimizers,
                self._clock,
                scaler,
                self._pipeline,
                stages,
                updates="updates" in features,
                local=local,
                fault=self._faults,
                timed=timed,
            )
            self._closed = False
            self._closing = threading.Lock()
            self._capture.attach()
        except BaseException:
            for writer in own:
                writer.close()
            raise
        self._finalizers = [weakref.finalize(part, _orphan, weakref.ref(self)) for part in attachment.target().values()]
        for finalizer in self._finalizers:
            finalizer.atexit = False
        _open_lenses.add(self)

    # --- questions --------------------------------------------------------------------------------------------------

    def table(self, step: int | None = None, *, stage: str | None = None) -> pd.DataFrame:
        """One row a parameter: that step's last stage read, the latest step by default."""
        _check_stage(stage)
        self._catch_up()
        return frames.frame([self._history_at(step, stage)])

    def history(self) -> pd.DataFrame:
        """Long: one row a (step, backward, stage, parameter), of the snapshots in memory."""
        self._catch_up()
        return frames.frame(list(self._pipeline.history))

    def findings(self) -> list[Finding]:
        """What the rules found so far, in order."""
        self._catch_up()
        return list(self._pipeline.found)

    def names(self) -> list[str]:
        """The parameters, in model order; a tied one once, by its first name."""
        return [slot.name for slot in self._slots()]

    def gradient(self) -> Tensor:
        """All partials in one flat tensor, in the order of `names()`: the gradient. Parameters without one give zeros.

        On the parameters' common device, else the CPU; of their common dtype, else float32. An error where this rank holds
        pieces of it only.
        """
        slots = self._slots()
        _require_whole(slots)
        self._require_gradients(slots)
        with shielded():
            parts = [self._partials(slot) for slot in slots]
            devices, dtypes = {p.device for p in parts}, {p.dtype for p in parts}
            device = devices.pop() if len(devices) == 1 else torch.device("cpu")
            dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
            return torch.cat([p.to(device=device, dtype=dtype) for p in parts])

    def weights(self, name: str | None = None, *, top: int | None = None, by: str = "sensitivity") -> pd.DataFrame:
        """One row a weight: `parameter, index, value, partial, direction, sensitivity, saliency`.

        In model order, or the `top` ones by falling `by` (`sensitivity`, `saliency`, `value`, `partial`; the signed ones by
        size). Read from `.grad` now: `attrs` say of which step and stage that is. When the gradients are gone,
        `weights(top=k)` answers from what was kept, the 16 most sensitive weights of each parameter.

        With the feature `evidence` also `verdict, t, p, q`, over the backwards of the last step (two at least; at a false
        discovery rate of 0.1), and, over steps while the weights move, `agree` (lately, the share of steps with the more
        frequent sign), `flips` (the share where the sign turned) and `gsnr` (mean^2 / variance).

        Of a distributed tensor: the weights that this rank holds, by their index in the whole. `attrs["summands"]` names the
        parameters whose partials the ranks have yet to add.
        """
        if by not in ORDERS:
            raise choice("by", by, ORDERS)
        if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
            raise ArgumentError(f"top is a whole number of weights of at least 1, not {top!r}")
        slots = self._slots() if name is None else [self._slot(name)]
        self._capture.poll()
        if not any(_gradient(slot) is not None for slot in self._slots()):
            return self._kept_weights(slots, top, by)
        count = sum(_numel(slot, here=True) for slot in slots)
        if top is None and name is None and count > ROWS:
            raise ArgumentError(
                f"weights() would give {count:,} rows; ask for the most important with top=100, or for one parameter with "
                f"name={slots[0].name!r}"
            )
        with shielded():
            result = _ordered(_concat([self._weights_of(slot, top, by) for slot in slots]), top, by)
            self._add_evidence(result, slots)
        summands = [slot.name for slot in slots if summand(_gradient(slot))]
        result.attrs.update({"summands": summands} if summands else {})
        return self._stamped(result, self._clock.open)

    def explain(self, name: str, index: int | Sequence[int] = ()) -> str:
        """One paragraph on one weight: its partial, what that means, and how it compares."""
        slot = self._slot(name)
        self._catch_up()
        at = (index,) if isinstance(index, int) else tuple(index)
        shape = _weight_shape(slot)
        if len(at) != len(shape) or not all(-size <= i < size for i, size in zip(at, shape, strict=True)):
            raise ArgumentError(f"{name} has shape {shape}; {at} is not the index of one of its weights")
        at = tuple(int(i) % size for i, size in zip(at, shape, strict=True))
        self._require_gradients([slot])
        with shielded():
            partials, values = self._partials(slot), _reals(_local(slot))
            whole = int(np.ravel_multi_index(at, shape)) if shape else 0
            flat = _here(slot, at, whole)
            partial = float(partials[flat])
            followed = self._followed(slot)
            evidence = "" if followed is None else describe(followed.columns(np.asarray([flat])), followed.backwards)
            larger = int((partials.abs() > abs(partial)).sum()) if np.isfinite(partial) else partials.numel()
        return page.explain(
            name,
            at,
            value=float(values[flat]),
            partial=partial,
            rank=larger + 1,
            numel=partials.numel(),
            history=self._seen(slot.name, whole),
            evidence=evidence,
        )

    def noise_scale(self, *, decay: float = DECAY) -> NoiseScale:
        """How noisy the gradient of one micro-batch is: the batch size above which larger ones bring little.

        From the micro-batches of each step in memory, no gradient stored; in examples after `observe(batch_size=)`. A step's
        weight falls by `decay` with each one after it. Where nothing is known the result says why.
        """
        self._catch_up()
        return measured(self._pipeline.history, decay=decay)

    def report(self) -> str:
        """The page that a person reads in a minute."""
        self._catch_up()
        return page.text(self._pipeline.history, self._pipeline.found, overhead=str(self.overhead()), title=self._title())

    def overhead(self) -> Overhead:
        """What gradlens cost the training so far, measured."""
        return self._meter.overhead(self._budget)

    def __str__(self) -> str:
        self._catch_up()
        return page.brief(self._pipeline.history, self._pipeline.found)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "watching"
        return f"<gradlens.Lens {state} {len(self._capture.attachment.slots)} parameters, step {self._clock.step}>"

    # --- steps and life ---------------------------------------------------------------------------------------------

    def observe(self, loss: Any = None, *, batch_size: int | None = None, **scalars: Any) -> None:
        """Attach values to the open step, or to the next where none is open. Tensors are taken without a device sync.

        `batch_size`: the examples of one backward, which makes examples the unit of the noise scale.
        """
        self._require_open("observe()")
        given = {"loss": loss, "batch_size": batch_size, **scalars}
        self._clock.observe({name: _scalar(name, value) for name, value in given.items() if value is not None})

    def step(self) -> None:
        """The step ends here: for loops without an optimizer."""
        self._require_open("step()")
        if self._capture.updates.roles:
            raise StepError(
                "lens.step() beside an optimizer: its step() already ends the step. Remove lens.step(), or watch the model "
                "without the optimizer"
            )
        self._capture.explicit_step()
        self._pipeline.interrupt()

    def flush(self) -> None:
        """Everything captured so far is in memory, on disk and with the writers."""
        self._catch_up()

    def close(self) -> None:
        """Detach everything, write what is left, leave the model as it was. May be called again."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        try:
            self._capture.poll()
            if self._clock.open and not self._capture.updates.roles:
                self._capture.close_step()
            self._pipeline.release_open(self._clock.scalars)
        finally:
            self._capture.detach()
            for finalizer in self._finalizers:
                finalizer.detach()
            _open_lenses.discard(self)
            self._pipeline.close()

    def __enter__(self) -> Lens:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- details ----------------------------------------------------------------------------------------------------

    def _floor_above_budget(self, share: float) -> None:
        seen = (
            f"a step that is not observed costs {share:.1%} of its time already, and the budget is {self._budget:.1%}: it "
            "cannot be kept by looking less often"
        )
        self._faults.findings.append(
            Finding(
                rule="budget",
                step=self._clock.step,
                severity=Severity.INFO,
                seen=seen,
                causes=("very short steps: the optimizer's hooks cost some microseconds, whatever is observed",),
                remedy=f"a budget above {share:.1%}, or longer steps; lens.overhead() says what is spent on what",
                value=share,
            )
        )

    def _catch_up(self) -> None:
        if not self._closed:
            self._capture.poll()
            self._pipeline.release_open(self._clock.scalars)
        self._pipeline.flush()

    def _require_open(self, call: str) -> None:
        if self._closed:
            raise ClosedError(f"lens.{call} after close(): this lens sees nothing any more; call gradlens.watch() again")

    def _slots(self) -> list[Slot]:
        return [slot for slot in self._capture.attachment.slots if slot.tensor() is not None]

    def _slot(self, name: str) -> Slot:
        slots = {slot.name: slot for slot in self._slots()}
        found = slots.get(self._capture.attachment.aliases.get(name, name))
        if found is None:
            raise ArgumentError(f"there is no watched parameter {name!r}{nearest(str(name), slots)}")
        return found

    def _history_at(self, step: int | None, stage: str | None) -> Snapshot:
        history = self._pipeline.history
        if not len(history):
            raise NothingCapturedError(_nothing(self._closed))
        try:
            return history.at(step, stage)
        except (KeyError, LookupError) as error:
            steps = history.steps()
            raise ArgumentError(
                f"no {stage or 'snapshot'} of step {step} in memory; there are steps {steps[0]} to {steps[-1]}, stages "
                f"{', '.join(sorted({str(s.stage) for s in history}))}"
            ) from error

    def _partials(self, slot: Slot) -> Tensor:
        """This parameter's partials as they are in `.grad`, flat, unscaled; zeros where there are none."""
        gradient, weight = _gradient(slot), _local(slot)
        if gradient is None:
            return torch.zeros_like(_reals(weight))
        flat = _reals(plain(gradient))
        scale = self._capture.scale_now(slot)
        return flat.clone() if isinstance(scale, float) and scale == 1.0 else flat / scale

    def _require_gradients(self, slots: Sequence[Slot]) -> None:
        self._capture.poll()
        if any(_gradient(slot) is not None for slot in slots):
            return
        if not self._pipeline.count:
            raise NothingCapturedError(_nothing(self._closed))
        if len(slots) == 1 and any(_gradient(slot) is not None for slot in self._slots()):
            return  # this one is absent: its partials are 0
        raise NothingCapturedError(
            "the gradients are gone (zero_grad() was called); ask between backward() and zero_grad(), or ask "
            "weights(top=k), which answers from what was kept"
        )

    def _weights_of(self, slot: Slot, top: int | None, by: str) -> pd.DataFrame:
        partials, values = self._partials(slot).double(), _reals(_local(slot)).double()
        index = torch.arange(partials.numel(), device=partials.device)
        if top is not None and top < partials.numel():
            index = torch.topk(_key(partials, values, by), top).indices
        at = _place(slot).whole_index(0, index.cpu().numpy())
        return frames.weights(slot.name, _weight_shape(slot), at, values[index].cpu().numpy(), partials[index].cpu().numpy())

    def _kept_weights(self, slots: Sequence[Slot], top: int | None, by: str) -> pd.DataFrame:
        self._catch_up()
        latest = self._pipeline.history.latest()
        if latest is None:
            raise NothingCapturedError(_nothing(self._closed))
        if top is None:
            self._require_gradients(slots)
        snapshot = self._pipeline.history.at()
        parts = []
        for slot in slots:
            row = snapshot.parameters.position.get(slot.name)
            if row is not None and snapshot.top is not None:
                index = snapshot.top.index[row]
                kept = index >= 0
                parts.append(
                    frames.weights(
                        slot.name,
                        _weight_shape(slot),
                        index[kept],
                        snapshot.top.value[row][kept],
                        snapshot.top.partial[row][kept],
                    )
                )
        result = _ordered(_concat(parts), top, by)
        with shielded():
            self._add_evidence(result, slots)
        result.attrs.update(step=snapshot.step, stage=str(snapshot.stage))
        return result

    def _followed(self, slot: Slot) -> Followed | None:
        return None if self._pipeline.evidence is None else self._pipeline.evidence.of(slot.name)

    def _add_evidence(self, frame: pd.DataFrame, slots: Sequence[Slot]) -> None:
        """The columns of the feature `evidence`; empty for weights that are not followed, or not yet."""
        if self._pipeline.evidence is None:
            return
        for column in Followed.COLUMNS:
            frame[column] = np.full(len(frame), None, object) if column == "verdict" else np.nan
        for slot in slots:
            mine = np.flatnonzero(frame["parameter"] == slot.name)
            followed = self._followed(slot) if len(mine) else None
            if followed is not None:
                at = _place(slot).local_index(0, _flat_index(frame["index"].iloc[mine], _weight_shape(slot)))
                for column, values in followed.columns(at).items():
                    frame.iloc[mine, frame.columns.get_loc(column)] = values  # type: ignore[index]
                frame.attrs.update(backwards=followed.backwards, false_discovery_rate=Q)

    def _stamped(self, frame: pd.DataFrame, before: bool) -> pd.DataFrame:
        averaged = ranks.count() > 1 and self._capture.gradients.averaged
        stage = Stage.USED if not before else Stage.REDUCED if averaged else Stage.ACCUMULATED
        frame.attrs.update(step=self._clock.step if before else self._clock.step - 1, stage=stage.value)
        return frame

    def _seen(self, name: str, flat: int) -> list[float]:
        """This weight's partials, one a step, where it was kept among the most sensitive."""
        seen: dict[int, float] = {}
        for snapshot in self._pipeline.history:
            row = snapshot.parameters.position.get(name)
            if row is not None and snapshot.top is not None:
                at = np.flatnonzero(snapshot.top.index[row] == flat)
                if len(at):
                    seen[snapshot.step] = float(snapshot.top.partial[row][at[0]])
        return list(seen.values())

    def _title(self) -> str:
        return "gradlens" if self._run is None else f"gradlens: {self._run}"


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
        features: `"updates"`, `"flips"`, `"evidence"`: what needs buffers as large as the weights.
        memory: what those buffers may take together; what does not fit works on a seeded sample.
        rules: callables `history -> findings`.
        on_finding: `"record"`, `"warn"`, `"raise"` (in the training thread, after an update), or a callable.
        budget: the share of the training time that gradlens may cost, such as 0.01; it stretches its schedule to keep it.
        first_step: the number of the first step, for a training that goes on from a checkpoint.

    Raises:
        gradlens.GradlensError: an argument that cannot be meant; nothing is attached then.
    """
    stages = _stages(stage)
    chosen = _words("features", features, FEATURES)
    if not callable(on_finding) and on_finding not in ON_FINDING:
        raise choice("on_finding", str(on_finding), ON_FINDING)
    if budget is not None and not 0 < budget <= 1:
        raise ArgumentError(f"budget is a share of the training time between 0 and 1, such as 0.01, not {budget!r}")
    if isinstance(first_step, bool) or not isinstance(first_step, int) or first_step < 0:
        raise ArgumentError(f"first_step is the number of a step, 0 or more, not {first_step!r}")
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise ArgumentTypeError(f"scaler is a torch.amp.GradScaler, not {type(scaler).__name__}")
    lens = Lens(
        target,
        _optimizers(optimizer),
        run=None if run is None else Path(run),
        writers=_writers(writers),
        schedule=as_schedule(schedule),
        select=select,
        stages=stages,
        scaler=scaler,
        features=chosen,
        memory=parse_bytes(memory),
        rules=_rules(rules),
        on_finding=on_finding,
        budget=budget,
        first_step=first_step,
        local=ranks.count() > 1,
    )
    _announce(lens)
    return lens


def _announce(lens: Lens) -> None:
    slots = lens._slots()
    where = "" if lens._run is None else f"; records go to {lens._run}"
    print(
        f"gradlens: watching {len(slots)} parameters, {sum(map(_numel, slots)):,} weights{where}; {lens._plan.describe()}",
        file=sys.stderr,
    )


def _check_stage(stage: str | None) -> None:
    if stage is not None and stage not in list(Stage):
        raise choice("stage", str(stage), list(Stage))


def _stages(given: str | Iterable[str] | None) -> frozenset[str]:
    if given is None:
        return frozenset({"reduced", "used"} if ranks.count() > 1 else {"backward", "used"})
    return _words("stage", [given] if isinstance(given, str) else given, list(Stage), empty=False)


def _words(what: str, given: Iterable[str], allowed: Sequence[str], *, empty: bool = True) -> frozenset[str]:
    if isinstance(given, str):
        given = [given]
    words = list(given)
    for word in words:
        if word not in list(allowed):
            raise choice(what, str(word), allowed)
    if not words and not empty:
        raise ArgumentError(f"{what} is empty; name one or several of {', '.join(map(repr, map(str, allowed)))}")
    return frozenset(str(word) for word in words)


def _optimizers(given: Any) -> list[torch.optim.Optimizer]:
    if given is None:
        return []
    listed = list(given) if isinstance(given, list | tuple | set | frozenset) else [given]
    result = [inner(optimizer) for optimizer in listed]
    for optimizer, original in zip(result, listed, strict=True):
        if not isinstance(optimizer, torch.optim.Optimizer):
            hint = "; the model comes first: watch(model, optimizer)" if isinstance(original, torch.nn.Module) else ""
            raise ArgumentTypeError(
                f"optimizer is a torch.optim.Optimizer, or a list of them, not {type(original).__name__}{hint}"
            )
    return result


def _writers(given: Iterable[Writer]) -> list[Writer]:
    result = list(given)
    for writer in result:
        lacking = [call for call in ("write", "flush", "close") if not callable(getattr(writer, call, None))]
        if lacking:
            raise ArgumentTypeError(
                f"a writer has write(record), flush() and close(); {type(writer).__name__} lacks {lacking[0]}()"
            )
    return result


def _rules(given: Iterable[Any]) -> list[Any]:
    result = list(given)
    for rule in result:
        if not callable(rule) or isinstance(rule, type):
            raise ArgumentTypeError(
                f"a rule is a callable history -> findings (an instance, if it is a class), not {rule!r}"
            )
    return result


def _warn_of_strangers(optimizers: Sequence[torch.optim.Optimizer], attachment: Attachment, target: Target) -> None:
    """An optimizer that moves nothing of the model is a mistake that the user should hear of."""
    mine = {id(t) for slot in attachment.slots if (t := slot.tensor()) is not None}
    parts = attachment.target().values()
    mine |= {id(p) for part in parts if isinstance(part, torch.nn.Module) for p in part.parameters()}
    for optimizer in optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        strange = [p for p in held if id(p) not in mine]
        if strange:
            shapes = ", ".join(str(tuple(p.shape)) for p in strange[:3])
            warnings.warn(
                GradlensWarning(
                    f"{len(strange)} of the {len(held)} parameters of {type(optimizer).__name__} are not the model's "
                    f"(shapes {shapes}{', ...' if len(strange) > 3 else ''}); was it made for another model, or before the "
                    "model's parameters were replaced?"
                ),
                stacklevel=4,
            )


def _plan(attachment: Attachment, features: frozenset[str], stages: frozenset[str], memory: int) -> Plan:
    buffers = ("updates" in features and "used" in stages) + ("flips" in features) * len(stages)
    named = [word for word in FEATURES if word in features and (word != "updates" or "used" in stages)]
    more = Evidence.BYTES * ("evidence" in features)
    return Plan.of(attachment.parameters, memory, buffers, more=more, what=" and ".join(named) or "nothing")


def _settings(
    attachment: Attachment, stages: frozenset[str], features: frozenset[str], plan: Plan, schedule: Schedule, first_step: int
) -> dict[str, Any]:
    return {
        "stages": sorted(stages),
        "features": sorted(features),
        "schedule": repr(schedule),
        "first_step": first_step,
        "sampled": plan.share,
        "torch": torch.__version__,
        "rank": ranks.rank(),
        "ranks": ranks.count(),
        "aliases": dict(attachment.aliases),
    }


def _run_writers(run: Path, settings: dict[str, Any], first_step: int, tell: Callable[[Finding], None]) -> list[Writer]:
    """The durable store, and TensorBoard beside it, which the first rank draws for all."""
    from gradlens.store.store import Store
    from gradlens.writers.tensorboard import TensorBoard

    resumed = run.is_dir() and any(run.glob("events.out.tfevents.*"))
    rank, together = settings["rank"], settings["ranks"]
    shared = ranks.store(run.name) if together > 1 else None
    store = Store(run, settings)
    try:
        if rank:
            return [store] if shared is None else [store, Background(Sender(shared, rank, together), patience=PARTING)]
        board = TensorBoard(run, purge_step=first_step if resumed else None)
        if shared is not None:
            return [store, Background(Pooled(board, shared, together), patience=2 * PARTING + PATIENCE)]
        if together > 1:
            tell(_apart(first_step))
        return [store, board]
    except BaseException:
        store.close()
        raise


def _apart(step: int) -> Finding:
    return Finding(
        rule="ranks-apart",
        step=step,
        severity=Severity.INFO,
        seen="the process group met in a file, which would grow with all that is sent through it: the dashboard shows the "
        "first rank's own table",
        remedy="meet at an address (torchrun does; init_method='env://' or 'tcp://...'); open_run() pools the records",
    )


# --- weights --------------------------------------------------------------------------------------------------------


def _local(slot: Slot) -> Tensor:
    tensor = slot.tensor()
    assert tensor is not None
    return plain(tensor.detach())


def _gradient(slot: Slot) -> Tensor | None:
    tensor = slot.tensor()
    return None if tensor is None or not tensor.requires_grad else tensor.grad


def _reals(tensor: Tensor) -> Tensor:
    """Flat, dense, real: a complex entry is two weights."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.reshape(-1)


def _place(slot: Slot) -> Parameters:
    """What this rank holds of the parameter, and where that is in the whole."""
    tensor = slot.tensor()
    assert tensor is not None
    pieces = (piece(tensor),)
    return Parameters((slot.name,), (tuple(tensor.shape),), (str(tensor.dtype).removeprefix("torch."),), pieces)


def _here(slot: Slot, at: tuple[int, ...], whole: int) -> int:
    """Where a weight is in what this rank holds."""
    place = _place(slot)
    local = int(place.local_index(0, np.asarray([whole]))[0])
    if local < 0:
        raise ArgumentError(
            f"{slot.name}{list(at)} is on another rank; this one holds {place.piece(0)} of {slot.name}. Ask there, or "
            "gradlens.open_run(...).weights(), which has all ranks' most sensitive weights"
        )
    if summand(_gradient(slot)):
        raise ArgumentError(
            f"the partial of {slot.name}{list(at)} is the sum of what the ranks have (placement Partial), and this one has "
            "a part; reduce it first: p.grad.full_tensor()"
        )
    return local


def _require_whole(slots: Sequence[Slot]) -> None:
    parts = [slot.name for slot in slots if _place(slot).piece(0) or summand(_gradient(slot))]
    if parts:
        few = ", ".join(parts[:3]) + (", ..." if len(parts) > 3 else "")
        raise ArgumentError(
            f"gradient() is all partials in one tensor, and this rank holds a part of {len(parts)} parameters ({few}). "
            "weights() has what is here, by the index in the whole; p.grad.full_tensor(), called on all ranks, gathers one"
        )


def _weight_shape(slot: Slot) -> tuple[int, ...]:
    """Of the whole parameter; a complex entry is two weights."""
    tensor = slot.tensor()
    assert tensor is not None
    return (*tensor.shape, 2) if tensor.is_complex() else tuple(tensor.shape)


def _flat_index(index: pd.Series, shape: tuple[int, ...]) -> np.ndarray:
    if not shape:
        return np.zeros(len(index), np.int64)
    return np.ravel_multi_index(tuple(np.asarray(index.tolist(), np.int64).T), shape).astype(np.int64)


def _numel(slot: Slot, *, here: bool = False) -> int:
    """The parameter's weights: all of them, or those that this rank holds."""
    tensor = slot.tensor()
    if tensor is None or isinstance(tensor, torch.nn.parameter.UninitializedParameter):
        return 0
    return (plain(tensor) if here else tensor).numel() * (2 if tensor.is_complex() else 1)


def _key(partials: Tensor, values: Tensor, by: str) -> Tensor:
    keys = {"sensitivity": partials, "saliency": partials * values, "value": values, "partial": partials}
    return keys[by].abs().nan_to_num(nan=-1.0)


def _ordered(frame: pd.DataFrame, top: int | None, by: str) -> pd.DataFrame:
    if top is None:
        return frame
    order = frame[by].abs().sort_values(ascending=False, kind="stable", na_position="last").index[:top]
    return frame.loc[order].reset_index(drop=True)


def _concat(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    import pandas as pd

    if not parts:
        return frames.weights("", (), np.empty(0), np.empty(0), np.empty(0))
    return pd.concat(parts, ignore_index=True)


def _scalar(name: str, value: Any) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ArgumentError(f"observe({name}=...) takes one number, not a tensor of shape {tuple(value.shape)}")
        return value.detach().reshape(()).clone()
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ArgumentTypeError(f"observe({name}=...) takes a number or a tensor of one, not {value!r}") from None


def _nothing(closed: bool) -> str:
    if closed:
        return "nothing was captured before close()"
    return (
        "nothing was captured yet: no backward() has reached a watched parameter on an observed step since watch(). Call "
        "loss.backward() first"
    )


# --- the end --------------------------------------------------------------------------------------------------------


def _orphan(lens: weakref.ref[Lens]) -> None:
    """A part of the target died. When none is left, close from a thread of its own: this one may hold any lock."""
    alive = lens()
    if alive is not None and not alive._capture.attachment.alive():
        threading.Thread(target=alive.close, name="gradlens-close", daemon=True).start()


@atexit.register
def _close_all() -> None:
    for lens in list(_open_lenses):
        with contextlib.suppress(Exception):
            lens.close()
