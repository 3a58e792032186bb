"""Statements that hold treatments or tests: read from text, and printed in one fixed form.

A rule, `prune …`, `test …` or `otherwise …`; the words of a treatment such as
`4bit affine g64 sym by gptq`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from lark import Token

from policy_dsl.diagnostics import Diagnostic, did_you_mean
from policy_dsl.language.fragments import Fragment
from policy_dsl.language.keys import mistakes
from policy_dsl.language.parsing import Syntax, children, parse, place, tokens
from policy_dsl.language.selector_text import SelectorReader, print_ranges, print_selector
from policy_dsl.policy import Assertion, Prune, Rule
from policy_dsl.quantities import parse_size
from policy_dsl.selectors import LayerRange
from policy_dsl.treatments import MAX_BITS, PLAIN_DTYPES, WHOLE_ROW, Written
from policy_dsl.vocabulary import WORDS, Words

_MAX_PRUNED_DIGITS = 6
_EXPECTED = {
    "rule": "a rule",
    "prune": "a transform such as prune experts to 192 by reap",
    "test": "a test",
    "otherwise": "a treatment",
}
_ACTIONS = ("keep", "raw", "drop")
_NUMBER = re.compile(r"(?P<bits>[0-9]+)bits?|g(?P<group>-1|[0-9]+)")
_SYMMETRY = {"sym": True, "asym": False}


class ReadStatement(SelectorReader):
    """What a statement says (None if that is unclear), where it is, its defects.

    kinds: the grammar's names of those that are allowed here; another one is a defect.
    """

    value: Rule | Prune | Assertion | Written | None = None

    def __init__(self, statement: Fragment, kinds: tuple[str, ...], words: Words = WORDS) -> None:
        super().__init__(statement)
        self.span = statement.span
        self._words = words
        # What the words of a treatment said, each with its word.
        self._said: dict[str, tuple[Any, Token]] = {}
        tree = parse(statement)
        first = statement.text.split(maxsplit=1)[:1]
        body = None if isinstance(tree, Diagnostic) else children(tree)[0]
        # "This is not a transform" says more than what the grammar expected inside one.
        if isinstance(tree, Diagnostic) and (kinds != ("prune",) or first == ["prune"]):
            self.findings.append(tree)
        elif body is None or body.data not in kinds:
            self.report("not-here", self.span, word=first[0], expected=_EXPECTED[kinds[0]])
        else:
            readers: dict[str, Callable[[Syntax], Any]] = {
                "rule": self._rule,
                "prune": self._prune,
                "test": self._test,
            }
            value = readers.get(body.data, self._otherwise)(body)
            # Half a rule would match the wrong tensors, and every check after it would be noise.
            self.value = None if self.findings else value

    def _rule(self, tree: Syntax) -> Rule:
        selector_tree, treatment_tree = children(tree)
        selector = self.selector(selector_tree)
        treatment, optional = self._treatment(treatment_tree)
        return Rule(
            selector,
            treatment,
            optional,
            span=self.span,
            selector_span=place(self.text, selector_tree),
            treatment_span=place(self.text, treatment_tree),
            name_spans=tuple(self.spans),
        )

    def _otherwise(self, tree: Syntax) -> Written:
        (words,) = children(tree)
        self.span = place(self.text, words)
        return self._mandatory(words)

    def _prune(self, tree: Syntax) -> Prune | None:
        component, *words = tokens(tree)
        if component != "experts":
            self.report("unprunable", component, component=component)
        elif listed := children(tree):
            return Prune(keep=_apart(self.ranges(listed[0], signed=False)))
        # Length first: Python itself refuses numbers of thousands of digits.
        elif len(words[0]) > _MAX_PRUNED_DIGITS or int(words[0]) < 1:
            high = 10**_MAX_PRUNED_DIGITS - 1
            self.report("number-out-of-range", words[0], written=words[0], low=1, high=high)
        else:
            method = words[1] if len(words) > 1 else None
            return Prune(to=int(words[0]), by=str(method or "reap"))
        return None

    def _test(self, tree: Syntax) -> Assertion | None:
        (body,) = children(tree)
        self.span = place(self.text, body)
        parts = {token.type: token for token in tokens(body)}
        if "MEASURE" not in parts:
            selector_tree, treatment_tree = children(body)
            selector = self.selector(selector_tree)
            treatment = self._mandatory(treatment_tree)
            text = f"{print_selector(selector)} is {print_treatment(treatment)}"
            return Assertion(text, "treatment", "is", treatment, selector, self.span)
        groups = children(body)
        of = self.selector(children(groups[0])[0]) if groups else None
        measure, relation = str(parts["MEASURE"]), str(parts["RELATION"])
        # `90 GiB` and `90GiB` are one test, also when policies are compared.
        quantity = "".join(parts["QUANTITY"].split())
        value = _quantity(measure, quantity)
        if value is None:
            self.report("bad-quantity", parts["QUANTITY"], measure=measure, written=quantity)
        if of is None and measure not in ("bpw", "size"):
            cure = f'write "{measure}(experts.down_proj)"'
            self.report("measure-of-nothing", parts["MEASURE"], cure=cure, measure=measure)
        text = f"{measure}{f'({print_selector(of)})' if of else ''} {relation} {quantity}"
        return Assertion(text, measure, relation, value or 0.0, of, self.span)

    def _mandatory(self, tree: Syntax) -> Written:
        treatment, optional = self._treatment(tree)
        if optional:
            self.report("optional-otherwise", self.span)
        return treatment

    def _treatment(self, tree: Syntax) -> tuple[Written, bool]:
        """What the words say, and whether `optional` is among them."""
        before, optional = len(self.findings), False
        words = iter(tokens(tree))
        for word in words:
            if word == "optional":
                optional = True
            elif word == "by":
                self._method(word, next(words, None))
            else:
                self._word(word)
        if not self._said and len(self.findings) == before:
            self.report("missing-treatment", tree)
        said = {name: value for name, (value, _) in self._said.items()}
        return Written(said.pop("action", "quantize"), **said), optional

    def _method(self, by: Token, method: Token | None) -> None:
        if method is None:
            self.report("missing-method", by)
        elif method in self._words.methods:
            self._say("method", str(method), method)
        else:
            cure = did_you_mean(method, self._words.methods)
            self.report("unknown-method", method, cure=cure, method=method)

    def _word(self, word: Token) -> None:
        text = str(word)
        if number := _NUMBER.fullmatch(text):
            field = "bits" if number["bits"] else "group_size"
            self._number(field, number["bits"] or number["group"], word)
        elif text in _ACTIONS:
            self._say("action", text, word)
        elif text in PLAIN_DTYPES:
            self._say("action", "cast", word)
            self._say("dtype", text, word)
        elif text in _SYMMETRY:
            self._say("symmetric", _SYMMETRY[text], word)
        elif text in self._words.schemes:
            self._say("scheme", text, word)
        elif text in self._words.methods:
            self._say("method", text, word)
        else:
            self._unknown(word)

    def _number(self, field: str, digits: str, word: Token) -> None:
        limit = MAX_BITS if field == "bits" else 1 << 20
        whole_row = digits == str(WHOLE_ROW)
        if not whole_row and (len(digits) > 9 or not 1 <= int(digits) <= limit):
            self.report("number-out-of-range", word, written=word, low=1, high=limit)
        else:
            self._say(field, int(digits), word)

    def _unknown(self, word: Token) -> None:
        known = (*self._words.schemes, *self._words.methods, *PLAIN_DTYPES, *_ACTIONS, *_SYMMETRY)
        other = mistakes()["treatments"].get(word.lower())
        if re.fullmatch("[0-9]+", word):
            other = f"{word}bit"
        near = did_you_mean(word, (*known, "4bit", "optional"))
        cure = f'did you mean "{other}"?' if other else near
        self.report("unknown-scheme", word, cure=cure, scheme=word)

    def _say(self, field: str, value: object, word: Token) -> None:
        said, clash = self._said, None
        if field in said:
            clash = said[field][1]
        # What is not quantized has no width, scheme or method, and the other way round.
        elif said and (field == "action" or "action" in said):
            clash = said.get("action", next(iter(said.values())))[1]
        if clash is not None and clash is not word:
            self.report("contradicting-treatment", word, one=str(clash), other=str(word))
        said.setdefault(field, (value, word))


def _apart(ranges: Iterable[LayerRange]) -> tuple[LayerRange, ...]:
    """The same numbers as ascending ranges that do not touch: one form for equal lists."""
    merged: list[LayerRange] = []
    for added in sorted(ranges, key=lambda numbers: numbers.start):
        if merged and added.start <= merged[-1].stop + 1:
            merged[-1] = LayerRange(merged[-1].start, max(added.stop, merged[-1].stop))
        else:
            merged.append(added)
    return tuple(merged)


def _quantity(measure: str, text: str) -> float | None:
    if measure == "size":
        size = parse_size(text)
        return None if size is None else float(size)
    # A unit on a plain measure, as in `bpw <= 3GB`, is a mistake and not a number.
    return float(text) if text[-1].isdigit() and len(text) <= 20 else None


def print_treatment(treatment: Written) -> str:
    """The treatment as a policy says it, such as `4bit affine g64`."""
    action = "" if treatment.action == "quantize" else treatment.action
    symmetry = {None: "", True: "sym", False: "asym"}[treatment.symmetric]
    words = (
        treatment.dtype if action == "cast" else action,
        "" if treatment.bits is None else f"{treatment.bits}bit",
        treatment.scheme,
        "" if treatment.group_size is None else f"g{treatment.group_size}",
        symmetry,
        f"by {treatment.method}" if treatment.method else "",
    )
    return " ".join(filter(None, words))


def rule_text(rule: Rule) -> str:
    """A rule as a statement, with the variables that its author wrote."""
    if rule.template is not None:
        return rule.template
    optional = " optional" if rule.optional else ""
    return f"{print_selector(rule.selector)}: {print_treatment(rule.treatment)}{optional}"


def prune_text(prune: Prune) -> str:
    """A transform as a statement."""
    if prune.keep:
        return f"prune {prune.component} keep {print_ranges(prune.keep)}"
    return f"prune {prune.component} to {prune.to} by {prune.by}"
