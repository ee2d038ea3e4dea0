"""What a device would notice of some code: the operations that it runs, and the copies that make the host wait."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {"view", "select", "detach", "alias", "slice", "unsqueeze", "expand", "narrow", "permute", "transpose", "as_strided"}


class Launches(TorchDispatchMode):
    """Counts the operations that would run on a device, and the copies between devices that would make the host wait."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.counts[name] += 1
        result = func(*args, **(kwargs or {}))
        ends = {t.device.type for t in (*args, result) if isinstance(t, torch.Tensor)}
        waits = not ((kwargs or {}).get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
        if name in ("copy_", "_to_copy") and len(ends) > 1 and waits:
            self.waits.append((name, ends))
        return result
