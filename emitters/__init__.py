"""The back end: every folder here that holds a `spec.py` is a format."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from emitters.core.interface import Emitter
from policy_dsl.formats import FormatSpec


@cache
def names() -> tuple[str, ...]:
    """The names of all formats, sorted."""
    # Found, not registered: a new format is a new folder and nothing else.
    rooms = (room for room in pkgutil.iter_modules(__path__) if room.ispkg)
    found = (room.name for room in rooms if _is_format(room.name))
    return tuple(sorted(found))


@cache
def get(name: str) -> Emitter:
    """The format of that name; its modules are imported when they are first needed.

    Raises: KeyError if there is no such format.
    """
    if name not in names():
        raise KeyError(name)
    return Emitter(name, f"{__name__}.{name}")


def specs() -> Mapping[str, FormatSpec]:
    """What every format can do, by name; imports none of their kernels."""
    return {name: get(name).spec for name in names()}


def _is_format(name: str) -> bool:
    return any((Path(folder) / name / "spec.py").is_file() for folder in __path__)
