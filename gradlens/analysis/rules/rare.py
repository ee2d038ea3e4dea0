"""Yes-or-no questions that are answered "no" whatever the input: the rare class is never said.

    L = -s ln p - (1 - s) ln(1 - p)     the loss of a batch with a share s of positives, where every answer is p
    g = p - s                           the gradient of the output's bias

So batch losses lie on a line over g, of slope ln(p / (1 - p)), and their mean is the entropy of p. Of several outputs of one
layer the mean of both is known; of several heads, whose losses add up, the losses lie on a plane over their gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradlens.analysis.history import History
from gradlens.analysis.rules.base import check_number, check_steps
from gradlens.analysis.rules.occasional import Occasional, features, graphs, newest_step, operations
from gradlens.facts import PASSING, words
from gradlens.records import Finding, Severity, Stage

#: Losses of yes-or-no questions.
_QUESTIONS = words("BinaryCrossEntropyWithLogits BinaryCrossEntropy")
#: What may lie between such a loss and the layer whose output it judges.
_BETWEEN = PASSING | words("Sigmoid")
MOST_HEADS = 8
#: Of the batch's size, the least that the variance of its share of positives may amount to.
CHANCE = 0.3
#: How far the entropies of several heads' answers may be off the loss, as a share of it.
OFF = 0.3


@dataclass(frozen=True)
class RareClass(Occasional):
    """A yes-or-no question where "no" is said to everything: the rare class is never predicted.

    Where the answer p does not depend on the input, the loss of a batch is a straight line in its share of positives s, and
    the gradient of the output's bias is p - s. So the batch losses lie on a line over that gradient, and the level of the
    loss is the entropy of p. Both are asked: `fit` is the least share of the variance that the line explains. The gradient
    varies as s does, by p (1 - p) / n in batches of n; where it varies far more, the loss has weights (`pos_weight`). A
    layer of several outputs (labels) is asked as one, several heads side by side: then all of them have to say "no".
    """

    fit: float = 0.7
    most: float = 0.15
    steps: int = 60

    name: ClassVar[str] = "rare_class"

    def __post_init__(self) -> None:
        check_number(self, "fit", most=1.0)
        check_number(self, "most", most=0.5)
        check_steps(self)

    def look(self, history: History) -> Iterator[Finding]:
        """Of the heads that the loss judges by yes and no."""
        heads = _heads(history)
        gradients, losses, sizes = _batches(history, list(heads))
        if len(losses) < 2 * self.steps:
            return
        half, quarter = len(losses) // 2, len(losses) // 4
        if losses[-quarter:].mean() < 0.75 * losses[half:-quarter].mean():
            return  # it is still learning
        shares, slopes, fit = rare_shares(gradients[half:], losses[half:], list(heads.values()))
        draws = _examples(history) * sizes / np.array(list(heads.values())) ** 2  # that a gradient is the mean of
        chance = CHANCE * draws * gradients[half:].var(axis=0)
        if not (fit > self.fit and (shares > 0).all() and (shares < self.most).all() and (slopes < 0).all()):
            return
        if (shares * (1 - shares) < chance).any():
            return  # the gradient varies more than the draw of a batch explains: its loss is weighted, or the answer moves
        share = float(shares.min())
        yield Finding(
            rule=self.name,
            step=newest_step(history),
            severity=Severity.WARNING,
            seen=f"the rare class is never predicted: batch losses follow the share of positives in a batch alone "
            f"({fit:.0%} of their variance), as if the answer were {_said(shares)} for every input",
            causes=(
                f"class imbalance: about {share:.1%} of the examples are positive, and to say no to all is a low loss "
                "already",
            ),
            remedy=f"pos_weight=torch.tensor([{max(1, round((1 - share) / share))}.]) in the loss, or a sampler that draws "
            "positives more often; judge by recall or average precision, not by accuracy",
            value=share,
        )


def _said(shares: np.ndarray) -> str:
    return " and ".join(f"{share:.1%}" for share in shares.tolist())


def _heads(history: History) -> dict[str, int]:
    """The biases of the layers whose outputs are judged by yes and no, and by how many losses each."""
    found: Counter[str] = Counter()
    for graph in graphs(history):
        for at, op in enumerate(graph.operations):
            if op.name in _QUESTIONS:
                layers = [graph.layer_of(i) for i in graph.sources(at, _BETWEEN) if graph.is_layer(i)]
                found.update(name for layer in layers for name in layer if name.rpartition(".")[2] == "bias")
    if found or not _QUESTIONS & operations(history):
        return dict(found) if len(found) <= MOST_HEADS else {}
    layer = next((name for name in reversed(list(features(history))) if ":" not in name), None)
    return {} if layer is None else {f"{layer}.bias" if layer else "bias": 1}


def _batches(history: History, biases: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(gradients [m, heads], losses [m], outputs of each)` of the last backwards; nothing where a bias is not known."""
    newest = history.latest(Stage.BACKWARD)
    nothing = np.empty((0, len(biases))), np.empty(0), np.ones(len(biases))
    if not biases or newest is None or any(bias not in newest.parameters.position for bias in biases):
        return nothing
    sizes = np.array([float(newest.value("numel", bias)) for bias in biases])
    rows = [
        [*(float(s.value("sum", bias)) for bias in biases), s.loss]
        for s in history.recent(300, Stage.BACKWARD)
        if "loss" in s.scalars and all(bias in s.parameters.position for bias in biases)
    ][-300:]
    if not rows:
        return nothing
    table = np.asarray(rows)
    return table[:, :-1], table[:, -1], sizes


def _examples(history: History) -> int:
    """How many examples a batch has: the first axis of what the layers near the loss made; 8 where it is not known."""
    shapes = [op.shape for graph in graphs(history) for op in graph.operations[:12] if op.shape]
    return max((shape[0] for shape in shapes), default=8)


def rare_shares(gradients: np.ndarray, losses: np.ndarray, uses: Sequence[int]) -> tuple[np.ndarray, np.ndarray, float]:
    """`(share of positives, slope, both by head; share of variance explained)` of losses over the gradients p - s.

    Of one head the mean loss, divided by how many losses judge it, is the entropy of p, which gives p more exactly than
    the slope. Of several the slopes give each p, and their entropies have to make up the loss: else nothing is explained.
    """
    heads = gradients.shape[1]
    unknown = np.full(heads, np.nan)
    known = np.isfinite(losses).all() and np.isfinite(gradients).all()
    if len(losses) < heads + 2 or not known or (np.ptp(gradients, axis=0) == 0).any():
        return unknown, unknown, 0.0
    columns = np.column_stack([gradients, np.ones(len(losses))])
    fitted = np.linalg.lstsq(columns, losses, rcond=None)[0]
    slopes, rest = fitted[:-1], losses - columns @ fitted
    explained = 1 - float(rest.var() / max(float(losses.var()), 1e-30))
    mean = float(losses.mean())
    if heads == 1:
        return np.array([_entropic(mean / max(uses[0], 1))]), slopes, explained
    shares = 1 / (1 + np.exp(-np.clip(slopes, -50, 50)))
    level = sum(use * _entropy(share) for use, share in zip(uses, shares.tolist(), strict=True))
    return shares, slopes, explained if abs(level - mean) < OFF * mean else 0.0


def _entropy(p: float) -> float:
    return float(-p * np.log(max(p, 1e-300)) - (1 - p) * np.log1p(-min(p, 1 - 1e-16)))


def _entropic(loss: float) -> float:
    """The share p below a half whose entropy is this loss."""
    low, high = 0.0, 0.5
    for _ in range(40):
        p = (low + high) / 2
        low, high = (p, high) if _entropy(p) < loss else (low, p)
    return (low + high) / 2
