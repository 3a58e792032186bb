"""What readers of packed checkpoints cannot load, or load wrongly.

Source: vLLM 0.33.0, `INCConfig` for the auto-round dialect and `AutoGPTQConfig` for the other,
read, and what looks up names was run; transformers 5.23.0 with auto-round 0.16.1, with
gptqmodel 7.7.0, and with optimum 2.3.0, all run on a CPU with bundles of tiny models.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from emitters.checkpoints import covering_most, omission, uneven, unfit
from emitters.gptq import spec
from emitters.gptq.config import exact_rules
from emitters.gptq.spec import GPTQ, Width, dialect_of, width_of
from policy_dsl.formats import Review
from policy_dsl.plan import Draft, Module, Refusal, coded_modules
from policy_dsl.policy import namesake
from policy_dsl.reader_config import refused
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.treatments import WHOLE_ROW, Coded, Stored

_Coded = Iterable[tuple[Module, Coded]]
_OTHER_DIALECT = "use dialect auto-round"
_LANGUAGE_ONLY = "readers of packed checkpoints of these families want the language model only"
_LEFT_OUT = {"lm_head": "readers use", "vision": _LANGUAGE_ONLY, "audio": _LANGUAGE_ONLY}
# A word of codes, along either axis, begins with every 32nd value.
_STEP = 32
_NOT_LINEAR = {
    "embed": "no reader looks rows up in packed words",
    "embed_per_layer": "no reader looks rows up in packed words",
    "router": "no reader packs routers: they choose experts, and stay in 16 bits or more",
    "shared_expert_gate": "no reader packs gates of shared experts",
    "vision": "no reader has packed vision towers",
}
# The widths that Marlin kernels have, and what they want of experts: multiples of the model's
# width and of the experts' own.
_MARLIN_WIDTHS = (4, 8)
_HIDDEN_STEP, _INNER_STEP = 128, 64


def _held(tensor: ModelTensor, model: Model, stored: Stored) -> str | None:
    if not isinstance(stored, Coded):
        return None
    names = tensor.namesake, tensor.component or ""
    reasons = (_NOT_LINEAR[name] for name in names if name in _NOT_LINEAR)
    if reason := unfit(tensor, model, stored, "gptq") or next(reasons, None):
        return reason
    if stored.method in spec.SEARCHES and not stored.symmetric:
        return "AutoRound searches no scales for asymmetric groups: use rtn, or sym"
    uneven = [size for size in tensor.shape if size % _STEP]
    if tensor.is_matrix and uneven:
        return f"words hold {_STEP} values along either axis, and {uneven[0]} is not a multiple"
    return None


def _bundle(draft: Draft) -> Iterator[Refusal]:
    default = covering_most(draft.modules, width_of)
    # One module of each kind, the first: there are tens of thousands of experts.
    kinds: dict[tuple[object, ...], Module] = {}
    for module in draft.modules:
        kinds.setdefault((module.role, module.layer, module.shape, module.treatment), module)
    few = replace(draft, modules=tuple(kinds.values()))
    schemes: dict[str, str] = {}
    for _, coded in coded_modules(few.modules):
        schemes.setdefault(spec.STORAGE[coded.scheme].version, coded.scheme)
    if len(schemes) > 1:
        two = " and ".join(sorted(schemes.values()))
        reason = f"zero points are of one version in a whole bundle, and {two} are of two"
        yield Refusal("", "", reason, "error")
    for fault in filter(None, _of_vllm(few, default)):
        yield Refusal("", "vllm", fault, "fatal")
    for names, reader_fault in _of_others(few, default):
        yield from (Refusal("", runtime, reader_fault) for runtime in names if reader_fault)
    for reader, runtimes in spec.READERS.items():
        for runtime in runtimes:
            yield from refused(draft, reader, runtime)


def _left_out(tensor: ModelTensor, model: Model) -> str | None:
    if tensor.component in model.architecture.facts("gptq").get("kept", ()):
        return None
    return omission(tensor, model, _LEFT_OUT)


REVIEW = Review(left_out=_left_out, held=_held, bundle=_bundle)


def _of_vllm(draft: Draft, default: Width | None) -> Iterator[str | None]:
    coded, in_gptq = list(coded_modules(draft.modules)), dialect_of(draft) == GPTQ
    experts = [module for module in draft.modules if module.role.startswith("experts.")]
    reason = (
        "it holds the experts of a layer as one module: gate, up and down must have the same"
        " width, group size and symmetry, or all stay as they are"
    )
    yield uneven(reason, experts, width_of)
    for name, roles in draft.model.architecture.facts("gptq").get("joined", {}).items():
        joined = (module for module in draft.modules if module.role in roles)
        reason = f"it joins {', '.join(roles)} of a layer as {name}: they must be stored alike"
        if fault := uneven(reason, joined, width_of):
            yield fault
            break
    if in_gptq:
        reason = "its kernels in this dialect have no zero points: {0.name} must be sym"
        yield _first(coded, reason, lambda one: not one.symmetric)
        reason = "it reads 4 and 8 bits of this dialect, {0.name} has others; dialect auto-round"
        reason = f"{reason} has kernels for others"
        yield _first(coded, reason, lambda one: one.bits not in _MARLIN_WIDTHS)
    else:
        # Kernels for experts read zero points, and others both versions where they read none.
        marlin = [held for held in coded if held[1].bits in _MARLIN_WIDTHS]
        beside = [held for held in marlin if held[0].role[:8] != "experts."]
        reason = "its kernels of 4 and 8 bits have no zero points: {0.name} must be sym"
        yield _first(beside, reason, lambda one: not one.symmetric)
        reason = "it takes zero points of version 1 only, {0.name} has {0.treatment.scheme}"
        reason = f"{reason}: use int, or sym with dialect gptq"
        yield _first(coded, reason, lambda one: not _is_first_version(one))
    if default is not None:
        yield _slow_experts(experts, default, in_gptq=in_gptq)


def _slow_experts(experts: Iterable[Module], default: Width, *, in_gptq: bool) -> str | None:
    """Kernels for shapes that Marlin does not take have two gaps."""
    for module in experts:
        # This dialect asks about the default's groups, whatever a rule says of these experts.
        width = width_of(module)
        asked = default if in_gptq else width
        if asked is None or asked.bits not in _MARLIN_WIDTHS:
            continue
        out, columns = module.shape
        hidden, inner = (out, columns) if module.role == "experts.down_proj" else (columns, out)
        step = max(1 if in_gptq else _INNER_STEP, asked.group_size)
        if asked.sym and hidden % _HIDDEN_STEP == 0 and inner % step == 0:
            continue
        shapes = f"experts of {out}x{columns} need other kernels than Marlin's, which"
        if asked.group_size == WHOLE_ROW:
            return f"{shapes} want groups: g-1 does not load"
        if in_gptq and width != default:
            return f"{shapes} have one width for all layers in this dialect"
    return None


def _of_others(draft: Draft, default: Width | None) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """Readers, and why they do not read the bundle."""
    table, coded = draft.model.architecture, list(coded_modules(draft.modules))
    held = {module.role.partition(".")[0] for module in draft.modules}
    unread = table.facts("gptq").get("unread")
    if unread and ("with" not in unread or unread["with"] in held):
        yield tuple(unread["by"]), unread["reason"]
    roles = {module.role.partition(".")[0] + "." for module, _ in coded}
    packs_experts = "experts." in roles
    if packs_experts and table.renames_experts:
        # Names are mapped for plain experts, as tensors of a stack.
        reason = (
            f"transformers' own class for {table.family} has other names for experts: packed ones"
            " are left out, mostly without an error, and experts stay random; load it with vLLM,"
            " or with modeling code that has experts as linears (trust_remote_code)"
        )
        yield ("auto-round", "gptqmodel", "transformers"), reason
    kept = any(module.role.startswith("experts.") for module in draft.modules) and coded
    if kept and not packs_experts and table.renames_experts and dialect_of(draft) != GPTQ:
        reason = (
            f"it looks for packed experts of {table.family} where they are plain, too: these are"
            " left out, and experts stay random; load it with vLLM"
        )
        yield ("auto-round", "transformers"), reason
    older = [(module, one) for module, one in coded if _is_first_version(one)]
    if dialect_of(draft) != GPTQ:
        reason = "AutoRound's own kernels read {0.name} only as int-v2, or sym"
        found = _first(older, reason, lambda one: not one.symmetric)
        yield ("auto-round", "transformers"), found
        return
    if older and default and not default.sym:
        reason = "it trusts asymmetric groups of version 1 only to itself: use int-v2, or sym"
        yield ("gptqmodel",), reason
    if packs_experts and not table.renames_experts:
        # auto-round and gptqmodel take stacks apart again, optimum does not.
        reason = (
            "it stacks experts: in this dialect packed ones are left out without an error, and"
            f" stay random; {_OTHER_DIALECT}"
        )
        yield ("transformers",), reason
    # In its own dialect gptqmodel replaces blocks with experts by classes of its own.
    own = table.facts("gptq").get("own_blocks")
    if own and ("packed" not in own or own["packed"] in roles):
        yield ("gptqmodel",), str(own["reason"])
    if default is not None:
        yield ("transformers",), _several_widths(draft.modules, default)
    if any(not spec.STORAGE[one.scheme].g_idx for _, one in coded):
        reason = "in this dialect it needs the group of each column: use int-gidx"
        yield ("transformers",), reason


def _several_widths(modules: Sequence[Module], default: Width) -> str | None:
    """optimum replaces every linear of the blocks, and knows no rules."""
    rules = exact_rules(modules, default)
    for module in modules:
        role = namesake(module.role)
        packed_head = role == "lm_head" and isinstance(module.treatment, Coded)
        if module.name in rules and (packed_head or role not in ("lm_head", "router")):
            one = "in this dialect it has one width for all linears of the blocks"
            return f"{one}, and {module.name} has another; {_OTHER_DIALECT}"
    return None


def _first(coded: _Coded, reason: str, is_wrong: Callable[[Coded], bool]) -> str | None:
    """The reason with the first module that is stored wrongly; None if there is none."""
    return next((reason.format(module) for module, how in coded if is_wrong(how)), None)


def _is_first_version(coded: Coded) -> bool:
    return spec.STORAGE[coded.scheme].version == "gptq"
