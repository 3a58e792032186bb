"""What readers of packed checkpoints cannot load, or load wrongly.

Source: vLLM 0.33.0, `INCConfig` for the auto-round dialect and `AutoGPTQConfig` for the other,
read, and what looks up names was run; transformers 5.23.0 with auto-round 0.16.1, with
gptqmodel 7.7.0, and with optimum 2.3.0, all run on a CPU with bundles of tiny models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from emitters.checkpoints import QKV, at_layers, by_layer, omission
from emitters.gptq.module_rules import exact_rules
from emitters.gptq.spec import (
    AUTO_ROUND,
    GPTQ,
    READERS,
    SEARCHES,
    STORAGE,
    Width,
    default_width,
    dialect_of,
    width_of,
)
from policy_dsl.formats import Review
from policy_dsl.plan import Draft, Module, Refusal, coded_modules
from policy_dsl.reader_config import refused
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.treatments import WHOLE_ROW, Coded, Stored
from policy_dsl.vocabulary import namesake

_OTHER_DIALECT = "use dialect auto-round"
_LANGUAGE_ONLY = "readers of packed checkpoints of these families want the language model only"
_LEFT_OUT = {"lm_head": "readers use", "vision": _LANGUAGE_ONLY, "audio": _LANGUAGE_ONLY}
# A word of codes, along either axis, begins with every 32nd value.
_STEP = 32
_NOT_LINEAR = {
    "embed": "no reader looks rows up in packed words",
    "router": "no reader packs routers: they choose experts, and stay in 16 bits or more",
    "shared_expert_gate": "no reader packs gates of shared experts",
}
# Projections that vLLM holds as one matrix.
_JOINED = (
    ("q, k and v", QKV),
    ("gate and up", ("mlp.gate_proj", "mlp.up_proj")),
    ("gate and up of shared experts", ("shared_experts.gate_proj", "shared_experts.up_proj")),
)
# The widths that Marlin kernels have, and what they want of experts: multiples of the model's
# width and of the experts' own.
_MARLIN_WIDTHS = (4, 8)
_HIDDEN_STEP, _INNER_STEP = 128, 64


def _left_out(tensor: ModelTensor, model: Model) -> str | None:
    return omission(tensor, model, _LEFT_OUT)


def _held(tensor: ModelTensor, model: Model, stored: Stored) -> str | None:
    if not isinstance(stored, Coded):
        return None
    if tensor.namesake in _NOT_LINEAR:
        return _NOT_LINEAR[tensor.namesake]
    if stored.method in SEARCHES and not stored.symmetric:
        return "AutoRound searches no scales for asymmetric groups: use rtn, or sym"
    uneven = [size for size in tensor.shape if size % _STEP]
    if tensor.is_matrix and uneven:
        return f"words hold {_STEP} values along either axis, and {uneven[0]} is not a multiple"
    return None


def _bundle(draft: Draft) -> Iterator[Refusal]:
    schemes: dict[str, str] = {}
    for _, coded in coded_modules(draft.modules):
        schemes.setdefault(STORAGE[coded.scheme].version, coded.scheme)
    if len(schemes) > 1:
        two = " and ".join(sorted(schemes.values()))
        reason = f"zero points are of one version in a whole bundle, and {two} are of two"
        yield Refusal("", "", reason, "error")
    for constraint in _OF_VLLM:
        if (fault := constraint(draft)) is not None:
            yield Refusal("", "vllm", fault, "fatal")
    for constraint, runtimes in _OF_OTHERS:
        if (fault := constraint(draft)) is not None:
            yield from (Refusal("", runtime, fault) for runtime in runtimes)
    for reader, runtimes in READERS.items():
        for runtime in runtimes:
            yield from refused(draft, reader, runtime)


REVIEW = Review(left_out=_left_out, held=_held, bundle=_bundle)


def _experts_alike(draft: Draft) -> str | None:
    """All experts of a layer are one module, with one rule."""
    layers: dict[int | None, set[Width | None]] = defaultdict(set)
    for module in _experts(draft):
        layers[module.layer].add(width_of(module))
    reason = (
        "it holds the experts of a layer as one module: gate, up and down must have the same"
        " width, group size and symmetry, or all stay as they are"
    )
    return at_layers(reason, (layer for layer, widths in layers.items() if len(widths) > 1))


def _joined_alike(draft: Draft) -> str | None:
    layers = by_layer(draft.modules).items()
    for called, members in _JOINED:
        uneven = [
            layer
            for layer, held in layers
            if len({width_of(held[role]) for role in members if role in held}) > 1
        ]
        if uneven:
            reason = f"it joins {called} of a layer: they must be stored alike"
            return at_layers(reason, uneven)
    return None


def _symmetric(draft: Draft) -> str | None:
    """Kernels for experts read zero points of the auto-round dialect, others never do."""
    every = dialect_of(draft) == GPTQ
    for module, coded in coded_modules(draft.modules):
        spared = module.role.startswith("experts.") or coded.bits not in _MARLIN_WIDTHS
        if not coded.symmetric and (every or not spared):
            where = "in this dialect" if every else "of 4 and 8 bits"
            return f"its kernels {where} have no zero points: {module.name} must be sym"
    return None


def _gptq_widths(draft: Draft) -> str | None:
    for module, coded in coded_modules(draft.modules if dialect_of(draft) == GPTQ else ()):
        if coded.bits not in _MARLIN_WIDTHS:
            cure = "dialect auto-round has kernels for others"
            return f"it reads 4 and 8 bits of this dialect, {module.name} has others; {cure}"
    return None


def _first_version(draft: Draft) -> str | None:
    """Both are read alike where zero points are not read at all: in the other dialect."""
    for module, coded in coded_modules(draft.modules if dialect_of(draft) == AUTO_ROUND else ()):
        if STORAGE[coded.scheme].version != "gptq":
            return (
                f"it takes zero points of version 1 only, {module.name} has"
                f" {coded.scheme}: use int, or sym with dialect gptq"
            )
    return None


def _slow_experts(draft: Draft) -> str | None:
    """Kernels for shapes that Marlin does not take have two gaps."""
    default, for_all = default_width(draft.modules), dialect_of(draft) == GPTQ
    if default is None:
        return None
    # One module of experts for each shape, projection and width.
    distinct: dict[tuple[str, tuple[int, ...], Width | None], Module] = {}
    for module in _experts(draft):
        distinct.setdefault((module.role, module.shape, width_of(module)), module)
    for (_, _, width), module in distinct.items():
        # This dialect asks about the default's groups, whatever a rule says of these experts.
        asked = default if for_all else width
        if asked is None or asked.bits not in _MARLIN_WIDTHS:
            continue
        if _marlin(module, asked, padded=for_all):
            continue
        shape = "x".join(str(size) for size in module.shape)
        shapes = f"experts of {shape} need other kernels than Marlin's, which"
        if asked.group_size == WHOLE_ROW:
            return f"{shapes} want groups: g-1 does not load"
        if for_all and width != default:
            return f"{shapes} have one width for all layers in this dialect"
    return None


def _marlin(module: Module, width: Width, *, padded: bool) -> bool:
    """Whether Marlin kernels take experts, by the shape of one of their matrices."""
    out, columns = module.shape
    hidden, inner = (out, columns) if module.role == "experts.down_proj" else (columns, out)
    step = max(1 if padded else _INNER_STEP, width.group_size)
    return width.symmetric and hidden % _HIDDEN_STEP == 0 and inner % step == 0


_OF_VLLM: tuple[Callable[[Draft], str | None], ...] = (
    *(_experts_alike, _joined_alike, _symmetric),
    *(_gptq_widths, _first_version, _slow_experts),
)


def _renamed_experts(draft: Draft) -> str | None:
    """Names are mapped for plain experts, as tensors of a stack."""
    table = draft.model.architecture
    if not table.renames_experts or not _packs(draft, "experts."):
        return None
    return (
        f"transformers' own class for {table.family} has other names for experts: packed ones are"
        " left out, mostly without an error, and experts stay random; load it with vLLM, or"
        " with modeling code that has experts as linears (trust_remote_code)"
    )


def _stacked_experts(draft: Draft) -> str | None:
    """auto-round and gptqmodel take stacks apart again, optimum does not."""
    renamed = draft.model.architecture.renames_experts
    if dialect_of(draft) != GPTQ or renamed or not _packs(draft, "experts."):
        return None
    return (
        "it stacks experts: in this dialect packed ones are left out without an error, and stay"
        f" random; {_OTHER_DIALECT}"
    )


def _own_blocks(draft: Draft) -> str | None:
    """In its own dialect gptqmodel replaces blocks with experts by classes of its own."""
    fault = draft.model.architecture.facts("gptq").get("own_blocks")
    if dialect_of(draft) != GPTQ or fault is None:
        return None
    packed = fault.get("packed")
    return str(fault["reason"]) if packed is None or _packs(draft, packed) else None


def _one_width(draft: Draft) -> str | None:
    """optimum replaces every linear of the blocks, and knows no rules."""
    default = default_width(draft.modules)
    if dialect_of(draft) != GPTQ or default is None:
        return None
    rules = exact_rules(draft.modules, default)
    for module in draft.modules:
        role = namesake(module.role)
        packed_head = role == "lm_head" and isinstance(module.treatment, Coded)
        others = role not in ("lm_head", "router")
        if module.name in rules and (others or packed_head):
            one = "in this dialect it has one width for all linears of the blocks"
            return f"{one}, and {module.name} has another; {_OTHER_DIALECT}"
    return None


def _group_numbers(draft: Draft) -> str | None:
    coded = (coded for _, coded in coded_modules(draft.modules) if dialect_of(draft) == GPTQ)
    if any(not STORAGE[one.scheme].g_idx for one in coded):
        return "in this dialect it needs the group of each column: use int-gidx"
    return None


def _asymmetric(draft: Draft) -> str | None:
    for module, coded in coded_modules(draft.modules if dialect_of(draft) == AUTO_ROUND else ()):
        if _is_first_version(coded) and not coded.symmetric:
            return f"AutoRound's own kernels read {module.name} only as int-v2, or sym"
    return None


def _asymmetric_default(draft: Draft) -> str | None:
    default = default_width(draft.modules)
    if dialect_of(draft) != GPTQ or default is None or default.symmetric:
        return None
    if any(_is_first_version(coded) for _, coded in coded_modules(draft.modules)):
        return "it trusts asymmetric groups of version 1 only to itself: use int-v2, or sym"
    return None


_OF_OTHERS: tuple[tuple[Callable[[Draft], str | None], tuple[str, ...]], ...] = (
    (_renamed_experts, ("auto-round", "gptqmodel", "transformers")),
    (_asymmetric, ("auto-round", "transformers")),
    (_asymmetric_default, ("gptqmodel",)),
    (_stacked_experts, ("transformers",)),
    (_own_blocks, ("gptqmodel",)),
    (_one_width, ("transformers",)),
    (_group_numbers, ("transformers",)),
)


def _experts(draft: Draft) -> list[Module]:
    return [module for module in draft.modules if module.role.startswith("experts.")]


def _packs(draft: Draft, component: str) -> bool:
    modules: Iterable[Module] = (module for module, _ in coded_modules(draft.modules))
    return any(module.role.startswith(component) for module in modules)


def _is_first_version(coded: Coded) -> bool:
    return STORAGE[coded.scheme].version == "gptq"
