"""Policy -> text, in both notations and in one fixed form; its digest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from policy_dsl.language.fragments import escape_variables, quote
from policy_dsl.language.keys import KEYS, Key, plain_scalar
from policy_dsl.language.statement_text import print_treatment, prune_text, rule_text
from policy_dsl.policy import Assertion, Comment, Policy, Prune, Rule, Scalar
from policy_dsl.treatments import Written

_STEP = "  "
_DSL_FIELD = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)
_DSL_BARE = re.compile(r"[A-Za-z0-9_./~+-][\w./@:+~-]*", re.ASCII)
_YAML_PLAIN = re.compile(r"[A-Za-z_/](?:[\w./@+,() -]*[\w./@+)-])?|[0-9]+[A-Za-z]{1,4}", re.ASCII)
_YAML_STATEMENT = re.compile(r"[A-Za-z_](?:[^\s:#]|:(?=\S)| (?=[^\s#]))*")
_YAML_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
# YAML ends lines at these, DSL does not.
_LINE_BREAKS = re.compile("[\r\x85\u2028\u2029]")


def print_dsl(policy: Policy) -> str:
    """The policy as DSL text; `read_dsl` of it is the same policy, comments included."""
    return _DslPrinter(policy).print()


def print_yaml(policy: Policy) -> str:
    """The policy as YAML text; `read_yaml` of it is the same policy, comments included."""
    return _YamlPrinter(policy).print()


def canonical_text(policy: Policy) -> str:
    """The policy as YAML, with the values of its variables in their places and no comments.

    Policies that are equal have equal texts: how they were written takes no part.
    """
    rules = tuple(replace(rule, template=None) for rule in policy.rules)
    bare = replace(policy, rules=rules, comments=(), templates=(), key_spans=(), source=None)
    return print_yaml(bare)


def policy_digest(policy: Policy) -> str:
    """SHA-256, in hex, of the policy's canonical text."""
    return hashlib.sha256(canonical_text(policy).encode()).hexdigest()


class _Lines:
    """Collects lines; `line` puts an anchor's comments before and beside its line."""

    def __init__(self, comments: Iterable[Comment]) -> None:
        self._lines: list[str] = []
        self._opened = False
        self._leading: dict[str, list[str]] = {}
        self._trailing: dict[str, list[str]] = {}
        for comment in comments:
            kind = self._trailing if comment.trailing else self._leading
            text = _LINE_BREAKS.sub(" ", comment.text).strip()
            kind.setdefault(comment.anchor, []).append(text)
        # What is about the whole text, and a blank line after it.
        self.lead("^")
        self._add("")

    def has_comments(self, *anchors: str) -> bool:
        """Whether comments wait for one of these anchors."""
        return any(anchor in self._leading or anchor in self._trailing for anchor in anchors)

    def lead(self, *anchors: str, indent: str = "") -> None:
        """Prints all comments of these anchors, for lines that this notation does not have."""
        for anchor in anchors:
            texts = self._leading.pop(anchor, []) + self._trailing.pop(anchor, [])
            for text in texts:
                self._add(f"{indent}{text}" if text else "")

    def line(self, text: str, *anchors: str, indent: str = "") -> None:
        """Prints a line with the comments of its anchors; one is put beside it."""
        beside = [each for anchor in anchors for each in self._trailing.pop(anchor, [])]
        self.lead(*anchors, indent=indent)
        for extra in beside[1:]:
            self._add(f"{indent}{extra}")
        self._add(f"{indent}{text}" + (f"  {beside[0]}" if beside else ""))

    def open(self, text: str, *anchors: str, indent: str = "") -> None:
        """Prints a line that opens a block; no blank line follows it."""
        self.line(text, *anchors, indent=indent)
        self._opened = True

    def inner(self, line: str) -> None:
        """Prints a line of a block text, blank ones too."""
        self._lines.append(line)
        self._opened = False

    def text(self) -> str:
        """Everything printed, and the comments whose anchors never came."""
        for anchor in [*self._leading, *self._trailing]:
            if anchor:
                self.lead(anchor)
        self.lead("")
        return "\n".join(self._lines).rstrip("\n") + "\n"

    def _add(self, line: str) -> None:
        if line or (self._lines and self._lines[-1] and not self._opened):
            self._lines.append(line)
            self._opened = False


class _Item(NamedTuple):
    """A value under a key: its key path, its name if it has one, what is printed of it.

    template: it has variables, which the policy knows the values of. A `${` that is none is
    escaped already.
    """

    path: str
    name: str
    value: Any
    template: bool


class _Printer:
    """What both notations print."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._lines = _Lines(policy.comments)
        self._templates = dict(policy.templates)
        self._keys = {
            key: [self._item(*said) for said in self._said(key)]
            for key in KEYS
            if key.merge != "rules"
        }

    def _said(self, key: Key) -> Iterable[tuple[str, str, Any]]:
        """The key path, the name and the value of everything under a key."""
        name, value = key.name, getattr(self._policy, key.name)
        if key.kind == "text":
            # A name that is only that of the file is not printed.
            spans = {"name": None, **dict(self._policy.key_spans)}
            unsaid = name == "name" and self._policy.source and not spans["name"]
            return [(name, name, value)] if value and not unsaid else []
        if key.kind in ("fields", "mapping"):
            named = (
                value if key.kind == "mapping" else (pair for pair in value if pair[1] is not None)
            )
            return [(f"{name}.{field}", field, held) for field, held in named]
        return [(f"{name}[{index}]", "", held) for index, held in enumerate(value)]

    def _item(self, path: str, name: str, value: Any) -> _Item:
        if path in self._templates:
            return _Item(path, name, self._templates[path], template=True)
        match value:
            case Prune():
                value = prune_text(value)
            case Assertion():
                value = value.text
            case Written():
                value = print_treatment(value)
            case _:
                value = _escaped(value)
        return _Item(path, name, value, template=False)

    def _rules_of(self, target: str | None) -> list[tuple[str, Rule]]:
        """The rules for all targets, or those for one alone, with their anchors."""
        numbered = enumerate(self._policy.rules)
        return [(f"rules[{index}]", rule) for index, rule in numbered if rule.target == target]


class _DslPrinter(_Printer):
    def print(self) -> str:
        lines = self._lines
        for key in KEYS:
            if key.name == "targets" and self._policy.targets:
                lines.line(f"target {', '.join(map(_dsl_text, self._policy.targets))}", "targets")
            elif key.name == "rules":
                self._rules()
            if key.name in self._policy.cleared:
                empty = f'{key.name} ""' if key.kind == "text" else f"clear {key.name}"
                lines.line(empty, key.name)
            if key.kind != "text" and key.merge != "rules":
                lines.lead(key.name)
            for item in self._keys.get(key, ()):
                lines.line(self._statement(key, item), item.path)
        return lines.text()

    def _statement(self, key: Key, item: _Item) -> str:
        name, value = item.name, item.value
        if key.kind == "statements":
            return f"{key.word}{value}"
        # A statement of its own in the DSL: its value is a treatment, not a word.
        if item.path == "defaults.otherwise":
            return f"otherwise {value}"
        if key.name == "vars":
            return f"var {name} = {_dsl_scalar(value)}"
        if key.name == "metadata":
            return f"metadata {name if _DSL_FIELD.fullmatch(name) else quote(name)} {_json(value)}"
        text = _dsl_text(str(value).lower() if isinstance(value, bool) else str(value))
        return f"{key.word} {name} {text}" if key.kind == "fields" else f"{key.word} {text}"

    def _rules(self) -> None:
        lines = self._lines
        lines.lead("rules")
        for anchor, rule in self._rules_of(None):
            lines.line(rule_text(rule), anchor)
        lines.lead("rules[]")
        for target in self._policy.targets:
            rules = self._rules_of(target)
            end = f"targets.{target}.rules[]"
            # The header names every target; a block without rules would say nothing more.
            if not rules and not lines.has_comments(end):
                lines.lead(f"targets.{target}")
                continue
            lines.open(f"on {_dsl_text(target)} {{", f"targets.{target}")
            for anchor, rule in rules:
                lines.line(rule_text(rule), anchor, indent=_STEP)
            lines.lead(end, indent=_STEP)
            lines.line("}")


class _YamlPrinter(_Printer):
    def print(self) -> str:
        # `targets:` is either a list of names or holds the rules of each: one key, two places.
        branches = [f"targets.{target}" for target in self._policy.targets]
        ends = [f"{anchor}.rules[]" for anchor in branches]
        # A comment in an empty branch is reason enough to print the branch.
        ruled = any(rule.target is not None for rule in self._policy.rules)
        branched = ruled or self._lines.has_comments(*branches, *ends)
        for key in KEYS:
            if key.name == "rules":
                self._rules(None, "rules", "rules[]", "")
                if branched:
                    self._branches()
            elif key.name == "targets":
                if not branched:
                    self._targets()
            else:
                self._key(key, self._keys[key], key.name in self._policy.cleared)
        return self._lines.text()

    def _key(self, key: Key, items: list[_Item], cleared: bool) -> None:
        indent, replaced = _STEP, key.name == "tests" and cleared
        if replaced and not items:
            self._lines.line("tests: {replace: []}", "tests")
        elif cleared and not replaced:
            nothing = {"text": '""', "words": "[]", "statements": "[]"}.get(key.kind, "{}")
            self._lines.line(f"{key.name}: {nothing}", key.name)
        if key.kind == "text":
            for item in items:
                self._text(key.name, item, "")
            return
        # One item reads better beside its key; both forms read the same.
        if key.kind == "words" and len(items) == 1:
            text = _yaml_text(items[0].value)
            self._lines.line(f"{key.name}: {text}", items[0].path, key.name)
            return
        if items:
            self._lines.open(f"{key.name}:", key.name)
        if items and replaced:
            self._lines.open("replace:", indent=indent)
            indent += _STEP
        for item in items:
            self._named(key, item, indent)

    def _named(self, key: Key, item: _Item, indent: str) -> None:
        name, value = item.name, item.value
        if key.kind == "fields" and not isinstance(value, bool | int):
            self._text(name, item._replace(value=str(value)), indent)
        elif key.name == "metadata":
            self._metadata(item)
        else:
            text = _yaml_statement(value) if key.kind == "statements" else _yaml_value(value)
            self._lines.line(f"{f'{name}:' if name else '-'} {text}", item.path, indent=indent)

    def _text(self, key: str, item: _Item, indent: str) -> None:
        # A template is printed as it was written, on one line.
        block = None if item.template else _yaml_block(item.value)
        header, inner = block or (_yaml_text(item.value), [])
        self._lines.line(f"{key}: {header}", item.path, indent=indent)
        for line in inner:
            self._lines.inner(f"{indent}{_STEP}{line}" if line else "")

    def _metadata(self, item: _Item) -> None:
        key, value = _yaml_text(item.name), item.value
        if isinstance(value, str):
            self._text(key, item, _STEP)
        elif isinstance(value, dict | list) and value:
            self._lines.open(f"{key}:", item.path, indent=_STEP)
            for held in value:
                mark = f"{_yaml_text(held)}:" if isinstance(value, dict) else "-"
                text = _yaml_value(value[held] if isinstance(value, dict) else held)
                self._lines.line(f"{mark} {text}", indent=_STEP * 2)
        else:
            self._lines.line(f"{key}: {_json(value)}", item.path, indent=_STEP)

    def _targets(self) -> None:
        words = [_yaml_text(target) for target in self._policy.targets]
        if len(words) == 1:
            self._lines.line(f"target: {words[0]}", "targets")
        elif words:
            self._lines.open("targets:", "targets")
            for word in words:
                self._lines.line(f"- {word}", indent=_STEP)

    def _branches(self) -> None:
        self._lines.open("targets:", "targets")
        for target in self._policy.targets:
            anchor, end = f"targets.{target}", f"targets.{target}.rules[]"
            empty = not self._rules_of(target) and not self._lines.has_comments(end)
            self._lines.line(f"{_yaml_text(target)}:{' {}' * empty}", anchor, indent=_STEP)
            self._rules(target, f"{anchor}.rules", end, _STEP * 2)

    def _rules(self, target: str | None, anchor: str, end: str, indent: str) -> None:
        rules = self._rules_of(target)
        if not rules and not self._lines.has_comments(end):
            return
        self._lines.open("rules: |", anchor, indent=indent)
        for path, rule in rules:
            self._lines.line(rule_text(rule), path, indent=indent + _STEP)
        # Comments below the last rule would else end up under the next key.
        self._lines.lead(end, indent=indent + _STEP)


def _escaped(value: Any) -> Any:
    """A value whose texts are read back as they are: no `${` in them is a variable."""
    match value:
        case str():
            return escape_variables(value)
        case dict():
            return {key: _escaped(item) for key, item in value.items()}
        case list() | tuple():
            return [_escaped(item) for item in value]
    return value


def _dsl_text(text: str) -> str:
    """A text in DSL: bare if it is one word, else quoted."""
    return text if _DSL_BARE.fullmatch(text) else quote(text)


def _dsl_scalar(value: Scalar) -> str:
    """A variable's value in DSL; a text that looks like another value is quoted."""
    if not isinstance(value, str):
        return _json(value)
    text = _dsl_text(value)
    return quote(text) if not isinstance(plain_scalar(text), str) else text


def _yaml_text(text: str) -> str:
    """A text in YAML on one line, plain if nobody can mistake it, else quoted."""
    mistakable = text.lower() in _YAML_WORDS or not isinstance(plain_scalar(text), str)
    return text if _YAML_PLAIN.fullmatch(text) and not mistakable else quote(text)


def _yaml_value(value: Any) -> str:
    return _yaml_text(value) if isinstance(value, str) else _json(value)


def _yaml_statement(text: str) -> str:
    """A statement as a YAML list item."""
    return text if _YAML_STATEMENT.fullmatch(text) and text.isprintable() else quote(text)


def _yaml_block(text: str) -> tuple[str, list[str]] | None:
    """Header and lines of a text as a literal block; None if it has one line or odd spaces."""
    lines = text.removesuffix("\n").split("\n")
    tidy = all(line.isprintable() and line == line.rstrip() for line in lines)
    if len(lines) < 2 or not tidy or not lines[0] or lines[0][0] == " " or not lines[-1]:
        return None
    return ("|" if text.endswith("\n") else "|-"), lines


def _json(value: Any) -> str:
    """A JSON value on one line; valid JSON and valid YAML."""
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case int() | float():
            return number(value)
        case str():
            return quote(value)
        case dict():
            return "{" + ", ".join(f"{quote(key)}: {_json(value[key])}" for key in value) + "}"
    return "[" + ", ".join(map(_json, value)) + "]"


def number(value: float) -> str:
    """A number as JSON and every YAML version read it."""
    text = repr(value)
    return text.replace("e", ".0e") if "e" in text and "." not in text else text
