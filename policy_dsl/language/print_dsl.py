"""Policy -> DSL text."""

from __future__ import annotations

import re

from policy_dsl.language.fragments import quote
from policy_dsl.language.print_lines import Lines
from policy_dsl.language.print_parts import (
    TEXT_KEYS,
    prune_text,
    rule_text,
    rules_of,
    said_fields,
    says_name,
    templates,
)
from policy_dsl.language.print_values import dsl_scalar, dsl_text, json_text
from policy_dsl.policy import Part, Policy

_FIELD = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)


def print_dsl(policy: Policy) -> str:
    """The policy as DSL text; `read_dsl` of it is the same policy, comments included."""
    return _Printer(policy).print()


class _Printer:
    """Prints section after section; see `Lines` for the comments."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._lines = Lines(policy.comments)
        self._templates = templates(policy)

    def print(self) -> str:
        policy, lines = self._policy, self._lines
        lines.head()
        for key in TEXT_KEYS:
            self._text(key)
        if policy.targets:
            words = [dsl_text(target) for target in policy.targets]
            lines.line(f"target {', '.join(words)}", "targets")
        self._list("extends", "extends", policy.extends)
        self._cleared("vars")
        lines.lead("vars")
        for name, value in policy.vars:
            lines.line(f"var {name} = {dsl_scalar(value)}", f"vars.{name}")
        self._section("default", "defaults", policy.defaults)
        self._statements("transforms", "", [prune_text(each) for each in policy.transforms])
        self._section("calibration", "calibration", policy.calibration)
        self._rules()
        self._section("output", "output", policy.output)
        self._text("fp8_dequant")
        self._metadata()
        self._list("runtime", "runtimes", policy.runtimes)
        self._statements("tests", "test ", [test.text for test in policy.tests])
        return lines.text()

    def _text(self, key: str) -> None:
        value = getattr(self._policy, key)
        if key == "name" and not says_name(self._policy):
            return
        if key in self._policy.cleared:
            self._lines.line(f'{key} ""', key)
        elif value:
            self._lines.line(f"{key} {self._written(key, value)}", key)

    def _cleared(self, key: str) -> None:
        if key in self._policy.cleared:
            self._lines.line(f"clear {key}", key)

    def _list(self, word: str, key: str, values: tuple[str, ...]) -> None:
        self._cleared(key)
        self._lines.lead(key)
        for index, value in enumerate(values):
            anchor = f"{key}[{index}]"
            self._lines.line(f"{word} {self._written(anchor, value)}", anchor)

    def _section(self, word: str, section: str, part: Part) -> None:
        self._cleared(section)
        self._lines.lead(section)
        for name, value in said_fields(part):
            anchor = f"{section}.{name}"
            # A statement of its own in the DSL: its value is a treatment, not a word.
            if name == "otherwise":
                words = self._templates.get(anchor, value)
                self._lines.line(f"otherwise {words}", anchor)
                continue
            text = str(value).lower() if isinstance(value, bool) else str(value)
            self._lines.line(f"{word} {name} {self._written(anchor, text)}", anchor)

    def _statements(self, key: str, word: str, texts: list[str]) -> None:
        self._cleared(key)
        self._lines.lead(key)
        for index, text in enumerate(texts):
            anchor = f"{key}[{index}]"
            self._lines.line(word + self._templates.get(anchor, text), anchor)

    def _rules(self) -> None:
        lines = self._lines
        lines.lead("rules")
        for anchor, rule in rules_of(self._policy, None):
            lines.line(rule_text(rule), anchor)
        lines.lead("rules[]")
        for target in self._policy.targets:
            rules = rules_of(self._policy, target)
            end = f"targets.{target}.rules[]"
            # The header names every target; a block without rules would say nothing more.
            if not rules and not lines.has_comments(end):
                lines.lead(f"targets.{target}")
                continue
            lines.open(f"on {dsl_text(target)} {{", f"targets.{target}")
            for anchor, rule in rules:
                lines.line(rule_text(rule), anchor, indent="  ")
            lines.lead(end, indent="  ")
            lines.line("}")

    def _metadata(self) -> None:
        self._cleared("metadata")
        self._lines.lead("metadata")
        for name, value in self._policy.metadata:
            anchor = f"metadata.{name}"
            template = anchor in self._templates
            text = json_text(self._templates.get(anchor, value), template=template)
            key = name if _FIELD.fullmatch(name) else quote(name)
            self._lines.line(f"metadata {key} {text}", anchor)

    def _written(self, path: str, value: str) -> str:
        if path in self._templates:
            return dsl_text(self._templates[path], template=True)
        return dsl_text(value)
