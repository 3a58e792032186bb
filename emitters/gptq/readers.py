"""What readers of packed checkpoints cannot load, or load wrongly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from emitters.gptq import loaders, vllm
from emitters.gptq.schemes import SEARCHES, STORAGE
from emitters.gptq.widths import AUTO_ROUND, GPTQ
from policy_dsl.formats import MetadataValues
from policy_dsl.plan import Module, Plan, Refusal, coded_modules
from policy_dsl.reader_config import refused
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.treatments import Coded, Stored

RUNTIMES: Mapping[str, str] = {
    "vllm": "server on NVIDIA GPUs",
    "auto-round": "AutoRound's layers in transformers, any device",
    "gptqmodel": "Python, any device",
    "transformers": "with auto-round, or with optimum and gptqmodel, by dialect",
}
# Whose tables say what config.json must have -> the readers that read it so.
READERS: Mapping[str, tuple[str, ...]] = {
    "transformers": ("transformers", "auto-round", "gptqmodel", "vllm"),
    "vllm": ("vllm",),
}
METADATA_KEYS: Mapping[str, MetadataValues] = {"dialect": (AUTO_ROUND, GPTQ)}

# A word of codes, along either axis, begins with every 32nd value.
_STEP = 32
_NOT_LINEAR = {
    "embed": "no reader looks rows up in packed words",
    "router": "no reader packs routers: they choose experts, and stay in 16 bits or more",
    "shared_expert_gate": "no reader packs gates of shared experts",
}


def unsupported(tensor: ModelTensor, model: Model, treatment: Stored) -> str | None:
    """Why no reader can hold a matrix packed like that, else None."""
    if not isinstance(treatment, Coded):
        return None
    if tensor.namesake in _NOT_LINEAR:
        return _NOT_LINEAR[tensor.namesake]
    if treatment.method in SEARCHES and not treatment.symmetric:
        return "AutoRound searches no scales for asymmetric groups: use rtn, or sym"
    uneven = [size for size in tensor.shape if size % _STEP]
    if tensor.is_matrix and uneven:
        return f"words hold {_STEP} values along either axis, and {uneven[0]} is no multiple"
    return None


def conflicts(modules: Sequence[Module]) -> list[str]:
    """What quantized modules must share, because it is told once for the whole bundle."""
    found: dict[str, str] = {}
    for _, coded in coded_modules(modules):
        found.setdefault(STORAGE[coded.scheme].version, coded.scheme)
    if len(found) < 2:
        return []
    schemes = " and ".join(sorted(found.values()))
    return [f"zero points are of one version in a whole bundle, and {schemes} are of two"]


def refusals(plan: Plan) -> tuple[Refusal, ...]:
    """The readers that cannot load the planned bundle, with every reason."""
    return (
        *(Refusal("vllm", reason, fatal=True) for reason in vllm.constraints(plan)),
        *(Refusal(runtime, reason) for runtime, reason in loaders.constraints(plan)),
        *(
            refusal
            for reader, runtimes in READERS.items()
            for runtime in runtimes
            for refusal in refused(plan, reader, runtime)
        ),
    )
