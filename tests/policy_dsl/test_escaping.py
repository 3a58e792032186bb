"""Text from anywhere, made safe for terminals, Markdown and people."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy_dsl.diagnostics import SourceText, Span, diagnostic, json_text, render
from policy_dsl.escaping import columns, escaped, escaped_lines, is_visible, markdown
from policyc.reports import Facts, Items, Table, render_markdown, render_text

HOSTILE = {
    "an escape sequence": ("\x1b[31mred", r"\x1b[31mred"),
    "a bell and a title": ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
    "a forged line": ("x\nerror[fake]: no", r"x\nerror[fake]: no"),
    "a line that is written over": ("bad\rgood", r"bad\rgood"),
    "a tab": ("a\tb", r"a\tb"),
    "delete": ("a\x7f", r"a\x7f"),
    "a C1 control": ("\x9b31m", r"\x9b31m"),
    "a line separator": ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
    "an override of the direction": ("a\u202eb", r"a\u202eb"),
    "an isolate": ("a\u2066b\u2069", r"a\u2066b\u2069"),
    "marks of the direction": ("\u200ea\u200f\u061c", r"\u200ea\u200f\u061c"),
    "no width": ("a\u200bb\u200dc\ufeff", r"a\u200bb\u200dc\ufeff"),
    "letters that are blank": ("a\u3164\u2800b", r"a\u3164\u2800b"),
    "a pile of marks": ("a" + "\u0301" * 6, "a" + "\u0301" * 4 + r"\u0301\u0301"),
    "a variation": ("a\ufe0f\U000e0100", r"a\ufe0f\U000e0100"),
    "a tag": ("a\U000e0041", r"a\U000e0041"),
    "a private character": ("\ue000", r"\ue000"),
    "no character": ("\ufffe\U0001ffff", r"\ufffe\U0001ffff"),
    "half a pair": ("\ud800x", r"\ud800x"),
    "a byte of a file's name": ("\udcff.yaml", r"\xff.yaml"),
    "bytes that a locale did not decode": ("\udcc3\udcbc", "\u00fc"),
    "a control in such bytes": ("\udcc2\udc9b", r"\x9b"),
    "a space that is none": ("a\u00a0b\u3000", r"a\xa0b\u3000"),
    "nothing hostile": ("größer — 大 é (#1) C:\\new", "größer — 大 é (#1) C:\\new"),
}
TEXTS = [pytest.param(*case, id=name) for name, case in HOSTILE.items()]


@pytest.mark.parametrize(("text", "shown"), TEXTS)
def test_what_cannot_be_seen_is_escaped(text: str, shown: str) -> None:
    assert escaped(text) == shown
    assert escaped(shown) == shown
    lines = escaped_lines(f"{text}\n")
    assert lines == "".join(f"{escaped(line)}\n" for line in text.split("\n"))


@given(st.text(st.characters(), max_size=40))
def test_every_text_can_be_seen_after_that_and_keeps_its_values_in_json(text: str) -> None:
    assert is_visible(escaped(text))
    assert all(map(is_visible, escaped_lines(text).split("\n")))
    for indent in (None, 2):
        document = json_text({text: [text]}, indent=indent)
        assert json.loads(document) == {text: [text]}
        assert all(map(is_visible, document.split("\n")))


def test_runners_of_workflows_get_no_commands() -> None:
    text = "::set-output name=x::y\n  ::debug::x\na::b\n2 | # ##[error]x\n"
    text += "##vso[task.x]y\n## a [b]\n"
    assert escaped_lines(text) == (
        "\\x3a:set-output name=x::y\n  \\x3a:debug::x\na::b\n2 | # \\x23#[error]x\n"
        "\\x23#vso[task.x]y\n## a [b]\n"
    )
    assert escaped_lines(escaped_lines(text)) == escaped_lines(text)
    assert escaped_lines("::error title=x::y\n", commands=True) == "::error title=x::y\n"
    document = json_text({"a": "::x ##[error]y"})
    assert "##[" not in document
    assert json.loads(document) == {"a": "::x ##[error]y"}


def test_long_values_are_cut() -> None:
    assert escaped("a" * 100, longest=10) == "a" * 10 + "…"
    found = diagnostic("unknown-policy", name="\x1b" * 10**6)
    assert len(found.message) < 10_000
    assert len(render_text([Facts((("model", "m" * 10**6),))])) < 10_000


@pytest.mark.parametrize(("text", "shown"), TEXTS)
def test_all_parts_of_a_diagnostic_are_on_lines_of_their_own(text: str, shown: str) -> None:
    place = Span(SourceText(f"{text}.yaml", "a: b"), 0, 1)
    found = diagnostic(
        "unknown-policy", place, name=text, suggestion=f"not {text}", notes=[f"note {text}"]
    )
    assert render([found]).split("\n") == [
        f'error[unknown-policy]: there is no policy "{shown}"',
        f"  --> {shown}.yaml:1:1",
        "1 | a: b",
        f"  | ^ not {shown}",
        f"  = note {shown}",
    ]


@pytest.mark.parametrize(
    ("line", "shown", "caret"),
    [
        ("all\x1b[31m: 8bit", "all␛[31m: 8bit", 10),
        ("a\tb\x7f\u202e: 8bit", "a b␡\ufffd: 8bit", 7),
        ("大: 8bit", "大: 8bit", 4),
        ("e\u0301: 8bit", "e\u0301: 8bit", 3),
        ("\ufeff\u200b\U0001f600: 8bit", "\ufffd\ufffd\U0001f600: 8bit", 6),
    ],
)
def test_carets_point_at_their_column(line: str, shown: str, caret: int) -> None:
    at = line.index("8")
    found = diagnostic("unknown-policy", Span(SourceText("p", line), at, at + 4), name="x")
    excerpt, carets = render([found]).split("\n")[2:]
    assert excerpt == f"1 | {shown}"
    assert carets == f"  | {' ' * caret}^^^^"
    assert columns(excerpt[4 : excerpt.index("8")]) == caret


@pytest.mark.parametrize(("text", "shown"), TEXTS)
def test_reports_keep_their_rows_and_columns(text: str, shown: str) -> None:
    blocks = [
        Facts((("model", text),)),
        Table(("name", "bytes"), ((text, "1"), ("b", "22")), right=("bytes",)),
        Items((text,), "Left out"),
    ]
    made = render_text(blocks)
    assert len(made.splitlines()) == len(render_text(blocks).split("\n")) - 1 == 9
    assert made.startswith(f"model  {shown}\n")
    made = render_markdown(blocks)
    assert len(made.split("\n")) == 11
    assert all(map(is_visible, made.split("\n")))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b\nc", r"a\|b\\nc"),
        ("<img src=x onerror=y>", "&lt;img src=x onerror=y>"),
        ("[click](http://x) ![i](y)", r"\[click](http://x) !\[i](y)"),
        ("`code` **bold**", r"\`code\` \*\*bold\*\*"),
        ("_em_ but snake_case", r"\_em\_ but snake_case"),
        ("&lt; @everyone", "&amp;lt; &#64;everyone"),
    ],
)
def test_markdown_is_text(text: str, shown: str) -> None:
    assert markdown(text) == shown


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("# a heading", r"\# a heading"),
        ("- a list", r"\- a list"),
        ("12. a list", r"12\. a list"),
        ("> a quotation", r"\> a quotation"),
        ("~~~", r"\~~~"),
        ("[x]: http://y", r"\[x]: http://y"),
        ("1.5 bits", "1.5 bits"),
    ],
)
def test_an_entry_of_a_list_stays_one(line: str, shown: str) -> None:
    assert render_markdown([Items((line,))]) == f"* {shown}\n"
