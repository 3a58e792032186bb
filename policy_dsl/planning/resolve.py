"""Policy x Inventory x FormatSpecs -> Plan. Pure and total: a Plan, or every defect at once."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from policy_dsl.bounded_json import uncollected
from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, errors, fail
from policy_dsl.formats import Format, FormatSpec
from policy_dsl.inventory import Inventory, source_digest
from policy_dsl.language.print_policy import policy_digest
from policy_dsl.plan import Draft, Module, Omission, Plan, StatisticsFile, coded_modules
from policy_dsl.planning.bundle_files import placed, with_files
from policy_dsl.planning.decisions import decide
from policy_dsl.planning.lint import choose_target, setting_findings, without_allowed
from policy_dsl.planning.lowering import lower
from policy_dsl.planning.plan_warnings import plan_warnings, with_own_head
from policy_dsl.planning.pruning import ensure_all_pruned, pruned, pruning_of
from policy_dsl.policy import Policy
from policy_dsl.roles.classify import architecture_of, classify
from policy_dsl.roles.config_facts import TIED
from policy_dsl.roles.quantization import leftover, quantization_of
from policy_dsl.sources.saliency import Saliency

SALIENCY = "saliency"
# Statistic -> how to get one.
_SOURCES = {
    "imatrix": "an importance matrix: run llama.cpp's llama-imatrix on the model, and give the "
    "file with --imatrix or `calibration imatrix`",
    SALIENCY: "a ranking of the experts (a plan takes the first of each layer): run REAP's "
    "observer on the model, and give what it finds with --saliency or `calibration saliency`, "
    "or list those that stay with `prune experts keep …`",
}


@uncollected()
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
    spec = format.spec
    findings = _source_findings(inventory, spec, allow_requantize=allow_requantize)
    source = classify(inventory)
    pruning = pruning_of(policy, source, saliency)
    model, lost = pruned(source, pruning)
    model = spec.arranged(model)
    decisions = decide(policy, model, spec.name)
    ensure_all_pruned(pruning, decisions.made, model, format)
    own = with_own_head(model, decisions)
    lowered, omitted, defects = lower(decisions.made, own, policy, format)
    draft = Draft(policy=policy, model=own, modules=tuple(lowered))
    refusals = tuple(format.review.bundle(draft))
    findings += setting_findings(policy, spec, formats)
    findings += [*decisions.findings, *defects]
    conflicts = [one.reason for one in refusals if one.severity == "error"]
    findings += [diagnostic("conflict", target=spec.name, reason=reason) for reason in conflicts]
    # Defects of rules and of treatments are shown together, one run for all of them.
    _raise_errors(findings)
    modules, tensor_files = placed(draft.modules, policy, spec)
    used, pending, unused = _statistics_of(modules, policy, format, statistics or {}, saliency)
    findings += unused
    # Tensors that are no weights too: nothing of a source is left out without a word.
    ignored = [Omission(tensor, "", None, reason) for tensor, reason in model.ignored]
    plan = Plan(
        policy=policy,
        policy_digest=policy_digest(policy),
        target=spec.name,
        model=own,
        source_digest=source_digest(inventory),
        source_nbytes=inventory.nbytes,
        modules=modules,
        omitted=(*omitted, *lost, *ignored),
        files=tensor_files,
        fp8_rule=policy.fp8_dequant or spec.fp8_rules[0],
        statistics=tuple(used),
        pending=tuple(pending),
        remarks=_remarks(draft, is_untied=own.tied != model.tied, format=format),
        refusals=refusals,
        pruning=pruning,
        codec_version=spec.codec_version,
        source_files=inventory.file_nbytes,
        source_commit=inventory.commit,
        linked_files=tuple(sorted(inventory.links.items())),
        inventory=inventory,
    )
    # Warnings need the finished plan: they count bytes.
    findings += plan_warnings(plan, decisions, format)
    _raise_errors(findings)
    # Warnings about the source belong to the plan that rests on it.
    plan = replace(plan, findings=without_allowed([*inventory.findings, *findings], policy))
    return with_files(plan, inventory, format) if files else plan


def _raise_errors(findings: Sequence[Diagnostic]) -> None:
    if errors(findings):
        raise PolicyError(findings)


def _source_findings(
    inventory: Inventory, spec: FormatSpec, *, allow_requantize: bool
) -> list[Diagnostic]:
    """The warning about a source that was quantized before, or whose config says so.

    Raises: PolicyError if that is not allowed, its numbers are not read, or its family is refused.
    """
    # Asked before roles: packed names have none, and "unknown tensor" would say less.
    before = quantization_of(inventory)
    findings = [before.finding(inventory.id, allowed=allow_requantize)] if before else []
    findings += [] if before else leftover(inventory)
    _raise_errors(findings)
    table = architecture_of(inventory)
    # Findings about single tensors would only repeat that the whole family is refused.
    if (reason := spec.refusal(table)) is not None:
        raise fail("unsupported-family", target=spec.name, family=table.family, reason=reason)
    return findings


def _remarks(draft: Draft, *, is_untied: bool, format: Format) -> tuple[tuple[str, str], ...]:
    head = ("head", f"stored beside the embedding, so config.json says {TIED}: false")
    found = [head] if is_untied else []
    for method in format.methods.values():
        found += method.remarks(draft.policy, draft.modules) if method.remarks else ()
    return tuple(found)


def _statistics_of(
    modules: Sequence[Module],
    policy: Policy,
    format: Format,
    given: Mapping[str, str],
    saliency: Saliency | None,
) -> tuple[list[StatisticsFile], list[str], list[Diagnostic]]:
    """The files that modules and policy use, how to get those that they lack, and findings."""
    chosen = {coded.method for _, coded in coded_modules(modules)}
    needed: set[str] = set()
    users: dict[str, set[str]] = defaultdict(set)
    for name in chosen & format.methods.keys():
        method = format.methods[name]
        needed.add(method.needs)
        users[method.needs].add(name)
        users[method.uses].add(name)
    files = [
        replace(file, methods=frozenset(users[file.name]))
        for file in statistics_files(sorted(users), policy, given)
    ]
    if is_ranked(policy):
        needed.add(SALIENCY)
        users[SALIENCY] = set()
        if saliency:
            ranks = saliency.path, saliency.span, saliency.sha256
            files.append(StatisticsFile(SALIENCY, *ranks))
    cures = []
    for name in sorted(needed - {"", *(file.name for file in files)}):
        named = vars(policy.calibration)[name]
        absent = f" ({named}, which the policy names, is not here)" if named else ""
        cures.append(_SOURCES[name] + absent)
    return files, cures, _unused(set(users), policy, format, given)


def _unused(
    used: set[str], policy: Policy, format: Format, given: Mapping[str, str]
) -> list[Diagnostic]:
    """A warning for each file that no method of the plan uses."""
    # Of a policy, only what the target may use: the rest is an unused setting.
    usable = {setting.partition("calibration.")[2] for setting in format.spec.settings}
    every = {name for one in format.methods.values() for name in (one.needs, one.uses)}
    unused = sorted({*(usable & every), SALIENCY, *given} - used - {""})
    return [
        diagnostic("unused-statistics", file.span, name=file.name, path=file.path)
        for file in statistics_files(unused, policy, given)
    ]


def is_ranked(policy: Policy) -> bool:
    """Whether a saliency says which experts the policy keeps."""
    return any(prune.by for prune in policy.transforms)


def statistics_files(
    names: Iterable[str], policy: Policy, given: Mapping[str, str]
) -> list[StatisticsFile]:
    """The files of these statistics: what is given for a name, else what the policy says."""
    written, spans = vars(policy.calibration), policy.key_spans
    found = []
    for name in names:
        if name in given:
            found.append(StatisticsFile(name, given[name]))
        elif written.get(name) is not None:
            span = spans.get(f"calibration.{name}")
            found.append(StatisticsFile(name, str(written[name]), span))
    return found
