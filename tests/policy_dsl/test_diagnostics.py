"""Defects of one kind in many tensors are one finding, with a count and examples."""

from __future__ import annotations

import time

import pytest

from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, grouped, render


def _changed(name: str, reason: str = "it is not there") -> Diagnostic:
    return diagnostic("tensor-changed", tensor=name, reason=reason)


def test_one_finding_counts_all_that_have_the_defect() -> None:
    names = [f"model.layers.{i}.mlp.{part}" for i in range(3) for part in ("gate", "up")]
    (found,) = grouped(map(_changed, names))
    assert found == Diagnostic(
        "tensor-changed",
        f"tensor {names[0]} is not what was built: it is not there",
        notes=(f"in all 6: {', '.join(names[:3])}, …",),
    )


def test_numbers_names_and_shapes_make_no_other_kind_but_other_words_do() -> None:
    grids = [
        diagnostic("wrong-scale-grid", name=name, shape=[4, 8], found=found, wanted=[1])
        for name, found in (("a", [1, 3]), ("b", [2]), ("c", []))
    ]
    assert [found.count for found in grouped(grids)] == [3]
    reasons = ("it has 3 bytes", "it has 17 bytes", "it is empty", 'no "x"', 'no "y"')
    found = grouped(_changed(f"t{i}", reason) for i, reason in enumerate(reasons))
    assert [one.count for one in found] == [2, 1, 2]


def test_a_name_inside_a_reason_can_be_what_has_the_defect() -> None:
    found = grouped(
        diagnostic("bad-bundle-metadata", of=path, path="config.json", reason=f"{path} has 7")
        for path in ("layers.0.mlp.up", "w")
    )
    assert [one.message for one in found] == ["config.json: layers.0.mlp.up has 7"]
    assert found[0].notes == ("in all 2: layers.0.mlp.up, w",)


def test_of_kinds_without_end_a_hundred_are_shown() -> None:
    letters = [f"{one}{two}" for one in "abcdefghijkl" for two in "abcdefghijkl"]
    made = [_changed(f"t{at}", f"it is {word}") for at, word in enumerate(letters)]
    found = grouped([*made, *made])
    assert [each.count for each in found] == [2] * 100 + [2 * 144 - 2 * 100]
    assert found[-1].message == made[100].message
    assert [(each.message, each.count) for each in grouped(found)] == [
        (each.message, each.count) for each in found
    ]


def test_grouped_findings_can_be_grouped_again() -> None:
    some = grouped(map(_changed, "abcd"))
    (found,) = grouped([*some, *grouped(map(_changed, "efg"))])
    assert found.notes == ("in all 7: a, b, c, …",)
    assert grouped([found]) == [found]


def test_what_can_be_wrong_once_only_is_not_grouped() -> None:
    same = [diagnostic("bad-argument", option="--set", reason="no") for _ in range(2)]
    assert grouped(same) == same


def test_an_error_is_raised_with_one_of_each_kind() -> None:
    error = PolicyError(_changed(f"t{i}") for i in range(47_616))
    assert len(error.diagnostics) == 1
    assert "in all 47,616: t0, t1, t2, …" in render(error.diagnostics)


@pytest.mark.parametrize("piece", ["a", "[", "[a", '"', "1,", "a-", "a.b-", "é"])
def test_long_reasons_of_many_findings_take_no_time(piece: str) -> None:
    started = time.thread_time()
    for at in range(500):
        _changed(f"t{at}", piece * 5_000)
    assert time.thread_time() - started < 5
