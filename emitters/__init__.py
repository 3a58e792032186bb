"""The back end: every folder here that holds a `spec.py` is a format."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import cast

from policy_dsl.diagnostics import fail
from policy_dsl.formats import Format


class _Formats(Mapping[str, Format]):
    """The formats of this folder by name, sorted; each is imported when it is asked for."""

    def __init__(self) -> None:
        # Listed, not registered: a new format is a new folder and nothing else.
        specs = (spec for folder in __path__ for spec in Path(folder).glob("*/spec.py"))
        self._names = sorted({spec.parent.name for spec in specs})

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


def format_of(target: str, formats: Mapping[str, Format] = FORMATS) -> Format:
    """The one of these formats that is a target. Raises: PolicyError (unavailable-target)."""
    if target not in formats:
        raise fail("unavailable-target", target=target, known=", ".join(formats))
    return formats[target]
