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
from types import FunctionType
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from emitters.numerics import VALUE_TYPES, Array, value_type
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

int64, float32, several = _types.int64, _types.float32, _types.UniTuple

# What a cache that cannot be written, or holds a damaged file, makes numba raise.
_CACHE_FAULTS = (OSError, EOFError, pickle.UnpicklingError)
_lost_caches: list[str] = []


class Elements(NamedTuple):
    """An array argument; element: a numpy type, a value type, or the constant that names one."""

    element: str
    readonly: bool


reads, writes = partial(Elements, readonly=True), partial(Elements, readonly=False)


def _forms(element: str) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """How an element is stored, and what kernels see of it: of a value type, the bits."""
    if element.islower():
        return np.dtype(element), np.dtype(element)
    return np.dtype(value_type(element).storage), np.dtype(value_type(element).raw)


def row_of(values: Array, element: str, name: str = "") -> Array:
    """All elements in one row, as kernels see them; a view where memory layout allows.

    Raises: ValueError, naming the value type or the parameter, for another numpy type.
    """
    stored, seen = _forms(element)
    if values.dtype != stored:
        what = name if element.islower() else element
        raise ValueError(f"{what} is stored as {stored}, not {values.dtype}")
    row: Array = np.require(values, requirements=["C", "ALIGNED"]).reshape(-1)
    return row.view(seen)


def kernel(*arguments: Any, returns: Any = _types.void) -> Callable[..., Callable[..., Any]]:
    """A decorator: the function, compiled for these types at its first call, free of the GIL.

    Callers give arrays of any shape, the kernel gets their elements in one row. Parameters beyond
    these arguments are constants, given by name: each set of them is compiled on its own, with
    the number of a value type for its name. The machine code is cached, see `_cached_name`.
    """

    def deferred(function: Any) -> Callable[..., Any]:
        compiled, lock = cache(partial(_compiled, function, arguments, returns)), Lock()

        @wraps(function)
        def called(*values: Any, **constants: Any) -> Any:
            with lock:  # waiting costs less than compiling twice
                run = compiled(**constants)
            given = zip(arguments, values, function.__code__.co_varnames, strict=False)
            return run(*(_row(*each, constants) for each in given), *constants.values())

        return called

    return deferred


def _row(argument: Any, value: Any, name: str, constants: dict[str, Any]) -> Any:
    if not isinstance(argument, Elements):
        return value
    if not (argument.readonly or value.flags.carray):
        raise TypeError(f"{name} cannot be written in place")
    return row_of(value, constants.get(argument.element, argument.element), name)


def _compiled(function: Any, arguments: Any, returns: Any, **constants: Any) -> Any:
    types = list(arguments)
    for at, argument in enumerate(arguments):
        if isinstance(argument, Elements):
            seen = _forms(constants.get(argument.element, argument.element))[1]
            types[at] = _types.Array(numba.from_dtype(seen), 1, "C", readonly=argument.readonly)
    # To numba, the default of a parameter that is left out is a constant.
    # Its dispatcher takes all of these for the same: what is compiled is called without it.
    names = function.__code__.co_varnames[len(arguments) : function.__code__.co_argcount]
    kinds = {name: known.kind for name, known in VALUE_TYPES.items()}
    given = tuple(kinds.get(constants[name], constants[name]) for name in names)
    signature = returns(*types, *map(_types.Omitted, given))
    function = FunctionType(function.__code__, function.__globals__, argdefs=given)
    function.__qualname__ = _cached_name(function, signature)
    dispatcher = _njit(function, nogil=True)
    try:
        dispatcher.enable_caching()
    except (OSError, RuntimeError) as fault:  # numba finds no folder to write to
        _report_lost_cache(str(fault))
    try:
        return dispatcher.compile(signature)
    except _CACHE_FAULTS as fault:
        _report_lost_cache(str(fault))
    # Compiled but not kept, or neither read nor compiled.
    dispatcher = dispatcher if dispatcher.signatures else _njit(function, nogil=True)
    return dispatcher.compile(signature)


def _cached_name(function: Any, signature: Any) -> str:
    """The function's name with a digest of everything that its machine code depends on.

    Numba's own key misses device functions in other files. And numba numbers the versions in
    one file of the cache without a lock: of two programs that compile at the same time, one
    would find the code of the other under its key. With this name each version has a file.
    """
    digest = sha256(repr((_compiler_and_sources(), signature)).encode())
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


def device(function: _Function) -> _Function:
    """The function, callable from kernels and from other device functions."""
    return cast("_Function", _njit(function))
