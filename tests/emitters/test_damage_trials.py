"""A slice of `benchmarks/damage_trials.py`: none is missed, none reported for nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.mark.parametrize("target", ["mlx_affine", "jangtq_prestack", "hipfire_hfq", "gptq"])
def test_damages_are_judged_by_their_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, BENCHMARKS])
    import damage_trials  # noqa: PLC0415 - a command, not a package

    subject = damage_trials.make_subject(tmp_path, target)
    counts = damage_trials.run_trials(subject, tmp_path, trials=32, seed=3)
    assert counts.examples == ()
    assert counts.found > 20
