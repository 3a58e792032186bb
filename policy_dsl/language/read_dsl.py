"""DSL text -> Policy."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lark import Token

from policy_dsl.diagnostics import Diagnostic, SourceText, Span, fail
from policy_dsl.language.draft import Draft, plain_scalar
from policy_dsl.language.fragments import Fragment, checked, short_escapes, unquote
from policy_dsl.language.parsing import Syntax, children, parse, tokens
from policy_dsl.language.statements import Opening, Remark, Statement, split_statements
from policy_dsl.policy import Comment, Policy, Scalar

# Statements whose values are filled with variables one by one, not as text before parsing.
_VALUE_STATEMENT = re.compile(
    r"((name|description|model|fp8_dequant|targets?|extends|runtimes?|default|calibration"
    r"|output|clear)(?!\s+(in|and|except)\s)|var|metadata)(?![\w.]|\s*[:,])"
)
_PLURAL = {"target": "targets", "runtime": "runtimes"}
_SECTION = {"default": "defaults"}
_RULES = ("rule",)
_STATEMENTS = ("rule", "prune", "test", "otherwise")


def read_dsl(source: SourceText, name: str, values: Mapping[str, Scalar] | None = None) -> Policy:
    """The policy that a DSL text says; `extends` is left as written.

    name: the policy's name if the text gives none. values: replace the defaults of `vars`.
    Raises: PolicyError with every defect of the text.
    """
    source = checked(source)
    reader = _Reader(source, name, values or {})
    return reader.read()


def read_rules(draft: Draft, text: Fragment, target: str | None) -> None:
    """Adds the rules of a text that may hold nothing else: `rules: |` of a YAML policy."""
    split = split_statements(text)
    draft.findings += split.findings
    remarks = Remarks(draft, f"targets.{target}.rules[]" if target else "rules[]")
    for piece in split.pieces:
        match piece:
            case Remark():
                remarks.take(piece)
                refuse_swallowing(draft, piece)
            case Statement(body):
                remarks.belong(draft.statement(body, _RULES, target))
            case Opening(place, closing) if not closing:
                draft.report("block-in-rules", place.span, target=place.text)
    remarks.end()


def refuse_swallowing(draft: Draft, remark: Remark) -> None:
    """Adds a defect if a comment takes more than its line: YAML joins lines in `>` texts."""
    span = remark.span
    if span is not None and "\n" in span.source.text[span.start : span.end]:
        draft.report("comment-in-folded-text", span)


class Remarks:
    """Ties comments to the statements they stand before or beside."""

    def __init__(self, draft: Draft, end: str, *, head: bool = False) -> None:
        self._draft = draft
        self._end = end
        self._waiting: list[str] = []
        self._last = ""
        self._head = head

    def take(self, remark: Remark) -> None:
        """Takes a comment: a trailing one belongs to the statement before it."""
        if remark.trailing and self._last:
            self._draft.comments.append(Comment(self._last, remark.text, True))
        else:
            self._waiting.append(remark.text)

    def belong(self, anchor: str) -> None:
        """Gives the comments that wait to the statement that follows them."""
        waiting = self._waiting
        if self._head and "" in waiting:
            # What a blank line parts from the first statement is about the whole text.
            cut = len(waiting) - waiting[::-1].index("")
            self._give("^", waiting[: cut - 1])
            waiting = waiting[cut:]
        self._give(anchor, waiting)
        self._waiting, self._last, self._head = [], anchor, False

    def end(self) -> None:
        """Gives what still waits to the end of the text or block."""
        self._give(self._end, self._waiting)
        self._waiting = []

    def _give(self, anchor: str, texts: list[str]) -> None:
        self._draft.comments += [Comment(anchor, text) for text in texts]


class _Reader:
    """Reads variables first, then statement after statement."""

    def __init__(self, source: SourceText, name: str, values: Mapping[str, Scalar]) -> None:
        self._source = source
        self._draft = Draft(source, name, values)
        self._anchors: dict[int, str] = {}

    def read(self) -> Policy:
        split = split_statements(Fragment.of(self._source, 0, len(self._source.text)))
        self._draft.findings += split.findings
        statements = [piece for piece in split.pieces if isinstance(piece, Statement)]
        openings = [piece for piece in split.pieces if isinstance(piece, Opening)]
        if not statements and not openings and not split.findings:
            raise fail("empty-policy", Span(self._source, 0, 1), path=self._source.name)
        # Variables may stand below the rules that use them.
        for statement in sorted(statements, key=lambda each: not _is_var(each.body.text)):
            self._anchors[id(statement)] = self._statement(statement)
        for opening in openings:
            self._draft.block(opening.target)
        self._comments(split.pieces)
        return self._draft.build()

    def _comments(self, pieces: list[Any]) -> None:
        remarks = Remarks(self._draft, "", head=True)
        for piece in pieces:
            match piece:
                case Remark():
                    remarks.take(piece)
                case Statement():
                    remarks.belong(self._anchors[id(piece)])
                case Opening(target, closing):
                    remarks.belong(f"targets.{target.text}" + ".rules[]" * closing)
        remarks.end()

    def _statement(self, statement: Statement) -> str:
        body = statement.body
        # A block holds rules of its target; headers belong to the whole policy.
        if statement.block is not None:
            return self._draft.statement(body, _RULES, statement.block)
        if not _VALUE_STATEMENT.match(body.text):
            return self._draft.statement(body, _STATEMENTS)
        tree = parse(body)
        if isinstance(tree, Diagnostic):
            self._draft.findings.append(tree)
            return ""
        return self._header(children(tree)[0], body)

    def _header(self, tree: Syntax, body: Fragment) -> str:
        first, *rest = [_value(token, body) for token in tokens(tree)]
        key = first.text
        match tree.data:
            case "clear":
                keys = [self._draft.clear(word.text, word.span) for word in (first, *rest)]
                return keys[0]
            case "text_key":
                return self._draft.text(key, rest[0], first.span)
            case "list_key":
                anchors = [self._draft.word(_PLURAL.get(key, key), word) for word in rest]
                return anchors[0]
            case "field":
                return self._draft.field(_SECTION.get(key, key), *rest)
            case "var":
                quoted = tokens(tree)[1].type == "STRING"
                return self._draft.var(first, rest[0], quoted=quoted)
        return self._metadata(first, tokens(tree)[1], body)

    def _metadata(self, key: Fragment, token: Token, body: Fragment) -> str:
        span = body.place(token.start_pos or 0, token.end_pos or 0)
        text = token.strip()
        value: Any = plain_scalar(text)
        if not re.fullmatch(r"[\w.+$-][\w.+$ {}/-]*", text) or text == "null":
            try:
                value = json.loads(short_escapes(text), parse_constant=_refuse)
            except (ValueError, RecursionError) as failure:
                reason = str(failure).partition(":")[0]
                self._draft.report("bad-json", span, reason=reason)
                return ""
        return self._draft.metadata(key, value, span)


def _is_var(text: str) -> bool:
    return text.split(maxsplit=1)[0] == "var"


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")


def _value(token: Token, body: Fragment) -> Fragment:
    start, end = token.start_pos or 0, token.end_pos or 0
    if token.type != "STRING":
        return body[start:end]
    inner = body[start + 1 : end - 1]
    # Without escapes every character keeps its own place, and carets stay exact.
    if "\\" not in inner.text:
        return inner
    text = unquote(token)
    return Fragment.all_at(text, inner.span)
