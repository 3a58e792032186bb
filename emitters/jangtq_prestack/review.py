"""What JANG's readers cannot load, or load wrongly: a table of constraints on a plan.

Source: jang 2.5.50 (`load_jangtq`, runs on a CPU), osaurus-ai/vmlx-swift at b298324c and
`jang-runtime` of FiditeNemini/jangq at bce65d4d (read).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from emitters.checkpoints import QKV, at_layers, by_layer, omission
from emitters.jangtq_prestack.spec import MXTQ, NAME, READER, projection_of
from policy_dsl.formats import Review
from policy_dsl.plan import Draft, Module, Refusal
from policy_dsl.reader_config import refused
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.treatments import Coded, Plain, Stored

_LANGUAGE_ONLY = "jang's loader of these families builds the language model only"
_LEFT_OUT = {
    "lm_head": "readers use",
    "vision": _LANGUAGE_ONLY,
    "audio": _LANGUAGE_ONLY,
    "mtp": "jang's loader has no multi-token prediction for these families",
}
# Of fewer values, jang's codebooks differ from machine to machine.
_SHORTEST_ROW = 4
_GATE, _UP, _DOWN = "experts.gate_proj", "experts.up_proj", "experts.down_proj"


def _left_out(tensor: ModelTensor, model: Model) -> str | None:
    return omission(tensor, model, _LEFT_OUT)


def _held(tensor: ModelTensor, model: Model, stored: Stored) -> str | None:
    if isinstance(stored, Plain):
        return None
    if stored.scheme == MXTQ:
        # Nothing in a bundle gives the length of other rows, which may end inside a word.
        if tensor.component != "experts":
            return "Swift readers know such codes of routed experts only"
        if tensor.shape[-1] < _SHORTEST_ROW:
            return f"rows of fewer than {_SHORTEST_ROW} values have no codebook"
    table = model.architecture
    if tensor.namesake in table.mlx.get("bare", ()):
        return f"readers hold the {tensor.namesake} of {table.family} as a bare parameter"
    return None


def _bundle(draft: Draft) -> Iterator[Refusal]:
    for runtime, constraint in _CONSTRAINTS:
        if (reason := constraint(draft)) is not None:
            yield Refusal("", runtime, reason)
    yield from refused(draft, READER, "jang")


REVIEW = Review(left_out=_left_out, held=_held, bundle=_bundle)


def _fused_gate_up(draft: Draft) -> str | None:
    """Gate and up run in one kernel, which takes the width of gate for both."""
    layers = by_layer(draft.modules).items()
    uneven = [
        at for at, roles in layers if len({_width(roles, r) for r in (_GATE, _UP)} - {0}) == 2
    ]
    return at_layers("mxtq gate and up of different widths are decoded wrongly", uneven)


def _down_beside_codes(draft: Draft) -> str | None:
    layers = by_layer(draft.modules).items()
    lacking = [
        at
        for at, roles in layers
        if _width(roles, _GATE) and _width(roles, _UP) and not _width(roles, _DOWN)
    ]
    return at_layers("where gate and up are mxtq, down must be mxtq too", lacking)


def _fused_qkv(draft: Draft) -> str | None:
    """Equal q, k and v are joined to one projection, and norms and biases after it are lost."""
    if not draft.model.architecture.facts(NAME).get("skips_qk_norms"):
        return None
    layers = [
        layer
        for layer, treatments in _qkv(draft).items()
        if len(treatments) == 1 and all(isinstance(one, Coded) for one in treatments)
    ]
    reason = "it joins q, k and v of equal widths and then skips their norms and biases"
    return at_layers(reason, layers)


def _router_groups(draft: Draft) -> str | None:
    layers = [
        module.layer
        for module in draft.modules
        if module.role == "router" and _group(module) not in (1, 64)
    ]
    return at_layers("it reads quantized routers in groups of 64", layers)


def _split_heads(draft: Draft) -> str | None:
    """Latent attention is split by heads on loading, and quantized again."""
    head = draft.model.config.get("qk_nope_head_dim")
    layers = [
        module.layer
        for module in draft.modules
        if module.role == "attention.kv_b_proj" and isinstance(head, int) and head % _group(module)
    ]
    reason = f"kv_b_proj is split by heads of {head} values, which its groups cross"
    return at_layers(reason, layers)


def _one_width_each(draft: Draft) -> str | None:
    kinds: dict[str, set[Stored]] = defaultdict(set)
    for module in draft.modules:
        name = projection_of(module.name)
        if name:
            kinds["down" if name == "down_proj" else "gate and up"].add(module.treatment)
    for called, treatments in sorted(kinds.items()):
        if not all(isinstance(one, Coded) and one.scheme == MXTQ for one in treatments):
            return f"it takes experts only as mxtq, and {called} is not in every layer"
        if len(treatments) > 1:
            return f"it takes one width for {called} in the whole model"
    return None


def _equal_qkv(draft: Draft) -> str | None:
    layers = [layer for layer, treatments in _qkv(draft).items() if len(treatments) > 1]
    return at_layers("q, k and v of one layer must have one width", layers)


def _no_float32(draft: Draft) -> str | None:
    plain = (module for module in draft.modules if module.treatment == Plain("F32"))
    first = next(plain, None)
    return f"it ignores float32 tensors such as {first.name}" if first else None


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


def _qkv(draft: Draft) -> Mapping[int, set[Stored]]:
    """Layer -> how its q, k and v are stored."""
    layers = by_layer(draft.modules).items()
    return {at: {roles[role].treatment for role in QKV if role in roles} for at, roles in layers}


def _group(module: Module) -> int:
    """Values that share a scale; 1 if it is not in groups."""
    return module.treatment.group_size or 1 if isinstance(module.treatment, Coded) else 1


def _width(roles: Mapping[str, Module], role: str) -> int:
    """The width of the mxtq codes of a role; 0 if it has no such codes."""
    stored = roles[role].treatment if role in roles else None
    return stored.bits if isinstance(stored, Coded) and stored.scheme == MXTQ else 0
