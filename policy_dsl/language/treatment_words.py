"""The words after the colon -> Written, and back: `4bit affine g64 sym by gptq optional`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from policy_dsl.diagnostics import Diagnostic, Span, diagnostic, did_you_mean
from policy_dsl.treatments import MAX_BITS, PLAIN_DTYPES, WHOLE_ROW, Written
from policy_dsl.vocabulary import METHODS, SCHEME_TARGETS

Word = tuple[str, Span]
ACTIONS = ("keep", "raw", "drop")
_BITS = re.compile(r"([0-9]+)bits?")
_GROUP = re.compile(r"g(-1|[0-9]+)")
_SYMMETRY = {"sym": True, "asym": False}
_KNOWN = (*SCHEME_TARGETS, *METHODS, *PLAIN_DTYPES, *ACTIONS, *_SYMMETRY, "4bit", "optional")
_OTHER_NAMES = {
    "fp16": "f16", "float16": "f16", "half": "f16", "bfloat16": "bf16", "fp32": "f32",
    "float32": "f32", "none": "keep", "skip": "keep", "symmetric": "sym", "asymmetric": "asym",
}  # fmt: skip


def read_treatment(
    words: Sequence[Word], where: Span
) -> tuple[Written | None, bool, tuple[Diagnostic, ...]]:
    """The treatment the words say, whether `optional` stood among them, and their defects.

    where: all of the words; the treatment is None if they say none.
    """
    reader = _Words(words)
    reader.read()
    findings = reader.findings
    if not reader.fields and not findings:
        findings.append(diagnostic("missing-treatment", where))
    if findings:
        return None, reader.optional, tuple(findings)
    fields = {name: value for name, (value, _) in reader.fields.items()}
    action = fields.pop("action", "quantize")
    return Written(action, **fields), reader.optional, ()


class _Words:
    """Takes word after word; `fields` holds what they said, each with its word."""

    def __init__(self, words: Sequence[Word]) -> None:
        self._words = words
        self.fields: dict[str, tuple[Any, Word]] = {}
        self.optional = False
        self.findings: list[Diagnostic] = []

    def read(self) -> None:
        words = iter(self._words)
        for word in words:
            if word[0] == "optional":
                self.optional = True
            elif word[0] == "by":
                self._by(word, next(words, None))
            else:
                self._plain(word)

    def _by(self, by: Word, method: Word | None) -> None:
        if method is None:
            self.findings.append(diagnostic("missing-method", by[1]))
        elif method[0] in METHODS:
            self._say("method", method[0], method)
        else:
            cure = did_you_mean(method[0], METHODS)
            self.findings.append(
                diagnostic("unknown-method", method[1], suggestion=cure, method=method[0])
            )

    def _plain(self, word: Word) -> None:
        text = word[0]
        for pattern, field in ((_BITS, "bits"), (_GROUP, "group_size")):
            if found := pattern.fullmatch(text):
                self._number(field, found[1], word)
                return
        if text in ACTIONS:
            self._say("action", text, word)
        elif text in PLAIN_DTYPES:
            self._say("action", "cast", word)
            self._say("dtype", text, word)
        elif text in _SYMMETRY:
            self._say("symmetric", _SYMMETRY[text], word)
        elif text in SCHEME_TARGETS:
            self._say("scheme", text, word)
        elif text in METHODS:
            self._say("method", text, word)
        else:
            self._unknown(word)

    def _number(self, field: str, digits: str, word: Word) -> None:
        limit = MAX_BITS if field == "bits" else 1 << 20
        if digits == str(WHOLE_ROW):
            self._say(field, WHOLE_ROW, word)
        elif len(digits) > 9 or not 1 <= int(digits) <= limit:
            self.findings.append(
                diagnostic("number-out-of-range", word[1], written=word[0], low=1, high=limit)
            )
        else:
            self._say(field, int(digits), word)

    def _unknown(self, word: Word) -> None:
        other = _OTHER_NAMES.get(word[0].lower())
        cure = f'did you mean "{other}"?' if other else did_you_mean(word[0], _KNOWN)
        if re.fullmatch(r"[0-9]+", word[0]):
            cure = f'did you mean "{word[0]}bit"?'
        self.findings.append(diagnostic("unknown-scheme", word[1], suggestion=cure, scheme=word[0]))

    def _say(self, field: str, value: object, word: Word) -> None:
        clash = self._clash(field)
        if clash is not None and clash is not word:
            self.findings.append(
                diagnostic("contradicting-treatment", word[1], one=clash[0], other=word[0])
            )
        self.fields.setdefault(field, (value, word))

    def _clash(self, field: str) -> Word | None:
        if field in self.fields:
            return self.fields[field][1]
        # What is not quantized has no width, scheme or method, and the other way round.
        others = [name for name in self.fields if name != field]
        if field == "action" or "action" in others:
            other = "action" if "action" in others else (others[0] if others else None)
            return self.fields[other][1] if other else None
        return None


def treatment_words(treatment: Written) -> Iterator[str]:
    """The words that `read_treatment` reads as this treatment, in their fixed order."""
    if treatment.action == "cast":
        yield treatment.dtype or ""
    elif treatment.action != "quantize":
        yield treatment.action
    if treatment.bits is not None:
        yield f"{treatment.bits}bit"
    if treatment.scheme is not None:
        yield treatment.scheme
    if treatment.group_size is not None:
        yield f"g{treatment.group_size}"
    if treatment.symmetric is not None:
        yield "sym" if treatment.symmetric else "asym"
    if treatment.method is not None:
        yield f"by {treatment.method}"


def print_treatment(treatment: Written) -> str:
    """The treatment as a policy says it, such as `4bit affine g64`."""
    return " ".join(treatment_words(treatment))
