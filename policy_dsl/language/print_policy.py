"""Policy -> text, in both notations and in one fixed form; its digest."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple

from policy_dsl import policy as model
from policy_dsl.language.parsing import plain_scalar, quote
from policy_dsl.policy import KEYS, Assertion, Key, Policy, Prune, Rule, Scalar, Selector
from policy_dsl.treatments import Written

_STEP = "  "
_LOOSE = model.And | model.Or | model.Except
# Selectors that are said by words and one value.
_LEAVES: Mapping[type, str] = {
    model.All: "all",
    model.Middle: "middle",
    model.Name: "{0.text}",
    model.Family: "family {0.name}",
    model.Boundary: "boundary {0.count}",
    model.LayersWhere: "layers where {0.expression}",
}
_SLASH = re.compile(r"(\\.)|/", re.DOTALL)
_DSL_FIELD = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)
_DSL_BARE = re.compile(r"[A-Za-z0-9_./~+-][\w./@:+~-]*", re.ASCII)
_YAML_PLAIN = re.compile(r"[A-Za-z_/](?:[\w./@+,() -]*[\w./@+)-])?|[0-9]+[A-Za-z]{1,4}", re.ASCII)
_YAML_STATEMENT = re.compile(r"[A-Za-z_](?:[^\s:#]|:(?=\S)| (?=[^\s#]))*")
_YAML_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
# YAML ends lines at these, DSL does not.
_LINE_BREAKS = str.maketrans("\r\x85\u2028\u2029", "    ")


def print_dsl(policy: Policy) -> str:
    """The policy as DSL text; `read_dsl` of it is the same policy, comments included."""
    lines = _Lines(policy)
    for key in KEYS:
        items = lines.items(key)
        if key.name in policy.cleared:
            lines.add(f'{key.name} ""' if key.kind == "text" else f"clear {key.name}", key.name)
        if key.kind == "rules":
            _dsl_rules(lines)
        elif key.name == "targets" and items:
            lines.add(f"target {', '.join(_dsl_text(item.value) for item in items)}", "targets")
        elif key.name != "targets":
            lines.lead(*[key.name] * (key.kind != "text"))
            for item in items:
                lines.add(_dsl_statement(key, item), item.path)
    return lines.text()


def print_yaml(policy: Policy) -> str:
    """The policy as YAML text; `read_yaml` of it is the same policy, comments included."""
    lines = _YamlLines(policy)
    # `targets:` is either a list of names or holds the rules of each: one key, two places.
    # A comment in an empty branch is reason enough to print the branch.
    branched = any(rule.target is not None for rule in policy.rules)
    branched = branched or any(anchor.startswith("targets.") for anchor in lines.anchors)
    for key in KEYS:
        if key.kind == "rules":
            lines.rules_text(None, "rules", "rules[]", "")
            if branched:
                lines.branches()
        elif key.name != "targets" or not branched:
            lines.key(key, lines.items(key), key.name in policy.cleared)
    return lines.text()


def canonical_text(policy: Policy) -> str:
    """The policy as YAML without variables and comments: one text for all equal policies."""
    rules = tuple(replace(rule, template=None) for rule in policy.rules)
    bare = replace(policy, rules=rules, comments=(), templates={}, key_spans={}, source=None)
    return print_yaml(bare)


def policy_digest(policy: Policy) -> str:
    """SHA-256, in hex, of the policy's canonical text."""
    return hashlib.sha256(canonical_text(policy).encode()).hexdigest()


class _Item(NamedTuple):
    """A value under a key, as it is printed."""

    path: str
    name: str
    value: Any


class _Lines:
    """Collects lines, and puts the comments of an anchor before and beside its line."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.anchors = {comment.anchor for comment in policy.comments}
        self._lines: list[str] = []
        self._opened = False
        self._leading: dict[str, list[str]] = defaultdict(list)
        self._trailing: dict[str, list[str]] = defaultdict(list)
        for comment in policy.comments:
            kind = self._trailing if comment.trailing else self._leading
            kind[comment.anchor].append(comment.text.translate(_LINE_BREAKS).strip())
        # What is about the whole text, and a blank line.
        self.lead("^")
        self._put("")

    def text(self) -> str:
        """Everything printed, and the comments whose anchors never came."""
        self.lead(*filter(None, (*self._leading, *self._trailing)), "")
        return "\n".join(self._lines).rstrip("\n") + "\n"

    def lead(self, *anchors: str, indent: str = "") -> None:
        """Prints all comments of these anchors, for lines that this notation does not have."""
        for anchor in anchors:
            for text in self._leading.pop(anchor, []) + self._trailing.pop(anchor, []):
                self._put(f"{indent}{text}" if text else "")

    def add(self, text: str, *anchors: str, indent: str = "", opens: bool = False) -> None:
        """Prints a line; a comment is put beside it. opens: no blank line follows it."""
        beside = [each for anchor in anchors for each in self._trailing.pop(anchor, [])]
        self.lead(*anchors, indent=indent)
        for extra in beside[1:]:
            self._put(indent + extra)
        self._put("  ".join((f"{indent}{text}", *beside[:1])))
        self._opened = opens

    def _put(self, line: str) -> None:
        if line or (self._lines and self._lines[-1] and not self._opened):
            self._lines.append(line)
            self._opened = False

    def items(self, key: Key) -> list[_Item]:
        """What the policy says under a key; variables as they were written."""
        name, value = key.name, getattr(self.policy, key.name)
        if key.kind == "text":
            # A name that is only the file's is not printed.
            given = self.policy.source is None or name in self.policy.key_spans or name != "name"
            pairs = [(name, name, value)] * bool(value and given)
        elif key.kind in ("mapping", "fields"):
            held = dict(value) if key.kind == "mapping" else model.given(value)
            pairs = [(f"{name}.{field}", field, held[field]) for field in held]
        else:
            pairs = [(f"{name}[{index}]", "", held) for index, held in enumerate(value)]
        said = self.policy.templates
        return [_Item(path, name, said.get(path, _written(v))) for path, name, v in pairs]

    def has_rules(self, target: str | None, end: str) -> bool:
        return end in self.anchors or any(rule.target == target for rule in self.policy.rules)

    def rules_of(self, target: str | None, end: str, indent: str = "") -> None:
        for index, rule in enumerate(self.policy.rules):
            if rule.target == target:
                self.add(rule_text(rule), f"rules[{index}]", indent=indent)
        # Comments below the last rule would else end up under the next key.
        self.lead(end, indent=indent)


class _YamlLines(_Lines):
    def key(self, key: Key, items: list[_Item], cleared: bool) -> None:
        replaced = key.name == "tests" and cleared
        if cleared and not (replaced and items):
            nothing = {"text": '""', "words": "[]", "statements": "[]"}.get(key.kind, "{}")
            self.add(f"{key.name}: {'{replace: []}' if replaced else nothing}", key.name)
        # One item reads better beside its key; both forms read the same.
        if key.kind == "words" and len(items) == 1:
            name = "target" if key.name == "targets" else key.name
            self.add(f"{name}: {_yaml_value(items[0].value)}", items[0].path, key.name)
        elif key.kind == "text":
            for item in items:
                self._text(item, "")
        elif items:
            self.add(f"{key.name}:", key.name, opens=True)
            if replaced:
                self.add("replace:", indent=_STEP, opens=True)
            for item in items:
                self._item(key, item, _STEP * (1 + replaced))

    def _item(self, key: Key, item: _Item, indent: str) -> None:
        name, value = item.name, item.value
        if key.kind == "fields" and not isinstance(value, int):
            self._text(item._replace(value=str(value)), indent)
        elif key.name != "metadata":
            plain = key.kind == "statements" and _YAML_STATEMENT.fullmatch(value)
            text = value if plain and value.isprintable() else _yaml_value(value)
            self.add(f"{f'{name}:' if name else '-'} {text}", item.path, indent=indent)
        elif isinstance(value, str):
            self._text(item, indent)
        elif isinstance(value, dict | list) and value:
            self.add(f"{_yaml_value(name)}:", item.path, indent=indent, opens=True)
            for held in value:
                mark = f"{_yaml_value(held)}:" if isinstance(value, dict) else "-"
                text = _yaml_value(value[held] if isinstance(value, dict) else held)
                self.add(f"{mark} {text}", indent=indent + _STEP)
        else:
            self.add(f"{_yaml_value(name)}: {print_json(value)}", item.path, indent=indent)

    def _text(self, item: _Item, indent: str) -> None:
        text = item.value
        lines = text.removesuffix("\n").split("\n")
        tidy = all(line.isprintable() and line == line.rstrip() for line in lines)
        blocked = tidy and len(lines) > 1 and lines[0][:1] not in ("", " ") and lines[-1]
        shown = "|" if text.endswith("\n") else "|-"
        # A template is printed as it was written, on one line.
        if item.path in self.policy.templates or not blocked:
            shown, lines = _yaml_value(text), []
        self.add(f"{_yaml_value(item.name)}: {shown}", item.path, indent=indent)
        # Blank ones too.
        self._lines += [f"{indent}{_STEP}{line}".rstrip() for line in lines]

    def branches(self) -> None:
        self.add("targets:", "targets", opens=True)
        for target in self.policy.targets:
            anchor, end = f"targets.{target}", f"targets.{target}.rules[]"
            empty = not self.has_rules(target, end)
            self.add(f"{_yaml_value(target)}:{' {}' * empty}", anchor, indent=_STEP)
            self.rules_text(target, f"{anchor}.rules", end, _STEP * 2)

    def rules_text(self, target: str | None, anchor: str, end: str, indent: str) -> None:
        if self.has_rules(target, end):
            self.add("rules: |", anchor, indent=indent, opens=True)
            self.rules_of(target, end, indent + _STEP)


def _dsl_rules(lines: _Lines) -> None:
    lines.lead("rules")
    lines.rules_of(None, "rules[]")
    for target in lines.policy.targets:
        anchor, end = f"targets.{target}", f"targets.{target}.rules[]"
        # The header names every target; a block without rules would say nothing more.
        if not lines.has_rules(target, end):
            lines.lead(anchor)
            continue
        lines.add(f"on {_dsl_text(target)} {{", anchor, opens=True)
        lines.rules_of(target, end, _STEP)
        lines.add("}")


def _dsl_statement(key: Key, item: _Item) -> str:
    name, value = item.name, item.value
    # A treatment, not a word.
    if item.path == "defaults.otherwise" or key.kind == "statements":
        return f"{'otherwise ' if name else key.word}{value}"
    if key.name == "metadata":
        return f"metadata {name if _DSL_FIELD.fullmatch(name) else quote(name)} {print_json(value)}"
    if key.name == "vars":
        # A text that looks like another value is quoted.
        plain = isinstance(value, str) and isinstance(plain_scalar(value), str)
        return f"var {name} = {_dsl_text(value) if plain else print_json(value)}"
    return f"{key.word} {f'{name} ' * (key.kind == 'fields')}{_dsl_text(value)}"


def _dsl_text(value: Scalar) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if _DSL_BARE.fullmatch(text) else quote(text)


def _written(value: Any) -> Any:
    """What is printed of a value, so that no `${` in it is read as a variable."""
    match value:
        case str():
            value = value.replace("${", "$${")
        case dict():
            value = {key: _written(item) for key, item in value.items()}
        case list():
            value = [_written(item) for item in value]
        case Prune():
            value = prune_text(value)
        case Assertion():
            value = value.text
        case Written():
            value = print_treatment(value)
    return value


def _yaml_value(value: Any) -> str:
    """A value in YAML on one line; a text is plain if nobody can mistake it, else quoted."""
    if not isinstance(value, str):
        return print_json(value)
    mistakable = value.lower() in _YAML_WORDS or not isinstance(plain_scalar(value), str)
    return value if _YAML_PLAIN.fullmatch(value) and not mistakable else quote(value)


def print_json(value: Any) -> str:
    """A JSON value on one line; valid JSON and valid YAML of every version."""
    match value:
        case None | bool():
            return json.dumps(value)
        case int() | float():
            text = repr(value)
            return text.replace("e", ".0e") if "e" in text and "." not in text else text
        case str():
            return quote(value)
        case dict():
            return "{" + ", ".join(f"{quote(key)}: {print_json(value[key])}" for key in value) + "}"
    return "[" + ", ".join(map(print_json, value)) + "]"


def print_selector(selector: Selector) -> str:
    """The selector as a policy says it, such as `experts.down_proj in layers 2-59`."""
    text = _LEAVES.get(type(selector), "").format(selector)
    match selector:
        case model.Except(base, excluded):
            text = f"{_within(base, model.Except)} except {_within(excluded, model.Except)}"
        case model.Or(parts):
            # `a, b in layers 0-1` would be refused.
            text = ", ".join(_within(part, _LOOSE) for part in parts)
        case model.And(parts):
            text = "".join(_conditions(parts))
        case model.Layers(ranges, boundary):
            text = f"{'boundary ' * boundary}layers {print_ranges(ranges)}"
        case model.Name(name, experts) if experts:
            text = f"experts[{print_ranges(experts)}]{name.removeprefix('experts')}"
        case model.Glob(pattern):
            text = quote(pattern).replace("${", "$${")
        case model.Regex(pattern):
            slashes = _SLASH.sub(lambda found: found[1] or "\\/", pattern)
            text = f"/{slashes}/".replace("${", "$${")
    return text


def print_ranges(ranges: Iterable[model.LayerRange]) -> str:
    """Ranges as `0-1,-2..-1`."""
    pairs = [(layers.start, layers.stop) for layers in ranges]
    return ",".join(
        str(start) if start == stop else f"{start}{'..' if min(start, stop) < 0 else '-'}{stop}"
        for start, stop in pairs
    )


def _conditions(parts: tuple[Selector, ...]) -> Iterator[str]:
    for part, after in zip_longest(parts, parts[1:]):
        # An expression would swallow the `and` after it.
        yield _within(part, _LOOSE | model.LayersWhere if after else _LOOSE)
        yield " in " if isinstance(after, model.LayerSet) else " and " * bool(after)


def _within(part: Selector, looser: Any) -> str:
    return f"({print_selector(part)})" if isinstance(part, looser) else print_selector(part)


def print_treatment(treatment: Written) -> str:
    """The treatment as a policy says it, such as `4bit affine g64`."""
    words = (
        treatment.dtype or treatment.action.replace("quantize", ""),
        "" if treatment.bits is None else f"{treatment.bits}bit",
        treatment.scheme,
        "" if treatment.group_size is None else f"g{treatment.group_size}",
        {None: "", True: "sym", False: "asym"}[treatment.symmetric],
        f"by {treatment.method}" if treatment.method else "",
    )
    return " ".join(filter(None, words))


def rule_text(rule: Rule) -> str:
    """A rule as a statement, with the variables that its author wrote."""
    if rule.template is not None:
        return rule.template
    text = f"{print_selector(rule.selector)}: {print_treatment(rule.treatment)}"
    return f"{text} optional" if rule.optional else text


def prune_text(prune: Prune) -> str:
    """A transform as a statement."""
    kept = f"keep {print_ranges(prune.keep)}" if prune.keep else f"to {prune.to} by {prune.by}"
    return f"prune experts {kept}"
