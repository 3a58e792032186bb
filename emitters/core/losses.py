"""Matrices of which a build leaves nothing: every value becomes 0, and the source's are not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from emitters.core.blocks import Site, make_unit, source_values
from emitters.core.misfit import BAND, Misfit
from emitters.core.stretches import in_stretches
from emitters.core.units import Unit
from policy_dsl.diagnostics import Diagnostic, PolicyError


def ensure_something_left(site: Site, lost: Iterable[Unit]) -> None:
    """Raises: PolicyError if all values of a source's matrix became 0.

    lost: the units whose values did; other units may have others of the same matrix.
    """
    matrices: dict[tuple[int, int], Unit] = {}
    for unit in lost:
        matrices.setdefault((unit.module, unit.source), unit)
    found = [
        _finding(site, unit)
        for unit in matrices.values()
        if not any(make_unit(site, part).is_kept for part in _units(site, unit))
    ]
    if found:
        raise PolicyError(found)


def _units(site: Site, lost: Unit) -> Iterator[Unit]:
    """The rows of a unit's matrix, as many at a time as it has."""
    n_rows = in_stretches(site.plan.modules[lost.module]).sources[lost.source].n_rows
    for start in range(0, n_rows, lost.count):
        count = min(lost.count, n_rows - start)
        yield replace(lost, first=start, count=count, at=lost.at - lost.first + start)


def _finding(site: Site, lost: Unit) -> Diagnostic:
    """What is lost, and what would hold it; tried with the band of the largest value."""
    module = in_stretches(site.plan.modules[lost.module])
    view = module.sources[lost.source]
    wide = replace(module, dtype="F32")
    values = source_values(site, wide, view, (lost.first, lost.count))
    row = int(np.abs(values).max(axis=-1).argmax()) // BAND * BAND
    misfit = Misfit(site.plan, site.format, module, view, values[row : row + BAND])
    return misfit.too_small(view.n_rows * view.width)
