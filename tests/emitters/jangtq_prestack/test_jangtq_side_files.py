"""Chat templates and tokenizer configurations: what publishers write, what bundles hold."""

from __future__ import annotations

import json

import pytest
from hash_sources import CHAT_TEMPLATE, TOKENIZER_CONFIG

from emitters import FORMATS
from policy_dsl.diagnostics import PolicyError
from policy_dsl.language.load import load
from policy_dsl.planning.resolve import resolve
from tests.models import tiny

TEMPLATE, TOKENIZER = "chat_template.jinja", "tokenizer_config.json"
SWITCH = "{%- if enable_thinking is defined and enable_thinking is false -%}"
USUAL = json.dumps(TOKENIZER_CONFIG).encode()


def edited(files: dict[str, bytes]) -> dict[str, bytes]:
    plan = resolve(load("jangtq_2"), tiny(), FORMATS)
    return FORMATS["jangtq_prestack"].files().edited(plan, files)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_the_thinking_block_becomes_a_choice_whatever_ends_a_line(newline: str) -> None:
    template = CHAT_TEMPLATE.replace("\n", newline).encode()
    found = edited({TEMPLATE: template, TOKENIZER: USUAL})
    assert SWITCH in found[TEMPLATE].decode()
    document = json.loads(found[TOKENIZER])
    assert document["chat_template"] == found[TEMPLATE].decode()
    assert document["tokenizer_class"] == "GPT2Tokenizer"


def test_files_that_need_no_change_stay_as_they_are() -> None:
    held = b'{"chat_template":"{{ messages }}\\n"}'
    files = {TEMPLATE: b"{{ messages }}\r\n", TOKENIZER: held}
    assert edited(files) == files
    alone = {TOKENIZER: b'{"tokenizer_class":"GPT2Tokenizer"}'}
    assert edited(alone) == alone


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE.encode()])
def test_text_that_no_encoding_holds_stays_escaped(template: bytes | None) -> None:
    stored = rb'{"tokenizer_class": "TokenizersBackend", "x": "\ud800 \u00e9"}'
    files = {TOKENIZER: stored} | ({TEMPLATE: template} if template else {})
    content = edited(files)[TOKENIZER]
    assert rb"\ud800" in content
    assert json.loads(content)["x"] == "\ud800 é"


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        (TEMPLATE, b"\xff\xfe", "unreadable-file"),
        (TOKENIZER, b"\xff", "unreadable-file"),
        (TOKENIZER, b"", "bad-source-json"),
        (TOKENIZER, b"[]", "bad-source-json"),
        (TOKENIZER, b"[" * 100_000, "bad-source-json"),
    ],
)
def test_files_that_are_not_what_they_must_be(name: str, content: bytes, code: str) -> None:
    with pytest.raises(PolicyError) as caught:
        edited({TEMPLATE: b"", TOKENIZER: USUAL} | {name: content})
    (found,) = caught.value.diagnostics
    assert found.code == code
    assert name in found.message
