"""The capabilities stamp: what JANG's engines take from a bundle instead of guessing.

Source: jang 2.5.50, `capabilities`: its table of families, names and modality rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from policy_dsl.formats import MetadataValues
from policy_dsl.plan import Plan


class _Row(NamedTuple):
    family: str
    reasoning_parser: str
    tool_parser: str
    think_in_template: bool
    cache_type: str


# JANG has no row of its own for the DeepSeek-V3 family; this one passes its checks.
_DEEPSEEK = _Row("deepseek_v3", "deepseek_r1", "deepseek", True, "mla")
_ROWS: Mapping[str, _Row] = {
    "minimax_m2": _Row("minimax_m2", "qwen3", "minimax", True, "kv"),
    "qwen3_moe": _Row("qwen3", "qwen3", "qwen", True, "kv"),
    "glm4_moe": _Row("glm4_moe", "deepseek_r1", "glm47", False, "kv"),
    "deepseek_v3": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
}
_SENSES = ("vision", "audio", "video")
# What a policy's `metadata` may say: names that JANG has registered.
METADATA_KEYS: Mapping[str, MetadataValues] = {
    "reasoning_parser": (
        *("deepseek_r1", "gemma4", "inkling", "minimax_m3", "mistral", "muse_glimmer"),
        *("openai_gptoss", "qwen3", "think_xml"),
    ),
    "tool_parser": (
        *("atem", "deepseek", "dsml", "gemma4", "glm47", "hunyuan", "inkling", "lfm2"),
        *("llama", "minimax", "minimax_m3", "mistral", "nemotron", "openpangu", "qwen"),
        *("qwen3_coder", "step3p5", "xml_function", "zaya_xml"),
    ),
    "cache_type": ("hybrid", "kv", "mamba", "mla"),
    "modality": ("text", *_SENSES),
    "think_in_template": bool,
    "supports_tools": bool,
    "supports_thinking": bool,
    "source_model": {"name": str, "org": str, "architecture": str},
}


def stamp(plan: Plan) -> dict[str, Any]:
    """The twelve keys of `capabilities`: the policy's words, else those of the family."""
    row, said = _ROWS[plan.model.architecture.family], dict(plan.policy.metadata)
    modality = said.get("modality", "text")
    return {
        "reasoning_parser": said.get("reasoning_parser", row.reasoning_parser),
        "tool_parser": said.get("tool_parser", row.tool_parser),
        "think_in_template": said.get("think_in_template", row.think_in_template),
        "supports_tools": said.get("supports_tools", True),
        "supports_thinking": said.get("supports_thinking", True),
        "family": row.family,
        "modality": modality,
        "modalities": {"text": True, **{sense: sense == modality for sense in _SENSES}},
        **_flags(modality),
        "cache_type": said.get("cache_type", row.cache_type),
    }


def senses(plan: Plan) -> dict[str, bool]:
    """Flags for `jang_config.json` itself, where the config alone would say otherwise."""
    modality = dict(plan.policy.metadata).get("modality", "text")
    flags = _flags(modality)
    configured = {f"has_{sense}" for sense in _SENSES if f"{sense}_config" in plan.model.config}
    return {flag: held for flag, held in flags.items() if held or flag in configured}


def _flags(modality: str) -> dict[str, bool]:
    return {f"has_{sense}": sense == modality for sense in _SENSES}
