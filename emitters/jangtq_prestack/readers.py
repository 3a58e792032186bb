"""What JANG's readers cannot load, or load wrongly: a table of constraints on a plan.

Source: jang 2.5.50 (`load_jangtq`, runs on a CPU), osaurus-ai/vmlx-swift at b298324c and
`jang-runtime` of FiditeNemini/jangq at bce65d4d (read).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

from emitters.jangtq_prestack.names import MXTQ, SHORTEST_ROW, omission, projection_of
from policy_dsl.formats import Review
from policy_dsl.plan import Draft, Module, Refusal, coded_modules
from policy_dsl.reader_config import refused
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.treatments import Coded, Plain, Stored, scheme_of

# jang's loader builds the classes of mlx-lm.
READER = "mlx_lm"
RUNTIMES: Mapping[str, str] = {
    "jang": "jang_tools, Python with MLX on Apple silicon",
    "vmlx-swift": "vMLX-Swift, also inside Osaurus",
    "jang-runtime": "the older Swift reader",
}
# Routers that mlx-lm holds as a bare parameter: no quantized form exists.
_BARE_ROUTERS = frozenset({"glm4_moe", "deepseek_v3", "kimi_k2"})
# Families whose q and k are normalized between projection and attention.
_QK_NORM = frozenset({"qwen3_moe", "glm4_moe"})
_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")

_Layers = Mapping[int, Mapping[str, Module]]


def unsupported(tensor: ModelTensor, model: Model, treatment: Stored) -> str | None:
    """Why readers cannot hold a tensor like that, else None."""
    family, quantized = model.architecture.family, isinstance(treatment, Coded)
    if scheme_of(treatment) == MXTQ:
        # Nothing in a bundle tells the length of other rows, which may end inside a word.
        if tensor.component != "experts":
            return "Swift readers know such codes of routed experts only"
        if tensor.shape[-1] < SHORTEST_ROW:
            return f"rows of fewer than {SHORTEST_ROW} values have no codebook"
    if quantized and tensor.namesake == "router" and family in _BARE_ROUTERS:
        return f"readers hold the router of {family} as a bare parameter"
    return None


def _bundle(plan: Draft) -> Iterator[Refusal]:
    """The readers that cannot load the planned bundle, with every reason."""
    for runtime, constraint in _CONSTRAINTS:
        if (reason := constraint(plan)) is not None:
            yield Refusal("", runtime, reason)
    yield from refused(plan, READER, "jang")


REVIEW = Review(left_out=omission, held=unsupported, bundle=_bundle)


def _fused_gate_up(plan: Draft) -> str | None:
    """Gate and up run in one kernel, which takes the width of gate for both."""
    layers = [
        layer
        for layer, roles in _by_layer(plan).items()
        if len({_width(roles, name) for name in ("gate_proj", "up_proj")} - {None}) == 2
    ]
    return _at("mxtq gate and up of different widths are decoded wrongly", layers)


def _down_beside_codes(plan: Draft) -> str | None:
    layers = []
    for layer, roles in _by_layer(plan).items():
        coded = [_width(roles, name) is not None for name in ("gate_proj", "up_proj")]
        if all(coded) and _width(roles, "down_proj") is None:
            layers.append(layer)
    return _at("where gate and up are mxtq, down must be mxtq too", layers)


def _fused_qkv(plan: Draft) -> str | None:
    """Equal q, k and v are joined to one projection, and norms and biases after it are lost."""
    if plan.model.architecture.family not in _QK_NORM:
        return None
    layers = []
    for layer, roles in _by_role(plan).items():
        treatments = {roles[role].treatment for role in _QKV if role in roles}
        if len(treatments) == 1 and isinstance(next(iter(treatments)), Coded):
            layers.append(layer)
    reason = "it joins q, k and v of equal widths and then skips their norms and biases"
    return _at(reason, layers)


def _router_groups(plan: Draft) -> str | None:
    layers = [
        module.layer
        for module, coded in coded_modules(plan.modules)
        if module.role == "router" and coded.group_size not in (0, 64)
    ]
    return _at("it reads quantized routers in groups of 64", layers)


def _split_heads(plan: Draft) -> str | None:
    """Latent attention is split by heads on loading, and quantized again."""
    head = plan.model.config.get("qk_nope_head_dim")
    layers = [
        module.layer
        for module, coded in coded_modules(plan.modules)
        if module.role == "attention.kv_b_proj"
        and isinstance(head, int)
        and head % (coded.group_size or 1)
    ]
    return _at(f"kv_b_proj is split by heads of {head} values, which its groups cross", layers)


def _one_width_each(plan: Draft) -> str | None:
    found: dict[str, set[Stored]] = defaultdict(set)
    for module in plan.modules:
        name = projection_of(module.name)
        if name:
            found["down" if name == "down_proj" else "gate and up"].add(module.treatment)
    for called, treatments in sorted(found.items()):
        if any(scheme_of(treatment) != MXTQ for treatment in treatments):
            return f"it takes experts only as mxtq, and {called} is not in every layer"
        if len(treatments) > 1:
            return f"it takes one width for {called} in the whole model"
    return None


def _equal_qkv(plan: Draft) -> str | None:
    layers = [
        layer
        for layer, roles in _by_role(plan).items()
        if len({roles[role].treatment for role in _QKV if role in roles}) > 1
    ]
    return _at("q, k and v of one layer must have one width", layers)


def _no_float32(plan: Draft) -> str | None:
    names = [module.name for module in plan.modules if _is_plain(module, "F32")]
    return f"it ignores float32 tensors such as {names[0]}" if names else None


_CONSTRAINTS: tuple[tuple[str, Callable[[Draft], str | None]], ...] = (
    ("jang", _fused_gate_up),
    ("jang", _down_beside_codes),
    ("jang", _fused_qkv),
    ("jang", _router_groups),
    ("jang", _split_heads),
    ("vmlx-swift", _one_width_each),
    ("vmlx-swift", _equal_qkv),
    ("jang-runtime", _no_float32),
)


def _is_plain(module: Module, dtype: str) -> bool:
    return module.treatment == Plain(dtype)


def _by_layer(plan: Draft) -> _Layers:
    """Layer -> projection -> the module of its experts, of the first where they lie apart."""
    found: dict[int, dict[str, Module]] = defaultdict(dict)
    for module in plan.modules:
        name = projection_of(module.name)
        if name and module.layer is not None:
            found[module.layer].setdefault(name, module)
    return found


def _by_role(plan: Draft) -> _Layers:
    found: dict[int, dict[str, Module]] = defaultdict(dict)
    for module in plan.modules:
        if module.role in _QKV and module.layer is not None:
            found[module.layer][module.role] = module
    return found


def _width(roles: Mapping[str, Module], name: str) -> int | None:
    """The width of the mxtq codes of a projection; None if it has no such codes."""
    coded = roles[name].treatment if name in roles else None
    return coded.bits if isinstance(coded, Coded) and coded.scheme == MXTQ else None


def _at(reason: str, layers: Iterable[int | None]) -> str | None:
    """The reason with the layers that give it; None if there is no layer."""
    known = sorted(layer for layer in layers if layer is not None)
    if not known:
        return None
    more = f" and {len(known) - 1} more" if len(known) > 1 else ""
    return f"{reason} (layer {known[0]}{more})"
