"""What `overhead.py` compares: training as it is, gradlens in several settings, and what else people use.

A contender is a context manager on a `Training`. It attaches itself, yields, and detaches itself; what it has to do within
a step it hangs on `before_step`, `after_backward` (before the optimizer's step) and `after_step`. It looks at every step and
does what its own documentation shows, with its records going to disk as they would. A peer that is not installed raises
ImportError: it is left out, with the reason.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Call = Callable[[], None]


@dataclass
class Training:
    """A model in training, and where its records go."""

    model: nn.Module
    optimizer: Optimizer
    loss: Callable[[nn.Module], Tensor]
    directory: Path
    micro: int = 1  #: backward passes a step
    steps: int = 0
    last_loss: float = 0.0
    before_step: list[Call] = field(default_factory=list)
    after_backward: list[Call] = field(default_factory=list)
    after_step: list[Call] = field(default_factory=list)
    at_end: list[Call] = field(default_factory=list)  #: what waits is worked off, files stay open
    says: Callable[[], tuple[float, float]] = lambda: (
        math.nan,
        math.nan,
    )  #: seconds it says it took so far, and of how many

    def step(self) -> None:
        """One step, as loops have it in a method."""
        for call in self.before_step:
            call()
        self.optimizer.zero_grad()
        for _ in range(self.micro):
            loss = self.loss(self.model)
            loss.backward()
        for call in self.after_backward:
            call()
        self.optimizer.step()
        self.last_loss = loss.item()
        for call in self.after_step:
            call()
        self.steps += 1


Attach = Callable[[Training], "contextlib.AbstractContextManager[None]"]


@dataclass(frozen=True)
class Contender:
    """One way to train, and the way that it is compared with."""

    name: str
    attach: Attach
    kind: str  #: "bare", "gradlens" or "peer"
    baseline: str = "bare"
    micro: int = 1
    settles: bool = False  #: what it does is dearer at first: more steps pass before those that count


# --- training as it is ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bare(training: Training) -> Iterator[None]:
    """Nothing at all."""
    yield


@contextlib.contextmanager
def hooked(training: Training) -> Iterator[None]:
    """A hook of somebody else's on each parameter, which does nothing."""
    handles = [p.register_post_accumulate_grad_hook(_nothing) for p in training.model.parameters()]
    yield
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def distributed(training: Training) -> Iterator[None]:
    """Within `DistributedDataParallel`, in a group of one process: its hooks and its buckets, without any network."""
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    inner, training.model = training.model, DistributedDataParallel(training.model)
    yield
    training.model = inner


def _nothing(parameter: Tensor) -> None:
    return


# --- gradlens ---------------------------------------------------------------------------------------------------------


def gradlens(*, before: Attach = bare, records: bool = True, **settings: Any) -> Attach:
    """`gradlens.watch`; with a run directory: the durable store and TensorBoard are written."""

    @contextlib.contextmanager
    def attach(training: Training) -> Iterator[None]:
        import gradlens

        with before(training), contextlib.redirect_stderr(io.StringIO()):
            lens = gradlens.watch(
                training.model, training.optimizer, run=training.directory if records else None, **settings
            )
            training.at_end.append(lens.flush)
            training.says = says_of(lens)
            with lens:
                yield

    return attach


def says_of(lens: Any) -> Callable[[], tuple[float, float]]:
    """What the lens says of the steps since it was first asked: as it knows at the end, not as it guessed at first."""
    first = None

    def says() -> tuple[float, float]:
        nonlocal first
        now = lens.overhead()
        first = first or now
        counted = ("seconds", "steps", "observed", "elapsed", "background", "native")
        own = replace(now, **{name: getattr(now, name) - getattr(first, name) for name in counted})
        return (own.share * own.elapsed if own.elapsed > 0 else 0.0), own.elapsed

    return says


# --- peers ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def norms(training: Training) -> Iterator[None]:
    """What many loops have: the norm of each gradient, `.item()`, one `add_scalar` each."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(training.directory))
    training.at_end.append(writer.flush)

    def look() -> None:
        for name, parameter in training.model.named_parameters():
            if parameter.grad is not None:
                writer.add_scalar(f"norm/{name}", parameter.grad.norm().item(), training.steps)

    training.after_backward.append(look)
    yield
    writer.close()


@contextlib.contextmanager
def wandb(training: Training) -> Iterator[None]:
    """`run.watch(model, log="gradients")`, offline: a histogram of each gradient."""
    import wandb

    run = wandb.run or wandb.init(mode="offline", dir=tempfile.gettempdir(), settings=wandb.Settings(console="off"))
    run.watch(training.model, log="gradients", log_freq=1)
    training.after_step.append(lambda: run.log({"loss": training.last_loss}))
    yield
    run.unwatch(training.model)


def ignite(*handlers: str) -> Attach:
    """Ignite's TensorBoard handlers on an engine; its trainer runs our step."""

    @contextlib.contextmanager
    def attach(training: Training) -> Iterator[None]:
        from ignite.engine import Engine, Events
        from ignite.handlers import tensorboard_logger

        engine = Engine(lambda engine, batch: None)
        logger = tensorboard_logger.TensorboardLogger(log_dir=str(training.directory))
        for name in handlers:
            handler = getattr(tensorboard_logger, name)(training.model)
            logger.attach(engine, event_name=Events.ITERATION_COMPLETED, log_handler=handler)
        training.at_end.append(logger.writer.flush)

        def look() -> None:
            engine.state.iteration = training.steps
            engine.fire_event(Events.ITERATION_COMPLETED)

        engine.state.epoch = 0
        training.after_backward.append(look)
        yield
        logger.close()

    return attach


@contextlib.contextmanager
def histograms(training: Training) -> Iterator[None]:
    """The loop that everybody has written: `add_histogram` of each gradient."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(training.directory))
    training.at_end.append(writer.flush)

    def look() -> None:
        for name, parameter in training.model.named_parameters():
            if parameter.grad is not None:
                writer.add_histogram(f"grad/{name}", parameter.grad, training.steps)

    training.after_backward.append(look)
    yield
    writer.close()


@contextlib.contextmanager
def lightning(training: Training) -> Iterator[None]:
    """Lightning's `grad_norm` before the optimizer's step, its dictionary written to TensorBoard."""
    from lightning.pytorch.utilities import grad_norm
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(training.directory))
    training.at_end.append(writer.flush)

    def look() -> None:
        for name, norm in grad_norm(training.model, norm_type=2).items():
            writer.add_scalar(name, norm, training.steps)

    training.after_backward.append(look)
    yield
    writer.close()


@contextlib.contextmanager
def composer(training: Training) -> Iterator[None]:
    """What Composer's OptimizerMonitor does for gradients, re-created: Composer itself pins an older torch."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(training.directory))
    training.at_end.append(writer.flush)

    def look() -> None:
        norms, square = {}, 0.0
        for name, parameter in training.model.named_parameters():
            if parameter.grad is not None:
                norm = torch.linalg.vector_norm(parameter.grad)
                square += norm**2
                norms[f"l2_norm/grad/{name}"] = norm
        norms["l2_norm/grad/global"] = square**0.5
        for name, norm in norms.items():
            writer.add_scalar(name, norm.item(), training.steps)

    training.after_backward.append(look)
    yield
    writer.close()


@contextlib.contextmanager
def module_monitor(training: Training) -> Iterator[None]:
    """torch-module-monitor with its README's metrics of gradients and parameters, at every step."""
    from torch_module_monitor import ModuleMonitor

    monitor = ModuleMonitor(monitor_step_fn=lambda step: True)
    monitor.set_module(training.model)
    monitor.add_gradient_metric("norm", lambda x: x.norm())
    monitor.add_gradient_metric("mean", lambda x: x.mean())

    def end() -> None:
        monitor.end_step()
        monitor.get_step_metrics()

    training.before_step.append(lambda: monitor.begin_step(training.steps))
    training.after_backward.append(monitor.monitor_gradients)
    training.after_step.append(end)
    yield


@contextlib.contextmanager
def traintools(training: Training) -> Iterator[None]:
    """traintools' GradientHealthMonitor."""
    from traintools.gradhealth import GradientHealthMonitor

    monitor = GradientHealthMonitor()
    training.after_backward.append(lambda: monitor.inspect(training.model, step=training.steps, lr=1e-3) and None)
    yield


@contextlib.contextmanager
def gradviz(training: Training) -> Iterator[None]:
    """gradviz: the norm of each gradient in a hook."""
    from gradviz import GradViz

    monitor = GradViz(training.model)
    monitor.attach()
    training.after_step.append(monitor.step)
    yield
    monitor.detach()


ALL = [
    Contender("bare", bare, "bare"),
    Contender("bare again", bare, "bare"),
    Contender("gradlens", gradlens(), "gradlens", settles=True),
    Contender("gradlens, first steps", gradlens(), "gradlens"),
    Contender("gradlens, features=()", gradlens(features=()), "gradlens", settles=True),
    Contender("gradlens, with evidence", gradlens(features=("updates", "flips", "evidence")), "gradlens"),
    Contender("gradlens, no run directory", gradlens(records=False), "gradlens"),
    Contender("gradlens, not looking", gradlens(schedule=lambda step: False), "gradlens"),
    Contender("bare, 4 micro-batches", bare, "bare", micro=4),
    Contender("gradlens, 4 micro-batches", gradlens(), "gradlens", baseline="bare, 4 micro-batches", micro=4),
    Contender("bare, hooked by others", hooked, "bare"),
    Contender("gradlens, reading in the hooks", gradlens(before=hooked), "gradlens", baseline="bare, hooked by others"),
    Contender("bare, under DDP", distributed, "bare"),
    Contender("gradlens, under DDP", gradlens(before=distributed), "gradlens", baseline="bare, under DDP"),
    Contender(
        "gradlens, local gradients under DDP",
        gradlens(before=distributed, stage=("backward", "reduced", "used")),
        "gradlens",
        baseline="bare, under DDP",
    ),
    Contender("one norm a parameter, by hand", norms, "peer"),
    Contender("Composer-like gradient norms", composer, "peer"),
    Contender("Lightning grad_norm", lightning, "peer"),
    Contender("gradviz", gradviz, "peer"),
    Contender("torch-module-monitor", module_monitor, "peer"),
    Contender("traintools", traintools, "peer"),
    Contender("Ignite GradsScalar", ignite("GradsScalarHandler"), "peer"),
    Contender("Ignite GradsScalar + GradsHist", ignite("GradsScalarHandler", "GradsHistHandler"), "peer"),
    Contender("add_histogram loop", histograms, "peer"),
    Contender("wandb.watch, offline", wandb, "peer"),
]


def quieten() -> None:
    """Peers talk a lot."""
    os.environ.setdefault("WANDB_SILENT", "true")
    logging.getLogger("ignite").setLevel(logging.ERROR)
    sys.stdout.flush()
