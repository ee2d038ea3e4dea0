"""Pictures by matplotlib where they say more than a table: each takes a lens or a run and gives the axes.

    run = gradlens.open_run("runs/digits")
    gradlens.plots.gradient_flow(run)
    run.plot("directions")                 the same functions by name

`pip install torch-gradlens[plots]` brings matplotlib. All functions take `ax=`; without one a figure is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gradlens.errors import ArgumentError, GradlensError, NothingCapturedError, choice, nearest

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MOST = 60  #: parameters that have their names at an axis
STEPS = 400  #: columns of a map


def gradient_flow(source: Any, *, step: int | None = None, ax: Axes | None = None) -> Axes:
    """The size of the gradient from the first parameter to the last: mean, largest, and the middle 80 % of its weights.

    Where the curve falls towards the left, gradients vanish on their way back.
    """
    table = source.table(step)
    table = table[table["rms"] > 0]
    if table.empty:
        raise NothingCapturedError("no parameter has a gradient at this step that is not 0")
    axes = _axes(ax, width=max(6.0, min(0.28 * len(table), 14)))
    at = np.arange(len(table))
    axes.bar(at, table["abs_max"], color="tab:blue", alpha=0.2, label="largest")
    axes.plot(at, table["rms"], color="tab:blue", marker="o", markersize=3, label="rms")
    axes.set(yscale="log", ylabel="|dL/dw|", title=f"gradient flow, step {int(table['step'].iloc[0])}")
    _name(axes, table["parameter"].tolist())
    axes.legend()
    return axes


def directions(source: Any, *, ax: Axes | None = None) -> Axes:
    """A map of parameters by steps: the share of weights that should increase less the share that should decrease."""
    frame = _last_stage(source)
    frame = frame.assign(balance=frame["increase_share"] - frame["decrease_share"])
    return _map(frame, "balance", "share to increase - share to decrease", ax, cmap="PiYG", vmin=-1, vmax=1)


def sizes(source: Any, *, ax: Axes | None = None) -> Axes:
    """A map of parameters by steps: the decimal logarithm of the gradient's rms."""
    frame = _last_stage(source)
    with np.errstate(divide="ignore"):
        logs = np.log10(frame["rms"].to_numpy())
    frame = frame.assign(size=np.where(np.isfinite(logs), logs, np.nan))
    return _map(frame, "size", "log10 of the gradient's rms", ax, cmap="viridis")


def update_ratios(source: Any, *, ax: Axes | None = None) -> Axes:
    """|dw|/|w| over the steps: each matrix thin, their median thick; about 1e-3 is usual."""
    frame = source.history()
    frame = frame[(frame["stage"] == "used") & (frame["update_ratio"] > 0)]
    matrices = frame[frame["shape"].map(len) > 1]
    frame = matrices if len(matrices) else frame
    if frame.empty:
        raise NothingCapturedError("no update was recorded: watch() needs the optimizer, and the feature 'updates'")
    axes = _axes(ax)
    ratios = frame.pivot_table(index="step", columns="parameter", values="update_ratio", aggfunc="last", sort=False)
    axes.plot(ratios.index, ratios, color="tab:gray", alpha=0.4, linewidth=0.8)
    axes.plot(ratios.index, ratios.median(axis=1), color="tab:blue", linewidth=2, label="median")
    axes.axhline(1e-3, color="tab:green", linestyle=":", label="1e-3")
    axes.set(yscale="log", xlabel="step", ylabel="|dw| / |w|", title="update ratios")
    axes.legend()
    return axes


def histogram(source: Any, parameter: str, *, ax: Axes | None = None) -> Axes:
    """How large one parameter's partials are, over the steps of which histograms were kept: a run has them, a lens not."""
    if not hasattr(source, "histograms"):
        raise ArgumentError("histograms are kept in run directories: watch(run=...), then open_run(...)")
    _known(source, parameter)
    counts = source.histograms(parameters=parameter)
    if counts.empty:
        raise NothingCapturedError(f"no histogram of {parameter!r} was kept yet")
    counts = counts[counts["stage"] == counts["stage"].iloc[-1]]
    from gradlens import fields

    exponent = counts["bucket"].to_numpy() % fields.BUCKETS + fields.EXPONENT_MIN
    wide = counts.assign(exponent=exponent).pivot_table(
        index="exponent", columns="step", values="count", aggfunc="sum", fill_value=0
    )
    axes = _axes(ax)
    share = wide / wide.sum()
    steps = np.arange(len(share.columns))
    picture = axes.pcolormesh(steps, share.index, share, cmap="Blues", shading="nearest")
    axes.figure.colorbar(picture, ax=axes, label="share of the weights")
    ticks = np.unique(np.linspace(0, len(steps) - 1, 8).round().astype(int))
    axes.set_xticks(ticks, [str(share.columns[i]) for i in ticks])
    axes.set(xlabel="step", ylabel="|dL/dw| = 2^", title=f"partials of {parameter}")
    return axes


def weight(source: Any, parameter: str, *, of: str = "partial", ax: Axes | None = None) -> Axes:
    """A heat map of one weight matrix of a lens: its `partial`s or its `value`s. Blue lowers, red raises the loss."""
    if of not in ("partial", "value"):
        raise choice("of", of, ("partial", "value"))
    _known(source, parameter)
    frame = source.weights(parameter)
    shape = np.array(frame["index"].tolist()).reshape(len(frame), -1).max(axis=0) + 1 if len(frame) else np.zeros(1, int)
    if len(frame) != int(np.prod(shape)):
        raise ArgumentError("a heat map needs every weight: ask a lens, between backward() and zero_grad()")
    values = frame[of].to_numpy(float).reshape(int(shape[0]) if shape.size > 1 else 1, -1)
    axes = _axes(ax)
    limit = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    picture = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.figure.colorbar(picture, ax=axes, label="dL/dw" if of == "partial" else "w")
    axes.set(title=f"{parameter}: {of}s", ylabel="first index", xlabel="the others, flattened")
    return axes


#: By name, for `lens.plot("flow")`.
KINDS: dict[str, Callable[..., Any]] = {
    "flow": gradient_flow,
    "directions": directions,
    "sizes": sizes,
    "updates": update_ratios,
    "histogram": histogram,
    "weight": weight,
}


def plot(source: Any, kind: str = "flow", *arguments: Any, **options: Any) -> Any:
    """The picture of that name."""
    if kind not in KINDS:
        raise choice("kind", kind, KINDS)
    return KINDS[kind](source, *arguments, **options)


# --- details --------------------------------------------------------------------------------------------------------


def _axes(ax: Axes | None, width: float = 8.0) -> Any:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise GradlensError(
            "pictures need matplotlib: pip install 'torch-gradlens[plots]', or pip install matplotlib"
        ) from None
    return plt.subplots(figsize=(width, 4), layout="constrained")[1]


def _last_stage(source: Any) -> pd.DataFrame:
    frame = source.history()
    if frame.empty:
        raise NothingCapturedError("nothing was captured yet")
    stages = frame["stage"].unique().tolist()
    return frame[frame["stage"] == ("used" if "used" in stages else stages[-1])]


def _map(frame: pd.DataFrame, column: str, label: str, ax: Axes | None, **options: Any) -> Any:
    wide = frame.pivot_table(index="parameter", columns="step", values=column, aggfunc="last", sort=False, dropna=False)
    wide = wide[sorted(wide.columns)]
    kept = np.unique(np.linspace(0, len(wide.columns) - 1, min(STEPS, len(wide.columns))).round().astype(int))
    wide = wide.iloc[:, kept]
    axes = _axes(ax)
    picture = axes.imshow(wide.to_numpy(), aspect="auto", interpolation="nearest", **options)
    axes.figure.colorbar(picture, ax=axes, label=label)
    ticks = np.unique(np.linspace(0, wide.shape[1] - 1, 6).round().astype(int))
    axes.set_xticks(ticks, [str(wide.columns[i]) for i in ticks])
    rows = np.unique(np.linspace(0, wide.shape[0] - 1, min(wide.shape[0], 30)).round().astype(int))
    axes.set_yticks(rows, [str(wide.index[i]) for i in rows], fontsize=8)
    axes.set(xlabel="step", title=label)
    return axes


def _name(axes: Any, names: list[str]) -> None:
    if len(names) <= MOST:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    else:
        axes.set_xlabel("parameter, from the first to the last")


def _known(source: Any, parameter: str) -> None:
    names = source.names()
    if parameter not in names:
        raise ArgumentError(f"there is no parameter {parameter!r}{nearest(parameter, names)}")
