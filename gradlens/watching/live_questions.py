"""The questions about live weights: what is in `.grad` now, of which step that is, and what was kept where it is gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from gradlens.analysis.history import History
from gradlens.capture.watcher import Watcher
from gradlens.errors import ArgumentError, NothingCapturedError, nearest
from gradlens.records import Snapshot, Stage
from gradlens.statistics.streaming import describe
from gradlens.watching import live_weights as weights
from gradlens.watching import process_group
from gradlens.watching.isolation import isolated_compute
from gradlens.watching.live_weights import LiveParameter
from gradlens.watching.recorder import Recorder
from gradlens.watching.tables import TableBuilder
from gradlens.weight_names import known_name, label, parse_index, parse_weight
from gradlens.writers import report as page

if TYPE_CHECKING:
    import pandas as pd


class LiveQuestions:
    """What `Lens` answers of single weights."""

    def __init__(self, watcher: Watcher, tables: TableBuilder, recorder: Recorder) -> None:
        self._watcher, self._tables, self._recorder = watcher, tables, recorder
        self.closed = False

    def held(self) -> list[LiveParameter]:
        """The parameters that are alive, in model order."""
        slots = self._watcher.attachment.slots
        return [LiveParameter(slot, tensor) for slot in slots if (tensor := slot.tensor()) is not None]

    def gradient(self) -> Tensor:
        """`Lens.gradient`: all partials in one flat tensor."""
        self._require_here()
        everything = self.held()
        weights.check_whole(everything)
        self._require_gradients(everything)
        with isolated_compute():
            return weights.flat_gradient(everything, [self._scale(held) for held in everything])

    def weights(self, name: str | None = None, *, top: int | None = None, by: str = "sensitivity") -> pd.DataFrame:
        """`Lens.weights`: one row a weight."""
        weights.check_order(top, by)
        if name is not None:
            name, index = parse_weight(name, [held.name for held in self.held()])
            if index is not None:
                return _only(self.weights(name), name, index)
        asked = self.held() if name is None else [self._held(name)]
        self._watcher.close_skipped_step()
        if self._watcher.elsewhere() or not self._has_gradients():
            return self._kept_weights(asked, top, by)
        if top is None and name is None:
            weights.check_rows(asked)
        with isolated_compute():
            scales = [self._scale(held) for held in asked]
            if top is None:
                result = weights.joined([held.frame(scale) for held, scale in zip(asked, scales, strict=True)], top, by)
            else:
                result = weights.largest(asked, scales, top, by)
            self._add_evidence(result, asked)
        summands = [held.name for held in asked if held.summand]
        result.attrs.update({"summands": summands} if summands else {})
        return self._stamped(result, self._watcher.step.open)

    def explain(self, name: str, index: int | Sequence[int] | None = None) -> str:
        """`Lens.explain`: one paragraph on one weight."""
        name, at = self._weight(name, index)
        held = self._held(name)
        self._require_here()
        self.catch_up()
        whole, here = held.at(at)
        self._require_gradients([held])
        with isolated_compute():
            (partial, larger), value = held.partial(here, self._scale(held)), held.value(here)
            evidence = self._evidence_of(held, here)
        return page.explain(
            held.name,
            tuple(int(i) % size for i, size in zip(at, held.shape, strict=True)),
            value=value,
            partial=partial,
            rank=larger + 1,
            numel=held.numel(here=True),
            history=self._seen(held.name, whole),
            evidence=evidence,
        )

    def catch_up(self) -> None:
        """What has been captured so far reaches the history and the writers."""
        if not self.closed and not self._watcher.elsewhere():
            self._watcher.close_skipped_step()
            self._tables.release_open(self._watcher.step.scalars)
        self._recorder.flush()

    def history(self) -> History:
        """What is in memory; an error where that is nothing."""
        if not len(self._recorder.history):
            raise NothingCapturedError(self._nothing())
        return self._recorder.history

    def snapshot_at(self, step: int | None, stage: str | None) -> Snapshot:
        """That step's last stage read; an error where it is not in memory."""
        history = self.history()
        try:
            return history.at(step, stage)
        except (KeyError, LookupError) as error:
            steps = history.steps()
            raise ArgumentError(
                f"no {stage or 'snapshot'} of step {step} in memory; there are steps {steps[0]} to {steps[-1]}, stages "
                f"{', '.join(sorted({str(s.stage) for s in history}))}"
            ) from error

    # --- details ----------------------------------------------------------------------------------------------------

    def _weight(self, name: str, index: int | Sequence[int] | None) -> tuple[str, tuple[int, ...]]:
        """The parameter and the index of one weight, which may be written as text: `fc1.weight[3, 17]`."""
        if index is not None:
            return name, parse_index(index)
        name, written = parse_weight(name, [held.name for held in self.held()])
        return name, written or ()

    def _held(self, name: str) -> LiveParameter:
        everything = {held.name: held for held in self.held()}
        alias = self._watcher.attachment.aliases.get(name, name)
        found = everything.get(known_name(alias, everything) or alias)
        if found is None:
            raise ArgumentError(f"there is no watched parameter {name!r}{nearest(str(name), everything)}")
        return found

    def _scale(self, held: LiveParameter) -> float | Tensor:
        return self._watcher.scale_now(held.slot)

    def _has_gradients(self) -> bool:
        return any(held.gradient is not None for held in self.held())

    def _require_here(self) -> None:
        if self._watcher.elsewhere():
            raise NothingCapturedError(
                "another thread trains this model, and .grad must not be read while it does; ask from that thread, or ask "
                "weights(top=k) or table(), which answer from what was kept"
            )

    def _require_gradients(self, asked: Sequence[LiveParameter]) -> None:
        self._require_here()
        self._watcher.close_skipped_step()
        if any(held.gradient is not None for held in asked):
            return
        if not self._tables.open.count:
            raise NothingCapturedError(self._nothing())
        if len(asked) == 1 and self._has_gradients():
            return  # this one is absent: its partials are 0
        raise NothingCapturedError(
            "the gradients are gone (zero_grad() was called); ask between backward() and zero_grad(), or ask "
            "weights(top=k), which answers from what was kept"
        )

    def _kept_weights(self, asked: Sequence[LiveParameter], top: int | None, by: str) -> pd.DataFrame:
        self.catch_up()
        history = self.history()
        if top is None:
            self._require_gradients(asked)
        snapshot = history.at()
        result = weights.kept(snapshot, asked, top, by)
        with isolated_compute():
            self._add_evidence(result, asked)
        result.attrs.update(step=snapshot.step, stage=str(snapshot.stage))
        return result

    def _add_evidence(self, frame: pd.DataFrame, asked: Sequence[LiveParameter]) -> None:
        if self._tables.evidence is not None:
            weights.add_evidence(frame, asked, self._tables.evidence.of)

    def _evidence_of(self, held: LiveParameter, here: int) -> str:
        followed = None if self._tables.evidence is None else self._tables.evidence.of(held.name)
        return "" if followed is None else describe(followed.columns(np.asarray([here])), followed.backwards)

    def _stamped(self, frame: pd.DataFrame, before: bool) -> pd.DataFrame:
        before = before or self._watcher.gradients_unheard()
        averaged = process_group.count() > 1 and self._watcher.averaged()
        stage = Stage.USED if not before else Stage.REDUCED if averaged else Stage.ACCUMULATED
        frame.attrs.update(step=self._watcher.step.number if before else self._watcher.step.number - 1, stage=stage.value)
        return frame

    def _seen(self, name: str, flat: int) -> list[float]:
        """This weight's partials, one a step, where it was kept among the most sensitive."""
        seen: dict[int, float] = {}
        for snapshot in self._recorder.history:
            row = snapshot.parameters.position.get(name)
            if row is not None and snapshot.top is not None:
                at = np.flatnonzero(snapshot.top.index[row] == flat)
                if len(at):
                    seen[snapshot.step] = float(snapshot.top.partial[row][at[0]])
        return list(seen.values())

    def _nothing(self) -> str:
        if self.closed:
            return "nothing was captured before close()"
        return (
            "nothing was captured yet: no backward() has reached a watched parameter on an observed step since watch(). "
            "Call loss.backward() first"
        )


def _only(frame: pd.DataFrame, name: str, index: tuple[int, ...]) -> pd.DataFrame:
    """The row of one weight."""
    row = frame[[at == index for at in frame["index"]]].reset_index(drop=True)
    if row.empty:
        raise ArgumentError(f"{label(name, index)} is not among the weights of {name} that are here")
    row.attrs.update(frame.attrs)
    return row
