"""DSL text -> Policy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from lark import Token

from policy_dsl.diagnostics import Diagnostic, SourceText, Span, fail
from policy_dsl.language.draft import Draft
from policy_dsl.language.fragments import Fragment, checked, short_escapes, unquote
from policy_dsl.language.keys import KEYS, plain_scalar
from policy_dsl.language.parsing import (
    Opening,
    Remark,
    Remarks,
    Splitting,
    Statement,
    Syntax,
    children,
    holds_values,
    parse,
    tokens,
)
from policy_dsl.policy import Policy, Values
from policy_dsl.vocabulary import WORDS, Words

_KEYS = {key.word: key.name for key in KEYS}
_VAR = re.compile(r"var(?!\S)")
_RULES = ("rule",)
_STATEMENTS = ("rule", "prune", "test", "otherwise")
_BARE_JSON = re.compile(r"[\w.+$-][\w.+$ {}/-]*")


def read_dsl(
    source: SourceText, name: str, values: Values | None = None, *, words: Words = WORDS
) -> Policy:
    """The policy that a DSL text says; `extends` is left as written.

    name: the policy's name if the text gives none. values: replace the defaults of `vars`.
    Raises: PolicyError with every defect of the text.
    """
    source = checked(source)
    draft = Draft(source, name, values or {}, words)
    split = Splitting(Fragment.of(source, 0, len(source.text)))
    if not split.findings and all(isinstance(piece, Remark) for piece in split.pieces):
        raise fail("empty-policy", Span(source, 0, min(1, len(source.text))), path=source.name)
    _take(draft, split, lambda read: _statement(draft, read))
    return draft.build()


def read_rules(draft: Draft, text: Fragment, target: str | None) -> None:
    """Adds the rules of a text that may hold nothing else: `rules: |` of a YAML policy."""
    split = Splitting(text)
    for piece in split.pieces:
        if isinstance(piece, Remark):
            refuse_swallowing(draft, piece)
        elif isinstance(piece, Opening) and not piece.closing:
            draft.report("block-in-rules", piece.target.span, target=piece.target.text)
    split.pieces = [piece for piece in split.pieces if not isinstance(piece, Opening)]
    end = f"targets.{target}.rules[]" if target else "rules[]"
    _take(draft, split, lambda read: draft.statement(read.body, _RULES, target), end)


def refuse_swallowing(draft: Draft, remark: Remark) -> None:
    """Adds a defect if a comment takes more than its line: YAML joins lines in `>` texts."""
    span = remark.span
    if span is not None and "\n" in span.source.text[span.start : span.end]:
        draft.report("comment-in-folded-text", span)


def _take(draft: Draft, split: Splitting, read: Callable[[Statement], str], end: str = "") -> None:
    """Reads every statement, variables first, and ties comments to what they belong to."""
    draft.findings += split.findings
    statements = [piece for piece in split.pieces if isinstance(piece, Statement)]
    # Variables may be below the rules that use them.
    ordered = sorted(statements, key=lambda each: not _VAR.match(each.body.text))
    anchors = {id(statement): read(statement) for statement in ordered}
    last, remarks = "", Remarks(head=not end)
    for piece in split.pieces:
        if isinstance(piece, Remark):
            if piece.trailing and last:
                remarks.beside(last, piece.text)
            else:
                remarks.wait(piece.text)
            continue
        if isinstance(piece, Statement):
            last = anchors[id(piece)]
        else:
            draft.block(piece.target)
            last = f"targets.{piece.target.text}" + ".rules[]" * piece.closing
        remarks.belong(last)
    draft.comments += remarks.end(end)


def _statement(draft: Draft, statement: Statement) -> str:
    body = statement.body
    # A block holds rules of its target; headers belong to the whole policy.
    if statement.block is not None:
        return draft.statement(body, _RULES, statement.block)
    if not holds_values(body.text):
        return draft.statement(body, _STATEMENTS)
    tree = parse(body)
    if isinstance(tree, Diagnostic):
        draft.findings.append(tree)
        return ""
    return _header(draft, children(tree)[0], body)


def _header(draft: Draft, tree: Syntax, body: Fragment) -> str:
    first, *rest = [_value(token, body) for token in tokens(tree)]
    key = _KEYS.get(first.text, first.text)
    match tree.data:
        case "clear":
            keys = [draft.clear(word.text, word.span) for word in (first, *rest)]
            return keys[0]
        case "text_key":
            return draft.text(key, rest[0], first.span)
        case "list_key":
            anchors = [draft.word(key, word) for word in rest]
            return anchors[0]
        case "field":
            return draft.field(key, *rest)
        case "var":
            return draft.var(first, rest[0], quoted=tokens(tree)[1].type == "STRING")
    return _metadata(draft, first, tokens(tree)[1], body)


def _metadata(draft: Draft, key: Fragment, token: Token, body: Fragment) -> str:
    span = body.place(token.start_pos or 0, token.end_pos or 0)
    text = token.strip()
    value: Any = plain_scalar(text)
    if not _BARE_JSON.fullmatch(text) or text == "null":
        try:
            value = json.loads(short_escapes(text), parse_constant=_refuse)
        except (ValueError, RecursionError) as failure:
            draft.report("bad-json", span, reason=str(failure).partition(": line ")[0])
            return ""
    return draft.metadata(key, value, span)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")


def _value(token: Token, body: Fragment) -> Fragment:
    start, end = token.start_pos or 0, token.end_pos or 0
    if token.type != "STRING":
        return body[start:end]
    inner = body[start + 1 : end - 1]
    # Without escapes every character keeps its own place, and carets stay exact.
    return inner if "\\" not in inner.text else Fragment.all_at(unquote(token), inner.span)
