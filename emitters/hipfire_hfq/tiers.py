"""The published tiers of a file, and the scales that stand beside experts coded with AWQ.

Source: Kaden-Schutt/hipfire, MiniMax branch of the quantizer at 02786be, read.
"""

from __future__ import annotations

from collections.abc import Sequence

from emitters.hipfire_hfq.names import column_scale
from policy_dsl.inventory import tensor_nbytes
from policy_dsl.plan import Module, PlannedTensor, coded_modules
from policy_dsl.policy import Policy
from policy_dsl.treatments import Plain, scheme_of

AWQ = "awq"
DEFAULT_ALPHA = 0.55
EXACT, UPSTREAM = "exact", "upstream"
# Schemes of gate and up, and of down -> the ending of the file's name.
_TIERS = {
    ("mq4", "mq4"): "mq4",
    ("mq3-lloyd", "mq4"): "mq3-lloyd",
    ("mq3-lloyd", "mq3-lloyd"): "mq3",
    ("mq2-lloyd", "mq4"): "mq2-lloyd",
    ("mq2-lloyd", "mq3-lloyd"): "mq2",
}


def container(policy: Policy, modules: Sequence[Module]) -> str:
    """The file's name: `model`, with the tier that these modules are, else `.hfq`."""
    inner = _schemes(modules, ("experts.gate_proj", "experts.up_proj"))
    down = _schemes(modules, ("experts.down_proj",))
    tiers = {_TIERS.get((one, other), "hfq") for one in inner for other in down}
    return f"model.{tiers.pop() if len(tiers) == 1 else 'hfq'}"


def added_scales(modules: Sequence[Module]) -> tuple[Module, ...]:
    """The scale of every layer whose gate and up are coded with AWQ; its bytes come later."""
    found: dict[str, Module] = {}
    for module, coded in coded_modules(modules):
        name = column_scale(module.name)
        if name is not None and coded.method == AWQ and name not in found:
            found[name] = _scale(name, module)
    return tuple(found.values())


def alpha_of(policy: Policy) -> float:
    """The exponent of the scales."""
    alpha = policy.calibration.awq_alpha
    return DEFAULT_ALPHA if alpha is None else alpha


def scales_of(policy: Policy) -> str:
    """Whether weights are scaled by what is stored, or, as upstream does, by what it rounds."""
    return policy.calibration.awq_scales or EXACT


def remarks(policy: Policy, modules: Sequence[Module]) -> tuple[tuple[str, str], ...]:
    """What a plan says about AWQ, if it is used."""
    if not any(coded.method == AWQ for _, coded in coded_modules(modules)):
        return ()
    how = {
        EXACT: "by the float16 values that are stored (exact)",
        UPSTREAM: "before they are rounded to what is stored (upstream)",
    }[scales_of(policy)]
    return (("awq", f"alpha {alpha_of(policy):g}, gate and up share a scale, applied {how}"),)


def _schemes(modules: Sequence[Module], roles: tuple[str, ...]) -> set[str]:
    return {scheme_of(module.treatment) for module in modules if module.role in roles}


def _scale(name: str, scaled: Module) -> Module:
    shape = scaled.shape[-1:]
    nbytes = tensor_nbytes("F16", shape)
    tensor = PlannedTensor(f"{name}.weight", "weight", "F16", shape, nbytes, "", 0)
    return Module(
        name=name,
        role="awq_scale",
        layer=scaled.layer,
        treatment=Plain("F16"),
        shape=shape,
        dtype="F16",
        sources=(),
        tensors=(tensor,),
        parameters=0,
        decided_by=scaled.decided_by,
        written="keep",
    )
