"""gradlens: which way should each weight move to lower the loss, and how sure is that?

Live names need torch and are loaded when first used; offline ones (`open_run`, `rules`, `fields`) do not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gradlens import errors, fields, records, schedules
from gradlens.errors import FindingError, GradlensError, GradlensWarning
from gradlens.frames import to_frame
from gradlens.records import Direction, Finding, Severity, Snapshot, Stage, Status, Verdict

if TYPE_CHECKING:
    from gradlens import testing, writers
    from gradlens.analysis import rules
    from gradlens.lens import Lens, watch
    from gradlens.probes.audit import audit
    from gradlens.probes.curvature import curvature, hessian_product
    from gradlens.probes.dissect import dissect
    from gradlens.probes.finite_difference import check_partials
    from gradlens.probes.mixed_partials import mixed_partials
    from gradlens.probes.nonfinite import trace_nonfinite
    from gradlens.probes.nudge import nudge
    from gradlens.probes.partials import partials
    from gradlens.probes.survey import survey
    from gradlens.probes.symmetry import check_symmetry
    from gradlens.store.run import Run, open_run

__version__ = "0.1.0"

__all__ = [
    # watching a training loop
    "watch",
    "Lens",
    "schedules",
    # asking a function or a model, on demand
    "partials",
    "mixed_partials",
    "check_partials",
    "check_symmetry",
    "survey",
    "nudge",
    "curvature",
    "hessian_product",
    "dissect",
    "audit",
    "trace_nonfinite",
    # what was recorded
    "open_run",
    "Run",
    "to_frame",
    "rules",
    "writers",
    # the words
    "fields",
    "records",
    "Stage",
    "Status",
    "Direction",
    "Verdict",
    "Severity",
    "Snapshot",
    "Finding",
    # what goes wrong
    "errors",
    "GradlensError",
    "GradlensWarning",
    "FindingError",
    # models with a known illness, a recording writer
    "testing",
]

#: Where the names live that are not imported at once: (module, attribute); no attribute means the module itself.
_LAZY: dict[str, tuple[str, str | None]] = {
    "watch": ("gradlens.lens", "watch"),
    "Lens": ("gradlens.lens", "Lens"),
    "partials": ("gradlens.probes.partials", "partials"),
    "mixed_partials": ("gradlens.probes.mixed_partials", "mixed_partials"),
    "check_symmetry": ("gradlens.probes.symmetry", "check_symmetry"),
    "check_partials": ("gradlens.probes.finite_difference", "check_partials"),
    "survey": ("gradlens.probes.survey", "survey"),
    "nudge": ("gradlens.probes.nudge", "nudge"),
    "curvature": ("gradlens.probes.curvature", "curvature"),
    "hessian_product": ("gradlens.probes.curvature", "hessian_product"),
    "dissect": ("gradlens.probes.dissect", "dissect"),
    "trace_nonfinite": ("gradlens.probes.nonfinite", "trace_nonfinite"),
    "audit": ("gradlens.probes.audit", "audit"),
    "open_run": ("gradlens.store.run", "open_run"),
    "Run": ("gradlens.store.run", "Run"),
    "rules": ("gradlens.analysis.rules", None),
    "writers": ("gradlens.writers", None),
    "testing": ("gradlens.testing", None),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'gradlens' has no attribute {name!r}{errors.nearest(name, __all__)}")
    module, attribute = _LAZY[name]
    found = importlib.import_module(module)
    value = found if attribute is None else getattr(found, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
