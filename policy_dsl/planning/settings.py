"""What a policy says beside its rules, held against what its target uses and allows."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from policy_dsl.diagnostics import Diagnostic, diagnostic, did_you_mean, fail
from policy_dsl.escaping import name_defect
from policy_dsl.formats import Format, FormatSpec, MetadataValues
from policy_dsl.plan import Module, StatisticsFile, coded_modules
from policy_dsl.policy import Policy
from policy_dsl.sources.saliency import Saliency
from policy_dsl.vocabulary import TARGETS

# Readers take files with such endings for something else.
_TAKEN_ENDINGS = (".safetensors", ".json", ".py")
_CALLED = {bool: "true or false", str: "a text"}


def choose_target(policy: Policy, formats: Mapping[str, Format], target: str | None = None) -> str:
    """The target to plan for: the one asked for, else the policy's only one.

    Raises: PolicyError if there is none, more than one, or an unknown one.
    """
    spans = dict(policy.key_spans)
    if target is None and len(policy.targets) != 1:
        choices = policy.targets or tuple(formats)
        raise fail("no-target", spans.get("target"), policy=policy.name, choices=", ".join(choices))
    chosen = target or policy.targets[0]
    if chosen in formats:
        return chosen
    # A policy for a format that is not built in is not a typo.
    code = "unavailable-target" if chosen in TARGETS else "unknown-target"
    raise fail(
        code,
        # What --target says is nowhere in the text.
        spans.get(f"targets.{chosen}"),
        suggestion=did_you_mean(chosen, formats),
        target=chosen,
        known=", ".join(formats),
    )


def setting_findings(
    policy: Policy, spec: FormatSpec, formats: Mapping[str, Format]
) -> list[Diagnostic]:
    """Readers that the target does not know, settings that it does not use, values it lacks.

    formats: all targets. Where a policy is for several, a word may be for another of them.
    """
    several = len(policy.targets) > 1
    meant = [formats[name].spec for name in policy.targets if name in formats] if several else []
    known = [spec, *(other for other in meant if other is not spec)]
    # Nobody here knows what a target takes that is not installed.
    unknown = [] if several and len(meant) < len(policy.targets) else _unknown(policy, known)
    return [
        *unknown,
        *_fp8_rule(policy, spec),
        *_layout(policy, spec),
        *_file_name(policy, spec),
        *_metadata(policy, spec),
    ]


def used_settings(spec: FormatSpec) -> tuple[str, ...]:
    """The keys of `output` and `calibration` that count for a target."""
    # Experts are pruned before a target comes in; the plan says whether they are.
    return (*spec.settings, "calibration.saliency")


def _unknown(policy: Policy, specs: Sequence[FormatSpec]) -> Iterator[Diagnostic]:
    """Readers and settings that none of these targets knows; the first is the one to blame."""
    spec, spans = specs[0], dict(policy.key_spans)
    readers = {name: None for one in specs for name in one.runtimes}
    for runtime in policy.runtimes:
        if runtime not in readers:
            yield diagnostic(
                "unknown-runtime",
                spans.get(f"runtimes.{runtime}"),
                suggestion=did_you_mean(runtime, readers),
                target=spec.name,
                runtime=runtime,
                known=", ".join(spec.runtimes),
            )
    used = {setting for one in specs for setting in used_settings(one)}
    used |= {f"metadata.{key}" for one in specs for key in one.metadata_keys}
    for setting in _written(policy):
        section, _, key = setting.partition(".")
        near = [one.removeprefix(f"{section}.") for one in used if one.startswith(section)]
        if setting not in used:
            yield diagnostic(
                "unused-setting",
                spans.get(setting) or spans.get(section),
                suggestion=did_you_mean(key, near),
                setting=setting,
                target=spec.name,
            )


def _written(policy: Policy) -> Iterator[str]:
    yield from (f"output.{key}" for key, value in policy.output if value is not None)
    yield from (f"calibration.{key}" for key, value in policy.calibration if value is not None)
    yield from (f"metadata.{key}" for key, _ in policy.metadata)


def _fp8_rule(policy: Policy, spec: FormatSpec) -> Iterator[Diagnostic]:
    rule = policy.fp8_dequant
    if rule is not None and rule not in spec.fp8_rules:
        yield diagnostic(
            "unknown-fp8-rule",
            dict(policy.key_spans).get("fp8_dequant"),
            suggestion=did_you_mean(rule, spec.fp8_rules),
            rule=rule,
            rules=", ".join(spec.fp8_rules),
        )


def _layout(policy: Policy, spec: FormatSpec) -> Iterator[Diagnostic]:
    layout = policy.output.layout
    # A target without layouts does not use the setting, which is another finding.
    if layout is None or layout in spec.layouts or not spec.layouts:
        return
    spans = dict(policy.key_spans)
    yield diagnostic(
        "unknown-layout",
        spans.get("output.layout") or spans.get("output"),
        suggestion=did_you_mean(layout, spec.layouts),
        target=spec.name,
        layout=layout,
        known=", ".join(spec.layouts),
    )


def _file_name(policy: Policy, spec: FormatSpec) -> Iterator[Diagnostic]:
    name = policy.output.file_name
    # A target with files of fixed names does not use the setting, which is another finding.
    if name is None or spec.container is None:
        return
    reason = name_defect(name)
    if reason is None and name.casefold().endswith(_TAKEN_ENDINGS):
        # Disks that ignore case would take it for the record.
        reason = f"files that end in {', '.join(_TAKEN_ENDINGS)} are something else"
    if reason is not None:
        span = dict(policy.key_spans).get("output.file_name")
        yield diagnostic("bad-file-name", span, name=name, reason=reason)


def _metadata(policy: Policy, spec: FormatSpec) -> Iterator[Diagnostic]:
    spans = dict(policy.key_spans)
    for key, value in policy.metadata:
        allowed = spec.metadata_keys.get(key)
        if allowed is None or _is_allowed(value, allowed):
            continue
        yield diagnostic(
            "bad-metadata-value",
            spans.get(f"metadata.{key}") or spans.get("metadata"),
            suggestion=_meant(value, allowed),
            key=key,
            # In the policy's own words: true and null, not True and None.
            value=json.dumps(value, ensure_ascii=False),
            wanted=values_text(allowed),
        )


def _is_allowed(value: object, allowed: MetadataValues) -> bool:
    if isinstance(allowed, tuple):
        return value in allowed
    if isinstance(allowed, Mapping):
        if not isinstance(value, Mapping):
            return False
        return all(key in allowed and _is_allowed(value[key], allowed[key]) for key in value)
    # A boolean is an int to Python, and no number to anybody else.
    return type(value) is allowed


def values_text(allowed: MetadataValues) -> str:
    """What an entry of a policy's `metadata` may be, in words."""
    if isinstance(allowed, tuple):
        return ", ".join(allowed)
    if isinstance(allowed, Mapping):
        entries = (f"{key} ({values_text(value)})" for key, value in allowed.items())
        return f"a mapping of {', '.join(entries)}"
    return _CALLED[allowed]


def _meant(value: object, allowed: MetadataValues) -> str | None:
    if isinstance(allowed, Mapping) and isinstance(value, Mapping):
        unknown = [str(key) for key in value if key not in allowed]
        return did_you_mean(unknown[0], allowed) if unknown else None
    return did_you_mean(str(value), allowed) if isinstance(allowed, tuple) else None


SALIENCY = "saliency"
# Statistic -> how to get one.
_SOURCES = {
    "imatrix": "an importance matrix: run llama.cpp's llama-imatrix on the model, and give the "
    "file with --imatrix or `calibration imatrix`",
    SALIENCY: "a ranking of the experts (a plan takes the first of each layer): run REAP's "
    "observer on the model, and give what it finds with --saliency or `calibration saliency`, "
    "or list those that stay with `prune experts keep …`",
}


@dataclass(frozen=True, slots=True)
class PlanStatistics:
    """The files that a plan's methods use, how to get those that they lack, and findings.

    Only what a method cannot do without is pending.
    """

    files: tuple[StatisticsFile, ...]
    pending: tuple[str, ...]
    findings: tuple[Diagnostic, ...]


def statistics_of(
    modules: Sequence[Module],
    policy: Policy,
    format: Format,
    given: Mapping[str, str],
    saliency: Saliency | None,
) -> PlanStatistics:
    """What these modules and the policy use, of what is given by name or the policy names.

    saliency: what was read of the file of that name.
    """
    methods = {coded.method for _, coded in coded_modules(modules)}
    known = {name: method for name, method in format.methods.items() if name in methods}
    needed = {method.needs for method in known.values() if method.needs}
    users: dict[str, set[str]] = {}
    for name, method in known.items():
        for statistic in filter(None, (method.needs, method.uses)):
            users.setdefault(statistic, set()).add(name)
    used = set(users)
    files = tuple(
        replace(file, methods=frozenset(users[file.name]))
        for file in statistics_files(sorted(used), policy, given)
    )
    if is_ranked(policy):
        needed, used = needed | {SALIENCY}, used | {SALIENCY}
        read = saliency
        files += (StatisticsFile(SALIENCY, read.path, read.span, read.sha256),) if read else ()
    missing = needed - {file.name for file in files}
    return PlanStatistics(
        files,
        pending=tuple(_cure(name, policy) for name in sorted(missing)),
        findings=tuple(_unused(used, policy, format, given)),
    )


def _cure(name: str, policy: Policy) -> str:
    named = dict(policy.calibration)[name]
    absent = f" ({named}, which the policy names, is not here)" if named else ""
    return f"{_SOURCES[name]}{absent}"


def is_ranked(policy: Policy) -> bool:
    """Whether a saliency says which experts the policy keeps."""
    return any(prune.by for prune in policy.transforms)


def statistics_files(
    names: Iterable[str], policy: Policy, given: Mapping[str, str]
) -> tuple[StatisticsFile, ...]:
    """The files of these statistics: what is given for a name, else what the policy says."""
    written, spans = dict(policy.calibration), dict(policy.key_spans)
    found = []
    for name in names:
        if name in given:
            found.append(StatisticsFile(name, given[name]))
        elif written.get(name) is not None:
            span = spans.get(f"calibration.{name}")
            found.append(StatisticsFile(name, str(written[name]), span))
    return tuple(found)


def _unused(
    used: Collection[str], policy: Policy, format: Format, given: Mapping[str, str]
) -> Iterator[Diagnostic]:
    """A warning for each file that no method of the plan uses."""
    written, spans = dict(policy.calibration), dict(policy.key_spans)
    known = {name for one in format.methods.values() for name in (one.needs, one.uses) if name}
    # Of a policy, only what the target may use: the rest is an unused setting.
    usable = [name for name in known if f"calibration.{name}" in format.spec.settings]
    said = {
        name: str(written[name]) for name in (*usable, SALIENCY) if written.get(name) is not None
    }
    for name, path in sorted((said | dict(given)).items()):
        if name not in used:
            span = None if name in given else spans.get(f"calibration.{name}")
            yield diagnostic("unused-statistics", span, name=name, path=path)
