"""What hipfire's loaders trust without a check, and what its kernels cannot run.

Source: Kaden-Schutt/hipfire, crates/hipfire-arch-minimax at 05674fe, read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from emitters.checkpoints import at_layers, omission
from emitters.hipfire_hfq.container import READER
from emitters.hipfire_hfq.spec import AWQ, DOWN, GATE_UP, SPEC
from policy_dsl.formats import Review
from policy_dsl.plan import Draft, Refusal
from policy_dsl.reader_config import refused
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.treatments import Coded, Plain, Stored, scheme_of

_LANGUAGE_ONLY = "hipfire's loaders of these families read the language model only"
_LEFT_OUT = {
    "lm_head": "loaders use",
    "vision": _LANGUAGE_ONLY,
    "audio": _LANGUAGE_ONLY,
    "mtp": "hipfire's loaders skip multi-token prediction",
}
# Kernels of these are written for so many experts a token, and no other number.
_FIXED, _TOP_K = ("mq4", "mq6"), 8
_GROUP = 256


def _left_out(tensor: ModelTensor, model: Model) -> str | None:
    return omission(tensor, model, _LEFT_OUT)


def _held(tensor: ModelTensor, model: Model, stored: Stored) -> str | None:
    facts = model.architecture.facts(SPEC.name)
    is_awq = isinstance(stored, Coded) and stored.method == AWQ
    if is_awq and tensor.role not in facts.get(AWQ, ()):
        return "it knows AWQ for gate and up of MiniMax-M2's experts only"
    for only in facts.get("only", ()):
        if tensor.namesake in only["roles"] and scheme_of(stored) not in only["schemes"]:
            return str(only["reason"])
    if tensor.is_matrix and stored == Plain("F32"):
        return "its loaders refuse float32 matrices"
    return None


def _bundle(draft: Draft) -> Iterator[Refusal]:
    layers: dict[int | None, set[Stored]] = defaultdict(set)
    for module in draft.modules:
        if module.role in GATE_UP:
            layers[module.layer].add(module.treatment)
    uneven = [layer or 0 for layer, treatments in layers.items() if len(treatments) > 1]
    reason = at_layers("gate and up of a layer must be stored alike", uneven)
    if reason is not None:
        yield Refusal("", "", reason, "error")
    routed = draft.model.config.get("num_experts_per_tok")
    experts = (module for module in draft.modules if module.role in (*GATE_UP, DOWN))
    schemes = {scheme_of(module.treatment) for module in experts}
    fixed = [scheme for scheme in _FIXED if scheme in schemes]
    if fixed and routed != _TOP_K:
        reason = f"its {fixed[0]} kernels route to {_TOP_K} experts, this model to {routed}"
        yield Refusal("", READER, reason)
    crossing = next((module for module in draft.modules if module.together > 1), None)
    if crossing is not None:
        reason = f"rows of {crossing.name} are not whole blocks of {_GROUP} values"
        yield Refusal("", READER, reason)
    yield from refused(draft, READER, READER)


REVIEW = Review(left_out=_left_out, held=_held, bundle=_bundle)
