"""What kernels must know of a tensor: whether it is a plain one, or of a type with a behaviour of its own."""

from __future__ import annotations

import torch
from torch import Tensor

#: The types that torch itself defines without a subclass's behaviour.
PLAIN = {Tensor, torch.nn.Parameter}
