"""What a survey found: verdicts on weights, as arrays, as tables, and as a text to print."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from gradlens.errors import ArgumentError, nearest
from gradlens.records import Parameters
from gradlens.statistics.evidence import REASONS, VERDICTS, Judged

if TYPE_CHECKING:
    import pandas as pd

MOVE = 1e-4  #: the move that `expected_change` is for, and that `nudge` makes
ROWS = 1_000_000  #: that a frame has at most


@dataclass(frozen=True, eq=False)
class Survey:
    """Verdicts on the weights of a model, and how sure they are.

    Arrays hold one entry a weight surveyed, parameters one after another; `frame` is the same as a table.
    """

    parameters: Parameters
    index: tuple[np.ndarray | None, ...]  #: flat indices of the weights surveyed of each parameter; None: all of them
    value: np.ndarray  #: of the weights, float64
    judged: Judged
    batches: int  #: K
    sizes: tuple[int, int] | None  #: smallest and largest batch, where they say how large they are
    level: float  #: q
    method: str
    loss: float  #: mean over the batches
    training: str  #: `train`, `eval` or `mixed`: the mode the verdicts hold for
    total: int  #: weights of the parameters surveyed, sampled or not

    def __len__(self) -> int:
        return len(self.value)

    @cached_property
    def counts(self) -> np.ndarray:
        """How many weights of each parameter were surveyed."""
        numel = [int(np.prod(shape, dtype=np.int64)) for shape in self.parameters.shapes]
        return np.array([n if at is None else len(at) for n, at in zip(numel, self.index, strict=True)], np.int64)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.counts)])

    @property
    def verdict(self) -> np.ndarray:
        """The words, one a weight."""
        return np.array(VERDICTS, dtype=object)[self.judged.verdict]

    @property
    def coverage(self) -> float:
        """The share of the weights surveyed that have a verdict."""
        return float(np.mean(self.judged.verdict != 0)) if len(self) else float("nan")

    @property
    def expected_change(self) -> float:
        """First-order change of the loss if every verdict is followed by a move of 1e-4, all at once.

        Kept means are exaggerated a little, having been picked for their size.
        """
        return float(-MOVE * np.abs(self.judged.mean[self.judged.verdict != 0]).sum())

    @cached_property
    def reasons(self) -> dict[str, int]:
        """Why weights are undecided (`weak, sparse, always_zero, nonfinite`), or certain (`constant`): how many of each."""
        counts = np.bincount(self.judged.reason, minlength=len(REASONS))
        return {word: int(n) for word, n in zip(REASONS[1:], counts[1:], strict=True) if n}

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a parameter: `parameter, surveyed, increase, decrease, undecided, coverage, expected_change`, reasons."""
        import pandas as pd

        spans = [slice(a, b) for a, b in pairwise(self._starts)]
        verdicts = np.array([np.bincount(self.judged.verdict[s], minlength=len(VERDICTS)) for s in spans])
        reasons = np.array([np.bincount(self.judged.reason[s], minlength=len(REASONS)) for s in spans])
        moved = np.where(self.judged.verdict != 0, np.abs(self.judged.mean), 0)
        with np.errstate(invalid="ignore"):
            coverage = (verdicts[:, 1] + verdicts[:, 2]) / self.counts
        return pd.DataFrame(
            {
                "parameter": pd.Series(self.parameters.names, dtype="str"),
                "surveyed": self.counts,
                "increase": verdicts[:, 1],
                "decrease": verdicts[:, 2],
                "undecided": verdicts[:, 0],
                "coverage": coverage,
                "expected_change": [-MOVE * float(moved[s].sum()) for s in spans],
                **{word: reasons[:, i] for i, word in enumerate(REASONS) if word},
            }
        )

    @cached_property
    def frame(self) -> pd.DataFrame:
        """`weights()` of all weights surveyed."""
        return self.weights()

    def weights(self, name: str | None = None, *, top: int | None = None) -> pd.DataFrame:
        """One row a weight: `parameter, index, value, partial, verdict, t, p, q, agree, expected_change, reason`.

        `partial` is the mean over the batches; `expected_change` that of the loss if this weight alone follows its
        verdict by 1e-4. `name` restricts it to one parameter, `top` to the weights of the largest |t|, in that order.
        More than a million rows are an error that names both.
        """
        chosen = np.arange(len(self)) if name is None else self.span(name)
        if top is not None:
            strength = np.nan_to_num(np.abs(self.judged.t[chosen]), nan=-1.0, posinf=np.inf)
            chosen = chosen[np.argsort(-strength, kind="stable")[:top]]
        if len(chosen) > ROWS:
            raise ArgumentError(
                f"{len(chosen):,} rows are too many for one frame: ask for survey.weights(name) or "
                f"survey.weights(top=1000), or read the arrays of survey.judged"
            )
        return self._rows(chosen)

    def span(self, name: str) -> np.ndarray:
        """The entries that belong to one parameter."""
        if name not in self.parameters.position:
            raise ArgumentError(f"{name!r} was not surveyed{nearest(name, self.parameters.names)}")
        at = self.parameters.position[name]
        return np.arange(self._starts[at], self._starts[at + 1])

    def places(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The parameter and the flat index in it of each of the given entries."""
        of = np.searchsorted(self._starts, chosen, side="right") - 1
        flat = chosen - self._starts[of]
        for i in np.unique(of):
            at = self.index[i]
            if at is not None:
                flat[of == i] = at[flat[of == i]]
        return of, flat

    def _rows(self, chosen: np.ndarray) -> pd.DataFrame:
        import pandas as pd

        of, flat = self.places(chosen)
        index = np.empty(len(chosen), object)
        for i in np.unique(of):
            shape, mine = self.parameters.shapes[i], np.nonzero(of == i)[0]
            axes = [axis.tolist() for axis in np.unravel_index(flat[mine], shape)] if shape else []
            for row, place in zip(mine, zip(*axes, strict=True) if axes else [()] * len(mine), strict=True):
                index[row] = place
        j = self.judged
        return pd.DataFrame(
            {
                "parameter": pd.Series(np.array(self.parameters.names, object)[of], dtype="str"),
                "index": pd.Series(index, dtype=object),
                "value": self.value[chosen],
                "partial": j.mean[chosen],
                "verdict": pd.Series(self.verdict[chosen], dtype="str"),
                "t": j.t[chosen],
                "p": j.p[chosen],
                "q": j.q[chosen],
                "agree": j.agree[chosen],
                "expected_change": np.where(j.verdict[chosen] != 0, -MOVE * np.abs(j.mean[chosen]), 0.0),
                "reason": pd.Series(np.array(REASONS, object)[j.reason[chosen]], dtype="str"),
            }
        )

    def __str__(self) -> str:
        increase, decrease = (int((self.judged.verdict == i).sum()) for i in (1, 2))
        undecided = len(self) - increase - decrease
        sampled = f" (a sample of {self.total:,})" if len(self) < self.total else ""
        why = " · ".join(f"{word} {n:,}" for word, n in self.reasons.items() if word != "constant")
        lines = [
            f"survey of {len(self):,} weights{sampled} over {self.batches} batches{self._of_size()}, "
            f"{self.training} mode, mean loss {self.loss:.6g}",
            f"  increase {increase:,} · decrease {decrease:,} · undecided {undecided:,}{f' ({why})' if why else ''} · "
            f"coverage {self.coverage:.1%}",
        ]
        if self.reasons.get("constant"):
            lines.append(f"  {self.reasons['constant']:,} verdicts rest on partials that were the same in every batch")
        if increase + decrease == 0:
            return "\n".join([*lines, f"  nothing is certain enough at q = {self.level:g}: take more or larger batches"])
        best = self.table.sort_values("coverage", ascending=False, kind="stable").head(3)
        most = ", ".join(f"{name} {share:.0%}" for name, share in zip(best["parameter"], best["coverage"], strict=True))
        safer = "; method='by' is the safer choice" if self.method == "bh" else ""
        return "\n".join(
            [
                *lines,
                f"  most decided: {most}",
                f"  expected change of the loss if they all move by {MOVE:g}: {self.expected_change:.3g}",
                f"  at q = {self.level:g} ({self.method}) about {self.level:.0%} of the verdicts are wrong on average, and "
                f"more where weights are strongly correlated{safer}",
            ]
        )

    def _of_size(self) -> str:
        if self.sizes is None:
            return ""
        low, high = self.sizes
        return f" of {low}" if low == high else f" of {low} to {high} examples, weighted by their size"
