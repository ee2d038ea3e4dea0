"""What a survey found: verdicts on weights, as arrays, as tables, and as a text to print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from gradlens import markup
from gradlens.probes.per_weight import PerWeight
from gradlens.statistics.evidence import REASONS, VERDICTS, TestResults

if TYPE_CHECKING:
    import pandas as pd

#: By the number of batches: the share of wrong verdicts on a language model's output layer, late in training, at q = 0.1
#: (benchmarks/layers.csv). In all its other layers it was 2 % and less.
RARE = {8: 0.41, 16: 0.33, 32: 0.23, 64: 0.12}
MOVE = 1e-4  #: the move that `expected_change` is for, and that `nudge` makes


@dataclass(frozen=True, eq=False, repr=False)
class Survey(markup.Shown, PerWeight):
    """Verdicts on the weights of a model, and how sure they are.

    One row a weight in `frame`: `parameter, index, value, partial, verdict, t, p, q, agree, expected_change, reason`.
    `partial` is the mean over the batches; `expected_change` is that of the loss if this weight alone follows its verdict
    by 1e-4; `weights(top=)` takes those of the largest |t|.
    """

    results: TestResults
    batches: int  #: K
    sizes: tuple[float, float] | None  #: smallest and largest batch, where they say how large they are
    level: float  #: q
    method: str
    loss: float  #: mean over the batches
    training: str  #: `train`, `eval` or `mixed`: the mode the verdicts hold for
    total: int  #: weights of the parameters surveyed, sampled or not
    spoiled: tuple[int, ...] = ()  #: the batches, from 0, whose loss or partials were not finite
    chosen: str = ""  #: how the weights surveyed were: by `sample`, by `sensitivity` (top=); empty: all of them

    @property
    def verdict(self) -> np.ndarray:
        """The words, one a weight."""
        return np.array(VERDICTS, dtype=object)[self.results.verdict]

    @property
    def coverage(self) -> float:
        """The share of the weights surveyed that have a verdict."""
        return float(np.mean(self.results.verdict != 0)) if len(self) else float("nan")

    @property
    def expected_change(self) -> float:
        """First-order change of the loss if every verdict is followed by a move of 1e-4, all at once.

        Kept means are exaggerated a little, having been picked for their size.
        """
        return float(-MOVE * np.abs(self.results.mean[self.results.verdict != 0]).sum())

    @cached_property
    def reasons(self) -> dict[str, int]:
        """Why weights are undecided (`weak, sparse, always_zero, nonfinite`), or certain (`constant`): how many of each."""
        counts = np.bincount(self.results.reason, minlength=len(REASONS))
        return {word: int(n) for word, n in zip(REASONS[1:], counts[1:], strict=True) if n}

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a parameter: `parameter, surveyed, increase, decrease, undecided, coverage, expected_change`, reasons."""
        import pandas as pd

        spans = [slice(*bounds) for bounds in self.bounds]
        verdicts = np.array([np.bincount(self.results.verdict[s], minlength=len(VERDICTS)) for s in spans])
        reasons = np.array([np.bincount(self.results.reason[s], minlength=len(REASONS)) for s in spans])
        moved = np.where(self.results.verdict != 0, np.abs(self.results.mean), 0)
        surveyed = verdicts.sum(axis=1)
        with np.errstate(invalid="ignore"):
            coverage = (verdicts[:, 1] + verdicts[:, 2]) / surveyed
        return pd.DataFrame(
            {
                "parameter": pd.Series(self.parameters.names, dtype="str"),
                "surveyed": surveyed,
                "increase": verdicts[:, 1],
                "decrease": verdicts[:, 2],
                "undecided": verdicts[:, 0],
                "coverage": coverage,
                "expected_change": [-MOVE * float(moved[s].sum()) for s in spans],
                **{word: reasons[:, i] for i, word in enumerate(REASONS) if word},
            }
        )

    def strength(self, chosen: np.ndarray) -> np.ndarray:
        """|t|."""
        return np.abs(self.results.t[chosen])

    def columns(self, chosen: np.ndarray) -> dict[str, object]:
        """The evidence and the verdict."""
        import pandas as pd

        j = self.results
        return {
            "partial": j.mean[chosen],
            "verdict": pd.Series(self.verdict[chosen], dtype="str"),
            "t": j.t[chosen],
            "p": j.p[chosen],
            "q": j.q[chosen],
            "agree": j.agree[chosen],
            "expected_change": np.where(j.verdict[chosen] != 0, -MOVE * np.abs(j.mean[chosen]), 0.0),
            "reason": pd.Series(np.array(REASONS, object)[j.reason[chosen]], dtype="str"),
        }

    def __str__(self) -> str:
        increase, decrease = (int((self.results.verdict == i).sum()) for i in (1, 2))
        undecided = len(self) - increase - decrease
        sampled = f" (a sample of {self.total:,})" if self.chosen == "sample" else ""
        if self.chosen == "sensitivity":
            sampled = f" (the most sensitive of {self.total:,} in the first batch)"
        why = " · ".join(f"{word} {n:,}" for word, n in self.reasons.items() if word != "constant")
        lines = [
            self._first(increase + decrease),
            f"  survey of {len(self):,} weights{sampled} over {self.batches} batches{self._of_size()}, "
            f"{self.training} mode, mean loss {self.loss:.6g}, df {self.batches - 1}",
            f"  increase {increase:,} · decrease {decrease:,} · undecided {undecided:,}{f' ({why})' if why else ''} · "
            f"coverage {self.coverage:.1%}",
        ]
        if self.reasons.get("constant"):
            lines.append(f"  {self.reasons['constant']:,} verdicts rest on partials that were the same in every batch")
        if self.spoiled:
            lines.append(f"  not finite: {numbered(self.spoiled)}; leave them out")
        if increase + decrease == 0 and self.reasons.keys() <= {"nonfinite", "always_zero"}:
            return "\n".join(lines)
        if increase + decrease == 0:
            return "\n".join([*lines, f"  nothing is certain enough at q = {self.level:g} ({self.method})"])
        best = self.table.sort_values("coverage", ascending=False, kind="stable").head(3)
        most = ", ".join(f"{name} {share:.0%}" for name, share in zip(best["parameter"], best["coverage"], strict=True))
        return "\n".join(
            [
                *lines,
                f"  most decided: {most}",
                f"  expected change of the loss if they all move by {MOVE:g}: {self.expected_change:.3g}",
                f"  q = {self.level:g} ({self.method}): at most {100 * self.level:g}% of the verdicts are expected to be "
                "wrong",
                *(f"  but {caveat}" for caveat in self.caveats),
            ]
        )

    def _first(self, decided: int) -> str:
        """What came of it and what to do next, in one sentence."""
        if decided:
            return (
                f"a direction is known for {decided:,} of {len(self):,} weights ({self.coverage:.0%}); nudge(...) shows "
                f"whether the loss follows them"
            )
        if self.spoiled and len(self.spoiled) == self.batches:
            return "no direction is known: no batch gave finite partials; find the operation by trace_nonfinite"
        if self.reasons.get("always_zero") == len(self):
            return "no direction is known: every partial was 0 in every batch; the loss does not change with these weights"
        return "no direction is known: these batches do not agree on any; take more or larger ones"

    @property
    def caveats(self) -> tuple[str, ...]:
        """Where more verdicts are wrong than q says, of what applies here; measured in docs/evidence.md."""
        near = max((k for k in RARE if k <= self.batches), default=min(RARE))
        said = [
            f"{self.batches} batches cannot know of what happens in few of them or none: in the output layer of a language "
            f"model, whose rows belong to rare tokens, {RARE[near]:.0%} were wrong at {near} batches, in its other layers "
            f"hardly any (leave such a layer out by select, or take many more batches)"
        ]
        if self.method == "bh":
            said.append(
                "correlated weights are wrong together, many in one survey, none in the next (method='by' is safer there)"
            )
        said.append(
            "they speak of the data that these batches come from: held against other data more were wrong, on an overfitted "
            "model more than half"
        )
        return tuple(said)

    def _of_size(self) -> str:
        if self.sizes is None:
            return ""
        low, high = self.sizes
        return f" of {low:g}" if low == high else f" of {low:g} to {high:g} examples, weighted by their size"


def numbered(batches: Sequence[int]) -> str:
    """Batches by their numbers: `batch 3`, `batches 3 and 5`, `batches 0, 1, 2 and 7 more`."""
    if len(batches) == 1:
        return f"batch {batches[0]}"
    shown, last = [str(k) for k in batches[:3]], f"{len(batches) - 3} more"
    if len(batches) <= 3:
        *shown, last = shown
    return f"batches {', '.join(shown)} and {last}"
