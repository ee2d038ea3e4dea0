"""Runs a script to its first backward, reads the graph of that loss, and ends the script; `gradlens audit` starts it.

The models are those that the loss depends on, the optimizers those that hold what it depends on. Nothing is watched, and no
weight moves: the script ends before the backward, by `SystemExit`, so that its `finally` blocks run.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from gradlens.errors import GradlensError
from gradlens.integrations.script import AtBackward, AtOptimizer, Made, find_leaves, holds_any, leaves
from gradlens.records import Severity

NOTHING = "the script ended before any backward(): there is no graph to read"


class Auditor:
    """Waits for the first backward of this process."""

    def __init__(self, told: dict[str, Any]) -> None:
        self._told, self._pid, self._done = told, os.getpid(), False
        self._made = Made()
        self._handles = [
            register_module_parameter_registration_hook(self._registered),
            register_module_module_registration_hook(self._registered),
            AtOptimizer(self._made.note_optimizer),
            AtBackward(self._asked),
        ]
        atexit.register(self._end)

    def _registered(self, module: nn.Module, name: str, registered: Any) -> None:
        self._made.note_module(module)

    def _asked(self, *losses: Tensor) -> None:
        """Before the first backward: read, say it, and end."""
        if os.getpid() != self._pid:
            return
        if not losses:  # a backward from an edge of a graph alone
            AtBackward(self._asked)
            return
        self._done = True
        try:
            code = self._answer(_summed(losses))
        except GradlensError as error:
            print(f"Error: {error}", file=sys.stderr)
            code = 2
        AtBackward(lambda *again: os._exit(code))  # the script caught our exit
        raise SystemExit(code)

    def _answer(self, loss: Tensor) -> int:
        from gradlens.probes.audit import audit

        reached = leaves(loss)
        found = find_leaves(self._made, set(), loss)
        optimizers = [each for each in self._made.optimizers(None) if holds_any(each, reached)]
        result = audit(loss, None if found is None else _whole(found.target), optimizers or None)
        self._write(_as_json(result) if self._told["json"] else str(result))
        level = self._told["fail_on"]
        worst = max((finding.severity.rank for finding in result.findings), default=-1)
        return int(level is not None and worst >= Severity(level).rank)

    def _write(self, text: str) -> None:
        """Where standard output was before the script got another."""
        with os.fdopen(os.dup(self._told["output"]), "w") as output:
            print(text, file=output)

    def _end(self) -> None:
        if not self._done and os.getpid() == self._pid:
            print(f"Error: {NOTHING}", file=sys.stderr, flush=True)
            os._exit(2)


def _summed(losses: Sequence[Tensor]) -> Tensor:
    """One loss whose gradient is that of all: `torch.autograd.backward` takes several."""
    with torch.enable_grad():
        return functools.reduce(torch.add, [each if each.numel() == 1 else each.sum() for each in losses])


def _whole(target: nn.Module | dict[str, nn.Module | Tensor]) -> nn.Module | None:
    """One module of all that the loss depends on."""
    if isinstance(target, nn.Module):
        return target
    modules = {name: part for name, part in target.items() if isinstance(part, nn.Module)}
    return nn.ModuleDict(modules) if len(modules) > 1 else next(iter(modules.values()), None)


def _as_json(result: Any) -> str:
    findings = [{**dataclasses.asdict(finding), "severity": finding.severity.value} for finding in result.findings]
    operations = len(result.graph.operations)
    return json.dumps({"ok": result.ok, "operations": operations, "parameters": result.parameters, "findings": findings})


def begin(told: dict[str, Any]) -> None:
    """Wait for the first backward."""
    if os.getpid() == told["pid"]:
        Auditor(told)
