"""What readers of packed checkpoints cannot load, or load wrongly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from emitters.gptq import loaders, vllm
from emitters.gptq.names import omission
from emitters.gptq.schemes import SEARCHES, STORAGE
from emitters.gptq.widths import AUTO_ROUND, GPTQ
from policy_dsl.formats import MetadataValues, Review
from policy_dsl.plan import Draft, Refusal, coded_modules
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


def _bundle(draft: Draft) -> Iterator[Refusal]:
    """The readers that cannot load the planned bundle, with every reason."""
    found: dict[str, str] = {}
    for _, coded in coded_modules(draft.modules):
        found.setdefault(STORAGE[coded.scheme].version, coded.scheme)
    if len(found) > 1:
        schemes = " and ".join(sorted(found.values()))
        reason = f"zero points are of one version in a whole bundle, and {schemes} are of two"
        yield Refusal("", "", reason, "error")
    for reason in vllm.constraints(draft):
        yield Refusal("", "vllm", reason, "fatal")
    for runtime, reason in loaders.constraints(draft):
        yield Refusal("", runtime, reason)
    for reader, runtimes in READERS.items():
        for runtime in runtimes:
            yield from refused(draft, reader, runtime)


REVIEW = Review(left_out=omission, held=unsupported, bundle=_bundle)
