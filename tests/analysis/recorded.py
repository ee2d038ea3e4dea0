"""Real trainings on record: the `backward` and `used` snapshots of each step, made with the reference kernels."""

import numpy as np
import torch

from gradlens import fields
from gradlens.analysis.history import History
from gradlens.kernels import reference
from gradlens.records import Parameters, Snapshot, Stage, Status, Top


class Recorder:
    """Takes the snapshots of a model by hand: `backward()` after a backward pass, `step(optimizer)` instead of `.step()`."""

    def __init__(self, model, maxlen=1000):
        self.named = dict(model.named_parameters())
        self.parameters = Parameters(
            tuple(self.named),
            tuple(tuple(p.shape) for p in self.named.values()),
            tuple(str(p.dtype).removeprefix("torch.") for p in self.named.values()),
        )
        self.history, self.now, self.passes = History(maxlen), 0, 0
        self.appended = lambda: None

    def backward(self, loss=None):
        """The gradients as they are now, as those of a backward pass (so call `zero_grad` before it)."""
        self._append(self._snapshot(Stage.BACKWARD, loss, self._gradients()))
        self.passes += 1

    def step(self, optimizer, loss=None):
        """The optimizer's step, its used gradients and its updates; the next step begins."""
        before = [p.detach().clone() for p in self.named.values()]
        gradients = [None if g is None else g.clone() for g in self._gradients()]
        optimizer.step()
        after = [p.detach() for p in self.named.values()]
        updates = reference.compare(gradients, before, after).numpy()
        snapshot = self._snapshot(Stage.USED, loss, gradients, backward=max(self.passes - 1, 0))
        snapshot.columns.update({field.name: updates[:, i] for i, field in enumerate(fields.UPDATES)})
        self._append(snapshot)
        self.now, self.passes = self.now + 1, 0

    def _append(self, snapshot):
        self.history.append(snapshot)
        self.appended()

    def _gradients(self):
        return [p.grad if p.requires_grad else None for p in self.named.values()]

    def _snapshot(self, stage, loss, gradients, backward=None):
        values = [p.detach() for p in self.named.values()]
        filled = [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(values, gradients, strict=True)]
        rows = reference.summarize(filled, values).numpy()
        columns = fields.empty(len(values))
        for i, field in enumerate(fields.SUMMARY):
            columns[field.name] = rows[:, i].astype(field.dtype)
        status = np.full(len(values), Status.OK.value, dtype=object)
        status[columns["zero"] == columns["numel"]] = Status.ZERO.value
        status[columns["nan"] + columns["inf"] > 0] = Status.NONFINITE.value
        for i, (p, g) in enumerate(zip(self.named.values(), gradients, strict=True)):
            if g is None:
                status[i] = Status.ABSENT.value if p.requires_grad else Status.FROZEN.value
        histogram = rows[:, fields.HISTOGRAM].astype(np.int64)
        columns.update(fields.quantiles(histogram, columns))
        return Snapshot(
            step=self.now,
            backward=self.passes if backward is None else backward,
            stage=stage,
            time=float(self.now),
            parameters=self.parameters,
            status=status,
            scale=np.ones(len(values)),
            columns=columns,
            histogram=histogram,
            top=Top(rows[:, fields.TOP_INDEX].astype(np.int64), rows[:, fields.TOP_PARTIAL], rows[:, fields.TOP_VALUE]),
            scalars={} if loss is None else {"loss": float(loss.detach())},
        )


def train(case, steps, recorder=None, zero_grad=True):
    """A case's training on record; gives the recorder."""
    recorder = recorder or Recorder(case.model)
    for data in case.batches(steps):
        if zero_grad:
            case.optimizer.zero_grad()
        last = [None if p.grad is None else p.grad.clone() for p in case.model.parameters()]
        loss = case.loss(case.model, data)
        loss.backward()
        if zero_grad:
            recorder.backward(loss)
        else:  # .grad is a running sum: this pass's own partials are what came on top
            _own(case.model, last, lambda loss=loss: recorder.backward(loss))
        recorder.step(case.optimizer, loss)
    return recorder


def _own(model, last, look):
    sums = [p.grad for p in model.parameters()]
    for p, old in zip(model.parameters(), last, strict=True):
        p.grad = p.grad if old is None else p.grad - old
    look()
    for p, total in zip(model.parameters(), sums, strict=True):
        p.grad = total
