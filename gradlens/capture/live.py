"""A watched model: attachment, clock, backward passes and optimizer steps of one lens, put together."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim import Optimizer

from gradlens.capture import compiling
from gradlens.capture.attachment import Attachment, Slot
from gradlens.capture.auditor import Auditor
from gradlens.capture.clock import Clock
from gradlens.capture.gradients import Gradients, running
from gradlens.capture.readings import Sink
from gradlens.capture.scaling import Scaling
from gradlens.capture.updates import Role, Updates
from gradlens.records import Finding, Severity, Stage

#: Steps between full scans of the module tree. What registers a parameter in the usual way is seen at once; this finds
#: writes past torch's own registration, and costs about 2 us a parameter when it happens.
SCAN_EVERY = 16


class Capture:
    """Hooks on a model and its optimizers, and what they see, for one lens."""

    def __init__(
        self,
        attachment: Attachment,
        optimizers: Sequence[Optimizer],
        clock: Clock,
        scaler: Any,
        sink: Sink,
        stages: frozenset[str],
        *,
        updates: bool,
        local: bool,
        fault: Callable[[str, Exception], None],
        timed: AbstractContextManager[None],
    ) -> None:
        self.attachment, self.clock, self._sink, self._fault = attachment, clock, sink, fault
        self.scaling = Scaling(scaler)
        self.auditor = Auditor(attachment, self._optimizers, sink.note, fault)
        self.gradients = Gradients(
            attachment,
            clock,
            self.scaling,
            sink,
            stages,
            local=local,
            before_pass=self._before_pass,
            after_pass=self._after_pass,
            look=self.auditor.pass_begins,
            fault=fault,
            timed=timed,
        )
        self.updates = Updates(
            optimizers,
            attachment,
            clock,
            self.gradients,
            sink,
            used="used" in stages,
            weights=updates and "used" in stages,
            settle=self.settle,
            close=self.close_step,
            stranger=self._look_again,
            look=self.auditor.optimizer_steps,
            fault=fault,
            timed=timed,
        )
        self._handles: list[Any] = []
        self._dirty = False
        self._reduced, self._told = "reduced" in stages, set[str]()
        self._pid = os.getpid()

    def _optimizers(self) -> list[Optimizer]:
        return [optimizer for role in self.updates.roles if (optimizer := role.ref()) is not None]

    # --- life -------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Start watching."""
        compiling.leave_to_python()
        self.updates.attach()
        self._listen()
        self._follow_schedule()
        self.gradients.step_closed()

    def detach(self) -> None:
        """Leave the model as it was."""
        self.updates.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.attachment.disarm()

    def _listen(self) -> None:
        """Parameters and modules that are registered anywhere mark the slots for a new scan.

        What replaces a parameter is watched at once: were all of them replaced, no hook would notice the next backward.
        """
        this = weakref.ref(self)

        def changed(module: nn.Module, name: str, registered: Any) -> None:
            tool = this()
            if tool is not None and os.getpid() == tool._pid:
                tool._dirty = True
                if isinstance(registered, Tensor) and tool.watches:
                    tool._replaced(module, name, registered)

        changed._torchdynamo_disable = True  # type: ignore[attr-defined]
        self._handles = [
            register_module_parameter_registration_hook(changed),
            register_module_module_registration_hook(changed),
        ]

    def _replaced(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        try:
            with self.gradients.lock:
                self.attachment.registered(module, name, tensor, self.gradients.hooks)
        except Exception as error:  # noqa: BLE001 - nothing of ours is raised in a training step
            self._fault("a parameter's replacement", error)

    @property
    def watches(self) -> bool:
        """Whether this step has hooks on the parameters."""
        return self.clock.observed or not self.updates.roles

    def _follow_schedule(self) -> None:
        """Hooks are on the parameters of an observed step, and on none otherwise.

        Without an optimizer a backward is what counts steps, so the hooks stay.
        """
        if self.watches:
            self.attachment.arm(self.gradients.hooks)
        else:
            self.attachment.disarm()

    def _rescan(self) -> None:
        if self._dirty or self.attachment.lost or self.clock.step % SCAN_EVERY == 0:
            self._dirty = False
            if self.attachment.rescan():
                self.attachment.refresh()

    # --- steps ------------------------------------------------------------------------------------------------------

    def _before_pass(self) -> list[int]:
        """An outermost backward starts, and has so far reached its first hook. Returns the slots that get theirs now."""
        self._close_skipped()
        if not self.updates.roles and self.clock.open and not self.clock.explicit:
            self.close_step()
        self.attachment.refresh()
        if self._dirty or self.attachment.lost:
            self._rescan()
        # What was unfrozen or added since the last step may be reached later in this very pass.
        late = self.attachment.arm(self.gradients.hooks)
        self.scaling.look(anew=not self.clock.open)
        self.clock.begin()
        return late

    def _after_pass(self) -> None:
        if self.updates.roles:
            self.updates.after_pass()
        elif self.clock.observed:
            self.updates.manual_pass_ended(read=not self.clock.explicit)

    def settle(self) -> None:
        """Finish what backward left open; outside a backward."""
        self.gradients.settle()
        if self._dirty and not running():
            with self.gradients.lock:
                self._rescan()  # no hook may have fired at all, as where everything that trains is new

    def _look_again(self) -> None:
        """An optimizer stepped that is none of ours. Where its parameters replaced all of ours no hook would ever fire."""
        try:
            silent = not self.gradients.heard
            if not running() and os.getpid() == self._pid and (silent or self.attachment.unarmed()):
                with self.gradients.lock:
                    self.attachment.rescan()
                    self.attachment.refresh()
                    self._follow_schedule()
                if silent and any(slot.stretch is not None for slot in self.attachment.slots):
                    self._tell(_unheard(self.clock.step))
        except Exception as error:  # noqa: BLE001 - nothing of ours is raised in a training step
            self._fault("a look at replaced parameters", error)

    def poll(self) -> None:
        """Close the step that the scaler skipped: no hook says so."""
        if not running() and self.clock.open and not self.elsewhere():
            self.settle()
            self._close_skipped()

    def elsewhere(self) -> bool:
        """Whether another thread trains: what it has open is then left alone."""
        return self.gradients.elsewhere()

    def _close_skipped(self) -> None:
        if self.clock.open and any(role.clock for role in self._read_skipped()):
            self.close_step()

    def _read_skipped(self) -> list[Role]:
        """Of the optimizers that the scaler let do nothing in this step: what it kept from them."""
        skipped = [
            role
            for role in self.updates.roles
            if not role.stepped and (optimizer := role.ref()) is not None and self.scaling.stepped(optimizer)
        ]
        for role in skipped:
            role.stepped = True
            if self.clock.observed:
                self.updates.read_used(role, skipped=True)  # scaler.step() has unscaled what it then skipped
        return skipped

    def close_step(self) -> None:
        """The step ended: hand it over, look at the model again, and get ready for the next."""
        if os.getpid() != self._pid:
            return  # a forked child, whose parent may have held the lock
        step, scalars = self.clock.step, self.clock.scalars
        try:
            with self.gradients.lock, self.attachment.still:
                self._read_rest(step)
            self.clock.close()  # which asks the user's schedule
            with self.gradients.lock, self.attachment.still:
                self.updates.step_closed()
                self._rescan()
                self.gradients.step_closed(watched=self.watches)
                self._follow_schedule()
        except Exception as error:  # noqa: BLE001 - nothing of ours is raised in a training step
            self._fault("end of a step", error)
        self._sink.step_closed(step, scalars)

    def _read_rest(self, step: int) -> None:
        """What is read, and told, once the step is over."""
        self._read_skipped()
        if not self.updates.roles and self.clock.observed and self.clock.backward:
            self.updates.manual_step_ends()
        if self.updates.unheard:
            self._tell(_unheard(step))
        if self.attachment.flat:
            self._tell(_flattened(step))
        if self._reduced and self.clock.observed and self.clock.backward:
            if not self.gradients.averaged:
                self._tell(_not_averaged(step))
            elif self.gradients.local and self.attachment.ignored:
                ignored = self.attachment.ignored
                self._tell(_ignored(step, [slot.name for slot in self.attachment.slots if slot in ignored]))

    def _tell(self, finding: Finding) -> None:
        """Say it once."""
        if finding.rule not in self._told:
            self._told.add(finding.rule)
            self._sink.tell(finding)

    def explicit_step(self) -> None:
        """`lens.step()`."""
        self.clock.explicit = True
        self.settle()
        self.close_step()

    def unheard(self) -> bool:
        """Whether gradients came since the last step that no hook of ours can tell of."""
        return any(
            slot.stretch is not None and (t := slot.tensor()) is not None and self.gradients.changed(slot, t)
            for slot in self.attachment.slots
        )

    def averaged(self) -> bool:
        """Over ranks: whether `.grad` is of all of them, as far as is known."""
        stretches = [slot.stretch for slot in self.attachment.slots if slot.stretch is not None]
        return all(stretch.averaged() for stretch in stretches) if stretches else self.gradients.averaged

    def scale_now(self, slot: Slot) -> float | Tensor:
        """What this parameter's `.grad` still has to be divided by."""
        if self.scaling.scaler is None or not self.clock.open:
            return 1.0
        for role in self.updates.roles:
            if slot in self.updates.slots(role):
                return 1.0 if role.stepped or self.scaling.unscaled(role.ref()) else self.gradients.scale
        return self.gradients.scale


def _not_averaged(step: int) -> Finding:
    return Finding(
        rule="not-averaged",
        step=step,
        severity=Severity.INFO,
        stage=Stage.REDUCED.value,
        seen="no backward of this step ended with gradients that were averaged over ranks, so there is nothing to read as "
        "`reduced`; this is said once",
        causes=(
            "gradients are averaged by hand between backward() and the optimizer's step",
            "the model is under neither DistributedDataParallel nor fully_shard",
            "the optimizer's step came after no_sync() alone",
        ),
        remedy="read the stage `used`: what the optimizer consumed, however it was averaged",
    )


def _ignored(step: int, names: Sequence[str]) -> Finding:
    few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return Finding(
        rule="not-averaged",
        step=step,
        severity=Severity.INFO,
        stage=Stage.REDUCED.value,
        seen=f"{len(names)} parameters ({few}) are not among those that FSDP2 shards and averages: they have no `reduced` "
        "rows",
        causes=("fully_shard(..., ignored_params=...)", "fully_shard was called on parts of the model only"),
        remedy="average their gradients before the optimizer's step, or the ranks' copies drift apart; `used` has what it "
        "consumed",
        parameter=names[0],
        parameters=tuple(names),
    )


def _unheard(step: int) -> Finding:
    return Finding(
        rule="read-at-step",
        step=step,
        severity=Severity.INFO,
        stage=Stage.USED.value,
        seen="FSDP1 lets no hook on its original parameters fire: their gradients are read at the optimizer's step, as "
        "`used`, and no other stage has rows",
        remedy="give watch() the optimizer, without which there is no step to read at; fully_shard (FSDP2) has `reduced` "
        "gradients too",
    )


def _flattened(step: int) -> Finding:
    return Finding(
        rule="flat-parameters",
        step=step,
        severity=Severity.INFO,
        seen="FSDP1 has made flat parameters of several: each row is of this rank's part of one, padding included, and in "
        "`backward` of the whole of this rank's own flat gradient; no row is of a parameter that you named",
        remedy="FullyShardedDataParallel(..., use_orig_params=True) has rows by name at the optimizer's step; fully_shard "
        "(FSDP2) when a backward ends, too",
    )
