"""What a policy says beside its rules, held against what its target uses and allows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from policy_dsl.diagnostics import Diagnostic, diagnostic, did_you_mean, fail
from policy_dsl.escaping import name_defect
from policy_dsl.formats import Format, FormatSpec, MetadataValues
from policy_dsl.policy import Policy
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
    told = [] if several and len(meant) < len(policy.targets) else _unknown(policy, known)
    return [
        *told,
        *_fp8_rule(policy, spec),
        *_layout(policy, spec),
        *_file_name(policy, spec),
        *_metadata(policy, spec),
    ]


def used_settings(spec: FormatSpec) -> tuple[str, ...]:
    """The keys of `output` and `calibration` that count for a target."""
    # Experts are pruned before a target comes in; whether they are, the plan tells.
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
