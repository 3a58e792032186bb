"""A slice of `benchmarks/damage_trials.py`: none is missed, none reported for nothing."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from emitters.core.verify import verify_bundle
from policy_dsl.sources.reference import open_source

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
TARGETS = ["mlx_affine", "jangtq_prestack", "hipfire_hfq", "gptq"]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_damages_are_judged_by_their_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, BENCHMARKS])
    import damage_trials  # noqa: PLC0415 - a command, not a package

    subject = damage_trials.make_subject(tmp_path, target)
    counts = damage_trials.run_trials(subject, tmp_path, trials=32, seed=3)
    assert counts.examples == ()
    assert counts.found > 20


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_not_finite_is_a_finding_and_no_warning_of_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, BENCHMARKS])
    import damage_trials  # noqa: PLC0415 - a command, not a package

    subject = damage_trials.make_subject(tmp_path, target)
    source = Path(shutil.copytree(subject.source, tmp_path / "broken-source"))
    _break(source / "model.safetensors", damage_trials)
    bundle = Path(shutil.copytree(subject.folder, tmp_path / "broken"))
    for name in subject.places:
        # With others, modules are not whole, and are not compared.
        if name.endswith((".tq_bits", ".g_idx")):
            continue
        # Of scales, norms and codes in turn: NaN, the largest numbers, and others as well.
        content = subject.content(bundle, name)
        content[::7] |= 0x7F
        content[:16] = 0xFF
        subject.put(bundle, name, content)
    pairs = [(subject.folder, source), (bundle, subject.source), (bundle, source)]
    for record in (True, False):
        for folder, given in pairs:
            if not record:
                (folder / "policyc.json").unlink(missing_ok=True)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                report = verify_bundle(folder, open_source(str(given)), jobs=1)
            assert not report.ok
            told = {found.code for found in report.findings}
            assert "non-finite-decoded" in told


def _break(path: Path, damage_trials) -> None:
    """NaN and infinities in every tensor of a source."""
    with path.open("r+b") as opened:
        for place in damage_trials._places(path):
            kind = np.uint16 if place.dtype == "BF16" else np.uint32
            top = 0x7F80 if kind == np.uint16 else 0x7F800000
            opened.seek(place.start)
            opened.write(np.array([top | 1, top, top | 0x10], kind).tobytes())
