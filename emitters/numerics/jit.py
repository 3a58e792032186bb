"""Compiled functions: `kernel` for what Python calls, `device` for what kernels call.

Both keep strict IEEE order (no fast-math, no fused multiply-add) and divide as numpy does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar, cast
from zlib import crc32

import numba

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Numba's own annotations are partial; untyped calls go through this name.
_types: Any = numba.types

int64 = _types.int64
int64_pair = _types.UniTuple(int64, 2)


def _digest_of_sources() -> str:
    """Checksum of every source file of this room."""
    checksum = 0
    for source in sorted(Path(__file__).parent.glob("*.py")):
        checksum = crc32(source.read_bytes(), checksum)
    return f"{checksum:08x}"


_DIGEST = _digest_of_sources()


def reads(element: str) -> Any:
    """The type of a contiguous 1-D argument that a kernel only reads.

    element: a numpy dtype name. Read-only and writeable arrays are both accepted, by one
    compiled version.
    """
    return _types.Array(getattr(_types, element), 1, "C", readonly=True)


def writes(element: str) -> Any:
    """The type of a contiguous 1-D argument that a kernel writes; element as in `reads`."""
    return _types.Array(getattr(_types, element), 1, "C")


def kernel(*arguments: Any, returns: Any = _types.void) -> Callable[[_Function], _Function]:
    """A decorator: the function compiled at once for these types, free of the GIL.

    The machine code is cached on disk. Numba's cache key sees the file that holds the kernel
    but not the device functions it calls from other files, so the digest of all of them goes
    into the name; constants that a factory closes over are part of the key by themselves
    (plain numbers only: closing over another compiled function would defeat the cache).
    """
    compiler = partial(numba.njit, returns(*arguments), nogil=True, error_model="numpy")

    def compiled(function: _Function) -> _Function:
        function.__qualname__ = f"{function.__qualname__}_{_DIGEST}"
        try:
            return cast("_Function", compiler(cache=True)(function))
        except (OSError, RuntimeError):
            # No folder for the cache can be written: every run compiles anew.
            return cast("_Function", compiler()(function))

    return compiled


def factory(function: _Function) -> _Function:
    """The function, called once for each set of arguments, also when threads race to be first.

    For functions that make a kernel: waiting for it costs less than compiling it twice.
    """
    results: dict[tuple[Any, ...], Any] = {}
    lock = Lock()

    @wraps(function)
    def once(*arguments: Any) -> Any:
        with lock:
            if arguments not in results:
                results[arguments] = function(*arguments)
            return results[arguments]

    return cast("_Function", once)


def device(function: _Function) -> _Function:
    """The function, callable from kernels and from other device functions."""
    return cast("_Function", numba.njit(error_model="numpy")(function))
