"""Evidence from the gradients that training computes anyway.

Each backward's own partials go into `Evidence` as they are read: at the end of the pass, in batches, or one parameter at a
time inside a hook. Where the allowance is too small for every weight, those of the `Plan`'s seeded sample are followed.
Nothing here waits for the device until a question is asked.

What is not a repeated measurement of the same partial is left out:

- a backward that ran while the weights may move within the step (inside an optimizer's closure, or after another
  optimizer's step): its partials are of other weights;
- for that step, a parameter whose partials were not computed in one of its backwards (frozen meanwhile, or not among
  `backward(inputs=...)`). One that the loss does not depend on has partials of 0, which count;
- a step in which a backward failed after some of its partials were taken, or ran in one thread beside another's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gradlens.records import COMPLEX, Parameters, Verdict
from gradlens.statistics.evidence import VERDICTS, Evidence, TestResults
from gradlens.statistics.memory import Plan

Q = 0.1  #: the false discovery rate of the verdicts


@dataclass(frozen=True, eq=False)
class ParameterEvidence:
    """Evidence on one parameter: an entry for each weight that is followed."""

    index: np.ndarray  #: int64, into the flattened parameter; a complex entry is two weights
    backwards: int  #: that the verdicts rest on
    verdict: np.ndarray  #: words of `Verdict`; None where the last step had fewer than two backwards
    t: np.ndarray
    p: np.ndarray
    q: np.ndarray
    agree: np.ndarray  #: over steps, as in `evidence.OverTime`
    flips: np.ndarray
    gsnr: np.ndarray

    OVER_STEPS = ("agree", "flips", "gsnr")  #: while the weights move: descriptions; the others are tests at fixed weights
    COLUMNS = ("verdict", "t", "p", "q", *OVER_STEPS)

    def columns(self, at: np.ndarray) -> dict[str, np.ndarray]:
        """The columns for the given flat indices; empty for a weight that is not followed."""
        place = np.searchsorted(self.index, at)
        place[place == len(self.index)] = 0
        known = self.index[place] == at if len(self.index) else np.zeros(len(at), bool)
        result = {}
        for name in self.COLUMNS:
            values = getattr(self, name)
            column = np.full(len(at), None if name == "verdict" else np.nan, dtype=values.dtype)
            column[known] = values[place[known]]
            result[name] = column
        return result


class EvidenceCollector:
    """The feature `evidence`: takes each backward's partials, and answers for each parameter."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._samples = plan, plan.samples
        self._parameters: Parameters | None = None
        self._forget()
        self.left_out = ""  #: why a backward or a step was, the last time

    def _forget(self) -> None:
        self._evidence = Evidence([])
        self._at: dict[int, int] = {}  # the place in `_evidence` of each row
        self._backward: int | None = None  # the one under way
        self._seen: set[int] = set()
        self._over: set[int] = set()  # the backwards of the step that are over
        self._missed: set[int] = set()  # rows that some backward of the step did not compute
        self._spoiled = False
        self._judged: TestResults | None = None

    def add(
        self, parameters: Parameters, backward: int, rows: Sequence[int], tensors: Sequence[Tensor], divisor: float | Tensor
    ) -> None:
        """Some parameters' own partials of one backward; each parameter once."""
        if parameters is not self._parameters:
            self._forget()  # rows mean other parameters from here on
            self._parameters, self._samples = parameters, self._plan.samples_of(parameters)
        if backward != self._backward:
            self.ended()
            if not self._over:
                self._missed = set()  # the verdicts of the last step end here
            if backward in self._over:
                self._spoil("backwards ran beside each other, in several threads")
            self._evidence.begin()
            self._backward = backward
        self._judged = None
        if not self._seen.isdisjoint(rows):
            self._spoil("a parameter's partials came twice in one backward")
        if self._spoiled:
            return
        views = {row: self._view(row, g) for row, g in zip(rows, tensors, strict=True)}
        new = [row for row in rows if row not in self._at]
        if new:
            self._evidence.grow([_reals(views[row]) for row in new])
            first = len(self._at)
            self._at.update((row, first + i) for i, row in enumerate(new))
            self._leave_out(self._missed.intersection(new))
        self._seen.update(rows)
        self._evidence.moments.add({self._at[row]: g for row, g in views.items()}, divisor)

    def ended(self, missed: Collection[int] = ()) -> None:
        """The backward under way is over: what it did not reach had partials of 0, except those in `missed`."""
        if self._backward is not None:
            if not self._spoiled:
                self._evidence.moments.add({at: None for row, at in self._at.items() if row not in self._seen})
            self._leave_out(missed)
            self._over.add(self._backward)
        self._backward = None
        self._seen = set()

    def _leave_out(self, rows: Collection[int]) -> None:
        self._missed.update(rows)
        for row in rows:
            if row in self._at:
                self._evidence.moments.leave_out(self._at[row])

    def failed(self, backward: int) -> None:
        """This backward raised. Partials that were already added cannot be subtracted, so the step has no evidence."""
        if backward == self._backward:
            self._spoil("a backward failed after some of its partials were taken")
            self._backward, self._seen = None, set()

    def _spoil(self, why: str) -> None:
        self._spoiled, self.left_out = True, why

    def moving(self) -> None:
        """A backward ran while the weights may move: leave it out."""
        self.left_out = "backwards ran while the weights may move within the step (a closure, another optimizer's step)"

    def step_done(self) -> None:
        """The step is over."""
        self.ended()
        if self._spoiled:
            self._evidence.clear()
        self._spoiled = False
        self._over = set()
        self._evidence.step_done()

    def _view(self, row: int, g: Tensor) -> Tensor:
        return self._samples[row].view(g.to_dense() if g.is_sparse else g)

    def of(self, name: str) -> ParameterEvidence | None:
        """The evidence on a parameter; None where there is none."""
        row = None if self._parameters is None else self._parameters.position.get(name)
        at = None if row is None else self._at.get(row)
        if at is None or row is None or self._parameters is None or self._spoiled:
            return None
        moments = self._evidence.moments
        judged = None if row in self._missed else self._judge()
        size, start = moments.sizes[at], sum(moments.sizes[:at])
        mine = slice(start, start + size)
        over = self._evidence.over_time(at)
        empty = np.full(size, np.nan)
        return ParameterEvidence(
            index=self._index(row, size),
            backwards=moments.count,
            verdict=np.full(size, None, object) if judged is None else np.asarray(VERDICTS, object)[judged.verdict[mine]],
            t=empty if judged is None else judged.t[mine],
            p=empty if judged is None else judged.p[mine],
            q=empty if judged is None else judged.q[mine],
            agree=over.agree,
            flips=over.flips,
            gsnr=over.gsnr,
        )

    def _judge(self) -> TestResults | None:
        """The verdicts on every weight that is followed, together: false discoveries are counted over all of them."""
        if self._judged is None and self._seen == set():
            self._judged = self._evidence.verdicts(Q)
        return self._judged

    def _index(self, row: int, size: int) -> np.ndarray:
        """The flat indices of the weights that are followed."""
        assert self._parameters is not None
        width = 2 if self._parameters.dtypes[row] in COMPLEX else 1
        sample = self._samples[row]
        entries = np.arange(size // width, dtype=np.int64)
        if not sample.whole:
            entries = sample.start + sample.stride * entries
        return (entries[:, None] * width + np.arange(width)).reshape(-1)


def describe(found: dict[str, np.ndarray], backwards: int) -> str:
    """The evidence on one weight in sentences; empty where there is none."""
    verdict, q, agree, flips = (found[name][0] for name in ("verdict", "q", "agree", "flips"))
    sentences = []
    if verdict == Verdict.UNDECIDED.value:
        sentences.append(f"Over the last step's {backwards} micro-batches its direction is undecided.")
    elif isinstance(verdict, str):
        sentences.append(f"Over the last step's {backwards} micro-batches the verdict is {verdict} (q = {q:.2g}).")
    if np.isfinite(agree):
        sentences.append(f"Over recent steps, while the weights moved, its sign was the more frequent one in {agree:.0%}")
        sentences[-1] += f" and turned in {flips:.0%} of the steps." if np.isfinite(flips) else " of the steps."
    return " ".join(sentences)


def _reals(tensor: Tensor) -> Tensor:
    return tensor.new_empty((2 * tensor.numel(),), dtype=tensor.real.dtype) if tensor.is_complex() else tensor
