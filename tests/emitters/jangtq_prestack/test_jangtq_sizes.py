"""Sizes that readers take from a bundle's config: told rightly, or refused early."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from emitters import FORMATS
from policy_dsl.diagnostics import Diagnostic, PolicyError
from policy_dsl.language.load import load
from policy_dsl.planning.resolve import resolve
from tests.models import tiny


def written(**changes: Any) -> dict[str, Any]:
    """The config of a bundle whose source's has these entries, None for no such entry."""
    source = tiny()
    config = {key: value for key, value in {**source.config, **changes}.items() if value}
    plan = resolve(load("jangtq_k"), replace(source, config=config), FORMATS)
    return dict(json.loads(FORMATS["jangtq_prestack"].files().metadata(plan)["config.json"]))


def refused(**changes: Any) -> Diagnostic:
    with pytest.raises(PolicyError) as caught:
        written(**changes)
    (found,) = caught.value.diagnostics
    return found


def test_added_experts_are_counted_wherever_the_config_tells_them() -> None:
    assert written()["num_local_experts"] == 32
    told = written(num_experts=8, n_routed=8, text_config={"num_local_experts": 8, "a": 8})
    assert [told[key] for key in ("num_local_experts", "num_experts", "n_routed")] == [32] * 3
    assert told["text_config"] == {"num_local_experts": 32, "a": 8}


def test_a_count_that_readers_prefer_and_that_is_another_one() -> None:
    found = refused(n_routed_experts=7)
    assert found.code == "bad-config-value"
    assert found.message == "the config of tiny-minimax-m2 gives n_routed_experts as 7"
    assert found.notes == ("readers go by it, and there are 32 experts",)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("hidden_size", "256", "it must be a whole number from 1"),
        ("intermediate_size", 257, "it is 256 in model.layers.0.block_sparse_moe.experts.0.w1"),
        ("moe_intermediate_size", 128, "down_proj has rows of 256 values"),
        ("moe_intermediate_size", 256.0, "it must be a whole number from 1"),
    ],
)
def test_rows_of_another_length_than_experts_have(key: str, value: Any, reason: str) -> None:
    found = refused(**{key: value})
    assert found.code == "bad-config-value"
    assert found.message == f"the config of tiny-minimax-m2 gives {key} as {value!r}"
    (note,) = found.notes
    assert reason in note


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size"])
def test_a_length_of_rows_that_the_config_leaves_out(key: str) -> None:
    found = refused(**{key: None})
    assert found.code == "missing-config-key"
    assert found.message.startswith(f"the config of tiny-minimax-m2 has no {key}, on which ")


def test_sizes_of_the_text_part_are_written_where_jang_looks() -> None:
    text = {"hidden_size": 256, "intermediate_size": 256}
    told = written(hidden_size=None, intermediate_size=None, text_config=text)
    assert told["text_config"] == text
    assert [told[key] for key in text] == [256, 256]


def test_a_text_part_that_is_none() -> None:
    found = refused(text_config=3)
    assert found.message == "the config of tiny-minimax-m2 gives text_config as 3"
