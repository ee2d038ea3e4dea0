"""Snapshots of gradients that are there as arrays, and a made run in which things go wrong, for tests of writers."""

import numpy as np

from gradlens import fields
from gradlens.records import Finding, Parameters, Severity, Snapshot, Stage, Status


def histogram(gradient):
    """The counts of `fields`, by exponent and sign."""
    flat = gradient[np.isfinite(gradient) & (gradient != 0)]
    exponent = np.clip(np.frexp(np.abs(flat))[1] - 1, fields.EXPONENT_MIN, fields.EXPONENT_MAX) - fields.EXPONENT_MIN
    return np.bincount(exponent + np.where(flat > 0, fields.BUCKETS, 0), minlength=2 * fields.BUCKETS)


def row(gradient, weight, previous=None, moved=None):
    """The stored scalars of one parameter: `gradient`, `weight` before the step, `previous` gradient, `moved` = dw."""
    g, finite = gradient.ravel(), gradient[np.isfinite(gradient)].ravel()
    size = np.abs(finite)
    values = {
        "numel": g.size, "positive": (finite > 0).sum(), "negative": (finite < 0).sum(), "zero": (finite == 0).sum(),
        "nan": np.isnan(g).sum(), "inf": np.isinf(g).sum(), "sum": finite.sum(), "abs_sum": size.sum(),
        "square_sum": (finite**2).sum(), "weight_square_sum": (weight**2).sum(), "weight_abs_max": np.abs(weight).max(),
        "dot": np.nansum(weight * gradient),
    }  # fmt: skip
    if finite.size:
        values |= {"min": finite.min(), "max": finite.max(), "abs_max": size.max()}
    if (size > 0).any():
        values["abs_min_nonzero"] = size[size > 0].min()
    if previous is not None:
        moving = (gradient != 0) & (previous != 0)
        values |= {
            "flip_compared": g.size, "flip_moving": moving.sum(), "flip_count": (moving & (gradient * previous < 0)).sum(),
            "flip_dot": (gradient * previous).sum(), "flip_square_sum": (gradient**2).sum(),
            "flip_previous_square_sum": (previous**2).sum(),
        }  # fmt: skip
    if moved is not None:
        product = gradient * moved
        values |= {
            "update_numel": g.size, "update_square_sum": (moved**2).sum(), "update_before_square_sum": (weight**2).sum(),
            "update_used_square_sum": (gradient**2).sum(), "update_dot": product.sum(),
            "update_moving": (product != 0).sum(), "update_against": (product > 0).sum(),
            "update_stuck": ((gradient != 0) & (moved == 0)).sum(), "update_loss_dot": product.sum(), "update_loss_exact": 1,
        }  # fmt: skip
    return values


def snapshot(step, stage, gradients, weights, previous=None, moved=None, *, status=None, parameters=None, time=None,
             scalars=None, backward=0):  # fmt: skip
    """One row a name; a gradient of None makes an absent parameter."""
    names = tuple(weights)
    columns, counts = fields.empty(len(names)), []
    words = []
    for i, name in enumerate(names):
        gradient = gradients[name]
        zeros = np.zeros_like(weights[name])
        values = row(
            zeros if gradient is None else gradient, weights[name], (previous or {}).get(name), (moved or {}).get(name)
        )
        for column, value in values.items():
            columns[column][i] = value
        counts.append(histogram(zeros if gradient is None else gradient))
        bad = gradient is not None and not np.isfinite(gradient).all()
        words.append(Status.ABSENT if gradient is None else Status.NONFINITE if bad else Status.OK)
    columns |= fields.quantiles(np.array(counts), columns)
    shapes = tuple(weight.shape for weight in weights.values())
    return Snapshot(
        step=step,
        backward=backward,
        stage=stage,
        time=1_700_000_000.0 + step if time is None else time,
        parameters=parameters or Parameters(names, shapes, ("float32",) * len(names)),
        status=np.asarray(words if status is None else status, dtype=object),
        scale=np.ones(len(names)),
        columns=columns,
        histogram=np.array(counts),
        scalars=scalars or {},
    )


def net(layers=20, width=32, seed=0):
    """The weights of a deep net with an embedding, a head, and an auxiliary head that the loss does not depend on."""
    random = np.random.default_rng(seed)
    shapes = {"embed.weight": (width, width)}
    for i in range(layers):
        shapes |= {f"layers.{i}.weight": (width, width), f"layers.{i}.bias": (width,)}
    shapes |= {"aux.weight": (10, width), "head.weight": (10, width), "head.bias": (10,)}
    return {name: random.normal(0, 0.2, shape) for name, shape in shapes.items()}


def ill_run(steps=400, every=1, layers=20, explodes_at=300, rate=0.01, width=32):
    """The records of a training whose lower layers vanish, of which one layer explodes, and one parameter is absent.

    The bias of the head always wants to increase, the last layer's weights to decrease, all others go both ways.
    """
    random = np.random.default_rng(1)
    weights, previous = net(layers, width), None
    parameters = None
    for step in range(0, steps, every):
        gradients = {name: _gradient(name, weight, step, layers, explodes_at, random) for name, weight in weights.items()}
        loss = 2.3 * np.exp(-step / 150) + 0.1 + 0.02 * random.normal() + 3.0 * (step >= explodes_at) * (step % 7 == 0)
        scalars = {"loss": loss, "accuracy": 1 - loss / 6}
        moved = {
            name: np.zeros_like(w) if gradients[name] is None else -rate * np.nan_to_num(gradients[name])
            for name, w in weights.items()
        }
        known = {name: g for name, g in (previous or {}).items() if g is not None and gradients[name] is not None}
        made = {"parameters": parameters, "scalars": scalars}
        backward = snapshot(step, Stage.BACKWARD, gradients, weights, known, **made)
        parameters = backward.parameters
        yield backward
        yield snapshot(step, Stage.USED, gradients, weights, known, moved, **made)
        yield from _findings(step, every, explodes_at, layers)
        previous = gradients


def _gradient(name, weight, step, layers, explodes_at, random):
    module, *rest = name.split(".")
    if module == "aux":
        return None
    depth = {"embed": 0, "head": layers}.get(module) if module != "layers" else int(rest[0])
    size = 0.03 * 10 ** (-0.5 * (layers - depth)) * np.exp(-step / 400)
    towards = {"head.bias": -2.0, f"layers.{layers - 1}.weight": 0.6}.get(name, 0.0)
    if step >= explodes_at and name == f"layers.{layers // 2}.weight":
        size = min(1e-2 * 10 ** ((step - explodes_at) / 10), 1e5)
    gradient = (size * random.standard_t(4, weight.shape) + size * towards).astype(np.float32).astype(np.float64)
    if step >= explodes_at + 60 and name == f"layers.{layers // 2 + 1}.bias":
        gradient.flat[:3] = np.nan
    return gradient


def _findings(step, every, explodes_at, layers):
    def reached(at):
        return at <= step < at + every

    if reached(10):
        for i in range(layers // 2):
            yield Finding(
                "vanishing", step, Severity.WARNING, f"the rms of its partials is {3e-2 * 10 ** (-0.5 * (layers - i)):.1e}, "
                "that of head.weight is 3.0e-02; the ratio was below 1e-4 on 10 observed steps", f"layers.{i}.weight",
                ("saturating activations (sigmoid, tanh) in a deep stack", "weights that start too small"),
                "use ReLU or GELU with the initialisation made for it (kaiming_normal_), normalisation layers, or residual "
                "connections", "backward",
            )  # fmt: skip
        yield Finding(
            "absent", step, Severity.WARNING, "the loss did not depend on it on 10 observed steps", "aux.weight",
            ("its module is not called in forward(), or its output does not reach the loss",),
            "use it in the forward pass, add its output to the loss, or freeze it with requires_grad_(False)", "backward",
        )  # fmt: skip
    if reached(explodes_at + 40):
        yield Finding(
            "exploding", step, Severity.WARNING, "the gradient's norm is 3.2e+03, 500 times the norm of the weights (6.4)",
            f"layers.{layers // 2}.weight", ("a learning rate that has already driven the model away",),
            "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) between backward() and step()", "used",
        )  # fmt: skip
    if reached(explodes_at + 60):
        yield Finding(
            "nonfinite", step, Severity.ERROR, "3 of 32 partials are NaN", f"layers.{layers // 2 + 1}.bias",
            ("a division by 0, or the logarithm or square root of something that is not positive",),
            "torch.autograd.set_detect_anomaly(True) names the operation", "backward",
        )  # fmt: skip
