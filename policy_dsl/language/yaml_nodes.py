"""YAML text -> composed nodes that know their place; nothing is ever constructed.

Anchors, aliases, tags and deep nesting are refused while composing, before anything expands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from policy_dsl.diagnostics import Diagnostic, PolicyError, SourceText, Span, diagnostic, fail
from policy_dsl.language.fragments import Fragment
from policy_dsl.language.keys import mistakes

MAX_NESTING = 32
# The library takes some 50 microseconds for each.
MAX_VALUES = 50_000
_NULLS = ("", "~", "null", "Null", "NULL")
# What may mean one visible character, in double quotes, in single quotes and elsewhere.
_UNITS = {
    '"': re.compile(
        r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|\r?\n\s*|.)|\S", re.DOTALL
    ),
    "'": re.compile(r"''|\S"),
    "": re.compile(r"\S"),
}
_SPACE_ESCAPES = set("ntrvf _NLP\n\r")


class Pair(NamedTuple):
    """A key of a mapping and its value."""

    name: str
    key: ScalarNode
    value: Node


class _Loader(yaml.SafeLoader):
    """Composes nodes, refusing what a policy has no use for."""

    depth = 0
    count = 0

    def __init__(self, source: SourceText) -> None:
        super().__init__(source.text)
        self._source = source

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        span = Span(self._source, event.start_mark.index, event.end_mark.index)
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            cure = "a text that begins with * or & must be quoted"
            raise fail("yaml-alias", span, suggestion=cure)
        if getattr(event, "tag", None) is not None:
            raise fail("yaml-tag", span, tag=event.tag)
        if self.depth >= MAX_NESTING:
            raise fail("nested-too-deeply", span, limit=MAX_NESTING)
        self.count += 1
        if self.count > MAX_VALUES:
            path, limit = self._source.name, f"{MAX_VALUES:,}"
            count = f"more than {limit}"
            raise fail("too-many-parts", path=path, count=count, what="values", limit=limit)
        self.depth += 1
        node: Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


def compose(source: SourceText) -> Node | None:
    """The root node of a YAML text; None if it is empty.

    Raises: PolicyError if it is not YAML, or YAML that policies do not use.
    """
    loader = _Loader(source)
    try:
        return loader.get_single_node()
    except yaml.MarkedYAMLError as failure:
        raise PolicyError([_explain(source, failure)]) from None
    except (yaml.YAMLError, ValueError, OverflowError, IndexError) as failure:
        reason = str(failure).splitlines()[0]
        raise fail("bad-yaml", Span(source, 0, 1), reason=reason) from None
    finally:
        loader.dispose()


def span_of(source: SourceText, node: Node) -> Span:
    """Where a node is; of a mapping or list that spans lines, its first line."""
    start, end = node.start_mark.index, node.end_mark.index
    if not isinstance(node, ScalarNode) or node.style in ("|", ">"):
        line_end = source.text.find("\n", start)
        end = min(end, line_end if line_end >= 0 else end)
    return Span(source, start, max(end, start))


def kind_of(node: Node) -> str:
    """What a node is, in the users' words."""
    if isinstance(node, SequenceNode):
        return "a list"
    if isinstance(node, MappingNode):
        return "a mapping"
    return "nothing" if is_null(node) else f'"{node.value}"'


def is_null(node: Node) -> bool:
    """Whether a node is an empty value."""
    return isinstance(node, ScalarNode) and node.style is None and node.value in _NULLS


def pairs(source: SourceText, node: MappingNode, findings: list[Diagnostic]) -> list[Pair]:
    """The keys and values of a mapping; what is wrong with its keys goes to `findings`."""
    found: dict[str, Pair] = {}
    for key, value in node.value:
        span = span_of(source, key)
        if not isinstance(key, ScalarNode) or is_null(key):
            findings.append(diagnostic("bad-key", span, found=kind_of(key)))
        elif key.value == "<<" and key.style is None:
            findings.append(diagnostic("yaml-alias", span))
        elif key.value in found:
            first = span_of(source, found[key.value].key).location
            notes = [f"first at {first}"]
            findings.append(diagnostic("duplicate-key", span, notes=notes, key=key.value))
        else:
            found[key.value] = Pair(key.value, key, value)
    return list(found.values())


def scalar_fragment(source: SourceText, node: ScalarNode) -> Fragment:
    """The value of a scalar, each character with its place in the file.

    Indentation, folding and escapes change white space only, so that the other characters of
    value and file correspond one to one.
    """
    at = before = _body_start(source.text, node)
    units = list(_visible(source.text, at, node))
    if len(units) != sum(not char.isspace() for char in node.value):
        return Fragment.all_at(node.value, span_of(source, node))
    ahead, places = iter(units), list[tuple[int, int]]()
    for char in node.value:
        places.append((before, before) if char.isspace() else next(ahead))
        before = places[-1][1]
    starts, ends = [start for start, _ in places], [end for _, end in places]
    return Fragment(node.value, source, starts, ends, at)


def _body_start(text: str, node: ScalarNode) -> int:
    start: int = node.start_mark.index
    if node.style in ("|", ">"):
        return text.find("\n", start) + 1 or len(text)
    return start + (node.style in ("'", '"'))


def _visible(text: str, at: int, node: ScalarNode) -> Iterator[tuple[int, int]]:
    """Start and end of everything in the file that means one visible character."""
    end = node.end_mark.index - (node.style in ("'", '"'))
    for unit in _UNITS.get(node.style or "", _UNITS[""]).finditer(text, at, end):
        code = unit[0][1:] if node.style == '"' else ""
        if len(code) > 1 and code[0] in "xuU":
            space = chr(int(code[1:], 16)).isspace()
        else:
            space = bool(code) and code[0] in _SPACE_ESCAPES
        if not space:
            yield unit.span()


def _explain(source: SourceText, failure: yaml.MarkedYAMLError) -> Diagnostic:
    mark = failure.problem_mark or failure.context_mark
    at = min(mark.index, max(len(source.text) - 1, 0)) if mark else 0
    problem = failure.problem or "not YAML"
    span = Span(source, at, at + 1)
    line = source.line(span.line).strip()
    if "mapping values are not allowed" in problem and line.startswith(("- ", "rules:")):
        text = line.removeprefix("rules:").strip().removeprefix("- ")
        shown = [f"  {part.strip()}" for part in text.split(";") if part.strip()]
        notes = ["write them as a text:", "rules: |", *shown]
        return diagnostic("several-statements", span, notes=notes)
    if "expected a single document" in (failure.context or ""):
        return diagnostic("several-documents", span)
    for pattern, words in mistakes()["yaml"].items():
        if match := re.search(pattern, problem):
            return diagnostic("bad-yaml", span, reason=words.format(*match.groups()))
    return diagnostic("bad-yaml", span, reason=problem)
