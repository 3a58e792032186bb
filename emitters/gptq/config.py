"""`config.json`, the copy of its quantization, and the index of a planned bundle.

Modules that are not stored as most are get rules, by names and patterns. vLLM looks up all
experts of a layer under one name, `…mlp.experts`, whatever the checkpoint calls their block, and
joined projections under names of its own; AutoRound and GPTQModel every linear by its name.
Source: auto-round 0.16.1 and 0.12.2, exports and loader, its flow without a model; gptqmodel
7.7.0, `QuantizeConfig` and loader; vLLM 0.33.0, `AutoGPTQConfig` and its rule parsers; optimum
2.3.0, `GPTQQuantizer`; transformers 5.23.0, `save_pretrained`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emitters.checkpoints import CONFIG, INDEX, QUANTIZATIONS, covering_most, index, written
from emitters.gptq import spec
from emitters.gptq.spec import Width, dialect_of, width_of
from policy_dsl.formats import in_order
from policy_dsl.plan import Module, Plan, coded_modules
from policy_dsl.policy import namesake
from policy_dsl.reader_config import written_config
from policy_dsl.sources.checkpoint import finite

# Packing format of AutoRound -> version of the zero points; the first of each is what it writes.
PACKING_FORMATS: Mapping[str, str] = {
    "auto_round:auto_gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
}
_OLDEST = "0.12.2"
# Module or pattern -> its width; None is what is not quantized.
_Rules = dict[str, Width | None]
_IN_LAYER = re.compile(r"(.+\.layers)\.(\d+)\.(.+)")
# The block of experts and router has one name in checkpoints and the other in readers.
_EXPERT_BLOCKS = ("mlp", "block_sparse_moe")


def metadata(plan: Plan) -> dict[str, bytes]:
    """`config.json`, its `quantization_config` once more, and the index of several shards.

    A single shard has no index: its readers look for `model.safetensors`.
    """
    source = written_config(plan, *spec.READERS).items()
    config = {key: finite(value) for key, value in source if key not in QUANTIZATIONS}
    default, files = covering_most(plan.modules, width_of), {}
    if default is not None:
        dialect = dialect_of(plan)
        quantization = _gptq if dialect == spec.GPTQ else _auto_round
        config["quantization_config"] = quantization(plan, default)
        files[spec.SIDECARS[dialect]] = written(config["quantization_config"])
    tensors = in_order(plan.modules)
    if len({tensor.file for tensor in tensors}) > 1:
        files[INDEX] = written(index(tensors))
    return {CONFIG: written(config), **files}


def _auto_round(plan: Plan, default: Width) -> dict[str, Any]:
    """Its keys in the order of AutoRound's flow without a model."""
    coded = [coded for _, coded in coded_modules(plan.modules)]
    methods, version = {one.method for one in coded}, spec.STORAGE[coded[0].scheme].version
    oldest = any(spec.SEARCHES.get(method) == _OLDEST for method in methods)
    modules, _ = _apart(plan)
    places = (_IN_LAYER.fullmatch(one.name) for one in modules if not _is_expert(one.name))
    rules = {**exact_rules(plan.modules, default), **_expert_rules(modules, default)}
    return {
        "quant_method": spec.AUTO_ROUND,
        "packing_format": next(word for word, of in PACKING_FORMATS.items() if of == version),
        **default._asdict(),
        "data_type": "int",
        "iters": 0,
        # AutoRound says so of plain rounding only: the rest needs the model.
        **({"model_free": True} if methods == {spec.RTN} else {}),
        "autoround_version": _OLDEST if oldest else spec.SEARCHES["opt-rtn"],
        "block_name_to_quantize": ",".join(sorted({place[1] for place in places if place})),
        "extra_config": {name: _extra(width, default) for name, width in rules.items()},
    }


def _extra(width: Width | None, default: Width) -> dict[str, Any]:
    if width is None:
        return {"bits": 16, "data_type": "float"}
    usual, own = default._asdict(), width._asdict()
    # Always with bits: vLLM takes a module whose entry has none for one that is not quantized.
    return {key: own[key] for key in own if key == "bits" or own[key] != usual[key]}


def _gptq(plan: Plan, default: Width) -> dict[str, Any]:
    """What its readers look up, and nothing about how it was made."""
    coded = list(coded_modules(plan.modules))
    modules, beside = _apart(plan)
    rules = {
        **beside,
        **_layer_rules(modules, default, _joined(plan)),
        **_expert_rules(modules, default),
    }
    dynamic = {
        f"-:{pattern}" if width is None else f"+:{pattern}": width._asdict() if width else {}
        for pattern, width in rules.items()
    }
    return {
        "bits": default.bits,
        "group_size": default.group_size,
        "desc_act": False,
        "sym": default.sym,
        "lm_head": any(module.name == "lm_head" for module, _ in coded),
        "quant_method": spec.GPTQ,
        "checkpoint_format": spec.STORAGE[coded[0][1].scheme].version,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _apart(plan: Plan) -> tuple[list[Module], _Rules]:
    """The modules of the language model; rules for what is beside it and not quantized.

    Prediction blocks have numbers of layers too, and vLLM asks about towers as about all linears.
    """
    modules, rules = list(plan.modules), _Rules()
    for prefix in plan.model.architecture.elsewhere:
        inside = [one for one in modules if one.name.startswith(prefix)]
        if inside and not any(map(width_of, inside)):
            rules[rf".*{prefix[:-1].rpartition('.')[2]}\..*"] = None
            modules = [one for one in modules if not one.name.startswith(prefix)]
    return modules, rules


def exact_rules(modules: Iterable[Module], default: Width) -> _Rules:
    """The linears beside experts that the default is not for, by their names.

    What is outside the blocks, such as lm_head, is named whatever its width.
    """
    return {
        module.name: width_of(module)
        for module in modules
        # Not a table or a bare parameter.
        if not _is_expert(module.name)
        and module.tensors[0].name != module.name
        and len(module.shape) == 2
        and namesake(module.role) != "embed"
        and (width_of(module) != default or not _IN_LAYER.fullmatch(module.name))
    }


def _joined(plan: Plan) -> dict[str, set[str]]:
    """vLLM's name for projections that it holds as one matrix -> their own names."""
    joined = plan.model.architecture.facts(plan.target).get("joined", {})
    return {
        name.rpartition(".")[2]: {role.rpartition(".")[2] for role in roles}
        for name, roles in joined.items()
    }


def _layer_rules(
    modules: Iterable[Module], default: Width, fused: Mapping[str, set[str]]
) -> _Rules:
    """The same linears, those in blocks by patterns for all layers where they are alike.

    Nothing is said of what is outside the blocks and not quantized: nobody expects it.
    """
    alike: dict[tuple[str, Width | None], dict[int, list[str]]] = {}
    rules: _Rules = {}
    for name, width in exact_rules(modules, default).items():
        if match := _IN_LAYER.fullmatch(name):
            parent, _, last = match[3].rpartition(".")
            alike.setdefault((parent, width), {}).setdefault(int(match[2]), []).append(last)
        elif width is not None:
            rules[f"{re.escape(name)}$"] = width
    for (parent, width), layers in alike.items():
        # Words, and the layers that have exactly these.
        by_words: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for layer, words in layers.items():
            by_words[tuple(words)].append(layer)
        block = _one_of(_EXPERT_BLOCKS) if parent in _EXPERT_BLOCKS else re.escape(parent)
        path = rf"{block}\." if parent else ""
        for held, numbers in by_words.items():
            joined = (name for name, members in fused.items() if members <= set(held))
            last = _one_of((*held, *joined))
            rules[rf".*layers\.{_one_of(numbers)}\.{path}{last}$"] = width
    return rules


def _expert_rules(modules: Iterable[Module], default: Width) -> _Rules:
    """Patterns for the experts that the default is not for.

    Where all projections of a layer are alike, vLLM's one name for them matches too.
    """
    # The experts of a layer are alike: one of each projection is enough.
    examples = {(one.role, one.layer): one for one in modules if _is_expert(one.name)}
    layers: dict[int, dict[str, Width | None]] = defaultdict(dict)
    parents: set[str] = set()
    for module in examples.values():
        if place := _IN_LAYER.fullmatch(module.name):
            layers[int(place[2])][place[3].rpartition(".")[2]] = width_of(module)
            parents.add(place[3].partition(".experts.")[0])
    alike: dict[tuple[str, Width | None], list[int]] = defaultdict(list)
    for layer, widths in layers.items():
        together = len(set(widths.values())) == 1
        named = {"": next(iter(widths.values()))} if together else widths
        for projection, width in named.items():
            alike[projection, width].append(layer)
    known = _EXPERT_BLOCKS if parents & {*_EXPERT_BLOCKS} else ()
    block = rf"{_one_of([*known, *map(re.escape, sorted(parents - {*known}))])}\.experts"
    return {
        rf".*layers\.{_one_of(layers)}\.{block}"
        + (rf"\.\d+\.{projection}$" if projection else ".*"): width
        for (projection, width), layers in alike.items()
        if width != default
    }


def _is_expert(name: str) -> bool:
    # Nearly all modules are experts: no pattern is as quick.
    _, found, rest = name.partition(".experts.")
    return bool(found) and rest.partition(".")[0].isdigit()


def _one_of(choices: Sequence[object]) -> str:
    """A pattern for one of these words or numbers."""
    words = "|".join(map(str, choices))
    return words if len(choices) == 1 else f"({words})"
