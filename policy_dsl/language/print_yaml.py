"""Policy -> YAML text."""

from __future__ import annotations

from typing import Any

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
from policy_dsl.language.print_values import json_text, yaml_block, yaml_statement, yaml_text
from policy_dsl.policy import Part, Policy

_STEP = "  "


def print_yaml(policy: Policy) -> str:
    """The policy as YAML text; `read_yaml` of it is the same policy, comments included."""
    return _Printer(policy).print()


class _Printer:
    """Prints key after key; see `Lines` for the comments."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._lines = Lines(policy.comments)
        self._templates = templates(policy)

    def print(self) -> str:
        policy = self._policy
        self._lines.head()
        for key in TEXT_KEYS:
            self._text(key)
        # `targets:` is either a list of names or holds the rules of each: one key, two places.
        branched = self._branched()
        if not branched:
            self._targets()
        self._list("extends", policy.extends)
        self._cleared("vars", "{}")
        if policy.vars:
            self._lines.open("vars:", "vars")
        for name, value in policy.vars:
            text = yaml_text(value) if isinstance(value, str) else json_text(value)
            self._lines.line(f"{name}: {text}", f"vars.{name}", indent=_STEP)
        self._section("defaults", policy.defaults)
        self._cleared("transforms", "[]")
        self._statements("transforms", [prune_text(each) for each in policy.transforms])
        self._section("calibration", policy.calibration)
        self._rules(None, "rules", "rules[]", "")
        if branched:
            self._branches()
        self._section("output", policy.output)
        self._text("fp8_dequant")
        self._metadata()
        self._cleared("runtimes", "[]")
        self._list("runtimes", policy.runtimes)
        self._tests()
        return self._lines.text()

    def _cleared(self, key: str, nothing: str) -> None:
        if key in self._policy.cleared:
            self._lines.line(f"{key}: {nothing}", key)

    def _text(self, key: str) -> None:
        self._cleared(key, '""')
        value = getattr(self._policy, key)
        if not value or (key == "name" and not says_name(self._policy)):
            return
        self._value(key, value, key, "")

    def _value(self, key: str, value: str, path: str, indent: str) -> None:
        # A template is printed as it was written, on one line.
        block = None if path in self._templates else yaml_block(value)
        if block is None:
            self._lines.line(f"{key}: {self._written(path, value)}", path, indent=indent)
            return
        self._lines.line(f"{key}: {block[0]}", path, indent=indent)
        for line in block[1]:
            self._lines.inner(f"{indent}{_STEP}{line}" if line else "")

    def _list(self, key: str, values: tuple[str, ...]) -> None:
        # One item reads better beside its key; both forms read the same.
        if len(values) == 1:
            anchor = f"{key}[0]"
            self._lines.line(f"{key}: {self._written(anchor, values[0])}", anchor, key)
        elif values:
            self._lines.open(f"{key}:", key)
            for index, value in enumerate(values):
                anchor = f"{key}[{index}]"
                self._lines.line(f"- {self._written(anchor, value)}", anchor, indent=_STEP)

    def _section(self, section: str, part: Part) -> None:
        self._cleared(section, "{}")
        fields = list(said_fields(part))
        if fields:
            self._lines.open(f"{section}:", section)
        for name, value in fields:
            path = f"{section}.{name}"
            if isinstance(value, bool | int) and path not in self._templates:
                text = str(value).lower()
                self._lines.line(f"{name}: {text}", path, indent=_STEP)
            else:
                self._value(name, str(value).lower() if value is True else str(value), path, _STEP)

    def _tests(self) -> None:
        texts = [test.text for test in self._policy.tests]
        if "tests" not in self._policy.cleared:
            self._statements("tests", texts)
        elif texts:
            self._lines.open("tests:", "tests")
            self._lines.open("replace:", indent=_STEP)
            self._items("tests", texts, _STEP * 2)
        else:
            self._cleared("tests", "{replace: []}")

    def _statements(self, key: str, texts: list[str]) -> None:
        if texts:
            self._lines.open(f"{key}:", key)
        self._items(key, texts, _STEP)

    def _items(self, key: str, texts: list[str], indent: str) -> None:
        for index, text in enumerate(texts):
            anchor = f"{key}[{index}]"
            item = yaml_statement(self._templates.get(anchor, text))
            self._lines.line(f"- {item}", anchor, indent=indent)

    def _branched(self) -> bool:
        named = [f"targets.{target}" for target in self._policy.targets]
        ends = [f"{anchor}.rules[]" for anchor in named]
        # A comment in an empty branch is reason enough to print the branch.
        ruled = any(rule.target is not None for rule in self._policy.rules)
        return ruled or self._lines.has_comments(*named, *ends)

    def _targets(self) -> None:
        words = [yaml_text(target) for target in self._policy.targets]
        if len(words) == 1:
            self._lines.line(f"target: {words[0]}", "targets")
        elif words:
            self._lines.open("targets:", "targets")
            for word in words:
                self._lines.line(f"- {word}", indent=_STEP)

    def _branches(self) -> None:
        self._lines.open("targets:", "targets")
        for target in self._policy.targets:
            anchor = f"targets.{target}"
            end = f"{anchor}.rules[]"
            empty = not rules_of(self._policy, target) and not self._lines.has_comments(end)
            mark = " {}" if empty else ""
            self._lines.line(f"{yaml_text(target)}:{mark}", anchor, indent=_STEP)
            self._rules(target, f"{anchor}.rules", end, _STEP * 2)

    def _rules(self, target: str | None, anchor: str, end: str, indent: str) -> None:
        rules = rules_of(self._policy, target)
        if not rules and not self._lines.has_comments(end):
            return
        self._lines.open("rules: |", anchor, indent=indent)
        for place, rule in rules:
            self._lines.line(rule_text(rule), place, indent=indent + _STEP)
        # Comments below the last rule would else end up under the next key.
        self._lines.lead(end, indent=indent + _STEP)

    def _metadata(self) -> None:
        self._cleared("metadata", "{}")
        if self._policy.metadata:
            self._lines.open("metadata:", "metadata")
        for name, value in self._policy.metadata:
            path = f"metadata.{name}"
            template = path in self._templates
            self._json(name, self._templates.get(path, value), path, template)

    def _json(self, name: str, value: Any, path: str, template: bool) -> None:
        key = yaml_text(name, template=True)
        if isinstance(value, str) and not template:
            self._value(key, value, path, _STEP)
        elif isinstance(value, dict) and value:
            self._lines.open(f"{key}:", path, indent=_STEP)
            for each, item in value.items():
                text = self._leaf(item, template)
                self._lines.line(f"{yaml_text(each, template=True)}: {text}", indent=_STEP * 2)
        elif isinstance(value, list) and value:
            self._lines.open(f"{key}:", path, indent=_STEP)
            for item in value:
                self._lines.line(f"- {self._leaf(item, template)}", indent=_STEP * 2)
        else:
            self._lines.line(f"{key}: {self._leaf(value, template)}", path, indent=_STEP)

    def _leaf(self, value: Any, template: bool) -> str:
        if isinstance(value, str):
            return yaml_text(value, template=template)
        return json_text(value, template=template)

    def _written(self, path: str, value: str) -> str:
        # What a variable filled in is printed as the variable again.
        if path in self._templates:
            return yaml_text(self._templates[path], template=True)
        return yaml_text(value)
