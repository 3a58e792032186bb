"""One statement's text -> its syntax tree, or what is wrong in the users' words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from policy_dsl.diagnostics import Diagnostic, Span, diagnostic, did_you_mean
from policy_dsl.language.fragments import Fragment
from policy_dsl.resources import room

Syntax = Tree[Token]
HEADER_WORDS = (
    "name", "description", "model", "fp8_dequant", "target", "extends", "runtime", "var",
    "default", "calibration", "output", "otherwise", "metadata", "prune", "test", "clear",
)  # fmt: skip
# Deeper nesting than this is no policy; the trees are walked recursively.
MAX_NESTING = 32
MAX_STATEMENT = 20_000

# What may come next, most telling first: (a word kind of the grammar, in the users' words).
_EXPECTED = (
    ("TIMES", 'an operator, or ":" and a treatment'),
    ("COLON", '":" and a treatment'),
    ("WORD", "a treatment, such as 4bit or keep"),
    ("_WHERE", "layer numbers, such as 0-3, or where"),
    ("TEXT_KEY", "a statement"),
    ("REGEX", "a selector"),
    ("BOUNDARY", "a selector"),
    ("_LAYERS", 'a number of layers, or "layers"'),
    ("RANGE", "a number or a range, such as 0-3"),
    ("RELATION", "a comparison, such as <= 3.3"),
    ("_IS", '"is" and a treatment'),
    ("QUANTITY", "a number, such as 3.3 or 90GiB"),
    ("_TO", '"to" and a number of experts, or "keep" and their numbers'),
    ("COMPARE", "a comparison, such as i < 4"),
    ("INT", "a number, i, n or a parenthesis"),
    ("JSON", "a JSON value"),
    ("BARE", "a text"),
    ("EQUAL", '"=" and a value'),
    ("FIELD", "a name"),
    ("IDENTIFIER", "a name"),
    ("NAME", "a name"),
    ("RPAR", '")"'),
    ("RSQB", '"]"'),
)
# What people write instead: (kinds accepted there, what was found, the cure).
_ANYWHERE = {"COLON", "_EXCEPT", "RPAR", "_IS"}
_CURES = (
    ({"REGEX"}, re.compile(r"[-+]?\d"), 'write "layers {word}"'),
    ({"TIMES"}, re.compile(r"/"), "whole division is written //"),
    ({"TIMES"}, re.compile(r"="), "equality is written =="),
    (_ANYWHERE, re.compile(r"[-+]?\d+(-|\.\.)?-?\d*$"), 'write "in layers {word}"'),
    (_ANYWHERE, re.compile(r"(layers?|boundary|middle)$"), 'conditions are joined by "in"'),
    ({"REGEX"}, re.compile(r"/"), r"a regular expression is written /…/, and a slash in it \/"),
    (_ANYWHERE, re.compile(r"or$"), 'a comma means "or"'),
    (_ANYWHERE | {"REGEX"}, re.compile(r"\.?[*?]|\.?\["), "a name pattern must be quoted"),
)
# As JavaScript and Perl write them: `/…/i`.
_FLAGS = re.compile(r"[is]{1,2}$")
_FOUND = re.compile(r'\s*("(?:[^"\\\n]|\\.)*"|[\w.+*?$@!-]+|\S|$)')
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*"')


@cache
def _parser() -> Lark:
    grammar = (room("grammar") / "policy.lark").read_text(encoding="utf-8")
    return Lark(
        grammar,
        parser="lalr",
        start=["statement", "expression"],
        propagate_positions=True,
        maybe_placeholders=True,
    )


def parse(fragment: Fragment, start: str = "statement") -> Syntax | Diagnostic:
    """The syntax tree of a statement (or `expression`), or the defect that prevents it.

    Positions in the tree are those in `fragment.text`.
    """
    if defect := _too_much(fragment):
        return defect
    try:
        return _parser().parse(fragment.text, start=start)
    except UnexpectedInput as failure:
        return _explain(fragment, failure)


def place(fragment: Fragment, node: Syntax | Token) -> Span:
    """Where a node of the tree stands in the user's text."""
    if isinstance(node, Token):
        return fragment.place(node.start_pos or 0, node.end_pos or 0)
    if node.meta.empty:
        return fragment.span
    return fragment.place(node.meta.start_pos, node.meta.end_pos)


def children(node: Syntax) -> list[Syntax]:
    """The subtrees of a node, tokens left out."""
    return [child for child in node.children if isinstance(child, Tree)]


def tokens(node: Syntax) -> list[Token]:
    """The tokens directly under a node."""
    return [child for child in node.children if isinstance(child, Token)]


def _too_much(fragment: Fragment) -> Diagnostic | None:
    if len(fragment.text) > MAX_STATEMENT:
        where = fragment.place(0, 1)
        return diagnostic("statement-too-long", where, limit=MAX_STATEMENT)
    depth = 0
    for found in re.finditer(r'"(?:[^"\\\n]|\\.)*"|[()]', fragment.text):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if depth > MAX_NESTING:
            where = fragment.place(found.start(), found.end())
            return diagnostic("nested-too-deeply", where, limit=MAX_NESTING)
    return None


def _explain(fragment: Fragment, failure: UnexpectedInput) -> Diagnostic:
    text = fragment.text
    at_end = isinstance(failure, UnexpectedToken) and failure.token.type == "$END"
    at = len(text) if at_end else failure.pos_in_stream or 0
    found = _FOUND.match(text, at)
    start, end = found.span(1) if found else (at, at)
    word = text[start:end]
    odd = text[at : at + 1]
    if odd.isspace() and not odd.isascii():
        start, end, word = at, at + 1, f"U+{ord(odd):04X}, which is not a plain space"
    accepted = _accepted(failure)
    if word in ("", ":") and "RPAR" in accepted:
        return _unclosed(fragment)
    if word == ":" and ":" in text[:start]:
        return diagnostic("second-colon", fragment.place(start, end))
    return diagnostic(
        "syntax",
        fragment.place(start, end),
        suggestion=_cure(text, start, word, accepted),
        expected=_expected(accepted),
        found=_shown(word),
    )


def _shown(word: str) -> str:
    if not word:
        return "the end of the statement"
    return word if word[0] == '"' or " " in word else f'"{word}"'


def _accepted(failure: UnexpectedInput) -> set[str]:
    if isinstance(failure, UnexpectedToken):
        return set(failure.accepts or failure.expected)
    return set(failure.allowed) if isinstance(failure, UnexpectedCharacters) else set()


def _expected(accepted: Iterable[str]) -> str:
    for kind, words in _EXPECTED:
        if kind in accepted:
            return words
    return "the end of the statement"


def _cure(text: str, start: int, word: str, accepted: set[str]) -> str | None:
    before = text[:start].strip()
    if before == "not":
        return f'write "all except {word}"'
    if _FLAGS.match(word) and text[:start].endswith("/"):
        return f'write "(?{word})" at the beginning of the regular expression'
    if "COLON" in accepted and before not in HEADER_WORDS:
        close = did_you_mean(before, HEADER_WORDS)
        if close:
            return close
    for kinds, pattern, cure in _CURES:
        if kinds & accepted and pattern.match(word):
            return cure.format(word=word)
    missing = "COLON" in accepted and ":" not in text and word and not before.endswith(")")
    return 'a ":" comes before the treatment' if missing else None


def _unclosed(fragment: Fragment) -> Diagnostic:
    blanked = _QUOTED.sub(lambda found: " " * len(found[0]), fragment.text)
    open_at: list[int] = []
    for at, char in enumerate(blanked):
        if char == "(":
            open_at.append(at)
        elif char == ")" and open_at:
            open_at.pop()
    at = open_at[-1] if open_at else 0
    return diagnostic("unclosed-parenthesis", fragment.place(at, at + 1))
