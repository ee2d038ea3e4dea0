"""Memory that was freed goes back to the system.

Each request is answered in a thread of its own. The allocators of Arrow and of the C library keep what those threads have
freed, for a next time that comes in another thread: a server that has read many rows would keep some hundred megabytes that
nothing uses. Asked for after a large answer, it takes some 20 ms.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def release() -> None:
    """Give back what nothing uses."""
    import pyarrow

    pyarrow.default_memory_pool().release_unused()
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], object]:
    """The C library's `malloc_trim`, which glibc has; elsewhere nothing is done."""
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (AttributeError, OSError, TypeError):
        return lambda pad: None
