"""`rules:` of a YAML policy: DSL text, or a list of statements, one-key mappings and fields."""

from __future__ import annotations

import re
from collections.abc import Mapping

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from policy_dsl.diagnostics import SourceText, diagnostic, did_you_mean
from policy_dsl.language.document import RuleFields
from policy_dsl.language.draft import Draft
from policy_dsl.language.draft_fields import read_boolean, read_integer
from policy_dsl.language.fragments import Fragment, join, mentions_variable, quote
from policy_dsl.language.read_dsl import read_rules, refuse_swallowing
from policy_dsl.language.statements import Remark, Statement, split_statements
from policy_dsl.language.yaml_comments import Place, place_of
from policy_dsl.language.yaml_nodes import Pair, is_null, kind_of, pairs, scalar_fragment, span_of
from policy_dsl.policy import Comment

_FIELDS = tuple(RuleFields.model_fields)
_RULE = ("rule",)
# Words that stand for themselves in a treatment, and those that a field's value is put into.
_WORDS = {"scheme": "{}", "dtype": "{}", "treatment": "{}", "method": "by {}"}
_NUMBERS = {"bits": "{}bit", "group_size": "g{}"}
# Words of selectors that look like fields, and how they are written.
_SELECTOR_WORDS = {
    "boundary": "boundary 2",
    "middle": "middle",
    "family": "attention and family llama",
    "experts": "experts[0-15]",
    "except": "all except embed, lm_head",
}
_LAYER_SET = re.compile(r"\s*(layers?|boundary|middle)\b")


class RuleReader:
    """Adds rules to the draft and their places to `places`."""

    def __init__(self, source: SourceText, draft: Draft, places: list[Place]) -> None:
        self._source = source
        self._draft = draft
        self._places = places

    def read(self, node: Node, target: str | None) -> None:
        """Takes the value of `rules:` at the top, or of a target."""
        if isinstance(node, ScalarNode) and not is_null(node):
            read_rules(self._draft, scalar_fragment(self._source, node), target)
        elif isinstance(node, SequenceNode):
            end = f"targets.{target}.rules[]" if target else "rules[]"
            for item in node.value:
                anchor = self._item(item, target)
                self._places.append(place_of(item, item, anchor, block_end=end))
        else:
            notes = _as_text(self._source, node) if isinstance(node, MappingNode) else []
            self._wrong(node, "rules", "a text (rules: |) or a list", notes)

    def _item(self, node: Node, target: str | None) -> str:
        if isinstance(node, ScalarNode) and not is_null(node):
            return self._single(scalar_fragment(self._source, node), target)
        if not isinstance(node, MappingNode):
            self._wrong(node, "a rule", "a statement or a mapping")
            return ""
        found = pairs(self._source, node, self._draft.findings)
        # `- down_proj: 4bit` is a statement that YAML happens to read as a mapping.
        if len(found) == 1 and found[0].name not in _FIELDS and not _near_field(found[0]):
            return self._one_key(found[0], target)
        return self._mapping(node, found, target)

    def _single(self, text: Fragment, target: str | None) -> str:
        split = split_statements(text)
        self._draft.findings += split.findings
        bodies = [piece.body for piece in split.pieces if isinstance(piece, Statement)]
        if len(bodies) > 1:
            shown = [f"  {body.text}" for body in bodies]
            notes = ["write them as a text:", "rules: |", *shown]
            self._report("several-statements", text, notes)
            return ""
        if split.findings:
            return ""
        body = bodies[0] if bodies else text.strip()
        anchor = self._draft.statement(body, _RULE, target)
        for piece in split.pieces:
            if isinstance(piece, Remark) and piece.text:
                refuse_swallowing(self._draft, piece)
                self._draft.comments.append(Comment(anchor, piece.text))
        return anchor

    def _one_key(self, pair: Pair, target: str | None) -> str:
        if not isinstance(pair.value, ScalarNode) or is_null(pair.value):
            self._wrong(pair.value, pair.name, "a treatment, such as 4bit")
            return ""
        # YAML takes the quotes away that would make a name a pattern in the DSL.
        key = self._selector(pair.key, pattern=pair.key.style is not None)
        return self._single(join(key, ": ", scalar_fragment(self._source, pair.value)), target)

    def _selector(self, node: ScalarNode, *, pattern: bool) -> Fragment:
        text = scalar_fragment(self._source, node)
        if not pattern:
            return text
        quoted = quote(text.text)
        span = text.span
        return Fragment.all_at(quoted, span)

    def _mapping(self, node: MappingNode, found: list[Pair], target: str | None) -> str:
        before = len(self._draft.findings)
        fields = {pair.name: pair for pair in found}
        self._unknown(fields)
        texts = {name: text for name in fields if (text := self._field(fields[name]))}
        if len(self._draft.findings) > before:
            return ""
        if "match" not in texts:
            self._missing(node, "match")
            return ""
        # Fields are put together to the statement they mean: one reader decides what is legal.
        words = [word for name in _FIELDS[2:] if name in texts for word in (" ", texts[name])]
        if not words:
            self._missing(node, "treatment")
            return ""
        match, layers = texts["match"], texts.get("layers")
        # The parentheses keep `a, b` together, which `in` would split.
        selector = [match[0:0], "(", match, ") in ", layers] if layers else [match]
        return self._draft.statement(join(*selector, ":", *words), _RULE, target)

    def _unknown(self, fields: Mapping[str, Pair]) -> None:
        for name, pair in fields.items():
            if name in _FIELDS:
                continue
            cure = did_you_mean(name, set(_FIELDS) - set(fields))
            # In `{layers: 0-1,60-61}` YAML ends the value at the comma: 60-61 is a key.
            if re.fullmatch(r"[-+0-9.]+", name):
                cure = "a list of ranges must be quoted here"
            elif name in _SELECTOR_WORDS:
                cure = f'"{name}" is said in the selector: match: {_SELECTOR_WORDS[name]}'
            span = span_of(self._source, pair.key)
            self._draft.report("unknown-key", span, cure=cure, where="a rule", key=name)

    def _field(self, pair: Pair) -> Fragment | None:
        name, node = pair.name, pair.value
        if name not in _FIELDS:
            return None
        if name == "layers":
            return self._layers(node)
        if not isinstance(node, ScalarNode) or is_null(node):
            self._wrong(node, name, "a text or a number")
            return None
        text = scalar_fragment(self._source, node)
        if name == "match":
            pattern = node.style is not None and bool(re.search(r"[*?]", text.text))
            return self._selector(node, pattern=pattern and '"' not in text.text)
        return self._words(name, text)

    def _words(self, name: str, text: Fragment) -> Fragment | None:
        findings = self._draft.findings
        if name in _NUMBERS:
            if not mentions_variable(text.text):
                read_integer(text, findings, where=name)
            return _within(_NUMBERS[name], text)
        if name in ("symmetric", "optional"):
            said = read_boolean(text, findings, where=name)
            yes, no = ("sym", "asym") if name == "symmetric" else ("optional", None)
            word = yes if said else no
            return _within(word + "{}", text[0:0]) if word and said is not None else None
        return _within(_WORDS[name], text)

    def _layers(self, node: Node) -> Fragment | None:
        items = node.value if isinstance(node, SequenceNode) else [node]
        scalars = [item for item in items if isinstance(item, ScalarNode) and not is_null(item)]
        if not items or len(scalars) < len(items):
            self._wrong(node, "layers", "layers, such as 2-59")
            return None
        first, *rest = [scalar_fragment(self._source, item) for item in scalars]
        listed = join(first, *(part for text in rest for part in (",", text)))
        # `layers: boundary 2` says what kind of set it is; numbers alone do not.
        if _LAYER_SET.match(first.text):
            return listed
        return join(first[0:0], "layers ", listed)

    def _missing(self, node: Node, key: str) -> None:
        span = span_of(self._source, node)
        self._draft.report("missing-key", span, where="a rule", key=key)

    def _report(self, code: str, text: Fragment, notes: list[str]) -> None:
        self._draft.findings.append(diagnostic(code, text.span, notes=notes))

    def _wrong(self, node: Node, key: str, expected: str, notes: list[str] | None = None) -> None:
        self._draft.findings.append(
            diagnostic(
                "wrong-type",
                span_of(self._source, node),
                notes=notes or [],
                key=key,
                expected=expected,
                found=kind_of(node),
            )
        )


def _within(pattern: str, text: Fragment) -> Fragment:
    before, after = pattern.split("{}")
    return join(text[0:0], before, text, after)


def _near_field(pair: Pair) -> bool:
    return pair.key.style is None and isinstance(pair.value, MappingNode | SequenceNode)


def _as_text(source: SourceText, node: MappingNode) -> list[str]:
    statements = [
        f"  {key.value}: {value.value}"
        for key, value in node.value
        if isinstance(key, ScalarNode) and isinstance(value, ScalarNode)
    ]
    return ["rules: |", *statements] if statements else []
