"""What is wrong with a policy whatever the model, and with its settings for a target."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import starmap
from typing import Any

from policy_dsl.diagnostics import (
    Diagnostic,
    PolicyError,
    SourceText,
    Span,
    catalogue,
    codes_of,
    diagnostic,
    did_you_mean,
    fail,
)
from policy_dsl.escaping import name_defect as file_name_defect
from policy_dsl.formats import Format, FormatSpec, MetadataValues
from policy_dsl.planning.fill import fill
from policy_dsl.planning.matching import family_defect, name_defect, nodes
from policy_dsl.policy import WORDS, Family, Name, Policy, Rule, given

_COMMENT = re.compile(r"#\s*policyc:\s*allow\s+([\w-]+(?:\s*,\s*[\w-]+)*)\s*$", re.MULTILINE)
_CODE = re.compile(r"[\w-]+")
_CLASSES = ("matrix", "experts", "embed")
# Readers take files with such endings for something else.
_TAKEN_ENDINGS = (".safetensors", ".json", ".py")
_CALLED = {bool: "true or false", str: "a text"}


def lint(
    policy: Policy, formats: Mapping[str, Format], *, target: str | None = None
) -> tuple[Diagnostic, ...]:
    """Findings that need no model: names, families; treatments and settings by target."""
    found = [finding for rule in policy.rules for finding in _name_findings(rule)]
    found += filter(
        None, starmap(_not_allowable, (*_Comments(policy), *_accepted_anywhere(policy)))
    )
    for wanted in (target,) if target else policy.targets:
        try:
            spec = formats[choose_target(policy, formats, wanted)].spec
        except PolicyError as error:
            found += error.diagnostics
        else:
            found += _treatment_findings(policy, spec)
            found += setting_findings(policy, spec, formats)
    return tuple(dict.fromkeys(found))


def choose_target(policy: Policy, formats: Mapping[str, Format], target: str | None = None) -> str:
    """The target to plan for: the one asked for, else the policy's only one.

    Raises: PolicyError if there is none, more than one, or an unknown one.
    """
    spans = policy.key_spans
    if target is None and len(policy.targets) != 1:
        choices = ", ".join(policy.targets or formats)
        raise fail("no-target", spans.get("target"), policy=policy.name, choices=choices)
    chosen = target or policy.targets[0]
    if chosen in formats:
        return chosen
    # A policy for a format that is not built in is not a typo.
    code = "unavailable-target" if chosen in WORDS.targets else "unknown-target"
    # What --target says is nowhere in the text.
    span, meant = spans.get(f"targets.{chosen}"), did_you_mean(chosen, formats)
    raise fail(code, span, suggestion=meant, target=chosen, known=", ".join(formats))


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
    is_known = not several or len(meant) == len(policy.targets)
    return [*(_unknown(policy, known) if is_known else ()), *_bad_values(policy, spec)]


def used_settings(spec: FormatSpec) -> tuple[str, ...]:
    """The keys of `output` and `calibration` that count for a target."""
    # Experts are pruned before a target comes in; the plan says whether they are.
    return (*spec.settings, "calibration.saliency")


def values_text(allowed: MetadataValues) -> str:
    """What an entry of a policy's `metadata` may be, in words."""
    if isinstance(allowed, tuple):
        return ", ".join(allowed)
    if isinstance(allowed, Mapping):
        entries = (f"{key} ({values_text(value)})" for key, value in allowed.items())
        return f"a mapping of {', '.join(entries)}"
    return _CALLED[allowed]


def _name_findings(rule: Rule) -> Iterator[Diagnostic]:
    spans = dict(rule.name_spans)
    for node in nodes(rule.selector):
        defect = name_defect(node.text) if isinstance(node, Name) else None
        defect = family_defect(node.name) if isinstance(node, Family) else defect
        if defect is not None:
            yield replace(defect, span=spans.get(node, rule.selector_span))


def _treatment_findings(policy: Policy, spec: FormatSpec) -> Iterator[Diagnostic]:
    for rule in policy.rules:
        if rule.target in (None, spec.name):
            # What one class of tensors cannot hold another may: only what none can is wrong.
            outcomes = [fill(rule.treatment, each, policy.defaults, spec) for each in _CLASSES]
            defects = [one for one in outcomes if isinstance(one, Diagnostic)]
            if len(defects) == len(outcomes):
                yield replace(defects[0], span=rule.treatment_span or rule.span)


def _unknown(policy: Policy, specs: Sequence[FormatSpec]) -> Iterator[Diagnostic]:
    """Readers and settings that none of these targets knows; the first is the one to blame."""
    facts: dict[str, Any] = {"target": specs[0].name, "known": ", ".join(specs[0].runtimes)}
    spans, readers = policy.key_spans, [name for spec in specs for name in spec.runtimes]
    for runtime in [name for name in policy.runtimes if name not in readers]:
        span, meant = spans.get(f"runtimes.{runtime}"), did_you_mean(runtime, readers)
        yield diagnostic("unknown-runtime", span, suggestion=meant, runtime=runtime, **facts)
    yield from _unused(policy, specs)


def _unused(policy: Policy, specs: Sequence[FormatSpec]) -> Iterator[Diagnostic]:
    spans = policy.key_spans
    used = {setting for spec in specs for setting in used_settings(spec)}
    used |= {f"metadata.{key}" for spec in specs for key in spec.metadata_keys}
    for setting in [each for each in _written(policy) if each not in used]:
        section, _, key = setting.partition(".")
        near = [one.removeprefix(f"{section}.") for one in used if one.startswith(section)]
        span, meant = spans.get(setting) or spans.get(section), did_you_mean(key, near)
        facts: dict[str, Any] = {"setting": setting, "target": specs[0].name}
        yield diagnostic("unused-setting", span, suggestion=meant, **facts)


def _written(policy: Policy) -> Iterator[str]:
    yield from (f"output.{key}" for key in given(policy.output))
    yield from (f"calibration.{key}" for key in given(policy.calibration))
    yield from (f"metadata.{key}" for key, _ in policy.metadata)


def _bad_values(policy: Policy, spec: FormatSpec) -> Iterator[Diagnostic]:
    spans, output = policy.key_spans, policy.output
    rule, layout, file = policy.fp8_dequant, output.layout, output.file_name
    if rule is not None and rule not in spec.fp8_rules:
        span, meant = spans.get("fp8_dequant"), did_you_mean(rule, spec.fp8_rules)
        known = ", ".join(spec.fp8_rules)
        yield diagnostic("unknown-fp8-rule", span, suggestion=meant, rule=rule, rules=known)
    # A setting that the target does not use at all is another finding.
    if layout is not None and spec.layouts and layout not in spec.layouts:
        span, known = spans.get("output.layout") or spans.get("output"), ", ".join(spec.layouts)
        facts: dict[str, Any] = {"suggestion": did_you_mean(layout, spec.layouts), "known": known}
        yield diagnostic("unknown-layout", span, target=spec.name, layout=layout, **facts)
    if file is not None and spec.container and (reason := _misnamed(file)):
        yield diagnostic("bad-file-name", spans.get("output.file_name"), name=file, reason=reason)
    yield from _bad_metadata(policy, spec)


def _bad_metadata(policy: Policy, spec: FormatSpec) -> Iterator[Diagnostic]:
    spans = policy.key_spans
    for key, value in policy.metadata:
        allowed = spec.metadata_keys.get(key)
        if allowed is not None and not _is_allowed(value, allowed):
            span = spans.get(f"metadata.{key}") or spans.get("metadata")
            # In the policy's own words: true and null, not True and None.
            written, meant = json.dumps(value, ensure_ascii=False), _meant(value, allowed)
            facts: dict[str, Any] = {"key": key, "value": written, "wanted": values_text(allowed)}
            yield diagnostic("bad-metadata-value", span, suggestion=meant, **facts)


def _misnamed(file: str) -> str | None:
    # Disks that ignore case would take it for the record.
    taken = file.casefold().endswith(_TAKEN_ENDINGS)
    other = f"files that end in {', '.join(_TAKEN_ENDINGS)} are something else" if taken else None
    return file_name_defect(file) or other


def _is_allowed(value: object, allowed: MetadataValues) -> bool:
    if isinstance(allowed, tuple):
        return value in allowed
    if isinstance(allowed, Mapping):
        return isinstance(value, Mapping) and all(
            key in allowed and _is_allowed(value[key], allowed[key]) for key in value
        )
    # A boolean is an int to Python, and no number to anybody else.
    return type(value) is allowed


def _meant(value: object, allowed: MetadataValues) -> str | None:
    if isinstance(allowed, Mapping) and isinstance(value, Mapping):
        unknown = [str(key) for key in value if key not in allowed]
        return did_you_mean(unknown[0], allowed) if unknown else None
    return did_you_mean(str(value), allowed) if isinstance(allowed, tuple) else None


def _not_allowable(code: str, span: Span | None) -> Diagnostic | None:
    """What is wrong with accepting the findings of this code; None if nothing is."""
    known = catalogue()
    if code not in known:
        cure = did_you_mean(code, [one for one in known if known[one].severity != "error"])
        return diagnostic("unknown-code", span, suggestion=cure, allowed=code)
    is_error = known[code].severity == "error"
    return diagnostic("error-allowed", span, allowed=code) if is_error else None


def without_allowed(findings: Sequence[Diagnostic], policy: Policy) -> tuple[Diagnostic, ...]:
    """The findings of a plan that its policy does not accept, and what it accepts in vain.

    Raises: PolicyError if a comment would accept what cannot be.
    """
    beside = _Comments(policy)
    found = [(one, beside.accepting(one) or _by_key(one, policy)) for one in findings]
    used = {accepted for _, accepted in found}
    every = [*beside, *_accepted_anywhere(policy)]
    if defects := [*filter(None, starmap(_not_allowable, every))]:
        raise PolicyError(defects)
    # Of other codes, a plan does not know whether somebody has them.
    unused = [one for one in every if one not in used and one[0] in codes_of("planning")]
    return (
        *(finding for finding, accepted in found if not accepted),
        *(diagnostic("unused-allow", span, allowed=code) for code, span in unused),
    )


def _accepted_anywhere(policy: Policy) -> list[tuple[str, Span | None]]:
    return [(code, policy.key_spans.get(f"allow.{code}")) for code in policy.allow]


def _by_key(finding: Diagnostic, policy: Policy) -> tuple[str, Span | None] | None:
    span = policy.key_spans.get(f"allow.{finding.code}")
    return (finding.code, span) if finding.code in policy.allow else None


class _Comments:
    """The comments of a policy's texts that accept findings of one line each."""

    def __init__(self, policy: Policy) -> None:
        spans = [*(rule.span for rule in policy.rules), *policy.key_spans.values()]
        texts = {span.source.name: span.source for span in spans if span}
        # File and line -> what is accepted there.
        self._at: dict[tuple[str, int], list[tuple[str, Span]]] = defaultdict(list)
        for text in texts.values():
            for line, found in _accepted(text):
                self._at[text.name, line].append(found)

    def __iter__(self) -> Iterator[tuple[str, Span]]:
        for found in self._at.values():
            yield from found

    def accepting(self, finding: Diagnostic) -> tuple[str, Span] | None:
        """What accepts a finding, by its code and place."""
        if finding.span is None:
            return None
        file, line, _ = finding.span.place
        return next((one for one in self._at[file, line] if one[0] == finding.code), None)


def _accepted(text: SourceText) -> Iterable[tuple[int, tuple[str, Span]]]:
    """Each code that a comment accepts, and the line that it is about."""
    for comment in _COMMENT.finditer(text.text):
        line, column = text.position(comment.start())
        # A comment that has the line to itself is about the next one.
        is_alone = not text.line(line)[: column - 1].strip()
        for code in _CODE.finditer(comment[1]):
            start = comment.start(1) + code.start()
            span = Span(text, start, start + len(code[0]))
            yield line + is_alone, (code[0], span)
