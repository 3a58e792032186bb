"""A policy's own tests compare what reports show, and say what is missing when they fail."""

from __future__ import annotations

from pathlib import Path

import pytest

import emitters
from policy_dsl.language.load import parse_policy
from policy_dsl.planning.assertions import run_tests
from policy_dsl.planning.resolve import resolve
from policy_dsl.sources.reference import open_source

TINY = str(Path(__file__).parents[3] / "examples" / "tiny-minimax-m2")
RULES = "target mlx_affine\nall: 4bit\nrouter, norm: bf16\n"


def outcome(test: str) -> tuple[bool, str]:
    """Whether a test of the policy passes, and what it reports."""
    policy, _ = parse_policy(f"{RULES}test {test}\n", "p.qpol")
    plan = resolve(policy, open_source(TINY), emitters.FORMATS, target="mlx_affine")
    (result,) = run_tests(plan)
    return result.passed, result.found


@pytest.fixture(scope="module")
def shown() -> str:
    """The bits per weight as they are reported."""
    _, found = outcome("bpw < 100")
    return found


@pytest.mark.parametrize("relation", ["==", "<=", ">="])
def test_the_bpw_that_is_shown_can_be_asked_for(relation: str, shown: str) -> None:
    assert outcome(f"bpw {relation} {shown}") == (True, shown)


@pytest.mark.parametrize("relation", ["<", ">"])
def test_the_bpw_that_is_shown_is_not_beside_itself(relation: str, shown: str) -> None:
    assert outcome(f"bpw {relation} {shown}") == (False, shown)


def test_another_bpw_is_not_the_one_that_is_shown(shown: str) -> None:
    assert not outcome(f"bpw == {float(shown) + 0.0001:.4f}")[0]
    assert not outcome(f"bpw == {shown}1")[0]


def test_the_bpw_of_a_selection_can_be_asked_for() -> None:
    _, found = outcome("bpw(attention) < 100")
    assert outcome(f"bpw(attention) == {found}") == (True, found)


def test_the_size_that_is_shown_can_be_asked_for_in_both_units() -> None:
    _, found = outcome("size < 1GB")
    for size in found.split(" = "):
        assert outcome(f"size == {size}") == (True, found)
    assert not outcome("size == 1MB")[0]


def test_a_budget_that_is_missed_by_less_than_what_is_shown_names_the_bytes() -> None:
    _, found = outcome("size < 1GB")
    decimal, binary = found.split(" = ")
    failed = [outcome(f"size {sign} {size}") for sign in "<>" for size in (decimal, binary)]
    exact = {text for passed, text in failed if not passed}
    (text,) = exact
    assert text.endswith(" bytes")
    nbytes = int(text.removesuffix(" bytes").replace(",", ""))
    assert f"{nbytes / 1e6:.2f} MB" == decimal
