"""The token ids that a tokenizer's files and a model's configs name, read field by field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from policy_dsl.sources.safetensors_header import shown

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def tokens_beyond(
    documents: Mapping[str, Mapping[str, Any]], rows: int
) -> dict[str, list[str]]:
    """File -> the tokens it gives ids that an embedding of `rows` rows does not have.

    documents: JSON files by name; those that name no tokens are passed over.
    """
    found = {}
    for file, document in documents.items():
        read = _READERS.get(file)
        pairs = read(document) if read else ()
        # A negative id means that there is no such token.
        beyond = [f"{shown(name, 40)} {number}" for name, number in pairs if number >= rows]
        if beyond:
            found[file] = beyond
    return found


def _fast_tokenizer(document: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, list):
        # Unigram: pairs of a piece and its score, the id is the place.
        yield from ((_piece(entry), number) for number, entry in enumerate(vocabulary))
    else:
        yield from _numbered(vocabulary)
    added = document.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, Mapping) and type(entry.get("id")) is int:
            yield str(entry.get("content")), entry["id"]


def _piece(entry: Any) -> str:
    return str(entry[0]) if isinstance(entry, list) and entry else str(entry)


def _numbered(document: Any) -> Iterator[tuple[str, int]]:
    if isinstance(document, Mapping):
        yield from ((name, number) for name, number in document.items() if type(number) is int)


def _tokenizer_config(document: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    decoder = document.get("added_tokens_decoder")
    for number, entry in decoder.items() if isinstance(decoder, Mapping) else ():
        if number.isascii() and number.isdigit() and len(number) < 10:
            content = entry.get("content") if isinstance(entry, Mapping) else entry
            yield str(content), int(number)


def _special(document: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    inner = document.get("text_config")
    for config in (document, inner if isinstance(inner, Mapping) else {}):
        for key in _SPECIAL:
            value = config.get(key)
            for number in value if isinstance(value, list) else [value]:
                if type(number) is int:
                    yield key, number


_READERS = {
    "tokenizer.json": _fast_tokenizer,
    "vocab.json": _numbered,
    "added_tokens.json": _numbered,
    "tokenizer_config.json": _tokenizer_config,
    "config.json": _special,
    "generation_config.json": _special,
}
