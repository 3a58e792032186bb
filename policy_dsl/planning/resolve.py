"""Policy x Inventory x FormatSpecs -> Plan. Pure and total: a Plan, or every defect at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, errors, fail
from policy_dsl.formats import Container, Format, FormatSpec
from policy_dsl.inventory import Inventory, source_digest
from policy_dsl.language.print_policy import policy_digest
from policy_dsl.plan import Draft, Module, Omission, Plan, PlannedFile
from policy_dsl.planning.bundle_files import source_findings, with_files
from policy_dsl.planning.decisions import decide
from policy_dsl.planning.layout import Layout, lay_in_one, lay_out
from policy_dsl.planning.lowering import Lowered, lower
from policy_dsl.planning.plan_warnings import head_remarks, plan_warnings, with_own_head
from policy_dsl.planning.pruning import ensure_all_pruned, pruned, pruning_of
from policy_dsl.planning.settings import choose_target, setting_findings, statistics_of
from policy_dsl.policy import Policy
from policy_dsl.quantities import parse_size
from policy_dsl.roles.architecture import Architecture
from policy_dsl.roles.classify import Model, architecture_of, classify
from policy_dsl.roles.quantization import leftover, quantization_of
from policy_dsl.sources.saliency import Saliency

_NO_PREFACE = "its metadata hold the source's tokenizer and template"


def resolve(  # noqa: PLR0913 - a policy, its checkpoint, and options by keyword
    policy: Policy,
    inventory: Inventory,
    formats: Mapping[str, Format],
    *,
    target: str | None = None,
    allow_requantize: bool = False,
    statistics: Mapping[str, str] | None = None,
    saliency: Saliency | None = None,
    files: bool = True,
) -> Plan:
    """The plan of a policy for a checkpoint; `target` overrides the policy's own.

    allow_requantize: take a source that somebody quantized before, with a warning.
    statistics: files, by name such as `imatrix`, instead of those that the policy names.
    saliency: what ranks experts, if the policy prunes by it and somebody has it. files: False
    leaves out what is in no tensor, for who only asks whether a policy fits.
    Raises: PolicyError with every defect of the policy for this model and target, or else of
    the side files that the bundle takes from the source.
    """
    format = formats[choose_target(policy, formats, target)]
    plan = _with_tensors(
        *(policy, inventory, formats, format),
        allow_requantize=allow_requantize,
        statistics=statistics or {},
        saliency=saliency,
    )
    if not files:
        return plan
    beside = source_findings(plan, inventory, format.spec)
    if errors(beside):
        raise PolicyError(errors(beside))
    return with_files(replace(plan, findings=(*plan.findings, *beside)), inventory, format)


def _with_tensors(  # noqa: PLR0913 - as of `resolve`
    policy: Policy,
    inventory: Inventory,
    formats: Mapping[str, Format],
    format: Format,
    *,
    allow_requantize: bool,
    statistics: Mapping[str, str],
    saliency: Saliency | None,
) -> Plan:
    """The plan without the files that are not made of tensors."""
    spec = format.spec
    # Asked before roles: packed names have none, and "unknown tensor" would say less.
    lossy = _lossy_source(inventory, allow_requantize=allow_requantize)
    # Findings about single tensors would only repeat that the whole family is refused.
    _check_family(architecture_of(inventory), spec)
    model = classify(inventory)
    pruning = pruning_of(policy, model, saliency)
    model, lost = pruned(model, pruning)
    decisions = decide(policy, model, spec.name)
    ensure_all_pruned(pruning, decisions.made, model, format)
    own = with_own_head(model, decisions.made)
    lowered = lower(decisions.made, own, policy, format)
    settings = setting_findings(policy, spec, formats)
    draft = Draft(policy=policy, model=own, modules=tuple(lowered.modules))
    refusals = tuple(format.review(draft))
    conflicts = [
        diagnostic("conflict", target=spec.name, reason=one.reason)
        for one in refusals
        if one.severity == "error"
    ]
    findings = [*lossy, *settings, *decisions.findings, *lowered.findings, *conflicts]
    # Defects of rules and of treatments are shown together, one run for all of them.
    if errors(findings):
        raise PolicyError(findings)
    modules, files = _place(lowered, policy, spec)
    known = statistics_of(modules, policy, format, statistics, saliency)
    findings += known.findings
    plan = Plan(
        policy=policy,
        policy_digest=policy_digest(policy),
        target=spec.name,
        model=own,
        source_digest=source_digest(inventory),
        source_nbytes=inventory.nbytes,
        modules=modules,
        omitted=(*lowered.omitted, *lost, *_ignored(model)),
        files=files,
        fp8_rule=policy.fp8_dequant or spec.fp8_rules[0],
        statistics=known.files,
        pending=known.pending,
        remarks=(*head_remarks(own, model), *_remarks(format, policy, modules)),
        refusals=refusals,
        pruning=pruning,
        codec_version=spec.codec_version,
        source_files=inventory.file_nbytes,
        source_commit=inventory.commit,
        linked_files=tuple(sorted(inventory.links.items())),
        inventory=inventory,
    )
    # Warnings need the finished plan: they count bytes.
    findings += plan_warnings(plan, decisions.made, format)
    if errors(findings):
        raise PolicyError(findings)
    # Warnings about the source belong to the plan that rests on it.
    return replace(plan, findings=(*inventory.findings, *findings))


def _remarks(
    format: Format, policy: Policy, modules: Sequence[Module]
) -> Iterator[tuple[str, str]]:
    for method in format.methods.values():
        yield from method.remarks(policy, modules) if method.remarks else ()


def _ignored(model: Model) -> Iterator[Omission]:
    # They hold no weights, but nothing of a source is left out without a word.
    for tensor, reason in model.ignored:
        yield Omission(tensor, "", None, reason)


def _lossy_source(inventory: Inventory, *, allow_requantize: bool) -> list[Diagnostic]:
    """The warning about a source that was quantized before, or whose config says so.

    Raises: PolicyError if that is not allowed, or its numbers are not read.
    """
    found = quantization_of(inventory)
    if found is None:
        return list(leftover(inventory))
    finding = found.finding(inventory.id, allowed=allow_requantize)
    if errors([finding]):
        raise PolicyError([finding])
    return [finding]


def _check_family(table: Architecture, spec: FormatSpec) -> None:
    if (reason := spec.refusal(table)) is not None:
        raise fail("unsupported-family", target=spec.name, family=table.family, reason=reason)


def _place(
    lowered: Lowered, policy: Policy, spec: FormatSpec
) -> tuple[tuple[Module, ...], tuple[PlannedFile, ...]]:
    layout = _layout(lowered.modules, policy, spec)
    # Offsets are known before a weight is read: workers write without asking each other.
    modules = []
    for module in lowered.modules:
        placed = tuple([layout.places[tensor.name] for tensor in module.tensors])
        modules.append(module.with_tensors(placed))
    sizes = layout.file_nbytes.items()
    if spec.container is not None:
        # What comes before the tensors is made of side files, which planning does not read.
        return tuple(modules), tuple(
            PlannedFile(name, "tensors", None, _NO_PREFACE, size) for name, size in sizes
        )
    return tuple(modules), tuple(PlannedFile(name, "tensors", size) for name, size in sizes)


def _layout(modules: Sequence[Module], policy: Policy, spec: FormatSpec) -> Layout:
    files = spec.tensor_files
    tensors = files.order(modules)
    if isinstance(files, Container):
        return lay_in_one(tensors, policy.output.file_name or files.name(policy, modules))
    limit = parse_size(policy.output.shard_size) if policy.output.shard_size else None
    return lay_out(tensors, replace(files, nbytes=limit) if limit else files)
