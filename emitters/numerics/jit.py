"""Compiled functions: `kernel` for what Python calls, `device` for what kernels call.

Both keep strict IEEE order (no fast-math, no fused multiply-add) and divide as numpy does. LLVM
still makes vector code of kernels that are written for it: inner loops run over neighbours and do
not branch; indices are unsigned where parts of an array must be seen not to overlap, for a signed
one could count from the end; extremes are compared as integers, which LLVM may reorder.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable
from functools import cache, wraps
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar, cast

from policy_dsl.diagnostics import PolicyError, fail

_FILE = ".numba_config.yaml"


def ensure_no_settings_here() -> None:
    """Raises: PolicyError if the current folder has settings that numba would take.

    Among them is where compiled code is loaded from, and the folder may be a stranger's.
    """
    if Path(_FILE).exists():
        reason = f"it would take its settings from {_FILE} in the current folder"
        cure = "move the file away, or run policyc in another folder"
        raise fail("numba-unusable", reason=reason, suggestion=cure)


def unusable(reason: str) -> PolicyError:
    """The error of a numba that cannot be used, with what may be to blame for it."""
    settings = sorted(name for name in os.environ if name.startswith("NUMBA_"))
    cure = "install it again: python -m pip install --force-reinstall numba"
    if settings:
        cure = f"unset or correct {', '.join(settings)} in the environment"
    return fail("numba-unusable", reason=reason, suggestion=cure)


ensure_no_settings_here()
try:
    import numba
    from numba.core.registry import cpu_target
except Exception as fault:
    raise unusable(f"{type(fault).__name__}: {fault}") from fault
if getattr(numba.config, "DISABLE_JIT", 0):
    raise unusable("NUMBA_DISABLE_JIT forbids it to compile")

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Numba's own annotations are partial; untyped calls go through this name.
_types: Any = numba.types

int64 = _types.int64
int64_pair = _types.UniTuple(int64, 2)


# What a cache that cannot be written, or holds a damaged file, makes numba raise.
_CACHE_FAULTS = (OSError, EOFError, pickle.UnpicklingError)
_lost_caches: list[str] = []


def reads(element: str) -> Any:
    """The type of a contiguous 1-D argument, of a numpy dtype's name, that a kernel only reads."""
    return _types.Array(getattr(_types, element), 1, "C", readonly=True)


def writes(element: str) -> Any:
    """The type of a contiguous 1-D argument that a kernel writes; element as in `reads`."""
    return _types.Array(getattr(_types, element), 1, "C")


def kernel(*arguments: Any, returns: Any = _types.void) -> Callable[[_Function], _Function]:
    """A decorator: the function compiled at once for these types, free of the GIL.

    The machine code is cached on disk, see `_cached_name`. Constants that a factory closes over
    are plain numbers: closing over another compiled function would defeat the cache.
    """
    signature = returns(*arguments)

    def compiled(function: _Function) -> _Function:
        function.__qualname__ = _cached_name(function, signature)
        dispatcher = _dispatcher(function)
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
                dispatcher = _dispatcher(function)
                dispatcher.compile(signature)
        dispatcher.disable_compile()
        return cast("_Function", dispatcher)

    return compiled


def _dispatcher(function: Callable[..., Any]) -> Any:
    return numba.njit(nogil=True, error_model="numpy")(function)


def _cached_name(function: Callable[..., Any], signature: Any) -> str:
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
    results: dict[tuple[Any, ...], Any] = {}
    lock = Lock()

    @wraps(function)
    def once(*arguments: Any) -> Any:
        with lock:
            if arguments not in results:
                results[arguments] = function(*arguments)
            return results[arguments]

    return cast("_Function", once)


def late(*arguments: Any, returns: Any = _types.void) -> Callable[[_Function], _Function]:
    """A decorator as `kernel` is, of a function that is compiled when it is first called."""

    def deferred(function: _Function) -> _Function:
        make: Any = factory(lambda: kernel(*arguments, returns=returns)(function))

        @wraps(function)
        def called(*values: Any) -> Any:
            return make()(*values)

        return cast("_Function", called)

    return deferred


def device(function: _Function) -> _Function:
    """The function, callable from kernels and from other device functions."""
    return cast("_Function", numba.njit(error_model="numpy")(function))
