"""Where the numbers about a used gradient may come from: pure functions of facts, asked in one place.

Two questions. *May the `used` row copy the `backward` row*, sparing a pass over memory? Only if nothing can have changed the
gradient in between: one process, one backward onto fresh gradients, no loss scale, nobody else's hook, the same `.grad`
object and version, and the same bits in a fixed sample, since `p.grad.data.mul_()` leaves the version alone. A `reduced` row
is of `.grad` itself, whatever has come together there: it may be copied if it is the last backward's, on the same terms.

*Whose gradient is the g in `g.dw`*, the first-order change of the loss? The gradient of the loss itself, unscaled and
unclipped:

- `USED`: the optimizer was given it as it was, which needs the same facts for the last backward.
- `KEPT`: it was changed, and a copy of the loss's own was kept.
- `RATIO`: it was changed, and there is no copy. If clipping multiplied all of it by one number, as samples tell on the
  recorder's thread, `g_used.dw` divided by that number; else nothing.
"""

from __future__ import annotations

from gradlens.capture.events import GradientFacts
from gradlens.records import Source


def is_scaled(scale: object) -> bool:
    """Whether gradients were multiplied by a loss scale, as far as is known without waiting for a device."""
    return not (isinstance(scale, float) and scale == 1.0)


def may_copy(facts: GradientFacts, scale: object) -> bool:
    """Whether the `used` rows are those of `backward`, or of `reduced`, if the fixed samples agree too."""
    return (facts.single or facts.reduced) and facts.own and facts.untouched and not is_scaled(scale)


def loss_gradient(facts: GradientFacts, scale: object, *, kept: bool) -> Source:
    """Whose gradient stands for the loss's own; `USED` if the fixed samples agree too, else what there is without it.

    kept: A copy of the loss's own gradient, of the step's one backward, is at hand.
    """
    if facts.own and facts.untouched and not is_scaled(scale):
        return Source.USED
    return Source.KEPT if kept and facts.single else Source.RATIO
