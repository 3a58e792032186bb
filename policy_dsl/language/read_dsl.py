"""DSL text -> Policy: cut into statements and comments, then read one by one.

Statements end with `;` or a newline; `#` starts a comment; `on <target> {` and `}` open and
close a block. Quoted texts and `/…/` may hold any of these characters.
"""

import json
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from lark import Token

from policy_dsl.diagnostics import Diagnostic, SourceText, Span, diagnostic, fail
from policy_dsl.language import parsing
from policy_dsl.language.draft import Draft
from policy_dsl.language.parsing import Fragment, Syntax, children, parse, place, tokens
from policy_dsl.policy import KEYS, WORDS, Comment, Policy, Values, Words

_TOKEN = re.compile(
    r'"(?:[^"\\\n]|\\.)*"?|\$\{[^}\n]*\}?|#[^\n]*|[;{}\n/()\[\],]|[^\s"$#;{}/()\[\],]+|\$'
)
_CLOSED = re.compile(r'"(?:[^"\\]|\\.)*"')
_REGEX = re.compile(r"/(?:[^/\\\n]|\\.)+/")
_BLOCK = re.compile(r"\s*on\s+(\S+)\s*$")
# A regular expression begins at a slash after one of these; after anything else it divides.
_BEFORE_REGEX = {"", ",", "(", "in", "and", "except", "test"}
_KEYS = {key.word: key.name for key in KEYS}
_VAR = re.compile(r"\s*var(?!\S)")
_BLANK = re.compile(r"\n[\s;]*\n")
_BARE_JSON = re.compile(r"[\w.+$-][\w.+$ {}/-]*")


Kind = Literal["statement", "comment", "beside", "blank", "open", "close"]
_REMARKS = ("comment", "beside", "blank")


class Piece(NamedTuple):
    """A statement without its end, a comment, a blank line, or a bracket of an `on` block.

    beside: a comment on the line of what it is about. text: of a bracket, the block's target.
    block: the target of the block around a statement.
    """

    kind: Kind
    text: Fragment
    block: str | None = None


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
        self.pieces: list[Piece] = []
        self.findings: list[Diagnostic] = []
        self._all, self._text = fragment, fragment.text
        # Where the last piece ended and the open statement starts, and how deep its braces are.
        self._end = self._start = self._depth = 0
        self._broken = False
        self._block: Fragment | None = None
        before, at = "", 0
        while found := _TOKEN.search(self._text, at):
            start, token = found.start(), found[0]
            # `where i < n // 8` holds slashes that divide.
            if token == "/" and before in _BEFORE_REGEX:
                regex = _REGEX.match(self._text, start)
                token = regex[0] if regex else token
            at = start + len(token)
            self._take(token, start, at)
            before = "" if token in ("\n", ";") or self._start == at else token
        self._finish(len(self._text), 0)
        if self._block:
            place, target = self._block.span, self._block.text
            self.findings.append(diagnostic("unclosed-block", place, target=target))

    def _take(self, token: str, at: int, after: int) -> None:
        if token in ("\n", ";"):
            self._finish(at, after)
        elif token[0] == "#":
            line = self._text[self._text.rfind("\n", 0, at) + 1 : at]
            self._finish(at, after)
            self._add("beside" if line.strip(" \t\f\r;") else "comment", at, after)
        elif token == "{":
            block = None if self._block else _BLOCK.match(self._text, self._start, at)
            # Braces that open no block are left to the grammar, which names what it expected.
            if block is None:
                self._depth += 1
                return
            self._block = self._all[block.start(1) : block.end(1)]
            self._add("open", at, after)
            self._start = after
        elif token == "}" and self._depth:
            self._depth -= 1
        elif token == "}":
            self._finish(at, after)
            if self._block:
                self._add("close", at, after)
            else:
                self.findings.append(diagnostic("stray-brace", self._all.place(at, after)))
            self._block = None
        elif token[0] == '"' and not _CLOSED.fullmatch(token):
            self.findings.append(diagnostic("unclosed-quote", self._all.place(at, after)))
            self._broken = True

    def _finish(self, at: int, start: int) -> None:
        """Ends the open statement; the next one begins at `start`."""
        # A statement with an open quote has its finding; parsing it would add a second one.
        if self._text[self._start : at].strip() and not self._broken:
            self._add("statement", self._start, at)
        self._start, self._depth, self._broken = start, 0, False

    def _add(self, kind: Kind, at: int, after: int) -> None:
        if self.pieces and _BLANK.search(self._text, self._end, at):
            self.pieces.append(Piece("blank", self._all[at:at]))
        block = self._block
        text = block if block and kind in ("open", "close") else self._all[at:after]
        self.pieces.append(Piece(kind, text, block.text if block else None))
        self._end = after


def read_dsl(
    source: SourceText, name: str, values: Values | None = None, *, words: Words = WORDS
) -> Policy:
    """The policy that a DSL text says; `extends` is left as written.

    name: the policy's name if the text gives none. values: replace the defaults of `vars`.
    Raises: PolicyError with every defect of the text.
    """
    draft = Draft(source, name, values or {}, words)
    source = draft.source
    split = Splitting(Fragment.whole(source))
    if not split.findings and all(piece.kind in _REMARKS for piece in split.pieces):
        raise fail("empty-policy", Span(source, 0, min(1, len(source.text))), path=source.name)
    _take(draft, split, lambda piece: _statement(draft, piece))
    return draft.build()


def read_rules(draft: Draft, text: Fragment, target: str | None) -> None:
    """Adds the rules of a text that may hold nothing else: `rules: |` of a YAML policy."""
    split = Splitting(text)
    for piece in split.pieces:
        if piece.kind in _REMARKS:
            refuse_swallowing(draft, piece.text)
        elif piece.kind == "open":
            draft.report("block-in-rules", piece.text.span, target=piece.text.text)
    split.pieces = [piece for piece in split.pieces if piece.kind not in ("open", "close")]
    end = f"targets.{target}.rules[]" if target else "rules[]"
    _take(draft, split, lambda piece: draft.statement(piece.text.strip(), ("rule",), target), end)


def refuse_swallowing(draft: Draft, comment: Fragment) -> None:
    """Adds a defect if a comment takes more than its line: YAML joins lines in `>` texts."""
    span = comment.span
    if "\n" in span.source.text[span.start : span.end]:
        draft.report("comment-in-folded-text", span)


def _take(draft: Draft, split: Splitting, read: Callable[[Piece], str], end: str = "") -> None:
    """Reads every statement, variables first, and ties comments to what they belong to."""
    draft.findings += split.findings
    statements = [piece for piece in split.pieces if piece.kind == "statement"]
    # Variables may be below the rules that use them.
    ordered = sorted(statements, key=lambda piece: not _VAR.match(piece.text.text))
    anchors = {id(statement): read(statement) for statement in ordered}
    last, remarks = "", Remarks(head=not end)
    for piece in split.pieces:
        text = piece.text.text.strip()
        if piece.kind == "beside" and last:
            remarks.comments.append(Comment(last, text, trailing=True))
        elif piece.kind in _REMARKS:
            remarks.waiting.append((text, 0))
        else:
            if piece.kind == "statement":
                last = anchors[id(piece)]
            else:
                draft.block(piece.text)
                last = f"targets.{text}" + ".rules[]" * (piece.kind == "close")
            remarks.belong(last)
    # What still waits belongs to the end of the text or block.
    draft.comments += remarks.comments + [Comment(end, text) for text, _ in remarks.waiting]


def _statement(draft: Draft, piece: Piece) -> str:
    body = piece.text.strip()
    # A block holds rules of its target; headers belong to the whole policy.
    if piece.block is not None:
        return draft.statement(body, ("rule",), piece.block)
    if not parsing.value_statement().match(body.text):
        return draft.statement(body, ("rule", "prune", "test", "otherwise"))
    tree = parse(body)
    if not isinstance(tree, Diagnostic):
        return _header(draft, children(tree)[0], body)
    draft.findings.append(tree)
    return ""


def _header(draft: Draft, tree: Syntax, body: Fragment) -> str:
    first, *rest = [_value(token, body) for token in tokens(tree)]
    key = _KEYS.get(first.text, first.text)
    match tree.data:
        case "clear":
            paths = [draft.clear(word.text, word.span) for word in (first, *rest)]
        case "text_key":
            paths = [draft.text(key, rest[0], first.span)]
        case "list_key":
            paths = [draft.word(key, word) for word in rest]
        case "field":
            paths = [draft.field(key, *rest)]
        case "var":
            paths = [draft.var(first, rest[0], quoted=tokens(tree)[1].type == "STRING")]
        case _:
            paths = [_metadata(draft, first, tokens(tree)[1], body)]
    return paths[0]


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
