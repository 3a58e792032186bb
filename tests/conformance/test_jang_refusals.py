"""Families whose experts JANG does not load, and those without experts, are refused by name."""

from __future__ import annotations

import pytest
from one_layer_models import recorded

from policyc.cli import main
from tests.models import families_of

FAMILIES = families_of("jangtq_prestack")

REFUSED = [family for family, reason in FAMILIES.items() if reason]


@pytest.mark.parametrize("family", REFUSED)
def test_plan_refuses_it_by_name(family, tmp_path, capsys):
    source = tmp_path / f"{family}.json"
    source.write_text(recorded(family))
    assert main(["plan", "jangtq_k", "--model", str(source)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "error[unsupported-family]" in shown.err
    assert family in shown.err
    assert FAMILIES[family] in " ".join(shown.err.split())
