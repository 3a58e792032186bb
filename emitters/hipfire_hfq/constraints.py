"""What hipfire's loaders trust without a check, and what its kernels cannot run.

Source: Kaden-Schutt/hipfire, crates/hipfire-arch-minimax at 05674fe, read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from emitters.hipfire_hfq.names import omission
from policy_dsl.formats import Review
from policy_dsl.plan import Draft, Refusal
from policy_dsl.reader_config import refused
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.treatments import Coded, Plain, Stored, scheme_of

READER = "hipfire"
RUNTIMES: Mapping[str, str] = {"hipfire": "Rust and HIP, AMD GPUs"}

_GATE_UP = ("experts.gate_proj", "experts.up_proj")
_EXPERTS = (*_GATE_UP, "experts.down_proj")
_KERNELS = ("mq4", "mq6", "mq3-lloyd", "mq2-lloyd")
# Kernels of these are written for so many experts a token, and no other number.
_FIXED, _TOP_K = ("mq4", "mq6"), 8
_GROUP = 256
# What the MiniMax loader takes, by role; it reads other codes as if they were these.
_MINIMAX: Mapping[str, tuple[tuple[str, ...], str]] = {
    "embed": (("q8",), "its loader looks rows up as q8, whatever they are"),
    "router": (("q8",), "its loader computes garbage from routers that are not q8"),
    **dict.fromkeys(_EXPERTS, (_KERNELS, f"its kernels for experts are {', '.join(_KERNELS)}")),
}


def unsupported(tensor: ModelTensor, model: Model, treatment: Stored) -> str | None:
    """Why loaders cannot take a tensor stored like that, else None."""
    minimax = model.architecture.family == "minimax_m2"
    is_awq = isinstance(treatment, Coded) and treatment.method == "awq"
    if is_awq and not (minimax and tensor.role in _GATE_UP):
        return "it knows AWQ for gate and up of MiniMax-M2's experts only"
    allowed, reason = _MINIMAX.get(tensor.namesake, ((), "")) if minimax else ((), "")
    if allowed and scheme_of(treatment) not in allowed:
        return reason
    if tensor.is_matrix and treatment == Plain("F32"):
        return "its loaders refuse float32 matrices"
    return None


def _bundle(draft: Draft) -> Iterator[Refusal]:
    """What does not load, or loads and then does not run."""
    layers: dict[int | None, set[Stored]] = defaultdict(set)
    for module in draft.modules:
        if module.role in _GATE_UP:
            layers[module.layer].add(module.treatment)
    found = sorted(layer or 0 for layer, treatments in layers.items() if len(treatments) > 1)
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        reason = f"gate and up of a layer must be stored alike (layer {found[0]}{more})"
        yield Refusal("", "", reason, "error")
    routed = draft.model.config.get("num_experts_per_tok")
    schemes = {scheme_of(one.treatment) for one in draft.modules if one.role in _EXPERTS}
    fixed = [scheme for scheme in _FIXED if scheme in schemes]
    if fixed and routed != _TOP_K:
        reason = f"its {fixed[0]} kernels route to {_TOP_K} experts, this model to {routed}"
        yield Refusal("", "hipfire", reason)
    crossing = [module.name for module in draft.modules if module.together > 1]
    if crossing:
        reason = f"rows of {crossing[0]} are not whole blocks of {_GROUP} values"
        yield Refusal("", "hipfire", reason)
    yield from refused(draft, READER, "hipfire")


REVIEW = Review(left_out=omission, held=unsupported, bundle=_bundle)
