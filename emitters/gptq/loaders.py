"""What readers that build a model of transformers' own classes cannot hold.

Source: transformers 5.23.0 with auto-round 0.16.1, with gptqmodel 7.7.0, and with optimum 2.3.0
and gptqmodel, all run on a CPU with bundles of tiny models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from emitters.gptq.module_rules import exact_rules
from emitters.gptq.schemes import STORAGE
from emitters.gptq.widths import AUTO_ROUND, GPTQ, default_width, dialect_of
from policy_dsl.plan import Draft, coded_modules
from policy_dsl.treatments import Coded
from policy_dsl.vocabulary import namesake

# Published names of experts are those of the classes in other families.
_RENAMED_EXPERTS = frozenset({"minimax_m2", "mixtral"})


def constraints(plan: Draft) -> Iterator[tuple[str, str]]:
    """The readers that cannot load the planned bundle, with every reason."""
    for constraint, runtimes in _CONSTRAINTS:
        reason = constraint(plan)
        yield from ((runtime, reason) for runtime in runtimes if reason is not None)


def _renamed_experts(plan: Draft) -> str | None:
    """Names are mapped for plain experts, as tensors of a stack."""
    family = plan.model.architecture.family
    if family not in _RENAMED_EXPERTS or not _packs(plan, "experts."):
        return None
    return (
        f"transformers' own class for {family} has other names for experts: packed ones are"
        " left out, mostly without an error, and experts stay random; load it with vLLM, or"
        " with modeling code that has experts as linears (trust_remote_code)"
    )


def _stacked_experts(plan: Draft) -> str | None:
    """auto-round and gptqmodel take stacks apart again, optimum does not."""
    renamed = plan.model.architecture.family in _RENAMED_EXPERTS
    if dialect_of(plan) != GPTQ or renamed or not _packs(plan, "experts."):
        return None
    return (
        "it stacks experts: in this dialect packed ones are left out without an error, and stay"
        " random; use dialect auto-round"
    )


def _own_blocks(plan: Draft) -> str | None:
    """In its own dialect gptqmodel replaces blocks with experts by classes of its own."""
    family = plan.model.architecture.family
    cure = "use dialect auto-round"
    if dialect_of(plan) != GPTQ:
        return None
    if family == "glm4_moe":
        return f"its class for blocks with experts of {family} fails on the first token; {cure}"
    if family == "qwen3_moe" and _packs(plan, "mlp."):
        return (
            "it knows no dense blocks beside those with experts: packed ones are left out"
            f" without an error, and stay random; keep mlp, or {cure}"
        )
    return None


def _one_width(plan: Draft) -> str | None:
    """optimum replaces every linear of the blocks, and knows no rules."""
    default = default_width(plan.modules)
    if dialect_of(plan) != GPTQ or default is None:
        return None
    rules = exact_rules(plan.modules, default)
    for module in plan.modules:
        role = namesake(module.role)
        packed_head = role == "lm_head" and isinstance(module.treatment, Coded)
        others = role not in ("lm_head", "router")
        if module.name in rules and (others or packed_head):
            told = "in this dialect it has one width for all linears of the blocks"
            return f"{told}, and {module.name} has another; use dialect auto-round"
    return None


def _group_numbers(plan: Draft) -> str | None:
    if dialect_of(plan) != GPTQ:
        return None
    for _, coded in coded_modules(plan.modules):
        if not STORAGE[coded.scheme].g_idx:
            return "in this dialect it needs the group of each column: use int-gidx"
    return None


def _asymmetric(plan: Draft) -> str | None:
    if dialect_of(plan) != AUTO_ROUND:
        return None
    for module, coded in coded_modules(plan.modules):
        if _is_first_version(coded) and not coded.symmetric:
            return f"AutoRound's own kernels read {module.name} only as int-v2, or sym"
    return None


def _asymmetric_default(plan: Draft) -> str | None:
    default = default_width(plan.modules)
    if dialect_of(plan) != GPTQ or default is None or default.symmetric:
        return None
    if any(_is_first_version(coded) for _, coded in coded_modules(plan.modules)):
        return "it trusts asymmetric groups of version 1 only to itself: use int-v2, or sym"
    return None


_CONSTRAINTS: tuple[tuple[Callable[[Draft], str | None], tuple[str, ...]], ...] = (
    (_renamed_experts, ("auto-round", "gptqmodel", "transformers")),
    (_asymmetric, ("auto-round", "transformers")),
    (_asymmetric_default, ("gptqmodel",)),
    (_stacked_experts, ("transformers",)),
    (_own_blocks, ("gptqmodel",)),
    (_one_width, ("transformers",)),
    (_group_numbers, ("transformers",)),
)


def _packs(plan: Draft, component: str) -> bool:
    return any(module.role.startswith(component) for module, _ in coded_modules(plan.modules))


def _is_first_version(coded: Coded) -> bool:
    return STORAGE[coded.scheme].version == "gptq"
