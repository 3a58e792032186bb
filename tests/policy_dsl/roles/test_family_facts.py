"""What formats have to know of a family is in its table."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from policy_dsl.roles.architecture import (
    TABLES,
    architecture,
    facts_of,
    families,
    model_types,
    packaged_table,
)
from policy_dsl.roles.completeness import VALUE_KINDS
from policy_dsl.roles.model import llama_cpp_names, llama_cpp_roles

ROOT = Path(__file__).parents[3]


def test_a_format_that_a_table_does_not_name_does_not_take_the_family() -> None:
    refusal = architecture("llama").refusal("gguf")

    assert refusal == "none of its bundles has been loaded in a reader yet"
    assert architecture("llama").facts("gguf") == {}


def test_the_entry_of_a_family_replaces_that_of_its_parts() -> None:
    table = architecture("minimax_m2")

    assert table.refusal("jangtq_prestack") is None
    assert replace(table, targets={}).refusal("jangtq_prestack") is not None
    assert architecture("llama").refusal("jangtq_prestack") is not None


def test_a_refusal_for_want_of_experts_is_true() -> None:
    of_roles = {
        family: any(role.startswith("experts.") for role in architecture(family).roles)
        for family in families()
    }
    reasons = {
        family: architecture(family).refusal("jangtq_prestack") or "" for family in families()
    }

    assert [one for one, has in of_roles.items() if has and "no experts" in reasons[one]] == []
    assert [one for one, has in of_roles.items() if not has and not reasons[one]] == []


def test_a_type_with_a_reason_for_having_no_table_has_none() -> None:
    others = packaged_table(TABLES / "_others.yaml")

    assert others.keys() & model_types().keys() == set()


def test_facts_of_a_name_come_by_family() -> None:
    assert facts_of("hipfire_hfq", "arch_id")["minimax_m2"] == 10


def test_short_names_of_experts_come_from_the_names_in_the_table() -> None:
    renamed = {family for family in families() if architecture(family).renames_experts}

    assert {"minimax_m2", "mixtral", "lfm2_moe", "phimoe"} <= renamed
    assert not {"llama", "granitemoe", "qwen3_moe"} & renamed
    words = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    assert architecture("mixtral").published_experts == ("block_sparse_moe", words)
    assert architecture("llama").published_experts == ("mlp", {})


def test_every_kind_of_value_in_a_table_is_known() -> None:
    keys = [key for family in families() for key in architecture(family).config.values()]

    assert {
        kind for key in keys for kind in (key.kind, *key.entries.values())
    } <= VALUE_KINDS.keys()


# Words that readers of a format have registered, some of which are spelled like a family.
SPELLED = {
    "emitters/hipfire_hfq/container.py": {"llama"},
    "emitters/jangtq_prestack/spec.py": {
        *(
            "llama",
            "minimax",
            "mistral",
            "qwen3",
            "muse_glimmer",
            "gemma4",
            "hunyuan",
            "lfm2",
            "step3p5",
        )
    },
}


def named_families(path: Path) -> set[str]:
    """The families that texts of a module name; docstrings are not looked at."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if id(node) not in docstrings
    ]
    # Neither llama.cpp nor `llama-imatrix` nor a hub id is a family.
    words = {word for text in texts for word in re.findall(r"(?<![\w./-])\w+(?![\w./-])", text)}
    return words & {*families(), *model_types()}


@pytest.mark.parametrize("room", ["policyc", "policy_dsl", "emitters"])
def test_code_names_no_family(room: str) -> None:
    paths = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / room).rglob("*.py")}
    named = {name: named_families(path) - SPELLED.get(name, set()) for name, path in paths.items()}
    assert {name: words for name, words in named.items() if words} == {}


def test_statistics_of_a_tensor_never_reach_what_readers_make_of_its_columns() -> None:
    """Columns of `embed_q` are rows of `kv_b_proj`: an importance matrix says nothing of them."""
    turned = {
        part.role
        for family in families()
        for rule in architecture(family).names.values()
        for part in (rule.arranged.parts if rule.arranged else ())
        if part.transposed
    }
    assert turned == {"attention.embed_q"}
    assert not turned & set(llama_cpp_roles())
    assert llama_cpp_names("attention.embed_q", 0) == ()
