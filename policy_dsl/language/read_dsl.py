"""DSL text -> Policy: cut into statements and comments, then read one by one.

Statements end with `;` or a newline; `#` starts a comment; `on <target> {` and `}` open and
close a block. Quoted texts and `/…/` may hold any of these characters.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lark import Token

from policy_dsl.diagnostics import Diagnostic, SourceText, Span, diagnostic, fail
from policy_dsl.language import parsing
from policy_dsl.language.draft import Draft
from policy_dsl.language.parsing import Fragment, Syntax, children, parse, place, tokens
from policy_dsl.policy import KEYS, WORDS, Comment, Policy, Values, Words

_TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*"?|\$\{[^}\n]*\}?|[#;{}\n/()\[\],]|[^\s"$#;{}/()\[\],]+|\$')
_CLOSED = re.compile(r'"(?:[^"\\]|\\.)*"')
_REGEX = re.compile(r"/(?:[^/\\\n]|\\.)+/")
_BLOCK = re.compile(r"\s*on\s+(\S+)\s*$")
# A regular expression begins at a slash after one of these; after anything else it divides.
_BEFORE_REGEX = {None, ",", "(", "in", "and", "except", "test"}
_KEYS = {key.word: key.name for key in KEYS}
_VAR = re.compile(r"var(?!\S)")
_RULES = ("rule",)
_STATEMENTS = ("rule", "prune", "test", "otherwise")
_BARE_JSON = re.compile(r"[\w.+$-][\w.+$ {}/-]*")


class Statement(NamedTuple):
    """One statement without its end. `block` is the target of the `on` block around it."""

    body: Fragment
    block: str | None


class Opening(NamedTuple):
    """`on <target> {`; closing: its `}`."""

    target: Fragment
    closing: bool = False


class Remark(NamedTuple):
    """A comment's text with its `#`, or `` for blank lines; `trailing` as in Comment."""

    text: str
    trailing: bool = False
    span: Span | None = None


class Remarks:
    """Keeps comments until what they belong to turns up; `comments` are those that found it.

    head: what a blank line parts from the first statement is about the whole text.
    """

    def __init__(self, *, head: bool) -> None:
        self.comments: list[Comment] = []
        # Texts with their columns, `` for a blank line.
        self.waiting: list[tuple[str, int]] = []
        self._head = head

    def belong(self, anchor: str, column: int = 0, block_end: str | None = None) -> None:
        """Gives what waits to the statement at this column, and what is deeper to `block_end`."""
        waiting = self.waiting
        texts = [text for text, _ in waiting]
        if self._head and "" in texts:
            cut = len(texts) - texts[::-1].index("")
            self.comments += [Comment("^", text) for text in texts[: cut - 1]]
            waiting = waiting[cut:]
        for text, at in waiting:
            self.comments.append(Comment((block_end if at > column else None) or anchor, text))
        self.waiting, self._head = [], False


class Splitting:
    """The pieces of a text, in order, and what is wrong with its brackets and quotes."""

    def __init__(self, fragment: Fragment) -> None:
        self.pieces: list[Statement | Opening | Remark] = []
        self.findings: list[Diagnostic] = []
        self._all = fragment
        # Where the open statement starts, the token before, and how deep its braces are.
        self._start = 0
        self._before: str | None = None
        self._depth = 0
        self._broken = False
        self._block: Fragment | None = None
        self._line_used = False
        self._blank = False
        for token, at in self._tokens():
            self._take(token, at, at + len(token))
            ended = token in ("\n", ";") or self._start == at + len(token)
            self._before = None if ended else token
        self._finish(len(fragment.text), 0)
        if self._block is not None:
            self._report("unclosed-block", self._block, target=self._block.text)

    def _tokens(self) -> Iterator[tuple[str, int]]:
        text, at = self._all.text, 0
        while found := _TOKEN.search(text, at):
            start, token = found.start(), found[0]
            # `where i < n // 8` holds slashes that divide.
            if token == "/" and self._before in _BEFORE_REGEX:
                regex = _REGEX.match(text, start)
                token = regex[0] if regex else token
            elif token == "#":
                end = text.find("\n", start)
                token = text[start : end if end >= 0 else len(text)]
            yield token, start
            at = start + len(token)

    def _take(self, token: str, at: int, after: int) -> None:
        if token == "\n":
            self._finish(at, after)
            self._blank = self._blank or not self._line_used
            self._line_used = False
        elif token == ";":
            self._finish(at, after)
        elif token[0] == "#":
            # Asked before the statement ends: a comment beside a rule belongs to that rule.
            trailing = self._line_used or bool(self._all.text[self._start : at].strip())
            self._finish(at, after)
            self._add(Remark(token.strip(), trailing, self._all.place(at, after)))
        elif token == "{":
            self._open(at)
        elif token == "}" and self._depth:
            self._depth -= 1
        elif token == "}":
            self._finish(at, after)
            if self._block is None:
                self._report("stray-brace", self._all[at:after])
            else:
                self._add(Opening(self._block, closing=True))
            self._block = None
        elif token[0] == '"' and not _CLOSED.fullmatch(token):
            self._report("unclosed-quote", self._all[at:after])
            self._broken = True

    def _open(self, at: int) -> None:
        block = None if self._block else _BLOCK.match(self._all.text, self._start, at)
        # Braces that open no block are left to the grammar, which names what it expected.
        if block is None:
            self._depth += 1
            return
        self._block = self._all[block.start(1) : block.end(1)]
        self._add(Opening(self._block))
        self._start = at + 1

    def _finish(self, at: int, start: int) -> None:
        """Ends the open statement; the next one begins at `start`."""
        body = self._all[self._start : at].strip()
        # A statement with an open quote has its finding; parsing it would add a second one.
        if body.text and not self._broken:
            self._add(Statement(body, self._block.text if self._block else None))
        self._start, self._depth, self._broken = start, 0, False

    def _add(self, piece: Statement | Opening | Remark) -> None:
        if self._blank and self.pieces:
            self.pieces.append(Remark(""))
        self._blank, self._line_used = False, True
        self.pieces.append(piece)

    def _report(self, code: str, where: Fragment, **facts: Any) -> None:
        self.findings.append(diagnostic(code, where.span, **facts))


def read_dsl(
    source: SourceText, name: str, values: Values | None = None, *, words: Words = WORDS
) -> Policy:
    """The policy that a DSL text says; `extends` is left as written.

    name: the policy's name if the text gives none. values: replace the defaults of `vars`.
    Raises: PolicyError with every defect of the text.
    """
    source = parsing.checked(source)
    draft = Draft(source, name, values or {}, words)
    split = Splitting(Fragment.whole(source))
    if not split.findings and all(isinstance(piece, Remark) for piece in split.pieces):
        raise fail("empty-policy", Span(source, 0, min(1, len(source.text))), path=source.name)
    _take(draft, split, lambda read: _statement(draft, *read))
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
                remarks.comments.append(Comment(last, piece.text, trailing=True))
            else:
                remarks.waiting.append((piece.text, 0))
            continue
        if isinstance(piece, Statement):
            last = anchors[id(piece)]
        else:
            draft.block(piece.target)
            last = f"targets.{piece.target.text}" + ".rules[]" * piece.closing
        remarks.belong(last)
    # What still waits belongs to the end of the text or block.
    draft.comments += remarks.comments + [Comment(end, text) for text, _ in remarks.waiting]


def _statement(draft: Draft, body: Fragment, block: str | None) -> str:
    # A block holds rules of its target; headers belong to the whole policy.
    if block is not None:
        return draft.statement(body, _RULES, block)
    if not parsing.value_statement().match(body.text):
        return draft.statement(body, _STATEMENTS)
    tree = parse(body)
    if isinstance(tree, Diagnostic):
        draft.findings.append(tree)
        return ""
    return _header(draft, children(tree)[0], body)[0]


def _header(draft: Draft, tree: Syntax, body: Fragment) -> list[str]:
    first, *rest = [_value(token, body) for token in tokens(tree)]
    key = _KEYS.get(first.text, first.text)
    match tree.data:
        case "clear":
            return [draft.clear(word.text, word.span) for word in (first, *rest)]
        case "text_key":
            path = draft.text(key, rest[0], first.span)
        case "list_key":
            return [draft.word(key, word) for word in rest]
        case "field":
            path = draft.field(key, *rest)
        case "var":
            path = draft.var(first, rest[0], quoted=tokens(tree)[1].type == "STRING")
        case _:
            path = _metadata(draft, first, tokens(tree)[1], body)
    return [path]


def _metadata(draft: Draft, key: Fragment, token: Token, body: Fragment) -> str:
    span, text = place(body, token), token.strip()
    value: Any = parsing.plain_scalar(text)
    if not _BARE_JSON.fullmatch(text) or text == "null":
        try:
            value = json.loads(parsing.short_escapes(text), parse_constant=_refuse)
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
    return inner if "\\" not in inner.text else Fragment.all_at(parsing.unquote(token), inner.span)
