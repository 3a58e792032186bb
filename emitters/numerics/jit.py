"""Compiled functions: `kernel` for what Python calls, `device` for what kernels call.

Both keep strict IEEE order (no fast-math, no fused multiply-add) and divide as numpy does. LLVM
still makes vector code of kernels that are written for it: inner loops run over neighbours and do
not branch; indices are unsigned where parts of an array must be seen not to overlap, for a signed
one could count from the end; extremes are compared as integers, which LLVM may reorder.
"""

import logging
import os
import pickle
from collections.abc import Callable
from functools import cache, partial, wraps
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from emitters.numerics import Array, value_type
from policy_dsl.diagnostics import PolicyError, fail

_SETTINGS = ".numba_config.yaml"


def _unusable(reason: str, cure: str = "") -> PolicyError:
    """The error of a numba that cannot be used, with what may be to blame for it."""
    settings = sorted(name for name in os.environ if name.startswith("NUMBA_"))
    if settings:
        cure = cure or f"unset or correct {', '.join(settings)} in the environment"
    cure = cure or "install it again: python -m pip install --force-reinstall numba"
    return fail("numba-unusable", reason=reason, suggestion=cure)


# The settings name a folder of compiled code to load, and they may be a stranger's.
if Path(_SETTINGS).exists():
    raise _unusable(
        f"it would take its settings from {_SETTINGS} in the current folder",
        "move the file away, or run policyc in another folder",
    )
try:
    import numba
    from numba.core.registry import cpu_target
except Exception as fault:
    raise _unusable(f"{type(fault).__name__}: {fault}") from fault
if getattr(numba.config, "DISABLE_JIT", 0):
    raise _unusable("NUMBA_DISABLE_JIT forbids it to compile")

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Numba's own annotations are partial; untyped calls go through these names.
_types: Any = numba.types
_njit: Any = partial(numba.njit, error_model="numpy")

int64 = _types.int64
int64_pair = _types.UniTuple(int64, 2)

# What a cache that cannot be written, or holds a damaged file, makes numba raise.
_CACHE_FAULTS = (OSError, EOFError, pickle.UnpicklingError)
_lost_caches: list[str] = []


class Elements(NamedTuple):
    """An array argument: its element's name, how it is stored, and what the kernel gets."""

    name: str
    storage: np.dtype[Any]
    seen: Any

    def row(self, values: Array, parameter: str = "") -> Array:
        """All elements in one row, as kernels see them; a view where memory layout allows.

        Raises: ValueError, naming the value type or the parameter, for another numpy type.
        """
        if values.dtype != self.storage:
            what = parameter if self.name.islower() else self.name
            raise ValueError(f"{what} is stored as {self.storage}, not {values.dtype}")
        row: Array = np.require(values, requirements=["C", "ALIGNED"]).reshape(-1)
        return row.view(self.seen.dtype.name)


def writes(element: str, *, readonly: bool = False) -> Elements:
    """An array that a kernel writes; element: a numpy type, or a value type: it sees bits.

    Raises: ValueError for another value type.
    """
    stored = element if element.islower() else value_type(element).storage
    raw = element if element.islower() else value_type(element).raw.__name__
    seen = _types.Array(getattr(_types, raw), 1, "C", readonly=readonly)
    return Elements(element, np.dtype(stored), seen)


def reads(element: str) -> Elements:
    """An array that a kernel only reads; element as in `writes`."""
    return writes(element, readonly=True)


def kernel(*arguments: Any, returns: Any = _types.void) -> Callable[[_Function], _Function]:
    """A decorator: the function, compiled for these types at its first call, free of the GIL.

    Callers give arrays of any shape, the kernel gets their elements in one row. The machine code
    is cached on disk, see `_cached_name`. Constants that a factory closes over are plain numbers:
    closing over another compiled function would defeat the cache.
    """
    signature = returns(*(getattr(argument, "seen", argument) for argument in arguments))

    def deferred(function: Any) -> Any:
        compiled: Any = factory(lambda: _compiled(function, signature))
        names = function.__code__.co_varnames[: len(arguments)]

        @wraps(function)
        def called(*values: Any) -> Any:
            given = zip(arguments, values, names, strict=True)
            rows = [a.row(v, name) if isinstance(a, Elements) else v for a, v, name in given]
            return compiled()(*rows)

        return called

    return deferred


def _compiled(function: Any, signature: Any) -> Any:
    function.__qualname__ = _cached_name(function, signature)
    dispatcher = _njit(function, nogil=True)
    try:
        dispatcher.enable_caching()
    except (OSError, RuntimeError) as fault:  # numba finds no folder to write to
        _report_lost_cache(str(fault))
    try:
        dispatcher.compile(signature)
    except _CACHE_FAULTS as fault:
        _report_lost_cache(str(fault))
        # Compiled but not kept, or neither read nor compiled.
        if not dispatcher.signatures:
            dispatcher = _njit(function, nogil=True)
            dispatcher.compile(signature)
    dispatcher.disable_compile()
    return dispatcher


def _cached_name(function: Any, signature: Any) -> str:
    """The function's name with a digest of everything that its machine code depends on.

    Numba's own key misses device functions in other files. And numba numbers the versions in
    one file of the cache without a lock: of two programs that compile at the same time, one
    would find the code of the other under its key. With this name each version has a file.
    """
    constants = [cell.cell_contents for cell in function.__closure__ or ()]
    digest = sha256(repr((_compiler_and_sources(), signature, constants)).encode())
    return f"{function.__qualname__}_{digest.hexdigest()[:16]}"


@cache
def _compiler_and_sources() -> tuple[Any, ...]:
    digest = sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    processor = cpu_target.target_context.codegen().magic_tuple()
    return numba.__version__, processor, digest.hexdigest()


def _report_lost_cache(reason: str) -> None:
    if not _lost_caches:
        logging.getLogger(__name__).warning(
            "compiled kernels cannot be cached (%s): each run compiles them again, which takes "
            "seconds. Set NUMBA_CACHE_DIR to an empty folder that you can write to.",
            reason,
        )
    _lost_caches.append(reason)


def factory(function: _Function) -> _Function:
    """The function, called once for each set of arguments, also when threads race to be first.

    For functions that make a kernel: waiting for it costs less than compiling it twice.
    """
    made, lock = cache(function), Lock()

    @wraps(function)
    def once(*arguments: Any) -> Any:
        with lock:
            return made(*arguments)

    return cast("_Function", once)


def device(function: _Function) -> _Function:
    """The function, callable from kernels and from other device functions."""
    return cast("_Function", _njit(function))
