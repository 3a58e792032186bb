"""Which modules are not stored as most of a bundle is, as names and patterns for readers.

vLLM looks up all experts of a layer under one name, `…mlp.experts`, whatever the checkpoint
calls their block, and joined projections under names of its own. AutoRound and GPTQModel look
up every linear by its name.
Source: vLLM 0.33.0, its rule parsers; auto-round 0.16.1 and gptqmodel 7.7.0, their loaders.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from emitters.gptq.spec import Width, width_of
from policy_dsl.plan import Module
from policy_dsl.vocabulary import namesake

# Module or pattern -> its width; None is what is not quantized.
Rules = Mapping[str, Width | None]

_IN_LAYER = re.compile(r"(.+\.layers)\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.+)\.experts\.\d+\.(\w+)")
# The block of experts and router has one name in checkpoints and the other in readers.
_EXPERT_BLOCKS = ("mlp", "block_sparse_moe")
# vLLM's name -> what it joins.
_JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def blocks(modules: Iterable[Module]) -> list[str]:
    """What comes before the numbers of layers, such as `model.layers`."""
    matches = (_IN_LAYER.fullmatch(module.name) for module in modules)
    return sorted({match[1] for match in matches if match})


def exact_rules(modules: Sequence[Module], default: Width) -> Rules:
    """The linears beside experts that the default is not for, by their names.

    What is outside the blocks, such as lm_head, is named whatever its width.
    """
    return {
        module.name: width_of(module)
        for module in modules
        if _is_linear(module)
        and not _EXPERT.fullmatch(module.name)
        and (width_of(module) != default or not _IN_LAYER.fullmatch(module.name))
    }


def layer_rules(modules: Sequence[Module], default: Width) -> Rules:
    """The same linears, those in blocks by patterns for all layers where they are alike.

    Nothing is said of what is outside the blocks and not quantized: nobody expects it.
    """
    alike: dict[tuple[str, Width | None], dict[int, list[str]]] = {}
    rules: dict[str, Width | None] = {}
    for name, width in exact_rules(modules, default).items():
        match = _IN_LAYER.fullmatch(name)
        if match is None:
            rules |= {} if width is None else {f"{re.escape(name)}$": width}
            continue
        parent, _, last = match[3].rpartition(".")
        alike.setdefault((parent, width), {}).setdefault(int(match[2]), []).append(last)
    for (parent, width), layers in alike.items():
        # Words, and the layers that have exactly these.
        by_words: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for layer, words in layers.items():
            by_words[tuple(words)].append(layer)
        for held, numbers in by_words.items():
            path = f"{_path(parent)}{_one_of(_with_joined(held))}"
            rules[rf".*layers\.{_one_of(numbers)}\.{path}$"] = width
    return rules


def expert_rules(modules: Sequence[Module], default: Width) -> Rules:
    """Patterns for the experts that the default is not for.

    Where all projections of a layer are alike, vLLM's one name for them matches too.
    """
    alike: dict[tuple[str, Width | None], list[int]] = defaultdict(list)
    for layer, widths in _experts(modules).items():
        together = len(set(widths.values())) == 1
        named = {"": next(iter(widths.values()))} if together else widths
        for projection, width in named.items():
            alike[projection, width].append(layer)
    block = rf"{_one_of(_EXPERT_BLOCKS)}\.experts"
    return {
        rf".*layers\.{_one_of(layers)}\.{block}"
        + (rf"\.\d+\.{projection}$" if projection else ".*"): width
        for (projection, width), layers in alike.items()
        if width != default
    }


def _is_linear(module: Module) -> bool:
    """Whether it may be a linear to readers, not a table or a bare parameter."""
    is_weight = module.tensors[0].name != module.name
    return is_weight and len(module.shape) == 2 and namesake(module.role) != "embed"


def _experts(modules: Iterable[Module]) -> Mapping[int, dict[str, Width | None]]:
    """Layer -> projection -> width, which all experts of a layer have."""
    layers: dict[int, dict[str, Width | None]] = defaultdict(dict)
    for module in modules:
        layer = _IN_LAYER.fullmatch(module.name)
        expert = _EXPERT.fullmatch(layer[3]) if layer else None
        if layer and expert:
            layers[int(layer[2])][expert[2]] = width_of(module)
    return layers


def _with_joined(words: tuple[str, ...]) -> tuple[str, ...]:
    joined = (name for name, members in _JOINED.items() if set(members) <= set(words))
    return (*words, *joined)


def _path(parent: str) -> str:
    """A pattern for what is between the number of a layer and the last word."""
    if parent in _EXPERT_BLOCKS:
        return rf"{_one_of(_EXPERT_BLOCKS)}\."
    return rf"{re.escape(parent)}\." if parent else ""


def _one_of(choices: Sequence[object]) -> str:
    """A pattern for one of these words or numbers."""
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"({'|'.join(words)})"
