"""What the steps, the passes and the moves of one watched model share: made by the watcher, in this order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gradlens.capture.activations import ForwardWatch
from gradlens.capture.attachment import Attachment
from gradlens.capture.auditor import Auditor
from gradlens.capture.engine import Engine, TrainingThreads
from gradlens.capture.events import Sink
from gradlens.capture.guards import Guard
from gradlens.capture.hooks import Hooks
from gradlens.capture.losses import Roots
from gradlens.capture.optimizers import Optimizers
from gradlens.capture.readings import PassReader
from gradlens.capture.steady import SteadyRoute
from gradlens.capture.step_reader import StepReader
from gradlens.records import Finding, Stage


@dataclass(frozen=True)
class Workings:
    """The parts that know no step of their own."""

    attachment: Attachment
    stages: frozenset[str]
    local: bool  #: gradients are mixed with other ranks' before a pass ends
    sink: Sink
    guard: Guard
    tell: Callable[[Finding], None]  #: says a finding once
    threads: TrainingThreads
    roots: Roots
    auditor: Auditor
    activations: ForwardWatch
    engine: Engine
    optimizers: Optimizers
    reader: PassReader
    hooks: Hooks
    step_reader: StepReader
    steady: SteadyRoute

    @property
    def used(self) -> bool:
        """Whether what optimizers use is read."""
        return Stage.USED in self.stages
