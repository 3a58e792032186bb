"""Chat template and tokenizer configuration as JANG's engines want them.

Source: jang 2.5.50, `convert_minimax_jangtq`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import fail
from policy_dsl.plan import Plan

TEMPLATE = "chat_template.jinja"
TOKENIZER = "tokenizer_config.json"
# MiniMax's template opens the thinking block whatever the caller wants.
_ALWAYS_THINKS = r"{{- ']~b]ai' ~ '\n' ~ '<think>' ~ '\n' }}"
_MAY_THINK = "\n    ".join(
    (
        r"{{- ']~b]ai' ~ '\n' }}",
        "{%- if enable_thinking is defined and enable_thinking is false -%}",
        "{%- else -%}",
        r"{{- '<think>' ~ '\n' }}",
        "{%- endif -%}",
    )
)


def edited(plan: Plan, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The template with the `enable_thinking` switch, and the tokenizer's file with all of it.

    files: the source's, by name. A file that needs no change stays as it is, byte for byte.
    Raises: PolicyError if one of them is not UTF-8, or the tokenizer's is not a JSON object.
    """
    found = dict(files)
    template = _text(TEMPLATE, files[TEMPLATE]) if TEMPLATE in files else None
    if template is not None and _ALWAYS_THINKS in template and _MAY_THINK not in template:
        template = template.replace(_ALWAYS_THINKS, _MAY_THINK)
        found[TEMPLATE] = template.encode()
    if TOKENIZER in files:
        found[TOKENIZER] = _tokenizer(files[TOKENIZER], template)
    return found


def _tokenizer(stored: bytes, template: str | None) -> bytes:
    content = stored
    document = _document(content)
    # A class that only Python's newest tokenizers know; Swift reads the other one.
    if document.get("tokenizer_class") == "TokenizersBackend":
        document["tokenizer_class"] = "GPT2Tokenizer"
        content = json.dumps(document, indent=2).encode()
    # Engines that look for the template here and nowhere else.
    if template is not None and document.get("chat_template") != template:
        document["chat_template"] = template
        text = json.dumps(document, indent=2, ensure_ascii=False)
        # JSON may escape halves of a character, which are no text: they stay escapes.
        content = text.encode(errors="backslashreplace")
    return content


def _document(content: bytes) -> dict[str, Any]:
    try:
        document = parse_json(_text(TOKENIZER, content).encode())
    except ValueError as error:
        raise fail("bad-source-json", file=TOKENIZER, reason=str(error)) from None
    if not isinstance(document, dict):
        raise fail("bad-source-json", file=TOKENIZER, reason="it is not a JSON object")
    return document


def _text(name: str, content: bytes) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise fail("unreadable-file", path=name, reason="it is not UTF-8 text") from None
    # As a file opened for text is read: every end of line becomes the same.
    return text.replace("\r\n", "\n").replace("\r", "\n")
