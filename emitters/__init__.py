"""The back end: every folder here that holds a `spec.py` is a format."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import cast

from policy_dsl.formats import Format


class _Formats(Mapping[str, Format]):
    """The formats of this folder by name, sorted; each is imported when it is asked for."""

    @cached_property
    def _names(self) -> tuple[str, ...]:
        # Listed, not registered: a new format is a new folder and nothing else.
        rooms = (room.name for room in pkgutil.iter_modules(__path__) if room.ispkg)
        folders = [Path(folder) for folder in __path__]
        return tuple(
            sorted(
                name for name in rooms if any((at / name / "spec.py").is_file() for at in folders)
            )
        )

    def __getitem__(self, name: str) -> Format:
        if name not in self._names:
            raise KeyError(name)
        return cast("Format", import_module(f"{__name__}.{name}").FORMAT)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


FORMATS: Mapping[str, Format] = _Formats()
