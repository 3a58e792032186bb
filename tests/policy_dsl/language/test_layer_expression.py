"""The arithmetic of `layers where`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy_dsl.diagnostics import PolicyError, SourceText
from policy_dsl.language.read_dsl import read_dsl
from policy_dsl.language.statements import layers_where


def code_of(expression: str, n_layers: int = 8) -> str:
    with pytest.raises(PolicyError) as caught:
        layers_where(expression, n_layers)
    return caught.value.diagnostics[0].code


@pytest.mark.parametrize(
    ("expression", "layers"),
    [
        ("i < 2", {0, 1}),
        ("i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2", {0, 3, 6, 7}),
        ("0 < i < n - 5", {1, 2}),
        ("not i % 2 and i != 4", {0, 2, 6}),
        ("i == -(2 - n)", {6}),
        ("i - 1 - 1 == 0", {2}),
        ("-i % 3 == 2", {1, 4, 7}),
        ("n", set(range(8))),
        ("0", set()),
        ("not (i < 6 or i == 7)", {6}),
        ("i > 100 or i // 3 * 3 == i", {0, 3, 6}),
        ("i < 3 == 1", set()),
    ],
)
def test_an_expression_chooses_layers(expression: str, layers: set[int]) -> None:
    assert layers_where(expression, 8) == layers


OPERATOR = st.sampled_from(["+", "-", "*", "//", "%", "<", "<=", "==", "!=", ">=", " and ", " or "])
EXPRESSION = st.recursive(
    st.sampled_from(["i", "n", "0", "1", "3"]),
    lambda inner: (
        st.builds("({}{}{})".format, inner, OPERATOR, inner)
        | st.builds("{}{}{}".format, inner, OPERATOR, inner)
        | st.builds("-{}".format, inner)
        | st.builds("(not {})".format, inner)
    ),
    max_leaves=8,
)


@given(EXPRESSION)
def test_it_means_what_python_means(expression: str) -> None:
    try:
        meant = {i for i in range(9) if eval(expression, {"i": i, "n": 9})}
    except ZeroDivisionError:
        assert code_of(expression, 9) == "division-by-zero"
        return
    assert layers_where(expression, 9) == meant
    printed = read_dsl(SourceText("p", f"layers where {expression}: 4bit"), "p").rules[0]
    assert layers_where(printed.selector.expression, 9) == meant


def test_division_by_zero_names_the_layer() -> None:
    with pytest.raises(PolicyError) as caught:
        layers_where("n % (i - 3)", 8)
    message = "n % (i - 3) divides by zero for layer 3 of 8"
    assert caught.value.diagnostics[0].message == message


def test_what_could_hang_or_overflow_is_refused() -> None:
    assert code_of("i" + "*9" * 200) == "statement-too-long"
    assert code_of("9" * 10) == "number-too-large"
    assert code_of("(" * 40 + "i" + ")" * 40) == "nested-too-deeply"
    assert code_of("i ** 9") == "syntax"
    assert code_of("j < 3") == "unknown-expression-name"
