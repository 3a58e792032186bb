"""What readers of HFQ files understand, and stumble over although every tensor has its size.

Source: Kaden-Schutt/hipfire, crates/hipfire-runtime/src/hfq.rs at 9d90364, and its loader of
MiniMax-M2, crates/hipfire-arch-minimax/src/minimax.rs at 05674fe; both read.
"""

from collections.abc import Iterator, Mapping
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

from emitters.checkpoints import wrong_metadata, wrong_tensor
from emitters.hipfire_hfq.container import CODE_OF, GROUPS, SCALE
from emitters.hipfire_hfq.spec import CODES, SPEC
from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.formats import Claim, Claims, FileContents, Files, Forms, Tensors
from policy_dsl.roles.architecture import architecture, facts_of, family_of
from policy_dsl.sources.hfq_container import (
    ARCH_FAMILIES,
    QUANT_CODES,
    HfqContainer,
    HfqTensor,
    code_name,
    read_container,
)
from policy_dsl.sources.local_files import local_files
from policy_dsl.treatments import Coded

# Tensor, or empty for what concerns the whole file, and what is wrong.
_Defect = tuple[str, str]
# A tensor that the loader looks up: its name, shape, and the codes that it takes.
_Wanted = tuple[str, tuple[int, ...], tuple[int, ...]]

_CODED = {
    QUANT_CODES[CODES[of.name, size]].name: Coded(of.name, of.bits[0], size, of.symmetries[0], "")
    for of in SPEC.schemes
    for size in of.group_sizes
}
_NO_TOKENIZER = "build it again with a tokenizer.json beside the source's weights"
_ROTATION = 256
# A config of a million layers would make a million findings.
_MOST_DEFECTS = 100
_PLAIN, _Q8, _EXPERT = (1, 2), (3,), (13, 15, 19, 20)
# The loader's map of codes: float32 and bfloat16 are not matrices to it.
_MATRIX = (1, 3, 6, 7, 8, *range(11, 16), *range(17, 22), 24, 30)
_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "intermediate_size", "num_local_experts", "num_experts_per_tok"),
)
_MOE = "model.layers.{}.block_sparse_moe"


def claims(files: FileContents, forms: Forms) -> dict[str, Claim]:
    """What a loader understands of each coded tensor: its code alone says it.

    Raises: ValueError if a tensor is stored as none of these containers holds it.
    """
    dtypes = {dtype for parts in forms.values() for dtype, _ in parts.values()}
    if others := dtypes - CODE_OF.keys():
        raise ValueError(f"{min(others)} is not a quant code of HFQ files")
    weights = {path: parts["weight"] for path, parts in forms.items() if "weight" in parts}
    coded = ((path, _CODED.get(dtype), shape) for path, (dtype, shape) in weights.items())
    return {path: Claim(how, shape, "F32") for path, how, shape in coded if how}


def defects(
    folder: Path, files: FileContents, tensors: Tensors, claims: Claims
) -> Iterator[Diagnostic]:
    """What readers of the file would miss, or read without a word of complaint.

    Raises: PolicyError if the file cannot be read any more.
    """
    (file,) = {tensor.file or "" for tensor in tensors.values()}
    opened = local_files(folder, weights=file)
    container = read_container(opened, file)
    if str(container.metadata.get("tokenizer")).strip() in ("", "{}"):
        yield diagnostic("no-tokenizer", target="hipfire_hfq", suggestion=_NO_TOKENIZER)
    for name, reason in islice(_defects(container), _MOST_DEFECTS):
        yield wrong_tensor(file, name, reason) if name else wrong_metadata(file, reason)
    if any(opened.read(file, container.index_stop, container.payload_start)):
        yield wrong_metadata(file, "there is something between its index and its first tensor")


def _defects(container: HfqContainer) -> Iterator[_Defect]:
    yield from _metadata_defects(container.metadata, container.arch_id)
    # What entries of the index say and readers do not compare.
    for name, tensor in container.tensors.items():
        known, group = QUANT_CODES[tensor.code], GROUPS[tensor.code]
        if known.group and tensor.group_size != group:
            says = f"its entry says groups of {tensor.group_size}"
            yield name, f"{says}, and {known.name} has {group or 'none'}"
        columns = tensor.info.shape[-1] if tensor.info.shape else 1
        if known.rotated and columns % _ROTATION:
            reason = f"its {columns} columns are not a multiple of {_ROTATION}"
            yield name, f"it is rotated, and {reason}"
    numbers = facts_of(SPEC.name, "arch_id")
    if any(numbers[family] == container.arch_id for family in facts_of(SPEC.name, "loader")):
        yield from _loader_defects(container.metadata["config"], container.tensors)


def _metadata_defects(held: Mapping[str, Any], number: int) -> Iterator[_Defect]:
    kind = held["config"].get("model_type")
    family = family_of(held["config"])
    facts = architecture(family).facts(SPEC.name) if family else {}
    if "arch_id" in facts and number not in (facts["arch_id"], *facts.get("other_arch_ids", ())):
        called = ARCH_FAMILIES.get(number, "unknown")
        yield "", f"its arch_id is {number} ({called}), and its config says {kind}"
    tokenizer = held.get("tokenizer")
    # Loaders ask for a text, and find none in an object.
    if not isinstance(tokenizer, str):
        yield "", "its tokenizer is not a text"
    else:
        try:
            parse_json(tokenizer.encode(), what="its tokenizer")
        except ValueError as error:
            yield "", str(error)
    for key in ("tokenizer_config", "generation_config"):
        if not isinstance(held.get(key), dict | None):
            yield "", f"its {key} is not an object"


def _loader_defects(
    config: Mapping[str, Any], tensors: Mapping[str, HfqTensor]
) -> Iterator[_Defect]:
    """What the loader of MiniMax-M2 misses or misreads: as many as the config's counts allow."""
    missing = [key for key in _SIZES if not _is_count(config.get(key))]
    if missing:
        yield "", f"its config has no whole number from 1 as {', '.join(missing)}"
        return
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if not _is_count(head):
        yield "", f"its config says head_dim {head}"
        return
    for name, shape, codes in _wanted(config, head):
        held = tensors.get(name)
        if held is None:
            yield name, "it is missing"
        elif held.info.shape != shape:
            shapes = f"shape {list(held.info.shape)}, and the config means {list(shape)}"
            yield name, f"it has {shapes}"
        elif held.code not in codes:
            known = ", ".join(map(code_name, codes))
            yield name, f"it is {code_name(held.code)}, and readers take {known}"
    for layer in range(config["num_hidden_layers"]):
        yield from _expert_defects(_MOE.format(layer), config, tensors)


def _expert_defects(
    moe: str, config: Mapping[str, Any], tensors: Mapping[str, HfqTensor]
) -> Iterator[_Defect]:
    # All experts of a layer are read by the codes of expert 0.
    experts = range(config["num_local_experts"])
    up, down = product(experts, ("w1", "w3"), ("w1",)), product(experts, ("w2",), ("w2",))
    for expert, word, usual in chain(up, down):
        name = f"{moe}.experts.{expert}.{word}.weight"
        held, first = tensors.get(name), tensors.get(f"{moe}.experts.0.{usual}.weight")
        if held and first and held.code != first.code:
            what = f"{code_name(held.code)}, and readers take it for {code_name(first.code)}"
            yield name, f"it is {what}, as expert 0 is"
    # Scales that readers would skip, while the weights stay multiplied by them.
    name, hidden = f"{moe}.{SCALE}.weight", config["hidden_size"]
    held = tensors.get(name)
    if held and (held.info.dtype, held.info.nbytes) != ("F16", hidden * 2):
        what = f"{code_name(held.code)} of {held.info.nbytes} bytes"
        yield name, f"it is {what}, and readers skip what is not F16 of {hidden} values"
    if (name := f"{moe}.awq_scale_down.weight") in tensors:
        yield name, "readers do not apply it, so that the weights it scaled are wrong"


def _wanted(config: Mapping[str, Any], head: int) -> Iterator[_Wanted]:
    words, hidden, layers, heads, kv_heads, inner, count, _ = (config[key] for key in _SIZES)
    queries, keys = heads * head, kv_heads * head
    yield "model.embed_tokens.weight", (words, hidden), _Q8
    yield "lm_head.weight", (words, hidden), _MATRIX
    yield "model.norm.weight", (hidden,), _PLAIN
    for layer in range(layers):
        block, moe = f"model.layers.{layer}", _MOE.format(layer)
        yield f"{block}.input_layernorm.weight", (hidden,), _PLAIN
        yield f"{block}.post_attention_layernorm.weight", (hidden,), _PLAIN
        yield f"{block}.self_attn.q_proj.weight", (queries, hidden), _MATRIX
        yield f"{block}.self_attn.k_proj.weight", (keys, hidden), _MATRIX
        yield f"{block}.self_attn.v_proj.weight", (keys, hidden), _MATRIX
        yield f"{block}.self_attn.o_proj.weight", (hidden, queries), _MATRIX
        # Looked up whether the config says `use_qk_norm` or not.
        yield f"{block}.self_attn.q_norm.weight", (queries,), _PLAIN
        yield f"{block}.self_attn.k_norm.weight", (keys,), _PLAIN
        yield f"{moe}.gate.weight", (count, hidden), _Q8
        yield f"{moe}.e_score_correction_bias", (count,), _PLAIN
        for expert in range(count):
            yield f"{moe}.experts.{expert}.w1.weight", (inner, hidden), _EXPERT
            yield f"{moe}.experts.{expert}.w2.weight", (hidden, inner), _EXPERT
            yield f"{moe}.experts.{expert}.w3.weight", (inner, hidden), _EXPERT


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


# All that a loader reads is in the one file.
FILES = Files(metadata=lambda plan: {}, claims=claims, defects=defects)
