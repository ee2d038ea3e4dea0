"""What a tensor is, as far as kernels ask: a plain one, or the local part of a distributed one."""

from __future__ import annotations

import torch
from torch import Tensor

#: The types that torch itself defines without a subclass's behaviour.
PLAIN = {Tensor, torch.nn.Parameter}


def local_part(tensor: Tensor) -> Tensor:
    """The local part of a distributed tensor; any other as it is."""
    local = getattr(tensor, "_local_tensor", None)
    return tensor if local is None else local
