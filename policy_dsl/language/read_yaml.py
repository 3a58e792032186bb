"""YAML text -> Policy."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from policy_dsl.diagnostics import PolicyError, SourceText, Span, did_you_mean, fail
from policy_dsl.language import parsing, yaml_nodes
from policy_dsl.language.draft import SCHEMA, Draft
from policy_dsl.language.parsing import TRUTH, Fragment, checked, join, plain_scalar, quote
from policy_dsl.language.read_dsl import Splitting, read_rules, refuse_swallowing
from policy_dsl.language.yaml_nodes import Place, is_null, scalar_fragment
from policy_dsl.policy import CLEARABLE, KEYS, WORDS, Comment, Policy, Values, Words

YAML_KEYS = tuple(SCHEMA["properties"])
RULE_FIELDS: Mapping[str, Any] = SCHEMA["$defs"]["rule"]["properties"]
# In the order in which a statement says them.
_TRANSFORM_FIELDS = tuple(SCHEMA["$defs"]["transform"]["properties"])
_KINDS = {key.name: key.kind for key in KEYS}
# What an empty list or mapping clears. Empty tests add none; they clear nothing.
_CLEARED_BY_NOTHING = [key for key in CLEARABLE if _KINDS[key] != "text" and key != "tests"]
# YAML 1.1 truth values: nobody means the boolean who writes `licence: no`.
_AMBIGUOUS = ("yes", "no", "on", "off", "y", "n")
_RULE = ("rule",)
# Words that say the value of a rule's field: around the value, or for true and false.
_FIELD_WORDS = {
    "bits": ("", "bit"),
    "group_size": ("g", ""),
    "method": ("by ", ""),
    "symmetric": ("asym", "sym"),
    "optional": ("", "optional"),
}
_LAYER_SET = re.compile(r"\s*(layers?|boundary|middle)\b")


def read_yaml(
    source: SourceText, name: str, values: Values | None = None, *, words: Words = WORDS
) -> Policy:
    """The policy that a YAML text says; `extends` is left as written.

    name: the policy's name if the text gives none. values: replace the defaults of `vars`.
    Raises: PolicyError with every defect of the text.
    """
    draft = Draft(source, name, values or {}, words)
    source = draft.source
    root = yaml_nodes.compose(source)
    if root is None or is_null(root) or (isinstance(root, MappingNode) and not root.value):
        raise fail("empty-policy", Span(source, 0, min(1, len(source.text))), path=source.name)
    if not isinstance(root, MappingNode):
        raise fail("not-a-policy", yaml_nodes.span_of(source, root), found=yaml_nodes.kind_of(root))
    return _Reader(draft).read(root)


def looks_like_yaml(source: SourceText) -> bool:
    """Whether a text of unknown notation is YAML: a mapping with a key of policies."""
    try:
        root = yaml_nodes.compose(checked(source))
    except PolicyError:
        return False
    return isinstance(root, MappingNode) and any(
        key.value in YAML_KEYS for key, _ in root.value if isinstance(key, ScalarNode)
    )


class Pair(NamedTuple):
    """A key of a mapping and its value."""

    name: str
    key: ScalarNode
    value: Node


class _Reader:
    """Reads key after key, variables first."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._source = draft.source
        # What comments can belong to.
        self._places: list[Place] = []

    def read(self, root: MappingNode) -> Policy:
        known = self._known(self._pairs(root, "a policy"), YAML_KEYS, "a policy")
        # Variables may be below the rules that use them.
        for pair in sorted(known, key=lambda each: each.name != "vars"):
            self._key(pair, "targets" if pair.name == "target" else pair.name)
        self._draft.comments += yaml_nodes.yaml_comments(self._source.text, root, self._places)
        return self._draft.build()

    def _key(self, pair: Pair, name: str) -> None:
        kind = _KINDS[name]
        if name in _CLEARED_BY_NOTHING and pair.value.value == []:
            self._place(pair.key, pair.value, self._draft.clear(name, self._span(pair.key)))
        elif kind == "text":
            if text := self._text(pair.value, name):
                self._draft.text(name, text, self._span(pair.key))
            self._place(pair.key, pair.value, name)
        elif kind == "words" and name != "targets":
            self._words(pair)
        else:
            # What a key holds has places of its own.
            self._place(pair.key, pair.key, name)
            self._held(pair, name, kind)

    def _held(self, pair: Pair, name: str, kind: str) -> None:
        if name == "targets":
            self._targets(pair)
        elif kind == "rules":
            self._rules(pair.value, None)
        elif kind == "statements":
            self._statements(pair)
        else:
            for held in self._pairs(pair.value, name):
                self._named(name, held)

    def _rules(self, node: Node, target: str | None) -> None:
        """Takes `rules:`: DSL text, or a list of statements, one-key mappings and fields."""
        if isinstance(node, ScalarNode) and not is_null(node):
            read_rules(self._draft, scalar_fragment(self._source, node), target)
        elif isinstance(node, SequenceNode):
            end = f"targets.{target}.rules[]" if target else "rules[]"
            for item in node.value:
                self._place(item, item, self._rule(item, target), end)
        else:
            pairs = node.value if isinstance(node, MappingNode) else []
            statements = [
                f"  {key.value}: {value.value}"
                for key, value in pairs
                if isinstance(key, ScalarNode) and isinstance(value, ScalarNode)
            ]
            notes = ["rules: |", *statements] if statements else []
            self._wrong(node, "rules", "a text (rules: |) or a list", notes)

    def _rule(self, node: Node, target: str | None) -> str:
        if not isinstance(node, MappingNode):
            text = self._text(node, "a rule", "a statement or a mapping")
            return self._single(text, target) if text else ""
        found = self._pairs(node, "")
        first = found[0] if len(found) == 1 and found[0].name not in RULE_FIELDS else None
        # `- down_proj: 4bit` is a statement that YAML happens to read as a mapping.
        if first is None or (first.key.style is None and not isinstance(first.value, ScalarNode)):
            return self._mapping(node, found, target)
        text = self._text(first.value, first.name, "a treatment, such as 4bit")
        key = scalar_fragment(self._source, first.key)
        # YAML takes the quotes away that would make a name a pattern in the DSL.
        key = key if first.key.style is None else _quoted(key)
        return self._single(join(key, ": ", text), target) if text else ""

    def _single(self, text: Fragment, target: str | None) -> str:
        split = Splitting(text)
        self._draft.findings += split.findings
        bodies = [piece.text.strip() for piece in split.pieces if piece.kind == "statement"]
        if len(bodies) > 1:
            notes = ["write them as a text:", "rules: |", *(f"  {body.text}" for body in bodies)]
            self._draft.report("several-statements", text.span, notes=notes)
        if len(bodies) > 1 or split.findings:
            return ""
        anchor = self._draft.statement(bodies[0] if bodies else text.strip(), _RULE, target)
        for piece in split.pieces:
            if piece.kind in ("comment", "beside"):
                refuse_swallowing(self._draft, piece.text)
                self._draft.comments.append(Comment(anchor, piece.text.text.strip()))
        return anchor

    def _mapping(self, node: MappingNode, found: list[Pair], target: str | None) -> str:
        before = len(self._draft.findings)
        fields = self._known(found, RULE_FIELDS, "a rule")
        texts = {name: text for name, _, value in fields if (text := self._field(name, value))}
        if len(self._draft.findings) > before:
            return ""
        # Fields are put together to the statement they mean: one reader decides what is legal.
        match, layers = texts.pop("match", None), texts.pop("layers", None)
        words = [part for name in RULE_FIELDS if name in texts for part in (" ", texts[name])]
        if match is None or not words:
            missing = "match" if match is None else "treatment"
            self._report("missing-key", node, where="a rule", key=missing)
            return ""
        # The parentheses keep `a, b` together, which `in` would split.
        selector = ["(", match, ") in ", layers] if layers else [match]
        return self._draft.statement(join(*selector, ":", *words), _RULE, target)

    def _field(self, name: str, node: Node) -> Fragment | None:
        if name == "layers":
            return self._layers(node)
        text = self._text(node, name)
        if text is None or not isinstance(node, ScalarNode):
            return None
        if name == "match":
            pattern = node.style is not None and re.search(r"[*?]", text.text)
            return _quoted(text) if pattern and '"' not in text.text else text
        kind, (before, after) = RULE_FIELDS[name]["type"], _FIELD_WORDS.get(name, ("", ""))
        if kind == "boolean":
            said = self._draft.typed(kind, text, where=name)
            word = {None: "", True: after, False: before}[said]
            return join(text[0:0], word) if word else None
        if kind == "integer" and "${" not in text.text:
            self._draft.typed(kind, text, where=name)
        return join(before, text, after)

    def _layers(self, node: Node) -> Fragment | None:
        items = _items(node)
        scalars = [item for item in items if isinstance(item, ScalarNode) and not is_null(item)]
        if not items or len(scalars) < len(items):
            self._wrong(node, "layers", "layers, such as 2-59")
            return None
        first, *rest = [scalar_fragment(self._source, item) for item in scalars]
        listed = join(first, *(part for text in rest for part in (",", text)))
        # `layers: boundary 2` says what kind of set it is; numbers alone do not.
        return listed if _LAYER_SET.match(first.text) else join("layers ", listed)

    def _named(self, section: str, pair: Pair) -> None:
        key = scalar_fragment(self._source, pair.key)
        if section == "metadata":
            value = self._json(pair.value)
            anchor = self._draft.metadata(key, value, self._span(pair.value))
        elif (text := self._text(pair.value, f"{section}.{key.text}")) is None:
            return
        elif section == "vars":
            anchor = self._var(key, pair.value, text)
        elif (section, key.text) == ("defaults", "otherwise"):
            anchor = self._draft.statement(join("otherwise ", text), ("otherwise",))
        else:
            anchor = self._draft.field(section, key, text)
        self._place(pair.key, pair.value, anchor)

    def _var(self, key: Fragment, node: Node, text: Fragment) -> str:
        quoted = isinstance(node, ScalarNode) and node.style is not None
        # One spelling of truth values, that of the statements which variables are put into.
        mistakable = text.text.lower() in (*TRUTH, *_AMBIGUOUS) and text.text not in TRUTH
        if not quoted and mistakable:
            self._wrong(node, f"vars.{key.text}", "true or false, a number or a text")
        return self._draft.var(key, text, quoted=quoted)

    def _targets(self, pair: Pair) -> None:
        if not isinstance(pair.value, MappingNode):
            for node in _items(pair.value):
                if word := self._text(node, pair.name):
                    self._draft.word("targets", word)
            return
        for branch in self._pairs(pair.value, pair.name):
            key = scalar_fragment(self._source, branch.key)
            anchor = f"targets.{key.text}"
            self._place(branch.key, branch.key, anchor)
            self._draft.block(key)
            fields = [] if is_null(branch.value) else self._pairs(branch.value, anchor)
            for field in self._known(fields, ("rules",), anchor):
                self._place(field.key, field.key, anchor)
                self._rules(field.value, key.text)

    def _words(self, pair: Pair) -> None:
        listed = isinstance(pair.value, SequenceNode)
        first = (pair.key, pair.name) if listed else (pair.value, f"{pair.name}[0]")
        self._place(pair.key, *first)
        for node in _items(pair.value):
            if word := self._text(node, pair.name):
                anchor = self._draft.word(pair.name, word)
                if listed:
                    self._place(node, node, anchor)

    def _statements(self, pair: Pair) -> None:
        name, node = pair.name, pair.value
        if name == "tests" and isinstance(node, MappingNode):
            self._replaced_tests(node)
        elif not isinstance(node, SequenceNode):
            self._wrong(node, name, "a list")
        else:
            word, kind = ("test ", "test") if name == "tests" else ("", "prune")
            for item in node.value:
                if name == "transforms" and isinstance(item, MappingNode):
                    self._place(item, item, self._transform(item))
                elif text := self._text(item, name):
                    anchor = self._draft.statement(join(word, text), (kind,))
                    self._place(item, item, anchor)

    def _replaced_tests(self, node: MappingNode) -> None:
        found = self._pairs(node, "tests")
        if not found:
            self._wrong(node, "tests", "a list, or a mapping with replace")
        for field in self._known(found, ("replace",), "tests"):
            self._draft.clear("tests", self._span(field.key))
            self._place(field.key, field.key, "tests")
            self._statements(field._replace(name="tests"))

    def _transform(self, node: MappingNode) -> str:
        before = len(self._draft.findings)
        found = self._pairs(node, "")
        # A list of experts is ranked by nothing, and its length is the count.
        known, where = _TRANSFORM_FIELDS, "a transform"
        if any(pair.name == "keep" for pair in found):
            known, where = ("prune", "keep"), "a transform with keep"
        self._known(found, known, where)
        texts = {pair.name: text for pair in found if (text := self._text(pair.value, pair.name))}
        needed = {"prune": {"prune"}, 'to" or "keep': {"to", "keep"}}
        missing = [names for names in needed if not needed[names] & texts.keys()]
        # A misspelt key is why the other one is missing: one finding, not two.
        if missing and len(self._draft.findings) == before:
            self._report("missing-key", node, where="a transform", key=missing[0])
        if len(self._draft.findings) > before:
            return ""
        said = [join(f"{name} ", texts[name], " ") for name in known if name in texts]
        return self._draft.statement(join(*said), ("prune",))

    def _json(self, node: Node) -> Any:
        if isinstance(node, MappingNode):
            return {pair.name: self._json(pair.value) for pair in self._pairs(node, "metadata")}
        if isinstance(node, SequenceNode):
            return [self._json(item) for item in node.value]
        if not isinstance(node, ScalarNode) or is_null(node):
            return None
        # Quotes make a text of anything: "4" is not a number.
        if node.style is not None:
            return node.value
        word = node.value.lower()
        if word in _AMBIGUOUS:
            cure = f'write "{node.value}" in quotes, or true or false'
            self._report("ambiguous-word", node, cure=cure, word=node.value)
        return TRUTH.get(word, plain_scalar(node.value))

    def _span(self, node: Node) -> Span:
        return yaml_nodes.span_of(self._source, node)

    def _text(self, node: Node, where: str, kind: str = "a text or a number") -> Fragment | None:
        if isinstance(node, ScalarNode) and not is_null(node):
            return scalar_fragment(self._source, node)
        self._wrong(node, where, kind)
        return None

    def _pairs(self, node: Node, where: str) -> list[Pair]:
        """The keys and values of a mapping, each key once."""
        found: dict[str, Pair] = {}
        if not isinstance(node, MappingNode):
            self._wrong(node, where, "a mapping")
            return []
        for key, value in node.value:
            if not isinstance(key, ScalarNode) or is_null(key):
                self._report("bad-key", key, found=yaml_nodes.kind_of(key))
            elif key.value == "<<" and key.style is None:
                self._report("yaml-alias", key)
            elif key.value in found:
                notes = [f"first at {self._span(found[key.value].key).location}"]
                self._report("duplicate-key", key, notes=notes, key=key.value)
            else:
                found[key.value] = Pair(key.value, key, value)
        return list(found.values())

    def _known(self, found: list[Pair], known: Collection[str], where: str) -> list[Pair]:
        """The pairs whose keys are known; the others are defects."""
        missing = set(known) - {pair.name for pair in found}
        for key, node, _ in found:
            if key in known:
                continue
            cure = did_you_mean(key, missing)
            # In `{layers: 0-1,60-61}` YAML ends the value at the comma: 60-61 is a key.
            if where == "a rule" and re.fullmatch(r"[-+0-9.]+", key):
                cure = "a list of ranges must be quoted here"
            elif where == "a rule" and (selector := parsing.mistakes()["selectors"].get(key)):
                cure = f'"{key}" is said in the selector: match: {selector}'
            self._report("unknown-key", node, cure=cure, where=where, key=key)
        return [pair for pair in found if pair.name in known]

    def _report(self, code: str, node: Node, **facts: Any) -> None:
        self._draft.report(code, self._span(node), **facts)

    def _wrong(self, node: Node, key: str, expected: str, notes: Sequence[str] = ()) -> None:
        found = yaml_nodes.kind_of(node)
        self._report("wrong-type", node, notes=notes, key=key, expected=expected, found=found)

    def _place(self, key: Node, value: Node, anchor: str, block_end: str | None = None) -> None:
        """Takes where a value, or a key with its value, is: comments may belong to it."""
        stop = max((stop for _, stop in yaml_nodes.scalar_spans("", value)), default=0)
        self._places.append(Place(key.start_mark.index, stop, anchor, block_end))


def _items(node: Node) -> list[Node]:
    return list(node.value) if isinstance(node, SequenceNode) else [node]


def _quoted(text: Fragment) -> Fragment:
    return Fragment.all_at(quote(text.text), text.span)
