"""Where records go: anything with `write(record)`, `flush()` and `close()`, given to `watch(writers=[...])`.

    gradlens.watch(model, optimizer, writers=[gradlens.writers.CSV("gradients.csv")])     # while it trains
    gradlens.open_run("runs/digits").replay(gradlens.writers.JSONLines(sys.stdout))       # later, from the records

What `watch(run=...)` writes comes from two of these, `Store` and `TensorBoard`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gradlens import errors

if TYPE_CHECKING:
    from gradlens.store.store import Store
    from gradlens.writers.background import Background
    from gradlens.writers.base import Writer
    from gradlens.writers.export import CSV, Frame, JSONLines
    from gradlens.writers.fanout import Fanout
    from gradlens.writers.tensorboard import TensorBoard

__all__ = [
    # what a writer is
    "Writer",
    # files and frames for other tools
    "Frame",
    "CSV",
    "JSONLines",
    # what watch(run=...) writes
    "Store",
    "TensorBoard",
    # writers of writers
    "Fanout",
    "Background",
]

#: Where the names live: some bring pyarrow or tensorboard along.
_LAZY = {
    "Writer": "gradlens.writers.base",
    "Frame": "gradlens.writers.export",
    "CSV": "gradlens.writers.export",
    "JSONLines": "gradlens.writers.export",
    "Store": "gradlens.store.store",
    "TensorBoard": "gradlens.writers.tensorboard",
    "Fanout": "gradlens.writers.fanout",
    "Background": "gradlens.writers.background",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'gradlens.writers' has no attribute {name!r}{errors.nearest(name, __all__)}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
