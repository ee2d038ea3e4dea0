"""Curvature: how the partials themselves change as the weights move.

    H_ij = d^2 L / dw_i dw_j,   H v = d/dw (g.v)

- The *eigenvalues*: the largest is the sharpest curvature in any direction, the smallest is below 0 at a saddle. By Lanczos
  iterations, each with its residual, and said where one has not converged. Plain gradient descent with learning rate lr is
  stable along the top one while that is below 2 / lr; momentum b moves this to 2 (1 + b) / lr, and Adam measures in other
  units, so that the comparison does not hold there.
- The *diagonal* `H_ii` says how fast the partial of one weight changes with that weight. Estimated by the mean of `v * (H
  v)` over random signs v (Hutchinson; Bekas et al. 2007): the off-diagonal entries are its noise. Whether a weight's loss
  bends up or down is tested as in a survey, Student's t over the samples and control of false discoveries over all weights.
- The *trace* is the sum of the diagonal, and as an estimate far better than its entries.
- The *Newton move* of one weight, `-g_i / H_ii`, is where its own parabola has its minimum, all others held fixed. It is
  given where the loss is found to bend up, and made with the diagonal shrunken by what its noise explains: what was
  picked for its size is too large otherwise. To make all of them at once is not Newton's method.

All of it is for one batch and one draw of dropout. Curvature over the data is the mean over batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gradlens import markup
from gradlens.errors import ArgumentError, ArgumentTypeError, GradlensWarning, nearest
from gradlens.probes.interrupts import leaves_no_trace
from gradlens.probes.lanczos import ITERATIONS, End, Spectrum, extremes
from gradlens.probes.loss import Target
from gradlens.probes.per_weight import PerWeight
from gradlens.probes.rows import flat_indices
from gradlens.probes.second_order import Agreement, Products, flatten, host, unflatten, with_products
from gradlens.progress import tracked
from gradlens.selection import Select
from gradlens.statistics.evidence import Moments, TestResults, check_level, test_means
from gradlens.statistics.significance import detectable
from gradlens.weight_names import known_name

if TYPE_CHECKING:
    import pandas as pd

LAYER_ITERATIONS = 32  #: of the eigenvalue of one layer, at most
#: In gradients of float64: arrays for each weight and their sorting take 18; the way to the ends of the spectrum 6, and at
#: most 512 MiB of vectors.
MORE = 24
BENDS = np.array(["undecided", "up", "down"], object)


@dataclass(frozen=True, eq=False, repr=False)
class Curvature(markup.Shown, PerWeight):
    """The curvature of one batch's loss.

    One row a weight in `frame`: `parameter, index, value, partial, curvature, noise, t, p, q, bends, newton`;
    `weights(top=)` takes those of the largest |t|. `table` has one row a parameter, `layers` one a module where it was
    asked for.
    """

    partial: np.ndarray
    results: TestResults  #: of the diagonal: mean, t, p, q
    noise: np.ndarray  #: standard error of the diagonal
    bends: np.ndarray  #: 0 undecided, 1 up, 2 down, at the level `level` of false discovery
    shrunken: np.ndarray  #: the diagonal as the Newton moves use it
    spectrum: Spectrum
    traces: np.ndarray  #: [samples, parameters]: v.(H v), of each parameter's part
    layers: pd.DataFrame | None  #: `layer, weights, top, bottom, residual, converged`
    samples: int
    level: float
    lr: float | None
    loss: float
    seed: int
    agreement: Agreement  #: of the two ways to a product with the Hessian

    @property
    def curvature(self) -> np.ndarray:
        """The diagonal of the Hessian, estimated."""
        return self.results.mean

    @property
    def top(self) -> float:
        """The largest eigenvalue; within `spectrum.top.residual` of one."""
        return self.spectrum.top.value

    @property
    def bottom(self) -> float:
        """The smallest eigenvalue: below 0 at a saddle."""
        return self.spectrum.bottom.value

    @property
    def residual(self) -> float:
        """How far `top` may be from an eigenvalue."""
        return self.spectrum.top.residual

    @property
    def untouched(self) -> int:
        """How many weights are left out, since they lie in rows of sparse tables that the batch does not look up."""
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in self.parameters.shapes) - len(self)

    @property
    def converged(self) -> bool:
        """Whether both ends of the spectrum are known to their stated accuracy."""
        return self.spectrum.top.converged and self.spectrum.bottom.converged

    @property
    def trace(self) -> float:
        """The sum of all eigenvalues, estimated."""
        return float(self.traces.sum(axis=1).mean())

    @property
    def trace_noise(self) -> float:
        """Its standard error, with `samples - 1` degrees of freedom."""
        return float(self.traces.sum(axis=1).std(ddof=1) / self.samples**0.5)

    @property
    def newton(self) -> np.ndarray:
        """-g / H_ii, with the shrunken diagonal, where the loss bends up; else NaN."""
        made = (self.bends == 1) & (self.shrunken > 0)
        return np.divide(-self.partial, self.shrunken, out=np.full(len(self), np.nan), where=made)

    @property
    def limit(self) -> float | None:
        """2 / lr: the curvature above which plain gradient descent at this learning rate is unstable."""
        return None if self.lr is None else 2 / self.lr

    @property
    def stable(self) -> bool | None:
        """Whether the top eigenvalue is below 2 / lr; None without a learning rate, or where its residual does not tell."""
        if self.limit is None or abs(self.top - self.limit) <= self.residual:
            return None
        return self.top < self.limit

    def strength(self, chosen: np.ndarray) -> np.ndarray:
        """|t|."""
        return np.abs(self.results.t[chosen])

    def columns(self, chosen: np.ndarray) -> dict[str, object]:
        """The curvature, how sure it is, and what follows from it."""
        import pandas as pd

        named = {name: getattr(self, name)[chosen] for name in ("partial", "curvature", "noise")}
        tested = {name: getattr(self.results, name)[chosen] for name in ("t", "p", "q")}
        bends = pd.Series(BENDS[self.bends[chosen]], dtype="str")
        return {**named, **tested, "bends": bends, "newton": self.newton[chosen]}

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a parameter: `parameter, weights, trace, trace_noise, up, down, undecided`."""
        import pandas as pd

        spans = [slice(*bounds) for bounds in self.bounds]
        counts = np.array([np.bincount(self.bends[s], minlength=3) for s in spans])
        return pd.DataFrame(
            {
                "parameter": pd.Series(self.parameters.names, dtype="str"),
                "weights": counts.sum(axis=1),
                "trace": self.traces.mean(axis=0),
                "trace_noise": self.traces.std(axis=0, ddof=1) / self.samples**0.5,
                "up": counts[:, 1],
                "down": counts[:, 2],
                "undecided": counts[:, 0],
            }
        )

    def __str__(self) -> str:
        lines = [self._first(), *self._ends()]
        if self.untouched:
            lines.append(
                f"  {self.untouched:,} weights are left out, in rows that this batch does not look up: H is 0 there"
            )
        lines.append(f"  trace {self.trace:.4g} ± {self.trace_noise:.2g} ({self.samples} samples, df {self.samples - 1})")
        up, down = (int((self.bends == i).sum()) for i in (1, 2))
        lines.append(
            f"  along single weights: {up:,} bend up, {down:,} down, {len(self) - up - down:,} undecided (at most "
            f"{100 * self.level:g}% of those decided are expected to be wrong)"
        )
        if self.samples < 8:
            sure = detectable(self.samples - 1, self.level / 20) / self.samples**0.5
            lines.append(
                f"  {self.samples} samples tell little: an entry must be {sure:.1f} times its spread; take 32 or more"
            )
        if self.layers is not None and len(self.layers):
            sharpest = self.layers.sort_values("top", ascending=False).head(3)
            named = ", ".join(f"{name} {top:.3g}" for name, top in zip(sharpest["layer"], sharpest["top"], strict=True))
            lines.append(f"  sharpest layers: {named}")
        lines.append(f"  {self.agreement}; loss {self.loss:.6g}, seed {self.seed}")
        return "\n".join(lines)

    def _first(self) -> str:
        size = f"curvature over {len(self):,} weights"
        if self.limit is not None and self.stable is False:
            momentum = "plain gradient descent is UNSTABLE along the sharpest direction"
            limit = f"2 / lr = {self.limit:.4g} at lr = {self.lr:g}"
            return f"{size}: {momentum}: {self.top:.4g} > {limit}; take lr below {2 / self.top:.2g}"
        if not self.agreement.ok and not self.agreement.reason:
            return (
                f"{size}: autograd's own second derivative is WRONG here, so differences of the gradient are used; "
                f"check_symmetry says whether the gradient itself is right"
            )
        if not self.converged:
            end = "smallest" if self.spectrum.top.converged else "largest"
            return f"{size}: the {end} eigenvalue has NOT CONVERGED; raise iterations= before you rely on it"
        saddle = "a saddle, as nearly always while a network trains: along some direction the loss bends down"
        shape = saddle if self._saddle else "no direction bends down"
        against = ""
        if self.limit is not None:
            side = "below: stable" if self.stable else "too close to tell"
            against = f"; top {self.top:.4g} against 2 / lr = {self.limit:.4g} at lr = {self.lr:g}: {side} for plain descent"
        return f"{size}: {shape}{against}"

    @property
    def _saddle(self) -> bool:
        end = self.spectrum.bottom
        return end.value < -max(end.residual, 1e-5 * abs(self.top))

    def _ends(self) -> list[str]:
        took = f"{self.spectrum.iterations} products, {self.spectrum.starts} starts"
        return [
            f"  eigenvalues from {_shown(self.spectrum.bottom)} to {_shown(self.spectrum.top)} ({took})",
        ]


def _shown(end: End) -> str:
    return f"{end.value:.4g} ± {end.residual:.1g}" + ("" if end.converged else " (NOT CONVERGED)")


@leaves_no_trace
def curvature(
    model: Target,
    loss_fn: Callable[[Any], Tensor],
    *,
    samples: int = 32,
    lr: float | None = None,
    q: float = 0.1,
    layers: bool = False,
    iterations: int = ITERATIONS,
    select: Select = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Curvature:
    """The curvature of `loss_fn(model)`: extreme eigenvalues, trace, diagonal, and the Newton move of each weight.

    `samples` vectors of random signs estimate the diagonal and the trace (noise falls with their root); `q` is the false
    discovery rate of what is said to bend up or down; `lr` is compared with the top eigenvalue; `layers` asks for the
    eigenvalues of each module's own block; `select` takes the Hessian block of some parameters; `iterations` of Lanczos are
    made at most from one start vector, and two to four starts.

    Costs a Hessian-vector product, about two backward passes, for each sample and each iteration (a few dozen), in the
    precision of the model; and, for a test of autograd's products against differences of the gradient, two products and five
    gradients in float64. Memory: the graph of two backward passes, and up to 512 MiB of Lanczos vectors.
    """
    _check(samples, lr, q, iterations)

    def measure(products: Products) -> Curvature:
        random = torch.Generator().manual_seed(seed)
        steps = tracked(range(samples), "Hessian diagonal", samples, progress)
        moments, traces = hutchinson(products, steps, random)
        spectrum = _spectrum(products, random, iterations)
        weights = products.weights
        results, bends = _tested(moments, q)
        noise = np.sqrt(host(moments.squares) / (samples - 1) / samples)
        sizes = [w.numel() for w in weights]
        return Curvature(
            parameters=products.isolated.parameters,
            index=flat_indices(products.rows),
            value=host(weights),
            partial=host(products.gradient),
            results=results,
            noise=noise,
            bends=bends,
            shrunken=_shrunken(results.mean, noise, sizes, samples),
            spectrum=spectrum,
            traces=traces,
            layers=_layers(products, random) if layers else None,
            samples=samples,
            level=float(q),
            lr=lr,
            loss=products.loss,
            seed=seed,
            agreement=products.agreement,
        )

    return with_products("curvature", model, loss_fn, select, seed, measure, MORE, progress)


def _check(samples: int, lr: float | None, q: float, iterations: int) -> None:
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 2:
        raise ArgumentError(f"samples must be at least 2, to say how noisy the diagonal is, not {samples!r}")
    if lr is not None and not lr > 0:
        raise ArgumentError(f"lr is the learning rate to compare with, above 0, not {lr!r}")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 2:
        raise ArgumentError(f"iterations is how many products one start may take, at least 2, not {iterations!r}")
    check_level(q, "bh")


def hutchinson(products: Products, samples: Any, random: torch.Generator) -> tuple[Moments, np.ndarray]:
    """Moments of v * (H v) over vectors v of random signs, and the sums over each parameter: [samples, parameters]."""
    weights = products.weights
    moments, sums = Moments(weights), []
    for _ in samples:
        v = [(torch.randint(0, 2, w.shape, generator=random, dtype=torch.int8) * 2 - 1).to(w) for w in weights]
        found = [x * y for x, y in zip(v, products.multiply(v), strict=True)]
        moments.update(found)
        sums.append([x.double().sum().item() for x in found])
    return moments, np.array(sums)


def _spectrum(products: Products, random: torch.Generator, iterations: int) -> Spectrum:
    weights = products.weights
    exact = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    like = torch.empty(sum(w.numel() for w in weights), dtype=exact, device=weights[0].device)

    def multiply(v: Tensor) -> Tensor:
        return flatten(products.multiply(unflatten(v, weights))).to(exact)

    return extremes(multiply, like, random, iterations)


def _layers(products: Products, random: torch.Generator) -> pd.DataFrame:
    """The eigenvalues of the Hessian's block of each module's own parameters."""
    import pandas as pd

    names = products.isolated.parameters.names
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        groups.setdefault(name.rpartition(".")[0] or name, []).append(i)
    rows = []
    for layer, members in groups.items():
        weights = [products.weights[i] for i in members]
        exact = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
        like = torch.empty(sum(w.numel() for w in weights), dtype=exact, device=weights[0].device)

        def multiply(
            v: Tensor, members: Sequence[int] = members, weights: Sequence[Tensor] = weights, exact: torch.dtype = exact
        ) -> Tensor:
            return flatten(products.block(members, unflatten(v, weights))).to(exact)

        found = extremes(multiply, like, random, LAYER_ITERATIONS)
        top = found.top
        rows.append((layer, like.numel(), top.value, found.bottom.value, top.residual, top.converged))
    return pd.DataFrame(rows, columns=["layer", "weights", "top", "bottom", "residual", "converged"])


def _tested(moments: Moments, q: float) -> tuple[TestResults, np.ndarray]:
    """Which weights' loss bends up or down, at the level q of false discovery.

    Entries that were the same in all K samples are exact, or had K equal signs by luck, with a probability of 2^(1 - K):
    they take part with that.
    """
    results = test_means(moments, q, constant_p=2.0 ** (1 - moments.count))
    bends = np.where(results.q <= q, np.where(results.mean > 0, 1, 2), 0).astype(np.int8)
    return replace(results, verdict=bends), bends


def _shrunken(diagonal: np.ndarray, noise: np.ndarray, sizes: Sequence[int], samples: int) -> np.ndarray:
    """The diagonal, shrunken by what its noise explains (empirical Bayes), in units of that noise.

    Within a parameter `x = diagonal / noise` has the variance of the true ratios, and that of Student's t on top. Each x is
    pulled to the parameter's mean by the share that is noise's.
    """
    parts, start = [], 0
    of_t = (samples - 1) / (samples - 3) if samples > 3 else 10.0
    for n in sizes:
        d, s = diagonal[start : start + n], noise[start : start + n]
        start += n
        known = s > 0
        x = np.divide(d, s, out=np.zeros(n), where=known)
        of_truth = max(float(x[known].var()) - of_t, 0.0) if known.sum() > 1 else np.inf
        kept = 1.0 if np.isinf(of_truth) else of_truth / (of_truth + of_t)
        mean = float(x[known].mean()) if known.any() else 0.0
        parts.append(np.where(known, s * (mean + kept * (x - mean)), d))
    return np.concatenate(parts)


# --- one product ----------------------------------------------------------------------------------------------------------


@leaves_no_trace
def hessian_product(
    model: Target,
    loss_fn: Callable[[Any], Tensor],
    vector: Mapping[str, Any],
    *,
    select: Select = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """H v for one vector, given and returned as tensors by parameter name; what `vector` leaves out counts as 0.

    An entry has the shape of its parameter; arrays and lists of numbers are taken as tensors, names may carry the prefixes
    of wrappers. Computed by autograd in the model's precision; where that disagrees with differences of the gradient, or
    cannot differentiate twice, a warning says so and the differences are returned.
    """
    import warnings

    if not isinstance(vector, Mapping):
        raise ArgumentTypeError(f"vector is a mapping of parameter names to tensors, not {type(vector).__name__}")

    def measure(products: Products) -> dict[str, Tensor]:
        names, weights = products.isolated.parameters.names, products.weights
        live = products.isolated.tensors()
        v = zip(_vector(vector, names, live), products.rows, weights, strict=True)
        parts = products.multiply([rows.compact(x).to(w.device, w.dtype) for x, rows, w in v])
        if not products.agreement.ok:
            warnings.warn(f"hessian_product: {products.agreement}", GradlensWarning, stacklevel=6)
        found = [rows.whole(x.detach()) for rows, x in zip(products.rows, parts, strict=True)]
        return {
            name: (torch.view_as_complex(x.contiguous()) if p.is_complex() else x).to(p.dtype)
            for name, x, p in zip(names, found, live, strict=True)
        }

    return with_products("hessian_product", model, loss_fn, select, seed, measure)


def _vector(given: Mapping[str, Any], names: Sequence[str], live: Sequence[Tensor]) -> list[Tensor]:
    """One real tensor a weight."""
    entries: dict[str, Tensor] = {}
    for name, value in given.items():
        known = known_name(name, names) if isinstance(name, str) else None
        if known is None:
            raise ArgumentError(
                f"the vector has an entry for {name!r}, which is no parameter here{nearest(str(name), names)}"
            )
        entries[known] = _entry(known, value, live[names.index(known)])
    real = [torch.view_as_real(p.detach()) if p.is_complex() else p.detach() for p in live]
    return [entries.get(name, torch.zeros_like(p)) for name, p in zip(names, real, strict=True)]


def _entry(name: str, value: Any, like: Tensor) -> Tensor:
    try:
        found = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"the vector's entry for {name!r} is no tensor of numbers: {error}") from None
    shape = tuple(like.shape)
    if like.is_complex() and not found.is_complex() and tuple(found.shape) == (*shape, 2):
        return found
    if tuple(found.shape) != shape:
        turned = "; it looks transposed" if len(shape) == 2 and tuple(found.shape) == shape[::-1] else ""
        raise ArgumentError(
            f"the vector's entry for {name!r} has shape {tuple(found.shape)}, and the parameter has {shape}{turned}"
        )
    if found.is_complex() and not like.is_complex():
        raise ArgumentTypeError(f"the vector's entry for {name!r} is complex, and the parameter is real")
    if like.is_complex():
        return torch.view_as_real(found.to(like.dtype).resolve_conj())
    return found
