"""The closed word lists of the language: components, roles, schemes, targets, methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

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
# The schemes of every target: a policy may name one of a target that is not the one it is
# being resolved for.
SCHEMES: Mapping[str, tuple[str, ...]] = {
    "mlx_affine": ("affine", "mxfp4", "mxfp8", "nvfp4"),
    "jangtq_prestack": ("affine", "mxtq"),
    "hipfire_hfq": ("mq2", "mq3", "mq4", "mq6", "mq2-lloyd", "mq3-lloyd", "hfq4", "hfq6", "q8"),
    "gptq": ("int", "int-gidx", "int-v2", "int-v2-gidx"),
}


@dataclass(frozen=True, slots=True)
class Words:
    """What a policy may name beside roles: targets, schemes of their tensors, and methods."""

    targets: tuple[str, ...] = tuple(sorted(SCHEMES))
    schemes: tuple[str, ...] = tuple(dict.fromkeys(chain(*SCHEMES.values())))
    methods: tuple[str, ...] = ("rtn", "opt-rtn", "opt-rtn-0.12.2", "gptq", "lloyd", "awq")


WORDS = Words()


def namesake(role: str) -> str:
    """The role that an MTP block's role is like in the model: `router` of `mtp.router`.

    Any other role comes back as it is, and so do projections, which components share.
    """
    outside, _, word = role.partition(".")
    # Checkpoints call the head of an MTP block otherwise.
    word = "lm_head" if word == "head" else word
    return word if outside == "mtp" and word in SINGLE_ROLES else role
