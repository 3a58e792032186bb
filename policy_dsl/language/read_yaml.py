"""YAML text -> Policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from policy_dsl.diagnostics import PolicyError, SourceText, Span, did_you_mean, fail
from policy_dsl.language.document import Document, PruneFields, ReplacedTests
from policy_dsl.language.draft import TRUTH, Draft, plain_scalar
from policy_dsl.language.draft_fields import SECTIONS
from policy_dsl.language.fragments import Fragment, checked, join
from policy_dsl.language.read_yaml_rules import RuleReader
from policy_dsl.language.yaml_comments import Place, place_of, yaml_comments
from policy_dsl.language.yaml_nodes import (
    Pair,
    compose,
    is_null,
    kind_of,
    pairs,
    scalar_fragment,
    span_of,
)
from policy_dsl.policy import Policy, Scalar

# Keys whose empty list or mapping clears what is extended; empty tests add none.
_EMPTIED = (*SECTIONS, "vars", "metadata", "runtimes", "transforms")
_TEXTS = ("name", "description", "model", "fp8_dequant")
# A transform's keys, in the order in which a statement says them.
_TRANSFORM = tuple(field.alias or name for name, field in PruneFields.model_fields.items())
# YAML 1.1 truth values: nobody means the boolean who writes `licence: no`.
_AMBIGUOUS = ("yes", "no", "on", "off", "y", "n")


def read_yaml(source: SourceText, name: str, values: Mapping[str, Scalar] | None = None) -> Policy:
    """The policy that a YAML text says; `extends` is left as written.

    name: the policy's name if the text gives none. values: replace the defaults of `vars`.
    Raises: PolicyError with every defect of the text.
    """
    source = checked(source)
    root = compose(source)
    if root is None or is_null(root) or (isinstance(root, MappingNode) and not root.value):
        raise fail("empty-policy", Span(source, 0, min(1, len(source.text))), path=source.name)
    if not isinstance(root, MappingNode):
        raise fail("not-a-policy", span_of(source, root), found=kind_of(root))
    return _Reader(source, name, values or {}, root).read()


def looks_like_yaml(source: SourceText) -> bool:
    """Whether a text of unknown notation is YAML: a mapping with a key of policies."""
    try:
        root = compose(checked(source))
    except PolicyError:
        return False
    return isinstance(root, MappingNode) and any(
        key.value in Document.model_fields for key, _ in root.value if isinstance(key, ScalarNode)
    )


class _Reader:
    """Reads key after key, variables first; `_places` are what comments can belong to."""

    def __init__(
        self, source: SourceText, name: str, values: Mapping[str, Scalar], root: MappingNode
    ) -> None:
        self._source = source
        self._root = root
        self._draft = Draft(source, name, values)
        self._places: list[Place] = []
        self._rules = RuleReader(source, self._draft, self._places)

    def read(self) -> Policy:
        found = pairs(self._source, self._root, self._draft.findings)
        self._known(found, Document.model_fields, "a policy")
        # Variables may stand below the rules that use them.
        for pair in sorted(found, key=lambda each: each.name != "vars"):
            self._key(pair)
        self._draft.comments += yaml_comments(self._source.text, self._root, self._places)
        return self._draft.build()

    def _key(self, pair: Pair) -> None:
        name = pair.name
        if _is_empty(pair.value) and name in _EMPTIED:
            self._place(pair, self._draft.clear(name, span_of(self._source, pair.key)))
        elif name in _TEXTS:
            if text := self._text(pair.value, name):
                self._draft.text(name, text, span_of(self._source, pair.key))
            self._place(pair, name)
        elif name in SECTIONS or name in ("vars", "metadata"):
            self._place_key(pair, name)
            self._section(pair)
        elif name in ("target", "targets"):
            self._place_key(pair, "targets")
            self._targets(pair)
        elif name in ("extends", "runtimes"):
            self._words(pair, name)
        elif name in ("transforms", "tests"):
            self._place_key(pair, name)
            if name == "tests" and isinstance(pair.value, MappingNode):
                self._replaced_tests(pair)
            else:
                self._statements(pair, name)
        elif name == "rules":
            self._place_key(pair, "rules")
            self._rules.read(pair.value, None)

    def _section(self, pair: Pair) -> None:
        for each in self._pairs(pair.value, pair.name):
            key = scalar_fragment(self._source, each.key)
            if pair.name == "metadata":
                value = self._json(each.value)
                anchor = self._draft.metadata(key, value, span_of(self._source, each.value))
            elif (text := self._text(each.value, f"{pair.name}.{key.text}")) is None:
                continue
            elif pair.name == "vars":
                anchor = self._var(key, each.value, text)
            elif (pair.name, key.text) == ("defaults", "otherwise"):
                anchor = self._statement(text, "otherwise ", "otherwise")
            else:
                anchor = self._draft.field(pair.name, key, text)
            self._place(each, anchor)

    def _var(self, key: Fragment, node: Node, text: Fragment) -> str:
        quoted = isinstance(node, ScalarNode) and node.style is not None
        # One spelling of truth values, that of the statements which variables are put into.
        mistakable = text.text.lower() in (*TRUTH, *_AMBIGUOUS) and text.text not in TRUTH
        if not quoted and mistakable:
            self._wrong(node, f"vars.{key.text}", "true or false, a number or a text")
        return self._draft.var(key, text, quoted=quoted)

    def _targets(self, pair: Pair) -> None:
        node = pair.value
        if not isinstance(node, MappingNode):
            for word in self._texts(node, pair.name):
                self._draft.word("targets", word)
            return
        for each in pairs(self._source, node, self._draft.findings):
            key = scalar_fragment(self._source, each.key)
            self._place_key(each, f"targets.{key.text}")
            self._draft.block(key)
            if is_null(each.value):
                continue
            fields = self._pairs(each.value, f"targets.{key.text}")
            self._known(fields, ("rules",), f"targets.{key.text}")
            for field in fields:
                if field.name == "rules":
                    self._place_key(field, f"targets.{key.text}")
                    self._rules.read(field.value, key.text)

    def _words(self, pair: Pair, key: str) -> None:
        if isinstance(pair.value, SequenceNode):
            self._place_key(pair, key)
        else:
            self._place(pair, f"{key}[0]")
        for node, word in zip(_items(pair.value), self._texts(pair.value, key), strict=False):
            anchor = self._draft.word(key, word)
            if isinstance(pair.value, SequenceNode):
                self._places.append(place_of(node, node, anchor))

    def _replaced_tests(self, pair: Pair) -> None:
        found = self._pairs(pair.value, "tests")
        self._known(found, ReplacedTests.model_fields, "tests")
        if not found:
            self._wrong(pair.value, "tests", "a list, or a mapping with replace")
        for field in found:
            if field.name == "replace":
                self._draft.clear("tests", span_of(self._source, field.key))
                self._place_key(field, "tests")
                self._statements(field, "tests")

    def _statements(self, pair: Pair, name: str) -> None:
        if not isinstance(pair.value, SequenceNode):
            self._wrong(pair.value, name, "a list")
            return
        for node in pair.value.value:
            if name == "transforms" and isinstance(node, MappingNode):
                anchor = self._transform(node)
            elif (text := self._text(node, name)) is None:
                continue
            elif name == "tests":
                anchor = self._statement(text, "test ", "test")
            else:
                anchor = self._statement(text, "", "prune")
            self._places.append(place_of(node, node, anchor))

    def _transform(self, node: MappingNode) -> str:
        before = len(self._draft.findings)
        found = pairs(self._source, node, self._draft.findings)
        listed = any(each.name == "keep" for each in found)
        # A list of experts is ranked by nothing, and its length is the count.
        known = ("prune", "keep") if listed else _TRANSFORM
        self._known(found, known, "a transform with keep" if listed else "a transform")
        texts = {each.name: self._text(each.value, each.name) for each in found}
        missing = [*({"prune"} - texts.keys())]
        missing += [] if texts.keys() & {"to", "keep"} else ['to" or "keep']
        # A misspelt key is why the other one is missing: one finding, not two.
        if missing and len(self._draft.findings) == before:
            span = span_of(self._source, node)
            self._draft.report("missing-key", span, where="a transform", key=missing[0])
        if len(self._draft.findings) > before:
            return ""
        said = [(word, text) for word in known if (text := texts.get(word))]
        parts = [part for word, text in said for part in (text[0:0], f"{word} ", text, " ")]
        return self._draft.statement(join(said[0][1][0:0], *parts), ("prune",))

    def _statement(self, text: Fragment, keyword: str, kind: str) -> str:
        return self._draft.statement(join(text[0:0], keyword, text), (kind,))

    def _json(self, node: Node) -> Any:
        if isinstance(node, MappingNode):
            found = pairs(self._source, node, self._draft.findings)
            return {pair.name: self._json(pair.value) for pair in found}
        if isinstance(node, SequenceNode):
            return [self._json(item) for item in node.value]
        if not isinstance(node, ScalarNode) or is_null(node):
            return None
        # Quotes make a text of anything: "4" is no number.
        return node.value if node.style is not None else self._plain(node)

    def _plain(self, node: ScalarNode) -> Any:
        word = node.value.lower()
        if word in _AMBIGUOUS:
            cure = f'write "{node.value}" in quotes, or true or false'
            span = span_of(self._source, node)
            self._draft.report("ambiguous-word", span, cure=cure, word=node.value)
        return TRUTH.get(word, plain_scalar(node.value))

    def _texts(self, node: Node, where: str) -> list[Fragment]:
        texts = [self._text(item, where) for item in _items(node)]
        return [text for text in texts if text is not None]

    def _text(self, node: Node, where: str) -> Fragment | None:
        if isinstance(node, ScalarNode) and not is_null(node):
            return scalar_fragment(self._source, node)
        self._wrong(node, where, "a text or a number")
        return None

    def _pairs(self, node: Node, where: str) -> list[Pair]:
        if isinstance(node, MappingNode):
            return pairs(self._source, node, self._draft.findings)
        self._wrong(node, where, "a mapping")
        return []

    def _known(self, found: Iterable[Pair], known: Iterable[str], where: str) -> None:
        known = list(known)
        present = {pair.name for pair in found}
        for pair in found:
            if pair.name not in known:
                cure = did_you_mean(pair.name, set(known) - present)
                span = span_of(self._source, pair.key)
                self._draft.report("unknown-key", span, cure=cure, where=where, key=pair.name)

    def _wrong(self, node: Node, key: str, expected: str) -> None:
        span = span_of(self._source, node)
        self._draft.report("wrong-type", span, key=key, expected=expected, found=kind_of(node))

    def _place(self, pair: Pair, anchor: str) -> None:
        self._places.append(place_of(pair.key, pair.value, anchor))

    def _place_key(self, pair: Pair, anchor: str) -> None:
        # What a section holds has places of its own.
        self._places.append(place_of(pair.key, pair.key, anchor))


def _items(node: Node) -> list[Node]:
    return list(node.value) if isinstance(node, SequenceNode) else [node]


def _is_empty(node: Node) -> bool:
    return isinstance(node, SequenceNode | MappingNode) and not node.value
