"""What a step of an optimizer did, weight by weight: as arrays, as tables, and as a text to print."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from gradlens import markup
from gradlens.probes.per_weight import PerWeight
from gradlens.statistics.attribution import CAUSES, Attribution, alpha

if TYPE_CHECKING:
    import pandas as pd

MOST = 3  #: parameters that the text names


@dataclass(frozen=True, eq=False)
class Path:
    """The loss along the way of the step, from the weights before (0) to those after it (1)."""

    before: float
    after: float
    slopes: np.ndarray  #: [points, parameters]: g.dw at each point
    allocated: np.ndarray  #: [parameters]: each one's share of the change; NaN shares nothing
    narrow: tuple[str, ...]  #: operations that could not be computed in float64
    slope: float = float("nan")  #: of the loss itself at the beginning of the way, by a difference

    @property
    def cut_off(self) -> bool:
        """Whether the gradient is not that of the loss: g.dw differs from the slope by a percent of the largest slope."""
        scale = max(abs(self.slope), float(np.abs(self.slopes.sum(axis=1)).max()))
        return bool(abs(self.slopes[0].sum() - self.slope) > 0.01 * scale)

    @property
    def actual(self) -> float:
        """The change of the loss."""
        return self.after - self.before

    @property
    def missing(self) -> float:
        """What the shares do not account for: the error of the quadrature (kinks), and rounding."""
        return self.actual - float(self.allocated.sum())


@dataclass(frozen=True, eq=False, repr=False)
class StepReport(markup.Shown, PerWeight):
    """One step of an optimizer, beside what the gradient asked for.

    One row a weight in `frame`: `parameter, index, value` (before the step)`, partial, used, dw, against, cause,
    loss_change, allocated`; `weights(top=)` takes those that changed the loss most. `table` has one row a parameter.
    """

    partial: np.ndarray  #: of the loss, unscaled and unclipped; what was used where it is not known
    used: np.ndarray  #: what the optimizer consumed
    dw: np.ndarray
    blame: np.ndarray  #: uint8: bit i says that CAUSES[i] is a cause of moving against the gradient
    share: np.ndarray  #: each weight's allocated change of the loss; NaN without a loss function
    attributions: tuple[Attribution, ...]  #: by parameter
    kinds: tuple[str, ...]  #: by parameter: `SGD`, `Adam`, `AdamW`, or another optimizer's name in brackets; "" has none
    path: Path | None
    steps: int  #: that were made in the block
    clipping_known: bool
    failure: str = ""  #: why there is no path although a loss function was given

    @property
    def moving(self) -> int:
        """The weights with g * dw != 0."""
        return sum(found.moving for found in self.attributions)

    @property
    def against(self) -> float:
        """Of these, the share that moved against their own gradient."""
        return self._share("against")

    @property
    def causes(self) -> dict[str, float]:
        """`against`, by cause: several causes of one weight share it evenly."""
        return {cause: self._share(cause) for cause in CAUSES}

    def _share(self, name: str) -> float:
        parts = [(found.moving, getattr(found, name)) for found in self.attributions if found.moving]
        return sum(n * share for n, share in parts) / self.moving if parts else float("nan")

    @property
    def loss_change(self) -> float:
        """First-order change of the loss, `g.dw`, over the weights looked at."""
        return float((self.partial * self.dw).sum())

    @property
    def actual(self) -> float:
        """The change of the loss; NaN without a loss function."""
        return float("nan") if self.path is None else self.path.actual

    @property
    def alpha(self) -> float:
        """Where the step ended on the parabola along it: -1 at its start, 0 at the minimum, 1 as high on the other side."""
        return float("nan") if self.path is None else alpha(self.path.slopes[0].sum(), self.path.slopes[-1].sum())

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a parameter: `parameter, optimizer, weights, moving, against`, the causes, and changes of the loss.

        The causes add up to `against`. `loss_change` is g.dw, `allocated` the parameter's share of the actual change (they
        add up to that), `alpha` where the step ended along this parameter's part of the way.
        """
        import pandas as pd

        spans = [slice(*bounds) for bounds in self.bounds]
        change = self.partial * self.dw
        path, empty = self.path, [float("nan")] * len(spans)
        ends = () if path is None else zip(path.slopes[0], path.slopes[-1], strict=True)
        return pd.DataFrame(
            {
                "parameter": pd.Series(self.parameters.names, dtype="str"),
                "optimizer": pd.Series(self.kinds, dtype="str"),
                "weights": [s.stop - s.start for s in spans],
                "moving": [found.moving for found in self.attributions],
                "against": [found.against for found in self.attributions],
                **{cause: [found.causes[cause] for found in self.attributions] for cause in CAUSES},
                "error": [found.error for found in self.attributions],
                "loss_change": [float(change[s].sum()) for s in spans],
                "allocated": empty if path is None else path.allocated,
                "alpha": [alpha(start, end) for start, end in ends] or empty,
            }
        )

    def strength(self, chosen: np.ndarray) -> np.ndarray:
        """|change of the loss|, allocated where it was, else to first order."""
        change = self.partial * self.dw if self.path is None else self.share
        return np.abs(change[chosen])

    def columns(self, chosen: np.ndarray) -> dict[str, object]:
        """Wish, deed, and what came of it."""
        import pandas as pd

        words = [", ".join(c for bit, c in enumerate(CAUSES) if code >> bit & 1) for code in range(1 << len(CAUSES))]
        return {
            "partial": self.partial[chosen],
            "used": self.used[chosen],
            "dw": self.dw[chosen],
            "against": self.blame[chosen] > 0,
            "cause": pd.Series(np.array(words, object)[self.blame[chosen]], dtype="str"),
            "loss_change": self.partial[chosen] * self.dw[chosen],
            "allocated": self.share[chosen],
        }

    def __str__(self) -> str:
        kinds = ", ".join(dict.fromkeys(kind for kind in self.kinds if kind)) or "no optimizer"
        number = "a step" if self.steps == 1 else f"{self.steps} steps"
        lines = [f"{number} of {kinds}: {self.moving:,} of {len(self):,} weights moved with a partial"]
        if self.moving:
            shares = sorted(self.causes.items(), key=lambda item: -item[1])
            why = " · ".join(f"{cause} {share:.1%}" for cause, share in shares if share > 0)
            lines.append(f"  against their own gradient: {self.against:.1%}" + (f" ({why})" if why else ""))
        if not self.clipping_known:
            lines.append("  the gradient before clipping was not seen, so clipping is blamed for nothing")
        if self.path is None:
            then = "give loss_fn to see what it did"
            if self.failure:
                then = f"what it did is not known, since loss_fn failed ({self.failure})"
            lines.append(f"  to first order the loss changes by {self.loss_change:.4g}; {then}")
            return "\n".join(lines)
        return "\n".join([*lines, *self._told()])

    def _told(self) -> list[str]:
        assert self.path is not None
        path = self.path
        if not np.isfinite(path.actual):
            return [f"  loss {path.before:.6g} -> {path.after:.6g}: there is no change to share out"]
        first = float(path.slopes[0].sum())
        lines = [
            f"  loss {path.before:.6g} -> {path.after:.6g}: changed by {path.actual:.4g}; to first order {first:.4g}",
            f"  alpha {self.alpha:.2f}: {_place(self.alpha)}",
        ]
        order = np.argsort(path.allocated)
        down = [f"{self.parameters.names[i]} {path.allocated[i]:.2g}" for i in order[:MOST] if path.allocated[i] < 0]
        up = [f"{self.parameters.names[i]} +{path.allocated[i]:.2g}" for i in order[::-1][:MOST] if path.allocated[i] > 0]
        if down:
            lines.append(f"  lowered it most: {', '.join(down)}")
        if up:
            lines.append(f"  raised it most: {', '.join(up)}")
        if abs(path.missing) > 0.01 * abs(path.actual):
            why = "the loss has kinks along the way"
            if path.cut_off:
                why = (
                    "the gradient is not that of this loss, which cuts something off (detach(), no_grad(), as A2C and "
                    "bootstrapped targets do on purpose) or has a backward that is wrong; check_partials tells"
                )
            lines.append(f"  {path.missing:.2g} of the change is not accounted for: {why}")
        if path.narrow:
            lines.append(f"  computed in less than float64, so less exact: {', '.join(path.narrow)}")
        return lines


def _place(alpha: float) -> str:
    """Where on the parabola along the step it ended, in words."""
    if np.isnan(alpha):
        return "the step did not go downhill on this batch"
    if alpha < -1:
        return "the loss fell ever faster along its way, with no minimum in sight"
    if alpha < -0.1:
        return "it ended before the minimum along its way"
    if alpha <= 0.1:
        return "it ended near the minimum along its way"
    return "it went past the minimum along its way" + (", and higher than it came from" if alpha > 1 else "")
