"""One statement with meaning: a rule, `prune …`, `test …` or `otherwise …`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lark import Token

from policy_dsl.diagnostics import Diagnostic, Span, diagnostic
from policy_dsl.language.fragments import Fragment
from policy_dsl.language.parsing import Syntax, children, parse, place, tokens
from policy_dsl.language.selector_text import print_selector, read_numbers, read_selector
from policy_dsl.language.treatment_words import print_treatment, read_treatment
from policy_dsl.policy import Assertion, Prune, Rule
from policy_dsl.quantities import parse_size
from policy_dsl.selectors import LayerRange
from policy_dsl.treatments import Written

_MAX_PRUNED_DIGITS = 6
_EXPECTED = {
    "rule": "a rule",
    "prune": "a transform such as prune experts to 192 by reap",
    "test": "a test",
    "otherwise": "a treatment",
}


@dataclass
class ReadStatement:
    """What a statement says (None if it cannot be told), where it stands, its defects."""

    value: Rule | Prune | Assertion | Written | None
    span: Span
    findings: list[Diagnostic] = field(default_factory=list)


def read_statement(statement: Fragment, kinds: tuple[str, ...]) -> ReadStatement:
    """The statement as a Rule, Prune, Assertion, or the Written of `otherwise`.

    kinds: the grammar's names of those that may stand here; another one is a defect.
    """
    tree = parse(statement)
    words = statement.text.split(maxsplit=1)
    # "This is no transform" says more than what the grammar expected inside one.
    other = kinds == ("prune",) and words[:1] != ["prune"]
    if isinstance(tree, Diagnostic) and not other:
        return ReadStatement(None, statement.span, [tree])
    body = None if isinstance(tree, Diagnostic) else children(tree)[0]
    if body is None or body.data not in kinds:
        expected = _EXPECTED[kinds[0]]
        defect = diagnostic("not-here", statement.span, word=words[0], expected=expected)
        return ReadStatement(None, statement.span, [defect])
    reader = {"rule": _rule, "prune": _prune, "test": _test, "otherwise": _otherwise}[body.data]
    return reader(body, statement)


def _rule(tree: Syntax, statement: Fragment) -> ReadStatement:
    selector_tree, treatment_tree = children(tree)
    read = read_selector(selector_tree, statement)
    treatment, optional, findings = _treatment(treatment_tree, statement)
    found = ReadStatement(None, statement.span, [*read.findings, *findings])
    # Half a rule would match the wrong tensors, and every check after it would be noise.
    if treatment is not None and not found.findings:
        found.value = Rule(
            read.selector,
            treatment,
            optional,
            span=statement.span,
            selector_span=place(statement, selector_tree),
            treatment_span=place(statement, treatment_tree),
            name_spans=read.spans,
        )
    return found


def _treatment(
    tree: Syntax, statement: Fragment
) -> tuple[Written | None, bool, tuple[Diagnostic, ...]]:
    words = [(str(token), place(statement, token)) for token in tokens(tree)]
    return read_treatment(words, place(statement, tree))


def _otherwise(tree: Syntax, statement: Fragment) -> ReadStatement:
    (words,) = children(tree)
    treatment, optional, findings = _treatment(words, statement)
    where = place(statement, words)
    found = ReadStatement(treatment, where, list(findings))
    if optional:
        found.findings.append(diagnostic("optional-otherwise", where))
    return found


def _prune(tree: Syntax, statement: Fragment) -> ReadStatement:
    component, *words = tokens(tree)
    found = ReadStatement(None, statement.span)
    if component != "experts":
        where = place(statement, component)
        found.findings.append(diagnostic("unprunable", where, component=component))
    elif listed := children(tree):
        ranges, findings = read_numbers(listed[0], statement)
        found.findings += findings
        found.value = None if findings else Prune(keep=_apart(ranges))
    else:
        count, *method = words
        found.value = _counted(count, str(method[0]) if method else "reap")
        if found.value is None:
            low, high = 1, 10**_MAX_PRUNED_DIGITS - 1
            where = place(statement, count)
            found.findings.append(
                diagnostic("number-out-of-range", where, written=count, low=low, high=high)
            )
    return found


def _counted(count: Token, method: str) -> Prune | None:
    # Length first: Python itself refuses numbers of thousands of digits.
    if len(count) > _MAX_PRUNED_DIGITS or int(count) < 1:
        return None
    return Prune(to=int(count), by=method)


def _apart(ranges: Iterable[LayerRange]) -> tuple[LayerRange, ...]:
    """The same numbers as ascending ranges that do not touch: one form for equal lists."""
    merged: list[LayerRange] = []
    for each in sorted(ranges, key=lambda one: one.start):
        if merged and each.start <= merged[-1].stop + 1:
            stop = max(each.stop, merged[-1].stop)
            merged[-1] = LayerRange(merged[-1].start, stop)
        else:
            merged.append(each)
    return tuple(merged)


def _test(tree: Syntax, statement: Fragment) -> ReadStatement:
    (body,) = children(tree)
    where = place(statement, body)
    parts = {token.type: token for token in tokens(body)}
    if "MEASURE" not in parts:
        return _is_test(body, statement)
    found = ReadStatement(None, where)
    groups = children(body)
    selector = None
    if groups:
        read = read_selector(children(groups[0])[0], statement)
        selector, found.findings = read.selector, list(read.findings)
    measure, relation = str(parts["MEASURE"]), str(parts["RELATION"])
    # `90 GiB` and `90GiB` are one test, also when policies are compared.
    quantity = "".join(parts["QUANTITY"].split())
    value = _quantity(measure, quantity)
    if value is None:
        span = place(statement, parts["QUANTITY"])
        found.findings.append(diagnostic("bad-quantity", span, measure=measure, written=quantity))
    if selector is None and measure not in ("bpw", "size"):
        span = place(statement, parts["MEASURE"])
        cure = f'write "{measure}(experts.down_proj)"'
        found.findings.append(
            diagnostic("measure-of-nothing", span, suggestion=cure, measure=measure)
        )
    if value is not None and not found.findings:
        of = f"({print_selector(selector)})" if selector else ""
        text = f"{measure}{of} {relation} {quantity}"
        found.value = Assertion(text, measure, relation, value, selector, where)
    return found


def _is_test(body: Syntax, statement: Fragment) -> ReadStatement:
    selector_tree, treatment_tree = children(body)
    read = read_selector(selector_tree, statement)
    treatment, optional, findings = _treatment(treatment_tree, statement)
    where = place(statement, body)
    found = ReadStatement(None, where, [*read.findings, *findings])
    if optional:
        found.findings.append(diagnostic("optional-otherwise", where))
    if treatment is not None and not found.findings:
        text = f"{print_selector(read.selector)} is {print_treatment(treatment)}"
        found.value = Assertion(text, "treatment", "is", treatment, read.selector, where)
    return found


def _quantity(measure: str, text: str) -> float | None:
    if measure == "size":
        size = parse_size(text)
        return None if size is None else float(size)
    # A unit on a plain measure, as in `bpw <= 3GB`, is a mistake and not a number.
    return float(text) if text[-1].isdigit() and len(text) <= 20 else None
