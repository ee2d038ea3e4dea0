"""What gradlens shows in TensorBoard's own dashboards: the tags, in the order in which the pages show them.

A tag is `group/name`. TensorBoard sorts groups and names as text, so the groups are numbered. Names are those of the
columns; parameters are numbered in model order, which keeps that order and makes the tag of each its own, whatever its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MultilineChartContent

LAYERS = "gradlens-1-layers"
HEALTH = "gradlens-2-health"
DIRECTION = "gradlens-3-direction"
UPDATE = "gradlens-4-update"
RMS = "gradlens-5-log10_rms"
RATIO = "gradlens-6-log10_update_ratio"
PARTIALS = "gradlens-7-partials"
OBSERVED = "gradlens-8-observed"

FINDINGS, HELP = "gradlens/findings", "gradlens/help"  #: texts

#: The numbers of the whole model, and what they mean.
MODEL: dict[str, str] = {
    f"{HEALTH}/loss": "The loss, as given to `lens.observe(loss=...)`.",
    f"{HEALTH}/gradient_norm": "Euclidean norm of the gradient of the loss, before clipping. A sudden rise of a factor of "
    "ten or more: it explodes.",
    f"{HEALTH}/layer_spread": "How many powers of ten lie between the weights with the largest and the smallest rms of "
    "their partials. Up to 3 is usual; above 4 some layers hardly learn: the gradient vanishes.",
    f"{HEALTH}/partials_nonfinite": "How many partials are NaN or infinite. Must be 0.",
    f"{HEALTH}/parameters_absent": "How many parameters the loss does not depend on: they do not learn.",
    f"{DIRECTION}/increase_share": "Share of all weights that should increase to lower the loss (partial below 0).",
    f"{DIRECTION}/decrease_share": "Share of all weights that should decrease to lower the loss (partial above 0).",
    f"{DIRECTION}/hold_share": "Share of all weights whose partial is exactly 0.",
    f"{DIRECTION}/flip_share": "Share of the weights whose partial changed its sign since the last observed step. Near "
    "50 %: mostly noise, or a learning rate so large that it jumps from side to side.",
    f"{UPDATE}/update_ratio": "|dw| / |w|, the median over the weights: how much of itself a weight moved. About 1e-3 is "
    "usual.",
    f"{UPDATE}/alignment": "Cosine between the update and the negative gradient: 1 is plain gradient descent, below 0 the "
    "model moves up its own gradient.",
    f"{UPDATE}/loss_change": "g.dw: how much the step should have changed this batch's loss, to first order. Above 0: it "
    "went uphill.",
}

#: Those that only some runs have.
SOMETIMES: dict[str, str] = {
    f"{HEALTH}/noise_scale": "The batch size above which larger batches bring little, smoothed: in examples where "
    "`observe(batch_size=...)` says how many a backward has, else in micro-batches. Only with gradient accumulation.",
    f"{HEALTH}/activations_least_spread": "How much examples differ in what a module makes of them, beside its size: the "
    "least of all modules. Near 0: the model says the same for all. Only with the feature `activations`, as the next two.",
    f"{HEALTH}/activations_most_dead": "The largest share of a module's units that are 0 for every example of the batch.",
    f"{HEALTH}/activations_most_saturated": "The largest share of a sigmoid's or tanh's outputs at the ends of its range.",
}

IMAGES: dict[str, str] = {
    f"{LAYERS}/gradient_rms": "Size of the partials (root mean square), a layer a row in model order, steps to the right. "
    "Dark at one end of the model: the gradient vanishes there. Yellow: it explodes. Red names: see the findings on "
    "the Text page.",
    f"{LAYERS}/increase_share": "Which way weights should move to lower the loss: orange up, blue down. Of the weights "
    "whose partial is not 0, the share that should increase.",
}

GROUPS: dict[str, str] = {
    RMS: "log10 of the rms of the partials, of a few weights from the model's first to its last.",
    RATIO: "log10 of |dw| / |w|, of the same weights. About -3 is usual.",
    PARTIALS: "The partials by value. Left of 0: weights that should increase.",
    OBSERVED: "As given to `lens.observe(...)`.",
}


def about(tag: str) -> str:
    """What a tag shows, in Markdown."""
    return MODEL.get(tag) or SOMETIMES.get(tag) or IMAGES.get(tag) or GROUPS.get(tag.partition("/")[0], "")


def numbered(row: int, name: str) -> str:
    """The name that a parameter, or a module, has in tags, by its place in the model."""
    return f"{row:03d} {escape(name)}"


@lru_cache(maxsize=4096)  # of each parameter at each step with histograms
def escape(name: str, most: int = 100) -> str:
    """A name as part of a tag: printable, without a slash (which would open a group), and of bounded length."""
    shown = "".join(c if c.isprintable() and c not in "/\\" else _escapes(c) for c in name)
    return shown if len(shown) <= most else f"{shown[: most // 2 - 1]}..{shown[1 - most // 2 :]}"


def _escapes(character: str) -> str:
    return "\\x2f" if character == "/" else character.encode("unicode_escape").decode()


def page() -> str:
    """The tags in a few lines of Markdown."""
    lines = ["Start with the two pictures (Time Series or Images page), then read the findings.", ""]
    group = ""
    numbers = sorted((MODEL | SOMETIMES).items(), key=lambda item: item[0].partition("/")[0])
    for tag, text in [*IMAGES.items(), *numbers, *((f"{group}/...", text) for group, text in GROUPS.items())]:
        if tag.partition("/")[0] != group:
            group = tag.partition("/")[0]
            lines += ["", f"**{group}**", ""]
        lines.append(f"- `{tag.partition('/')[2]}` {text}")
    lines += [
        "",
        "A partial is dL/dw of one weight: below 0 the weight should *increase* to lower the loss, above 0 *decrease*. One "
        "batch's sign is a noisy guess: `gradlens.survey` says which can be relied on.",
    ]
    return "\n".join(lines)


def layout() -> Layout:
    """The Custom Scalars page: the same for every run, so that TensorBoard merges those of several."""
    return Layout(
        category=[
            Category(
                title="gradlens: health",
                chart=[
                    _chart("size of the gradient along the model (log10 rms)", [f"{RMS}/"]),
                    _chart("gradient norm", [f"{HEALTH}/gradient_norm"]),
                    _chart("powers of ten between layers", [f"{HEALTH}/layer_spread"]),
                    _chart("loss", [f"{HEALTH}/loss"]),
                    _chart(
                        "nonfinite partials, absent parameters",
                        [f"{HEALTH}/partials_nonfinite", f"{HEALTH}/parameters_absent"],
                    ),
                ],
            ),
            Category(
                title="gradlens: direction",
                chart=[
                    _chart("shares that should increase, decrease, hold", [f"{DIRECTION}/{w}_share" for w in _WAYS]),
                    _chart("share that changed its sign", [f"{DIRECTION}/flip_share"]),
                ],
            ),
            Category(
                title="gradlens: update",
                chart=[
                    _chart("update ratio along the model (log10 |dw| / |w|)", [f"{RATIO}/"]),
                    _chart("update ratio, median", [f"{UPDATE}/update_ratio"]),
                    _chart("alignment with the negative gradient", [f"{UPDATE}/alignment"]),
                    _chart("expected change of the loss", [f"{UPDATE}/loss_change"]),
                ],
            ),
        ]
    )


_WAYS = ("increase", "decrease", "hold")


def _chart(title: str, beginnings: Iterable[str]) -> Chart:
    """Lines of all tags that begin so."""
    return Chart(title=title, multiline=MultilineChartContent(tag=[re.escape(text) for text in beginnings]))
