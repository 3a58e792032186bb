"""What a policy says beside its rules: words that no target knows, values nobody takes."""

from __future__ import annotations

import pytest

from emitters import FORMATS
from policy_dsl.diagnostics import Diagnostic
from policy_dsl.language.load import parse_policy
from policy_dsl.planning.lint import lint

JANG = "target jangtq_prestack; all: 8bit\n"
BOTH = "target jangtq_prestack, mlx_affine; all: 8bit\n"


def findings(text: str, target: str | None = None, without: str = "") -> list[Diagnostic]:
    """What checking the policy finds, without any model, and without one of the targets."""
    policy, _ = parse_policy(text, "p.qpol")
    installed = {name: spec for name, spec in FORMATS.items() if name != without}
    return [one for one in lint(policy, installed, target=target) if one.code != "no-target"]


@pytest.mark.parametrize(
    ("line", "code", "suggestion"),
    [
        ("output layout perexpert", "unknown-layout", "per_expert"),
        ("output file_name a.b", "unused-setting", None),
        ("fp8_dequant bf61", "unknown-fp8-rule", "bf16"),
        ("metadata tool_parsr qwen", "unused-setting", "tool_parser"),
        ("metadata licence mit", "unused-setting", None),
        ("runtime vmlx", "unknown-runtime", None),
        ("runtime vmlx-swft", "unknown-runtime", "vmlx-swift"),
        ("metadata tool_parser qwn", "bad-metadata-value", "qwen"),
        ('metadata supports_tools "true"', "bad-metadata-value", None),
        ("metadata source_model x", "bad-metadata-value", None),
        ('metadata source_model {"nam": "x"}', "bad-metadata-value", "name"),
        ('metadata source_model {"name": 3}', "bad-metadata-value", None),
        ('metadata source_model {"name": null}', "bad-metadata-value", None),
    ],
)
def test_no_model_is_needed_to_find_it(line: str, code: str, suggestion: str | None) -> None:
    (found,) = findings(JANG + line)
    assert found.code == code
    assert found.span is not None
    assert found.span.location.startswith("p.qpol:2:")
    assert found.suggestion == (suggestion and f'did you mean "{suggestion}"?')


@pytest.mark.parametrize(
    ("value", "shown"),
    [("null", "null"), ("true", "true"), ("qwen4", '"qwen4"'), ('["qwen3"]', '["qwen3"]')],
)
def test_values_are_shown_as_they_are_written(value: str, shown: str) -> None:
    (found,) = findings(f"{JANG}metadata reasoning_parser {value}")
    assert found.message.startswith(f"metadata reasoning_parser cannot be {shown}; it is ")


def test_a_mapping_says_what_it_may_hold() -> None:
    (found,) = findings(f"{JANG}metadata source_model 3")
    entries = "name (a text), org (a text), architecture (a text)"
    assert found.message == f"metadata source_model cannot be 3; it is a mapping of {entries}"
    assert findings(JANG + 'metadata source_model {"name": "x", "org": "y"}') == []


@pytest.mark.parametrize("target", [None, "jangtq_prestack", "mlx_affine"])
def test_a_word_may_be_for_another_of_the_targets(target: str | None) -> None:
    words = "runtime jang, mlx-lm; output layout per_expert; metadata tool_parser qwen"
    assert findings(f"{BOTH}{words}", target) == []


@pytest.mark.parametrize(
    ("line", "code"),
    [("runtime jang, mlx-lmm", "unknown-runtime"), ("metadata licence mit", "unused-setting")],
)
def test_a_word_that_none_of_the_targets_knows(line: str, code: str) -> None:
    assert [one.code for one in findings(BOTH + line, "mlx_affine")] == [code]


def test_what_a_target_that_is_not_installed_knows_is_not_known() -> None:
    text = "target gptq, mlx_affine; all: 8bit; runtime vllm; metadata licence mit"
    assert findings(text, "mlx_affine", without="gptq") == []
