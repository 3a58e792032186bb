"""What hipfire's loader of MiniMax-M2 demands of a file, and what it trusts without a look.

Source: Kaden-Schutt/hipfire, crates/hipfire-arch-minimax/src/minimax.rs at 05674fe, read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from emitters.hipfire_hfq.container import SCALE
from policy_dsl.sources.hfq_container import HfqTensor, code_name

# (tensor, or empty for what concerns the whole file, and what is wrong)
Defect = tuple[str, str]

_PLAIN = (1, 2)
_Q8 = (3,)
# Its map of codes: float32 and bfloat16 are not matrices to it.
_MATRIX = (1, 3, 6, 7, 8, *range(11, 16), *range(17, 22), 24, 30)
_EXPERT = (13, 15, 19, 20)
_SCALE_NBYTES = 2
_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "intermediate_size", "num_local_experts", "num_experts_per_tok"),
)


class Wanted(NamedTuple):
    """A tensor that the loader looks up: its name, shape, and the codes that it takes."""

    name: str
    shape: tuple[int, ...]
    codes: tuple[int, ...]


def minimax_defects(
    config: Mapping[str, Any], tensors: Mapping[str, HfqTensor]
) -> Iterator[Defect]:
    """What the loader misses or misreads in a file of this config and these tensors.

    A config of huge counts has as many defects: take only some.
    """
    missing = [key for key in _SIZES if not _is_count(config.get(key))]
    if missing:
        yield "", f"its config has no whole number from 1 as {', '.join(missing)}"
        return
    heads = int(config["num_attention_heads"])
    head = config.get("head_dim") or config["hidden_size"] // heads
    if not _is_count(head):
        yield "", f"its config says head_dim {head}"
        return
    for wanted in _wanted(config, head):
        found = tensors.get(wanted.name)
        if found is None:
            yield wanted.name, "it is missing"
        elif found.info.shape != wanted.shape:
            shapes = f"shape {list(found.info.shape)}, and the config means"
            yield wanted.name, f"it has {shapes} {list(wanted.shape)}"
        elif found.code not in wanted.codes:
            codes = ", ".join(code_name(code) for code in wanted.codes)
            yield wanted.name, f"it is {code_name(found.code)}, and readers take {codes}"
    for layer in range(config["num_hidden_layers"]):
        yield from _experts(layer, config["num_local_experts"], tensors)
        yield from _scales(layer, config["hidden_size"], tensors)


def _wanted(config: Mapping[str, Any], head: int) -> Iterator[Wanted]:
    hidden, words = config["hidden_size"], config["vocab_size"]
    yield Wanted("model.embed_tokens.weight", (words, hidden), _Q8)
    yield Wanted("lm_head.weight", (words, hidden), _MATRIX)
    yield Wanted("model.norm.weight", (hidden,), _PLAIN)
    for layer in range(config["num_hidden_layers"]):
        yield from _wanted_attention(f"model.layers.{layer}", config, head)
        yield from _wanted_experts(_moe(layer), config)


def _wanted_attention(block: str, config: Mapping[str, Any], head: int) -> Iterator[Wanted]:
    hidden = config["hidden_size"]
    queries = config["num_attention_heads"] * head
    keys = config["num_key_value_heads"] * head
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Wanted(f"{block}.{name}.weight", (hidden,), _PLAIN)
    attention = f"{block}.self_attn"
    for letter, rows in (("q", queries), ("k", keys), ("v", keys)):
        yield Wanted(f"{attention}.{letter}_proj.weight", (rows, hidden), _MATRIX)
    yield Wanted(f"{attention}.o_proj.weight", (hidden, queries), _MATRIX)
    # Looked up whether the config says `use_qk_norm` or not.
    yield Wanted(f"{attention}.q_norm.weight", (queries,), _PLAIN)
    yield Wanted(f"{attention}.k_norm.weight", (keys,), _PLAIN)


def _wanted_experts(moe: str, config: Mapping[str, Any]) -> Iterator[Wanted]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    count = config["num_local_experts"]
    yield Wanted(f"{moe}.gate.weight", (count, hidden), _Q8)
    yield Wanted(f"{moe}.e_score_correction_bias", (count,), _PLAIN)
    for expert in range(count):
        for name, shape in _projections(hidden, inner).items():
            yield Wanted(f"{moe}.experts.{expert}.{name}.weight", shape, _EXPERT)


def _projections(hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    return {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}


def _experts(layer: int, count: int, tensors: Mapping[str, HfqTensor]) -> Iterator[Defect]:
    """Experts of other codes than expert 0, by whose codes all of a layer are read."""
    moe = _moe(layer)
    for names, like in ((("w1", "w3"), "w1"), (("w2",), "w2")):
        first = tensors.get(f"{moe}.experts.0.{like}.weight")
        if first is None:
            continue
        for expert in range(count):
            for name in names:
                found = tensors.get(f"{moe}.experts.{expert}.{name}.weight")
                if found is not None and found.code != first.code:
                    what = f"it is {code_name(found.code)}, and readers take it for"
                    reason = f"{what} {code_name(first.code)}, as expert 0 is"
                    yield f"{moe}.experts.{expert}.{name}.weight", reason


def _scales(layer: int, hidden: int, tensors: Mapping[str, HfqTensor]) -> Iterator[Defect]:
    """Scales that readers would skip, while the weights stay multiplied by them."""
    name = f"{_moe(layer)}.{SCALE}.weight"
    found = tensors.get(name)
    if found is not None and (found.code != 1 or found.info.nbytes != hidden * _SCALE_NBYTES):
        held = f"{code_name(found.code)} of {found.info.nbytes} bytes"
        yield name, f"it is {held}, and readers skip what is not F16 of {hidden} values"
    other = f"{_moe(layer)}.awq_scale_down.weight"
    if other in tensors:
        yield other, "readers do not apply it, so that the weights it scaled are wrong"


def _moe(layer: int) -> str:
    return f"model.layers.{layer}.block_sparse_moe"


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0
