"""What both readers fill: a policy in the making, checked piece by piece."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from policy_dsl import diagnostics, room
from policy_dsl.diagnostics import PolicyError, SourceText, Span, diagnostic, did_you_mean
from policy_dsl.escaping import LONGEST_POLICY_NAME, name_defect
from policy_dsl.language import parsing
from policy_dsl.language.parsing import TRUTH, Fragment, checked, plain_scalar, substitute
from policy_dsl.language.statements import StatementReader
from policy_dsl.policy import CLEARABLE, SECTIONS, Comment, Policy, Prune, Rule, Values, Words
from policy_dsl.quantities import parse_size
from policy_dsl.treatments import WHOLE_ROW, Written

# The JSON Schema of a policy as YAML: it names the keys and fields that readers take, and their
# types. That statements are well formed only the readers can say.
SCHEMA: Mapping[str, Any] = json.loads((room("grammar") / "policy.schema.json").read_text("utf-8"))
_KEYS = SCHEMA["properties"]
FIELDS: Mapping[str, Any] = {section: _KEYS[section]["properties"] for section in SECTIONS}
# YAML 1.1 reads these words as truth values; people rarely mean to.
_YAML_TRUTH = {"yes": "true", "on": "true", "no": "false", "off": "false"}
_NUMBER = re.compile(r"[-+]?[0-9]{1,18}(\.[0-9]{1,40})?(e[-+]?[0-9]{1,3})?")
_TYPES: Mapping[str, tuple[re.Pattern[str], Callable[[str], Any], str]] = {
    "integer": (re.compile(r"[-+]?[0-9]{1,18}"), int, "a whole number"),
    "number": (_NUMBER, float, "a number"),
    "boolean": (re.compile("true|false"), TRUTH.__getitem__, "true or false"),
}
_WHOLE_VARIABLE = re.compile(r"\$\{(\w+)\}")
_VARIABLE = re.compile(r"(?<!\$)\$\{")


class Draft:
    """Collects what a text says, values with their variables still in them, and its defects.

    Most methods return the key path of what they take, which comments are tied to.
    """

    def __init__(self, source: SourceText, name: str, overrides: Values, words: Words) -> None:
        self.source = checked(source)
        self.findings: list[diagnostics.Diagnostic] = []
        self.comments: list[Comment] = []
        self._overrides = overrides
        self._words = words
        self._texts = {"name": name}
        self._lists: dict[str, list[Any]] = defaultdict(list)
        self._mappings: dict[str, dict[str, Any]] = defaultdict(dict)
        self._vars = self._mappings["vars"]
        self._cleared: list[str] = []
        self._spans: dict[str, Span] = {}
        self._templates: dict[str, Any] = {}
        self._n_filled = 0

    def var(self, key: Fragment, value: Fragment, *, quoted: bool) -> str:
        """Takes a variable and its default."""
        name = key.text
        path = self._claim(f"vars.{name}", value.span, key.span)
        if not parsing.IDENTIFIER.fullmatch(name):
            self.report("malformed-variable", key.span, written=name)
        if _has_variable(value.text):
            self.report("nested-variable", value.span)
            return path
        # Without variables, only to turn an escaped `$${` into what it means.
        text = substitute(value, {})[0].text
        self._vars[name] = self._overrides.get(name, text if quoted else plain_scalar(text))
        return path

    def text(self, key: str, value: Fragment, key_span: Span) -> str:
        """Takes a key that holds one text."""
        self._claim(key, value.span, key_span)
        if not value.text and key in CLEARABLE:
            self._cleared.append(key)
            return key
        if (filled := self._value(key, value)) is not None:
            text = self._texts[key] = filled.text
            if not text.strip():
                self.report("empty-value", value.span, key=key)
            # Bundles are called after it where nobody says how.
            elif key == "name" and (reason := name_defect(text, longest=LONGEST_POLICY_NAME)):
                self.report("bad-policy-name", value.span, name=text, reason=reason)
        return key

    def clear(self, key: str, span: Span) -> str:
        """Takes a key under which nothing stays of what the policy extends."""
        if key not in CLEARABLE:
            cure = did_you_mean(key, CLEARABLE)
            self.report("unknown-key", span, cure=cure, where="clear", key=key)
        elif key in self._cleared:
            self.report("repeated-item", span, key="clear", item=key)
        self._cleared.append(key)
        self._spans.setdefault(f"clear.{key}", span)
        return key

    def word(self, key: str, value: Fragment) -> str:
        """Takes one more item of extends, targets, runtimes or allow."""
        path = f"{key}[{len(self._lists[key])}]"
        if key == "extends" and _has_variable(value.text):
            self.report("variable-in-extends", value.span)
            return path
        if (filled := self._value(path, value)) is None:
            return path
        word = filled.text
        if not word.strip():
            self.report("empty-value", value.span, key=key)
        # An item of a list has a path of its own, which `extends` is blamed by.
        if f"{key}.{word}" in self._spans:
            self.report("repeated-item", value.span, key=key, item=word)
        self._spans[f"{key}.{word}"] = value.span
        self._lists[key].append(word)
        if key != "targets":
            return path
        self._spans.setdefault("target", value.span)
        self._is_target(word, value.span)
        return key

    def block(self, target: Fragment) -> None:
        """Takes the target of a block of rules, named before or not."""
        if self._is_target(target.text, target.span) and target.text not in self._lists["targets"]:
            self.word("targets", target)

    def field(self, section: str, key: Fragment, value: Fragment) -> str:
        """Takes a field of defaults, calibration or output."""
        name = key.text
        # `otherwise` is a statement with a treatment, not a field with a word.
        if name not in FIELDS[section] or name == "otherwise":
            cure = did_you_mean(name, FIELDS[section])
            self.report("unknown-key", key.span, cure=cure, where=section, key=name)
            return section
        path = self._claim(f"{section}.{name}", value.span, key.span)
        filled = self._value(path, value)
        if filled and (read := self._read_field(section, name, filled)) is not None:
            self._mappings[section][name] = read
        return path

    def typed(self, kind: str, value: Fragment, *, where: str) -> Any | None:
        """The integer, number or boolean that the text is; None after adding a defect."""
        pattern, convert, expected = _TYPES[kind]
        if pattern.fullmatch(value.text):
            return convert(value.text)
        meant = _YAML_TRUTH.get(value.text.lower()) if kind == "boolean" else None
        self._wrong_type(value, where, expected, f"write {meant}" if meant else None)
        return None

    def metadata(self, key: Fragment, value: Any, span: Span) -> str:
        """Takes a JSON value under `metadata`."""
        path = self._claim(f"metadata.{key.text}", span, key.span)
        self._mappings["metadata"][key.text] = self._filled_json(value, span)
        if _has_variable(value):
            self._templates[path] = value
        return path

    def statement(self, raw: Fragment, kinds: tuple[str, ...], target: str | None = None) -> str:
        """Takes a rule, a `prune`, `test` or `otherwise` statement, of the allowed kinds."""
        filled = self._filled(raw)
        if filled is None:
            return ""
        read = StatementReader(filled, self._words)
        value = read.statement(kinds)
        self.findings += read.findings
        # Kept as written, so that printing gives back `${bits}bit` and not `4bit`.
        template = " ".join(raw.text.split()) if _has_variable(raw.text) else None
        match value:
            case None:
                return ""
            case Rule():
                self._spans.setdefault("rules", read.span)
                return self._add("rules", replace(value, target=target, template=template))
            case Written():
                path = self._claim("defaults.otherwise", read.span, read.span)
                self._mappings["defaults"]["otherwise"] = value
            case Prune():
                if self._lists["transforms"]:
                    self.report("contradicting-transforms", read.span, component="experts")
                path = self._add("transforms", value)
            case _:
                path = self._add("tests", value)
        self._spans[path] = read.span
        self._spans.setdefault(path.partition("[")[0], read.span)
        if template is not None:
            self._templates[path] = template.removeprefix("test ").removeprefix("otherwise ")
        return path

    def report(self, code: str, span: Span, *, cure: str | None = None, **facts: Any) -> None:
        """Adds a defect."""
        self.findings.append(diagnostic(code, span, suggestion=cure, **facts))

    def build(self) -> Policy:
        """The policy. Raises: PolicyError with every defect found on the way."""
        for key in self._cleared:
            if self._mappings.get(key):
                self.report("cleared-and-said", self._spans[f"clear.{key}"], key=key)
        # A Policy never exists with a hole in it.
        if self.findings:
            # Two checks may find the same defect.
            unique = dict.fromkeys(self.findings)
            raise PolicyError(sorted(unique, key=lambda each: each.span.start if each.span else -1))
        # Rules of a target come after those for all targets: the last that matches decides.
        order, rules = [None, *self._lists["targets"]], self._lists["rules"]
        numbers = sorted(range(len(rules)), key=lambda at: order.index(rules[at].target))
        moved = {f"rules[{old}]": f"rules[{new}]" for new, old in enumerate(numbers)}
        held: dict[str, Any] = {**self._texts}
        held |= {key: tuple(words) for key, words in self._lists.items()}
        held |= {key: tuple(named.items()) for key, named in self._mappings.items()}
        held |= {key: part(**self._mappings[key]) for key, part in SECTIONS.items()}
        held["rules"] = tuple(rules[at] for at in numbers)
        # Lists and texts that are given replace what is extended anyway; tests do not.
        said = {key for key, value in (self._texts | self._lists).items() if value} - {"tests"}
        held["cleared"] = tuple(key for key in CLEARABLE if key in {*self._cleared} - said)
        held["comments"] = tuple(
            replace(each, anchor=moved.get(each.anchor, each.anchor)) for each in self.comments
        )
        return Policy(**held, source=self.source, key_spans=self._spans, templates=self._templates)

    def _is_target(self, target: str, span: Span) -> bool:
        known = self._words.targets
        if target not in known:
            cure = did_you_mean(target, known)
            self.report("unknown-target", span, cure=cure, target=target, known=", ".join(known))
        return target in known

    def _add(self, key: str, item: Any) -> str:
        self._lists[key].append(item)
        return f"{key}[{len(self._lists[key]) - 1}]"

    def _claim(self, path: str, span: Span, key_span: Span) -> str:
        if path in self._spans:
            first = self._spans[path].location
            self.report("duplicate-key", key_span, notes=[f"first at {first}"], key=path)
        self._spans.setdefault(path, span)
        return path

    def _read_field(self, section: str, name: str, value: Fragment) -> Any | None:
        """The field's value of the type that its schema wants; None after adding a defect."""
        schema, read = FIELDS[section][name], None
        known = {"scheme": self._words.schemes, "method": self._words.methods}.get(name)
        if schema["type"] != "string":
            read = self.typed(schema["type"], value, where=name)
        elif known is not None and value.text not in known:
            cure = did_you_mean(value.text, known)
            self.report(f"unknown-{name}", value.span, cure=cure, **{name: value.text})
        elif name == "shard_size" and not parse_size(value.text):
            cure = "write a number with a unit, such as 5GiB or 5GB"
            self._wrong_type(value, name, "a size", cure)
        elif not value.text.strip():
            self.report("empty-value", value.span, key=name)
        else:
            read = value.text
        if read is not None and (reason := _misfit(schema, read)):
            key = f"{section}.{name}"
            self.report("bad-value", value.span, key=key, value=read, reason=reason)
        return read

    def _wrong_type(self, value: Fragment, key: str, expected: str, cure: str | None) -> None:
        found = f'"{value.text}"' if value.text else "nothing"
        self.report("wrong-type", value.span, cure=cure, key=key, expected=expected, found=found)

    def _value(self, path: str, value: Fragment) -> Fragment | None:
        if _has_variable(value.text):
            self._templates[path] = value.text
        return self._filled(value)

    def _filled(self, value: Fragment) -> Fragment | None:
        """The text with its variables replaced; None after adding a defect."""
        if "${" in value.text:
            # Before any of it is made: a short text can name a long one thousands of times.
            names = (written[1] for written in parsing.VARIABLE.finditer(value.text))
            self._n_filled += sum(len(str(self._vars.get(name, ""))) for name in names)
            self._n_filled += len(value.text)
            if self._n_filled > parsing.MAX_BYTES:
                defect = diagnostic("filled-too-long", value.span, limit=parsing.MAX_BYTES)
                raise PolicyError([*self.findings, defect])
        filled, findings = substitute(value, self._vars)
        self.findings += findings
        return None if findings else filled

    def _filled_json(self, value: Any, span: Span) -> Any:
        match value:
            case dict():
                return {key: self._filled_json(item, span) for key, item in value.items()}
            case list():
                return [self._filled_json(item, span) for item in value]
            case str():
                # Nothing but a variable keeps its type: a number stays a number.
                alone = _WHOLE_VARIABLE.fullmatch(value)
                if alone and alone[1] in self._vars:
                    return self._vars[alone[1]]
                filled = self._filled(Fragment.all_at(value, span))
                return filled and filled.text
        return value


def _misfit(schema: Mapping[str, Any], value: Any) -> str | None:
    """What a field takes, if the value is not that."""
    if value not in schema.get("enum", (value,)):
        return " or ".join(f"'{word}'" for word in schema["enum"])
    if "anyOf" in schema and value < 1 and value != WHOLE_ROW:
        return f"1 or more, or {WHOLE_ROW} for whole rows"
    if value < schema.get("minimum", value):
        return f"greater than or equal to {schema['minimum']}"
    if value > schema.get("maximum", value):
        return f"less than or equal to {schema['maximum']}"
    return None


def _has_variable(value: Any) -> bool:
    """Whether a text, or one in a JSON value, has a variable that is not escaped."""
    if isinstance(value, dict | list):
        return any(map(_has_variable, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and bool(_VARIABLE.search(value))
