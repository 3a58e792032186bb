"""What both readers fill: a policy in the making, checked piece by piece.

Values arrive as fragments with their variables still in them; defects are collected, and
`build` returns the Policy or raises them all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from policy_dsl.diagnostics import (
    Diagnostic,
    PolicyError,
    SourceText,
    Span,
    diagnostic,
    did_you_mean,
    errors,
)
from policy_dsl.escaping import LONGEST_POLICY_NAME, name_defect
from policy_dsl.language.draft_fields import SECTIONS, read_field, validate_section
from policy_dsl.language.draft_rules import ReadStatement, read_statement
from policy_dsl.language.fragments import (
    IDENTIFIER,
    MAX_BYTES,
    Fragment,
    filled_length,
    mentions_variable,
    substitute,
)
from policy_dsl.policy import CLEARABLE, Assertion, Comment, Policy, Prune, Rule, Scalar
from policy_dsl.treatments import Written
from policy_dsl.vocabulary import TARGETS

TRUTH = {"true": True, "false": False}
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,999})")
_FLOAT = re.compile(r"-?[0-9]+(?:\.[0-9]+(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)")
_WHOLE_VARIABLE = re.compile(r"\$\{(\w+)\}")
_VARIABLE = re.compile(r"(?<!\$)\$\{")


def plain_scalar(text: str) -> Scalar:
    """A bare word as the value it looks like: a truth value, a number, or text."""
    if text in TRUTH:
        return TRUTH[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text


class Draft:
    """Collects what a text says under the policy's keys; see the module's docstring."""

    def __init__(self, source: SourceText, name: str, overrides: Mapping[str, Scalar]) -> None:
        self.source = source
        self.findings: list[Diagnostic] = []
        self.comments: list[Comment] = []
        self._overrides = overrides
        self._texts: dict[str, str] = {"name": name}
        self._lists: dict[str, list[str]] = {"extends": [], "targets": [], "runtimes": []}
        self._vars: dict[str, Scalar] = {}
        self._sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        self._metadata: dict[str, Any] = {}
        self._rules: list[Rule] = []
        self._transforms: list[Prune] = []
        self._tests: list[Assertion] = []
        self._cleared: list[str] = []
        self._spans: dict[str, Span] = {}
        self._templates: list[tuple[str, Any]] = []
        self._n_filled = 0

    def var(self, key: Fragment, value: Fragment, *, quoted: bool) -> str:
        """Takes a variable and its default; returns its anchor."""
        name = key.text
        anchor = self._claim(f"vars.{name}", value.span, key.span)
        if not IDENTIFIER.fullmatch(name):
            self.report("malformed-variable", key.span, written=name)
        if _mentions_variable(value.text):
            self.report("nested-variable", value.span)
            return anchor
        # Without variables, only to turn an escaped `$${` into what it stands for.
        text = substitute(value, {})[0].text
        default = text if quoted else plain_scalar(text)
        self._vars[name] = self._overrides.get(name, default)
        return anchor

    def text(self, key: str, value: Fragment, key_span: Span) -> str:
        """Takes a key that holds one text; returns its anchor."""
        anchor = self._claim(key, value.span, key_span)
        if not value.text and key in CLEARABLE:
            self._cleared.append(key)
            return anchor
        self._texts[key] = self._value(anchor, value).text
        if not self._texts[key].strip():
            self.report("empty-value", value.span, key=key)
        elif key == "name":
            self._check_name(self._texts[key], value.span)
        return anchor

    def clear(self, key: str, span: Span) -> str:
        """Takes a key under which nothing stays of what the policy extends; its anchor."""
        if key not in CLEARABLE:
            cure = did_you_mean(key, CLEARABLE)
            self.report("unknown-key", span, cure=cure, where="clear", key=key)
        elif key in self._cleared:
            self.report("repeated-item", span, key="clear", item=key)
        self._cleared.append(key)
        self._spans.setdefault(f"clear.{key}", span)
        return key

    def word(self, key: str, value: Fragment) -> str:
        """Takes one more item of extends, targets or runtimes; returns its anchor."""
        anchor = f"{key}[{len(self._lists[key])}]"
        if key == "extends" and _mentions_variable(value.text):
            self.report("variable-in-extends", value.span)
            return anchor
        word = self._value(anchor, value).text
        if not word.strip():
            self.report("empty-value", value.span, key=key)
        # An item of a list has a path of its own, which `extends` is blamed by.
        path = f"{key}.{word}"
        if path in self._spans:
            self.report("repeated-item", value.span, key=key, item=word)
        self._spans[path] = value.span
        self._lists[key].append(word)
        if key == "targets":
            self._spans.setdefault("target", value.span)
            if word not in TARGETS:
                self._unknown_target(value, word)
        return "targets" if key == "targets" else anchor

    def block(self, target: Fragment) -> None:
        """Takes the target of a block of rules, named before or not."""
        if target.text not in TARGETS:
            self._unknown_target(target)
        elif target.text not in self._lists["targets"]:
            self.word("targets", target)

    def field(self, section: str, key: Fragment, value: Fragment) -> str:
        """Takes a field of defaults, calibration or output; returns its anchor."""
        name = key.text
        known = SECTIONS[section].model_fields
        # `otherwise` is a statement with a treatment, not a field with a word.
        if name not in known or name == "otherwise":
            cure = did_you_mean(name, known)
            self.report("unknown-key", key.span, cure=cure, where=section, key=name)
            return section
        anchor = self._claim(f"{section}.{name}", value.span, key.span)
        found = read_field(SECTIONS[section], name, self._value(anchor, value), self.findings)
        if found is not None:
            self._sections[section][name] = found
        return anchor

    def metadata(self, key: Fragment, value: Any, span: Span) -> str:
        """Takes a JSON value under `metadata`; returns its anchor."""
        anchor = self._claim(f"metadata.{key.text}", span, key.span)
        filled = self._filled_json(value, span)
        if _mentions_variable(value):
            self._templates.append((anchor, value))
        self._metadata[key.text] = filled
        return anchor

    def statement(self, raw: Fragment, kinds: tuple[str, ...], target: str | None = None) -> str:
        """Takes a rule, a `prune`, `test` or `otherwise` statement; returns its anchor.

        kinds: those that may stand here.
        """
        before = len(self.findings)
        filled = self._filled(raw, self._vars)
        if len(self.findings) > before:
            return ""
        read = read_statement(filled, kinds)
        self.findings += read.findings
        # Kept as written, so that printing gives back `${bits}bit` and not `4bit`.
        template = " ".join(raw.text.split()) if _mentions_variable(raw.text) else None
        return self._keep(read, template, target)

    def report(self, code: str, span: Span, *, cure: str | None = None, **facts: Any) -> None:
        """Adds a defect."""
        self.findings.append(diagnostic(code, span, suggestion=cure, **facts))

    def build(self) -> Policy:
        """The policy. Raises: PolicyError with every defect found on the way."""
        sections: dict[str, Any] = {
            name: validate_section(part, self._sections[name], self._spans, self.findings)
            for name, part in SECTIONS.items()
        }
        said = {**self._sections, "vars": self._vars, "metadata": self._metadata}
        for key in self._cleared:
            if said.get(key):
                self.report("cleared-and-said", self._spans[f"clear.{key}"], key=key)
        # A Policy never exists with a hole in it.
        if errors(self.findings):
            raise PolicyError(_in_order(self.findings))
        rules, renamed = _grouped(self._rules, self._lists["targets"])
        texts: dict[str, Any] = dict(self._texts)
        texts |= {key: tuple(words) for key, words in self._lists.items()}
        return Policy(
            **texts,
            **sections,
            vars=tuple(self._vars.items()),
            rules=rules,
            transforms=tuple(self._transforms),
            metadata=tuple(self._metadata.items()),
            tests=tuple(self._tests),
            cleared=self._emptied(),
            comments=tuple(_renamed(comment, renamed) for comment in self.comments),
            source=self.source,
            key_spans=tuple(self._spans.items()),
            templates=tuple(self._templates),
        )

    def _check_name(self, name: str, span: Span) -> None:
        reason = name_defect(name, longest=LONGEST_POLICY_NAME)
        if reason is not None:
            # Bundles are called after it where nobody says how.
            self.report("bad-policy-name", span, name=name, reason=reason)

    def _emptied(self) -> tuple[str, ...]:
        """The cleared keys without lists and texts that are given, and so replaced, anyway."""
        given = {key for key, words in self._lists.items() if words} | self._texts.keys()
        given |= {"transforms"} if self._transforms else set()
        return tuple(key for key in CLEARABLE if key in self._cleared and key not in given)

    def _unknown_target(self, value: Fragment, word: str | None = None) -> None:
        word, known = word or value.text, ", ".join(TARGETS)
        cure = did_you_mean(word, TARGETS)
        self.report("unknown-target", value.span, cure=cure, target=word, known=known)

    def _keep(self, read: ReadStatement, template: str | None, target: str | None) -> str:
        match read.value:
            case Rule() as rule:
                self._spans.setdefault("rules", read.span)
                self._rules.append(replace(rule, target=target, template=template))
                return f"rule:{len(self._rules) - 1}"
            case Prune() as prune:
                if any(other.component == prune.component for other in self._transforms):
                    self.report("contradicting-transforms", read.span, component=prune.component)
                anchor = f"transforms[{len(self._transforms)}]"
                self._transforms.append(prune)
            case Assertion() as test:
                anchor = f"tests[{len(self._tests)}]"
                self._tests.append(test)
            case Written() as treatment:
                anchor = self._claim("defaults.otherwise", read.span, read.span)
                self._sections["defaults"]["otherwise"] = treatment
            case None:
                return ""
        self._spans[anchor] = read.span
        self._spans.setdefault(anchor.partition("[")[0], read.span)
        if template is not None:
            words = template.removeprefix("test ").removeprefix("otherwise ")
            self._templates.append((anchor, words))
        return anchor

    def _claim(self, path: str, span: Span, key_span: Span) -> str:
        if path in self._spans:
            first = self._spans[path].location
            self.findings.append(
                diagnostic("duplicate-key", key_span, notes=[f"first at {first}"], key=path)
            )
        self._spans.setdefault(path, span)
        return path

    def _value(self, path: str, value: Fragment) -> Fragment:
        filled = self._filled(value, self._vars)
        if _mentions_variable(value.text):
            self._templates.append((path, value.text))
        return filled

    def _filled(self, value: Fragment, values: Mapping[str, Scalar]) -> Fragment:
        if mentions_variable(value.text):
            # Before any of it is made: a short text can name a long one thousands of times.
            self._n_filled += filled_length(value.text, values)
            if self._n_filled > MAX_BYTES:
                found = diagnostic("filled-too-long", value.span, limit=MAX_BYTES)
                raise PolicyError([*self.findings, found])
        filled, findings = substitute(value, values)
        self.findings += findings
        return filled

    def _filled_json(self, value: Any, span: Span) -> Any:
        match value:
            case dict():
                return {key: self._filled_json(item, span) for key, item in value.items()}
            case list():
                return [self._filled_json(item, span) for item in value]
            case str() if mentions_variable(value):
                # Nothing but a variable keeps its type: a number stays a number.
                whole = _WHOLE_VARIABLE.fullmatch(value)
                if whole and whole[1] in self._vars:
                    return self._vars[whole[1]]
                return self._filled(Fragment.all_at(value, span), self._vars).text
        return value


def _mentions_variable(value: Any) -> bool:
    match value:
        case dict():
            return any(_mentions_variable(item) for item in value.values())
        case list():
            return any(_mentions_variable(item) for item in value)
    return isinstance(value, str) and bool(_VARIABLE.search(value))


def _in_order(findings: list[Diagnostic]) -> list[Diagnostic]:
    # Two checks may find the same defect.
    unique = dict.fromkeys(findings)
    return sorted(unique, key=lambda found: found.span.start if found.span else -1)


def _grouped(rules: list[Rule], targets: list[str]) -> tuple[tuple[Rule, ...], Mapping[str, str]]:
    """Rules for all targets first, then those of each; and the comment anchors that follow."""
    # Rules of a target come after those for all targets: the last that matches decides.
    order = [None, *targets]
    numbered = sorted(enumerate(rules), key=lambda each: order.index(each[1].target))
    renamed = {f"rule:{old}": f"rules[{new}]" for new, (old, _) in enumerate(numbered)}
    return tuple(rule for _, rule in numbered), renamed


def _renamed(comment: Comment, renamed: Mapping[str, str]) -> Comment:
    return replace(comment, anchor=renamed.get(comment.anchor, comment.anchor))
