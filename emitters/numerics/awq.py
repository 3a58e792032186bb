"""Scales that make columns with large inputs count more (AWQ), from sums of squared inputs.

Weights are multiplied by a scale of each input column before they are quantized; a reader
divides the inputs by it. Gate and up of all experts of a layer share one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from emitters.numerics.rounding import cast, to_float32
from emitters.numerics.value_types import Array

_RANGE = (np.float32(0.01), np.float32(100))
_SUM_RANGE = (1e-12, 1e30)


class ColumnScale(NamedTuple):
    """applied: float32 [in], for the weights; stored: float16 [in], for the reader's inputs."""

    applied: Array
    stored: Array


def gate_up_sums(gate: Array, up: Array | None) -> Array:
    """float32 [in]: the sums of all experts and of both projections, added up.

    gate, up: float32 [experts, in]; gate alone counts if `up` is None or of another width.
    Source: Kaden-Schutt/hipfire, `calibration` module (2026-05), order of additions included.
    """
    sums = _added(gate)
    return sums if up is None or up.shape[-1] != gate.shape[-1] else sums + _added(up)


def _added(sums: Array) -> Array:
    total = np.zeros(sums.shape[-1], np.float32)
    # One expert after the other: the order decides the last bits.
    for row in sums:
        total += row
    return total


def awq_scale(sums: Array, alpha: float) -> Array:
    """float32 [in]: root mean squares to the power alpha, their geometric mean made 1.

    sums: float32 [in], of squared inputs; any factor on all of them cancels. NaN counts as
    almost 0. The scale is held between 0.01 and 100. alpha: 0 … 1, taken as float32.
    Raises: ValueError for another alpha.
    Source: Kaden-Schutt/hipfire, `calibration` module (2026-05); equal up to the last bit,
    which depends on the logarithm of the machine.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, not from 0 to 1")
    half = float(np.float32(alpha)) * 0.5
    least, most = _SUM_RANGE
    bounded = np.fmin(np.fmax(sums.astype(np.float64), least), most)
    # Not numpy's logarithm, which differs by CPU, nor sum(), which compensates from 3.12 on.
    logs = [half * math.log(value) for value in bounded.tolist()]
    total = 0.0
    for value in logs:
        total += value
    mean = total / len(logs)
    scale = np.array([math.exp(value - mean) for value in logs], np.float64)
    return np.clip(scale.astype(np.float32), *_RANGE)


def column_scale(scale: Array, *, exact: bool) -> ColumnScale:
    """The two forms of a scale; it is stored cut off toward zero.

    scale: float32 [in]. exact: weights are multiplied by the stored scale, so that it cancels;
    else by the scale itself, as hipfire does, and outputs come out 1 to 1.001 times too large.
    Source: Kaden-Schutt/hipfire 02786be, MiniMax branch of the quantizer.
    """
    stored = cast(scale, "F32", "F16", cuts_off=True)
    return ColumnScale(to_float32(stored, "F16") if exact else scale, stored)
