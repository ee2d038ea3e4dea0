"""One weight, as people write it: `"fc1.weight[3, 7]"`, `("fc1.weight", (3, 7))`, or a name alone for all its entries.

Reports print weights as `fc1.weight[3, 7]`, so that is accepted wherever a weight is named. A name may carry the prefixes
that wrappers add (`module.`, `_orig_mod.`): they are dropped where the name is not known with them.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection
from typing import Any

import numpy as np

from gradlens.errors import ArgumentError, ArgumentTypeError, nearest

#: Path components that wrappers add to the names of parameters wherever they stand.
PREFIXES = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
#: Those that a model may have of its own: the classes of the wrappers that add them (DDP's, opacus').
OF_CLASSES = {
    "module": {"DistributedDataParallel", "DataParallel"},
    "_module": {"GradSampleModule", "AbstractGradSampleModule"},
}
WRAPPERS = frozenset((*PREFIXES, *OF_CLASSES))
Index = tuple[int, ...]
_WRITTEN = re.compile(r"(.*)\[([-\d,\s]*)\]\s*", re.DOTALL)
_EXPECTED = "a weight is ('fc1.weight', (0, 3)), 'fc1.weight[0, 3]', or a name for all its entries"


def label(name: str, index: Index) -> str:
    """The name of one weight: `fc1.weight[3, 17]`, or `x` for a scalar."""
    return f"{name}[{', '.join(map(str, index))}]" if index else name


def known_name(name: str, names: Collection[str]) -> str | None:
    """The parameter that is meant: by its name, or by its name under wrappers; None if there is none."""
    if name in names:
        return name
    plain = ".".join(word for word in name.split(".") if word not in WRAPPERS)
    if plain in names:
        return plain
    inside = [known for known in names if ".".join(word for word in known.split(".") if word not in WRAPPERS) == plain]
    return inside[0] if len(inside) == 1 else None


def find_name(name: object, names: Collection[str]) -> str:
    """The same, or an error that names the nearest."""
    if not isinstance(name, str):
        raise ArgumentTypeError(f"a parameter is named by text, such as 'fc1.weight', not {name!r}")
    found = known_name(name, names)
    if found is None:
        raise ArgumentError(f"{name!r} is not among the parameters here{nearest(name, names)}")
    return found


def parse_weight(weight: object, names: Collection[str]) -> tuple[str, Index | None]:
    """The name and the index of a weight; the index is None where a name stands alone.

    The name is the known one where there is one, else as given: whoever asks says what is missing.
    """
    if isinstance(weight, str):
        written = None if known_name(weight, names) is not None else _WRITTEN.fullmatch(weight)
        if written is None:
            return known_name(weight, names) or weight, None
        numbers = written[2].replace(",", " ").split()
        return known_name(written[1].strip(), names) or written[1].strip(), tuple(map(_integer, numbers))
    if isinstance(weight, tuple | list) and len(weight) == 2 and isinstance(weight[0], str):
        return known_name(weight[0], names) or weight[0], parse_index(weight[1])
    raise ArgumentTypeError(f"{_EXPECTED}, not {weight!r}")


def parse_index(index: Any) -> Index:
    """An index as a tuple: of an int, a sequence of ints, or an array or a tensor of them."""
    given = index.tolist() if hasattr(index, "tolist") else index
    return tuple(map(_integer, given if isinstance(given, tuple | list) else (given,)))


def is_index(index: object) -> bool:
    """Whether this is an index, and not another weight."""
    try:
        return not isinstance(index, str) and bool(parse_index(index) or True)
    except ArgumentTypeError:
        return False


def _integer(value: Any) -> int:
    if not isinstance(value, bool | np.bool_):
        try:
            return int(value) if isinstance(value, str) else operator.index(value)
        except (TypeError, ValueError):
            pass
    raise ArgumentTypeError(f"{_EXPECTED}; {value!r} is no whole number")
