"""Histories with a course and facts of given numbers, for rules about a whole run."""

import numpy as np

from gradlens.activations import Activations
from gradlens.analysis.course import _State
from gradlens.analysis.history import History
from gradlens.facts import Features, Graph, Group, Modes, Operation, Settings
from tests.analysis.made import snapshot


def history_of(loss=None, *facts, steps=200, newest=None, **series):
    """A history whose course has these series: a number for all steps, or an array of `steps` numbers."""
    history = History()
    history.append(newest or snapshot(step=steps - 1))
    given = {} if loss is None else {"loss_used": loss} | series
    values = {name: np.broadcast_to(np.asarray(each, float), (steps,)).copy() for name, each in given.items()}
    known = {name: np.ones(steps, bool) for name in values}
    history.course._state = _State(steps, 1, np.arange(steps, dtype=float), values, known)
    for fact in facts:
        history.note(fact)
    return history


def flat(level=2.3, noise=0.02, steps=200):
    """A loss that does not fall."""
    return level + noise * np.random.default_rng(0).standard_normal(steps)


def falling(start=2.3, end=0.3, steps=200):
    """A loss that falls by a steady factor."""
    return np.geomspace(start, end, steps)


def looks(spreads, outputs=None, layer="head", rms=1.0, dead=0.0):
    """Features of a layer at steps that grow."""
    outputs = outputs or [float("nan")] * len(spreads)
    return [
        Features(10 * i, 0, layer, spread, rms, dead, made)
        for i, (spread, made) in enumerate(zip(spreads, outputs, strict=True))
    ]


def passes(steps, **modules):
    """Batches of 16 examples with 100 units: a module is `(type, spread, dead, saturated)`, or one for each step."""
    found = []
    for i, step in enumerate(steps):
        rows = [each[i] if isinstance(each, list) else each for each in modules.values()]
        sums = [[1600, 0, 40, 40 * spread, 100, 100 * dead, 1600 * at_end] for _, spread, dead, at_end in rows]
        kinds = tuple(row[0] for row in rows)
        found.append(Activations(step, 0, 0.0, tuple(modules), kinds, (1,) * len(rows), np.array(sums)))
    return found


def graph(*names, step=0, **more):
    """A chain of operations, the loss's own first, that ends in a leaf of the model."""
    ops = [Operation(name, (i + 1,), (8, 4)) for i, name in enumerate(names)]
    return Graph((*ops, Operation("Leaf", (), (4,), {}, "a.weight")), step=step, **more)


def settings(lr=0.1, step=0, kind="SGD", decoupled=False, **group):
    """What an optimizer was set to."""
    return Settings(step, kind, 0, (Group(lr, parameters=("a.weight", "a.bias"), **group),), decoupled)


def modes(training, evaluated=("drop",), step=0):
    """Modules with dropout, in a mode."""
    return Modes(step, training, tuple(evaluated), dropout=("drop",))


def rules_of(rule, history):
    """What a rule says, as pairs of rule and severity."""
    return [(finding.rule, str(finding.severity)) for finding in rule(history)]


def in_order(steps):
    """What several steps hold, one after the other."""
    return [one for several in steps for one in several]
