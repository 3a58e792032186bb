"""The closed word lists of the language: components, roles, schemes, targets, methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Components whose blocks never count as layers and that a bare projection does not reach.
OUTSIDE_LANGUAGE_MODEL = frozenset({"vision", "audio", "mtp"})
COMPONENTS = frozenset(
    {"experts", "shared_experts", "mlp", "attention", "linear_attention"} | OUTSIDE_LANGUAGE_MODEL
)
SINGLE_ROLES = frozenset(
    (
        *("router", "router_bias", "shared_expert_gate", "norm", "embed", "lm_head"),
        *("bias", "sinks", "conv", "ssm"),
    )
)

# Roles of MTP blocks that checkpoints call otherwise than their namesakes in the model.
_NAMESAKES: Mapping[str, str] = {"head": "lm_head"}

# Every scheme word and the targets that store it: a policy may name a scheme of a target
# that is not the one it is being resolved for.
SCHEME_TARGETS: Mapping[str, tuple[str, ...]] = {
    "affine": ("mlx_affine", "jangtq_prestack"),
    "mxfp4": ("mlx_affine",),
    "mxfp8": ("mlx_affine",),
    "nvfp4": ("mlx_affine",),
    "mxtq": ("jangtq_prestack",),
    "mq2": ("hipfire_hfq",),
    "mq3": ("hipfire_hfq",),
    "mq4": ("hipfire_hfq",),
    "mq6": ("hipfire_hfq",),
    "mq2-lloyd": ("hipfire_hfq",),
    "mq3-lloyd": ("hipfire_hfq",),
    "hfq4": ("hipfire_hfq",),
    "hfq6": ("hipfire_hfq",),
    "q8": ("hipfire_hfq",),
    "int": ("gptq",),
    "int-gidx": ("gptq",),
    "int-v2": ("gptq",),
    "int-v2-gidx": ("gptq",),
}
TARGETS = tuple(sorted({target for homes in SCHEME_TARGETS.values() for target in homes}))
METHODS = ("rtn", "opt-rtn", "opt-rtn-0.12.2", "gptq", "lloyd", "awq")


@dataclass(frozen=True, slots=True)
class Words:
    """What a policy may name beside roles: targets, schemes of their tensors, and methods."""

    targets: tuple[str, ...] = TARGETS
    schemes: tuple[str, ...] = tuple(SCHEME_TARGETS)
    methods: tuple[str, ...] = METHODS


WORDS = Words()


def namesake(role: str) -> str:
    """The role that an MTP block's role is like in the model: `router` of `mtp.router`.

    Any other role comes back as it is, and so do projections, which components share.
    """
    if not role.startswith("mtp."):
        return role
    word = role.removeprefix("mtp.")
    word = _NAMESAKES.get(word, word)
    return word if word in SINGLE_ROLES else role
