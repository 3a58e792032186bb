"""What readers of packed checkpoints cannot load, or load wrongly.

Source: vLLM 0.33.0 (read; its rules run on a CPU), auto-round 0.16.1, gptqmodel 7.7.0 and
transformers 5.23.0 with optimum 2.3.0 (run on a CPU where they can be).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from emitters.gptq.schemes import STORAGE
from emitters.gptq.widths import (
    AUTO_ROUND,
    GPTQ,
    Width,
    default_width,
    dialect_of,
    quantized,
    width_of,
)
from policy_dsl.formats import MetadataValues
from policy_dsl.plan import Module, Plan, Refusal
from policy_dsl.policy import WHOLE_ROW, Treatment
from policy_dsl.roles.classify import Model, ModelTensor

RUNTIMES: Mapping[str, str] = {
    "vllm": "Marlin kernels on NVIDIA GPUs, either dialect",
    "auto-round": "transformers with auto-round installed, any device, dialect auto-round",
    "gptqmodel": "Python, any device, dialect gptq",
    "transformers": "dialect gptq, with optimum and gptqmodel installed",
}
METADATA_KEYS: Mapping[str, MetadataValues] = {"dialect": (AUTO_ROUND, GPTQ)}

# A word of codes, along either axis, begins with every 32nd value.
_STEP = 32
_NOT_LINEAR = {
    "embed": "no reader looks rows up in packed words",
    "router": "no reader packs routers: they choose experts, and stay in 16 bits or more",
    "shared_expert_gate": "no reader packs gates of shared experts",
}
_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
# Projections that vLLM holds as one matrix.
_FUSED = (
    ("q, k and v", _QKV),
    ("gate and up", ("mlp.gate_proj", "mlp.up_proj")),
    (
        "gate and up of shared experts",
        ("shared_experts.gate_proj", "shared_experts.up_proj"),
    ),
)
_MARLIN_WIDTHS = (4, 8)
# What kernels of vLLM want of experts: of the model's width, and of the experts' own.
_HIDDEN_STEP, _INNER_STEP = 128, 64


def unsupported(tensor: ModelTensor, model: Model, treatment: Treatment) -> str | None:
    """Why no reader can hold a matrix packed like that, else None."""
    if treatment.action != "quantize":
        return None
    if tensor.role in _NOT_LINEAR:
        return _NOT_LINEAR[tensor.role]
    uneven = [size for size in tensor.shape if size % _STEP]
    if tensor.is_matrix and uneven:
        return f"words hold {_STEP} values along either axis, and {uneven[0]} is no multiple"
    return None


def conflicts(modules: Sequence[Module]) -> list[str]:
    """What quantized modules must share, because it is told once for the whole bundle."""
    found: dict[str, str] = {}
    for module in quantized(modules):
        version = STORAGE[module.treatment.scheme or ""].version
        found.setdefault(version, module.treatment.scheme or "")
    if len(found) < 2:
        return []
    schemes = " and ".join(sorted(found.values()))
    return [f"zero points are of one version in a whole bundle, and {schemes} are of two"]


def refusals(plan: Plan) -> tuple[Refusal, ...]:
    """The readers that cannot load the planned bundle, with every reason."""
    return tuple(
        Refusal(runtime, reason, fatal=runtime == "vllm")
        for runtime, constraint in _CONSTRAINTS
        if (reason := constraint(plan)) is not None
    )


def _experts_alike(plan: Plan) -> str | None:
    """All experts of a layer are one module, with one rule."""
    layers = [layer for layer, experts in _experts(plan).items() if len(_widths(experts)) > 1]
    reason = (
        "it holds the experts of a layer as one module: gate, up and down must have the same"
        " width, group size and symmetry, or all stay as they are"
    )
    return _at(reason, layers)


def _fused_alike(plan: Plan) -> str | None:
    roles = _by_role(plan)
    for called, members in _FUSED:
        layers = [
            layer
            for layer, held in roles.items()
            if len(_widths(held[role] for role in members if role in held)) > 1
        ]
        if layers:
            reason = f"it joins {called} of a layer: they must be stored alike"
            return _at(reason, layers)
    return None


def _symmetric(plan: Plan) -> str | None:
    """Kernels for experts read zero points of the auto-round dialect, others never do."""
    every = dialect_of(plan) == GPTQ
    for module in quantized(plan.modules):
        width = width_of(module)
        few = width is not None and width.bits in _MARLIN_WIDTHS
        spared = module.role.startswith("experts.") or not few
        if width is not None and not width.symmetric and (every or not spared):
            where = "in this dialect" if every else "of 4 and 8 bits"
            return f"its kernels {where} have no zero points: {module.name} must be sym"
    return None


def _gptq_widths(plan: Plan) -> str | None:
    if dialect_of(plan) != GPTQ:
        return None
    for module in quantized(plan.modules):
        if module.treatment.bits not in _MARLIN_WIDTHS:
            cure = "dialect auto-round has kernels for others"
            return f"it reads 4 and 8 bits of this dialect, {module.name} has others; {cure}"
    return None


def _first_version(plan: Plan) -> str | None:
    """Both are read alike where zero points are not read at all: in the other dialect."""
    if dialect_of(plan) != AUTO_ROUND:
        return None
    for module in quantized(plan.modules):
        if STORAGE[module.treatment.scheme or ""].version != "gptq":
            return (
                f"it takes zero points of version 1 only, {module.name} has"
                f" {module.treatment.scheme}: use int, or sym with dialect gptq"
            )
    return None


def _slow_experts(plan: Plan) -> str | None:
    """Kernels for shapes that Marlin does not take have two gaps."""
    default, told_once = default_width(plan.modules), dialect_of(plan) == GPTQ
    if default is None:
        return None
    for module, width in _expert_widths(plan):
        # This dialect asks about the default's groups, whatever a rule says of these experts.
        asked = default if told_once else width
        if width.bits not in _MARLIN_WIDTHS or _marlin(module, asked, padded=told_once):
            continue
        shape = "x".join(str(size) for size in module.shape)
        shapes = f"experts of {shape} need kernels other than Marlin's, which"
        if WHOLE_ROW in (width.group_size, default.group_size):
            return f"{shapes} want groups: g-1 does not load"
        if told_once and width != default:
            return f"{shapes} take one width for all layers from this dialect"
    return None


def _expert_widths(plan: Plan) -> Iterable[tuple[Module, Width]]:
    """One quantized module of experts for each shape, projection and width."""
    found: dict[object, tuple[Module, Width]] = {}
    for module in plan.modules:
        width = width_of(module)
        if width is not None and module.role.startswith("experts."):
            found.setdefault((module.role, module.shape, width), (module, width))
    return found.values()


def _marlin(module: Module, width: Width, *, padded: bool) -> bool:
    """Whether Marlin kernels take experts, by the shape of one of their matrices.

    padded: whether the width of experts is filled up to whole tiles.
    """
    out, columns = module.shape
    hidden, inner = (out, columns) if module.role == "experts.down_proj" else (columns, out)
    step = max(1 if padded else _INNER_STEP, width.group_size)
    return width.symmetric and hidden % _HIDDEN_STEP == 0 and inner % step == 0


_CONSTRAINTS: tuple[tuple[str, Callable[[Plan], str | None]], ...] = (
    ("vllm", _experts_alike),
    ("vllm", _fused_alike),
    ("vllm", _symmetric),
    ("vllm", _gptq_widths),
    ("vllm", _first_version),
    ("vllm", _slow_experts),
)


def _widths(modules: Iterable[Module]) -> set[object]:
    return {width_of(module) for module in modules}


def _experts(plan: Plan) -> Mapping[int, Sequence[Module]]:
    """Layer -> the modules of its experts."""
    found: dict[int, list[Module]] = defaultdict(list)
    for module in plan.modules:
        if module.role.startswith("experts.") and module.layer is not None:
            found[module.layer].append(module)
    return found


def _by_role(plan: Plan) -> Mapping[int, Mapping[str, Module]]:
    found: dict[int, dict[str, Module]] = defaultdict(dict)
    for module in plan.modules:
        if module.layer is not None:
            found[module.layer][module.role] = module
    return found


def _at(reason: str, layers: Iterable[int]) -> str | None:
    """The reason with the layers that give it; None if there is no layer."""
    known = sorted(layers)
    if not known:
        return None
    more = f" and {len(known) - 1} more" if len(known) > 1 else ""
    return f"{reason} (layer {known[0]}{more})"
