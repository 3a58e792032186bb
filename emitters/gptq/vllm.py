"""What vLLM cannot hold of a packed checkpoint.

Source: vLLM 0.33.0, `INCConfig` for the auto-round dialect and `AutoGPTQConfig` for the other,
read; what looks up names was run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from emitters.gptq.schemes import STORAGE
from emitters.gptq.widths import AUTO_ROUND, GPTQ, Width, default_width, dialect_of, width_of
from policy_dsl.plan import Draft, Module, coded_modules
from policy_dsl.treatments import WHOLE_ROW

_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_SHARED = ("shared_experts.gate_proj", "shared_experts.up_proj")
# Projections that it holds as one matrix.
_JOINED = (
    ("q, k and v", _QKV),
    ("gate and up", ("mlp.gate_proj", "mlp.up_proj")),
    ("gate and up of shared experts", _SHARED),
)
# The widths that Marlin kernels have, and what they want of experts: multiples of the model's
# width and of the experts' own.
_MARLIN_WIDTHS = (4, 8)
_HIDDEN_STEP, _INNER_STEP = 128, 64


def constraints(plan: Draft) -> Iterator[str]:
    """Every reason why it cannot load the planned bundle."""
    yield from filter(None, (constraint(plan) for constraint in _CONSTRAINTS))


def _experts_alike(plan: Draft) -> str | None:
    """All experts of a layer are one module, with one rule."""
    layers = [layer for layer, experts in _experts(plan).items() if len(_widths(experts)) > 1]
    reason = (
        "it holds the experts of a layer as one module: gate, up and down must have the same"
        " width, group size and symmetry, or all stay as they are"
    )
    return _at(reason, layers)


def _joined_alike(plan: Draft) -> str | None:
    roles = _by_role(plan)
    for called, members in _JOINED:
        layers = [
            layer
            for layer, held in roles.items()
            if len(_widths(held[role] for role in members if role in held)) > 1
        ]
        if layers:
            reason = f"it joins {called} of a layer: they must be stored alike"
            return _at(reason, layers)
    return None


def _symmetric(plan: Draft) -> str | None:
    """Kernels for experts read zero points of the auto-round dialect, others never do."""
    every = dialect_of(plan) == GPTQ
    for module, _ in coded_modules(plan.modules):
        width = width_of(module)
        few = width is not None and width.bits in _MARLIN_WIDTHS
        spared = module.role.startswith("experts.") or not few
        if width is not None and not width.symmetric and (every or not spared):
            where = "in this dialect" if every else "of 4 and 8 bits"
            return f"its kernels {where} have no zero points: {module.name} must be sym"
    return None


def _gptq_widths(plan: Draft) -> str | None:
    if dialect_of(plan) != GPTQ:
        return None
    for module, coded in coded_modules(plan.modules):
        if coded.bits not in _MARLIN_WIDTHS:
            cure = "dialect auto-round has kernels for others"
            return f"it reads 4 and 8 bits of this dialect, {module.name} has others; {cure}"
    return None


def _first_version(plan: Draft) -> str | None:
    """Both are read alike where zero points are not read at all: in the other dialect."""
    if dialect_of(plan) != AUTO_ROUND:
        return None
    for module, coded in coded_modules(plan.modules):
        if STORAGE[coded.scheme].version != "gptq":
            return (
                f"it takes zero points of version 1 only, {module.name} has"
                f" {coded.scheme}: use int, or sym with dialect gptq"
            )
    return None


def _slow_experts(plan: Draft) -> str | None:
    """Kernels for shapes that Marlin does not take have two gaps."""
    default, told_once = default_width(plan.modules), dialect_of(plan) == GPTQ
    if default is None:
        return None
    for module, width in _expert_widths(plan):
        # This dialect asks about the default's groups, whatever a rule says of these experts.
        asked = default if told_once else width
        if asked is None or asked.bits not in _MARLIN_WIDTHS:
            continue
        if _marlin(module, asked, padded=told_once):
            continue
        shape = "x".join(str(size) for size in module.shape)
        shapes = f"experts of {shape} need other kernels than Marlin's, which"
        if asked.group_size == WHOLE_ROW:
            return f"{shapes} want groups: g-1 does not load"
        if told_once and width != default:
            return f"{shapes} have one width for all layers in this dialect"
    return None


def _expert_widths(plan: Draft) -> Iterable[tuple[Module, Width | None]]:
    """One module of experts for each shape, projection and width."""
    found: dict[object, tuple[Module, Width | None]] = {}
    for module in plan.modules:
        if module.role.startswith("experts."):
            width = width_of(module)
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


_CONSTRAINTS: tuple[Callable[[Draft], str | None], ...] = (
    _experts_alike,
    _joined_alike,
    _symmetric,
    _gptq_widths,
    _first_version,
    _slow_experts,
)


def _widths(modules: Iterable[Module]) -> set[object]:
    return {width_of(module) for module in modules}


def _experts(plan: Draft) -> Mapping[int, Sequence[Module]]:
    """Layer -> the modules of its experts."""
    found: dict[int, list[Module]] = defaultdict(list)
    for module in plan.modules:
        if module.role.startswith("experts.") and module.layer is not None:
            found[module.layer].append(module)
    return found


def _by_role(plan: Draft) -> Mapping[int, Mapping[str, Module]]:
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
