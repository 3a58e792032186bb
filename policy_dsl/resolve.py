"""Policy x Inventory x FormatSpecs -> Plan. Pure and total: a Plan, or every defect at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from policy_dsl.decisions import OTHERWISE, Decision, decide
from policy_dsl.diagnostics import Diagnostic, PolicyError, Span, diagnostic, did_you_mean, errors, fail
from policy_dsl.formats import FormatSpec
from policy_dsl.inventory import Inventory, source_digest
from policy_dsl.layout import lay_out
from policy_dsl.lowering import Lowered, lower
from policy_dsl.matching import is_guarded
from policy_dsl.plan import Module, Plan, PlannedFile
from policy_dsl.policy import Policy
from policy_dsl.print_policy import policy_digest
from policy_dsl.roles import Model, classify
from policy_dsl.units import parse_nbytes
from policy_dsl.vocabulary import TARGETS


def resolve(
    policy: Policy,
    inventory: Inventory,
    specs: Mapping[str, FormatSpec],
    *,
    target: str | None = None,
) -> Plan:
    """The plan of a policy for a checkpoint; `target` overrides the policy's own.

    Raises: PolicyError with every defect of the policy for this model and target.
    """
    spec = specs[choose_target(policy, specs, target)]
    model = classify(inventory)
    _check_target(policy, model, spec)
    decisions = decide(policy, model, spec.name)
    lowered = lower(decisions.made, model, policy.defaults, spec)
    findings = [*decisions.findings, *lowered.findings]
    if errors(findings):
        raise PolicyError(findings)
    modules, files = _place(lowered, policy, spec)
    plan = Plan(
        policy=policy,
        policy_digest=policy_digest(policy),
        target=spec.name,
        model=model,
        source_digest=source_digest(inventory),
        source_nbytes=inventory.nbytes,
        modules=modules,
        omitted=tuple(lowered.omitted),
        files=files,
        fp8_rule=policy.fp8_dequant or spec.fp8_rules[0],
    )
    findings += _warnings(plan, decisions.made)
    if spec.review is not None:
        findings += spec.review(plan)
    if errors(findings):
        raise PolicyError(findings)
    return replace(plan, findings=tuple(findings))


def choose_target(
    policy: Policy, specs: Mapping[str, FormatSpec], target: str | None = None
) -> str:
    """The target to plan for: the one asked for, else the policy's only one.

    Raises: PolicyError if there is none, more than one, or an unknown one.
    """
    span = dict(policy.key_spans).get("target")
    if target is None and len(policy.targets) != 1:
        choices = policy.targets or tuple(specs)
        raise fail("no-target", span, policy=policy.name, choices=", ".join(choices))
    chosen = target or policy.targets[0]
    if chosen in specs:
        return chosen
    code = "unavailable-target" if chosen in TARGETS else "unknown-target"
    raise fail(
        code, span, suggestion=did_you_mean(chosen, specs), target=chosen, known=", ".join(specs)
    )


def _check_target(policy: Policy, model: Model, spec: FormatSpec) -> None:
    family = model.architecture.family
    spans = dict(policy.key_spans)
    found: list[Diagnostic] = []
    reason = spec.families.get(family, "its tensor names in this format are not known")
    if reason is not None:
        found.append(
            diagnostic("unsupported-family", target=spec.name, family=family, reason=reason)
        )
    if policy.fp8_dequant is not None and policy.fp8_dequant not in spec.fp8_rules:
        rules = ", ".join(spec.fp8_rules)
        found.append(
            diagnostic(
                "unknown-fp8-rule", spans.get("fp8_dequant"), rule=policy.fp8_dequant, rules=rules
            )
        )
    found += _transform_findings(policy, model, spec, spans.get("transforms"))
    if found:
        raise PolicyError(found)


def _transform_findings(
    policy: Policy, model: Model, spec: FormatSpec, span: Span | None
) -> list[Diagnostic]:
    found = []
    for prune in policy.transforms:
        if not 1 <= prune.to <= model.n_experts:
            found.append(diagnostic("prune-count", span, to=prune.to, count=model.n_experts))
        else:
            found.append(
                diagnostic("unsupported-transform", span, target=spec.name, transform="prune experts")
            )
    return found


def _place(
    lowered: Lowered, policy: Policy, spec: FormatSpec
) -> tuple[tuple[Module, ...], tuple[PlannedFile, ...]]:
    limit = parse_nbytes(policy.output.shard_size) if policy.output.shard_size else None
    layout = lay_out(
        [tensor for module in lowered.modules for tensor in module.tensors],
        shard_nbytes=limit or spec.shard_nbytes,
        shard_name=spec.shard_name,
        metadata=spec.header_metadata,
    )
    modules = []
    for module in lowered.modules:
        placed = tuple(
            replace(tensor, file=layout.places[tensor.name].file, start=layout.places[tensor.name].start)
            for tensor in module.tensors
        )
        modules.append(replace(module, tensors=placed))
    files = [PlannedFile(name, "tensors", size) for name, size in layout.file_nbytes.items()]
    return tuple(modules), tuple(files)


def _warnings(plan: Plan, made: tuple[Decision, ...]) -> list[Diagnostic]:
    spans = {one.origin: one.rule.rule.span for one in made if one.rule}
    return [
        *_unreached(plan, made),
        *_router_warnings(plan, spans),
        *_growth_warnings(plan, spans),
    ]


def _unreached(plan: Plan, made: tuple[Decision, ...]) -> list[Diagnostic]:
    left_out = {omission.tensor.name for omission in plan.omitted}
    missed = [
        one.tensor
        for one in made
        if one.rule is None and not is_guarded(one.tensor) and one.tensor.source.name not in left_out
    ]
    if not missed:
        return []
    roles = sorted({tensor.role for tensor in missed})
    names = {tensor.source.name for tensor in missed}
    size = sum(
        module.nbytes
        for module in plan.modules
        if module.rule == OTHERWISE and module.sources[0].tensor.name in names
    )
    return [
        diagnostic(
            "unreached-matrices",
            dict(plan.policy.key_spans).get("rules"),
            count=len(missed),
            roles=", ".join(roles),
            nbytes=f"{size / 1e9:.2f} GB",
        )
    ]


def _router_warnings(plan: Plan, spans: Mapping[str, Span | None]) -> list[Diagnostic]:
    rules: dict[str, int] = defaultdict(int)
    for module in plan.modules:
        if module.role == "router" and module.treatment.action == "quantize":
            rules[module.rule] += 1
    return [
        diagnostic("router-quantized", spans.get(rule), count=count) for rule, count in rules.items()
    ]


def _growth_warnings(plan: Plan, spans: Mapping[str, Span | None]) -> list[Diagnostic]:
    grown: dict[str, list[int]] = {}
    for module in plan.modules:
        before = sum(_source_nbytes(module))
        if module.nbytes > before:
            totals = grown.setdefault(module.rule, [0, 0, 0])
            for index, value in enumerate((1, before, module.nbytes)):
                totals[index] += value
    return [
        diagnostic(
            "larger-than-source",
            spans.get(rule),
            count=count,
            before=f"{before / 1e9:.3f} GB",
            after=f"{after / 1e9:.3f} GB",
        )
        for rule, (count, before, after) in grown.items()
    ]


def _source_nbytes(module: Module) -> list[float]:
    """Bytes of the source rows, and of their share of the FP8 scales."""
    sizes: list[float] = []
    for rows in module.sources:
        share = rows.count * rows.tensor.shape[-1] / max(1, _elements(rows.tensor.shape))
        sizes.append(share * (rows.tensor.nbytes + (rows.scale.nbytes if rows.scale else 0)))
    return sizes


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
