"""Warnings about a finished plan: what is legal and often a mistake."""

from __future__ import annotations

import math
from collections import defaultdict

from policy_dsl.diagnostics import Diagnostic, Span, diagnostic
from policy_dsl.formats import Format
from policy_dsl.inventory import DTYPE_BITS
from policy_dsl.plan import Module, Plan, Refusal
from policy_dsl.planning.decisions import Decision
from policy_dsl.planning.fill import plain_of
from policy_dsl.planning.heads import head_findings
from policy_dsl.planning.left_out import rules_without_effect
from policy_dsl.planning.matching import is_guarded
from policy_dsl.quantities import both_units, counted
from policy_dsl.treatments import KEEP, Coded
from policy_dsl.vocabulary import OUTSIDE_LANGUAGE_MODEL, namesake


def plan_warnings(plan: Plan, made: tuple[Decision, ...], format: Format) -> list[Diagnostic]:
    """What a reviewer should know: forgotten matrices, quantized routers, outputs that grow."""
    return [
        *_unreached(plan, made),
        *_dropped(plan, made),
        *head_findings(plan),
        *rules_without_effect(plan, made, format),
        *(_router_warnings(plan) if _has_plain_routers(plan, made, format) else []),
        *_growth_warnings(plan),
        *_added(plan),
        *_not_added(plan, format),
        *_refused(plan, format),
    ]


def _span(plan: Plan, rule: int | None) -> Span | None:
    """Where the rule is written; None for what no rule decided."""
    return None if rule is None else plan.policy.rules[rule].span


def _unreached(plan: Plan, made: tuple[Decision, ...]) -> list[Diagnostic]:
    # Vision towers and tied heads that the format leaves out were not forgotten.
    left_out = {omission.tensor.name for omission in plan.omitted}
    missed = [
        one.tensor
        for one in made
        if one.rule is None
        and not is_guarded(one.tensor)
        and one.tensor.source.name not in left_out
    ]
    if not missed:
        return []
    roles = sorted({tensor.role for tensor in missed})
    places = dict(plan.policy.key_spans)
    # A stack is one module: its first source stands for all of them.
    names = {tensor.source.name for tensor in missed}
    size = sum(
        module.nbytes
        for module in plan.modules
        if module.decided_by is None
        and any(rows.tensor.name in names for rows in module.sources[:1])
    )
    return [
        diagnostic(
            "unreached-matrices",
            places.get("defaults.otherwise") or places.get("rules"),
            matrices=counted(len(missed), "matrix", "matrices"),
            roles=", ".join(roles),
            nbytes=both_units(size),
        )
    ]


def _dropped(plan: Plan, made: tuple[Decision, ...]) -> list[Diagnostic]:
    roles: dict[int | None, set[str]] = defaultdict(set)
    for one in made:
        tensor = one.tensor
        spare = tensor.component in OUTSIDE_LANGUAGE_MODEL
        spare = spare or (tensor.role == "lm_head" and plan.model.tied)
        if one.written.action == "drop" and not spare:
            roles[one.decided_by].add(tensor.role)
    return [
        diagnostic(
            "dropped-tensors", _span(plan, rule), roles=", ".join(sorted(found)), target=plan.target
        )
        for rule, found in roles.items()
    ]


def _has_plain_routers(plan: Plan, made: tuple[Decision, ...], format: Format) -> bool:
    """Whether readers of the format would take a router that is not quantized."""
    # Where they would not, quantizing it is no choice.
    routers = (one.tensor for one in made if one.tensor.namesake == "router")
    return all(
        format.review.held(router, plan.model, plain_of(KEEP, router, plan.model, format.spec))
        is None
        for router in routers
    )


def _router_warnings(plan: Plan) -> list[Diagnostic]:
    # One warning for each rule, where the author can act on it.
    rules: dict[int | None, int] = defaultdict(int)
    for module in plan.modules:
        if namesake(module.role) == "router" and isinstance(module.treatment, Coded):
            rules[module.decided_by] += 1
    return [
        diagnostic("router-quantized", _span(plan, rule), routers=counted(count, "router"))
        for rule, count in rules.items()
    ]


def _growth_warnings(plan: Plan) -> list[Diagnostic]:
    grown: dict[int | None, list[int]] = {}
    for module in plan.modules:
        # Experts that no source has are another warning, and no rule's doing.
        before, after = _source_nbytes(module), module.nbytes - _added_nbytes(module)
        # Scales of groups, for codes as wide as the source's values, are no waste of bits.
        if module.sources and after > before and _is_wider(module):
            totals = grown.setdefault(module.decided_by, [0, 0, 0])
            for index, value in enumerate((1, before, after)):
                totals[index] += value
    return [
        diagnostic(
            "larger-than-source",
            _span(plan, rule),
            outputs=counted(count, "output"),
            before=both_units(before),
            after=both_units(after),
        )
        for rule, (count, before, after) in grown.items()
    ]


def _added(plan: Plan) -> list[Diagnostic]:
    """The warning about experts that the bundle has and the source has not."""
    padded = [module for module in plan.modules if module.added]
    if not padded:
        return []
    size = sum(map(_added_nbytes, padded))
    return [
        diagnostic(
            "experts-added",
            dict(plan.policy.key_spans).get("output.pad_experts"),
            target=plan.target,
            experts=counted(plan.added_experts, "expert"),
            count=plan.model.n_experts,
            nbytes=both_units(size),
        )
    ]


def _not_added(plan: Plan, format: Format) -> list[Diagnostic]:
    """The warning that experts are wanted which the target does not add to such models."""
    family = plan.model.architecture.family
    # A target that adds none to any model does not use the setting, which is another finding.
    if (
        not plan.policy.output.pad_experts
        or not format.spec.padding
        or family in format.spec.padding
    ):
        return []
    span = dict(plan.policy.key_spans).get("output.pad_experts")
    return [diagnostic("experts-not-added", span, target=format.spec.name, family=family)]


def _refused(plan: Plan, format: Format) -> list[Diagnostic]:
    """Readers that cannot load the bundle: if it is all, or those that the author names."""
    spans = dict(plan.policy.key_spans)
    fatal = {one.reader: one.reason for one in reversed(plan.refusals) if _is_fatal(one)}
    if fatal and fatal.keys() == format.spec.runtimes.keys():
        reasons = dict.fromkeys(one.reason for one in plan.refusals if _is_fatal(one))
        return [
            diagnostic(
                "no-reader",
                notes=list(reasons)[1:],
                target=format.spec.name,
                readers=", ".join(format.spec.runtimes),
                model=plan.model.id,
                reason=next(iter(reasons)),
            )
        ]
    named = plan.policy.runtimes
    nobody = format.spec.runtimes.keys() <= {one.reader for one in plan.refusals}
    return [
        diagnostic(
            "runtime-cannot" if _is_fatal(one) and one.reader in named else "runtime-refuses",
            spans.get(f"runtimes.{one.reader}"),
            runtime=one.reader,
            reason=one.reason,
        )
        for one in plan.refusals
        if nobody or one.reader in named
    ]


def _is_fatal(refusal: Refusal) -> bool:
    return refusal.severity == "fatal"


def _added_nbytes(module: Module) -> int:
    """Bytes of the experts that no source has."""
    return module.nbytes * module.added // module.shape[0] if module.added else 0


def _is_wider(module: Module) -> bool:
    """Whether it has more bits for each value than the source."""
    bits = min(DTYPE_BITS.get(rows.tensor.dtype, 0) for rows in module.sources)
    if isinstance(module.treatment, Coded):
        return module.treatment.bits > bits
    return DTYPE_BITS[module.dtype] > bits


def _source_nbytes(module: Module) -> int:
    """Bytes of the source rows, and of their share of the FP8 scales."""
    total = 0.0
    for view in module.sources:
        share = math.prod(view.shape) / max(1, math.prod(view.tensor.shape))
        total += share * (view.tensor.nbytes + (view.scale.nbytes if view.scale else 0))
    return round(total)
