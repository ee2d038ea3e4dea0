"""Code that torch.compile compiles calls us, and is compiled as if we were not there.

Dynamo, which reads Python for torch.compile, breaks at a call of ours and neither traces nor compiles what we do. To mark
the hooks is not enough: Dynamo then goes on to compile the functions that they call, one after another, which were 16 graphs
more for a compiled optimizer. So the package is left to Python as a whole. Functions without a file of their own, as
dataclasses make them, are not known as ours by that: what calls them, once a pass or a step, is run `eagerly`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._dynamo import trace_rules

Call = TypeVar("Call", bound=Callable[..., Any])


@functools.cache
def leave_to_python() -> None:
    """Dynamo neither traces nor compiles this package, from now on."""
    trace_rules.add("gradlens")


def eagerly(call: Call) -> Call:
    """The call, hidden from Dynamo with all that it calls. Costs 1 to 2.5 us each time: nothing for hooks of a parameter."""
    result: Call = torch.compiler.disable(call)
    return result
