"""Statements read from their syntax trees.

A rule, `prune …`, `test …` or `otherwise …`; selectors; the words of a treatment such as
`4bit affine g64 sym by gptq`. The arithmetic of `layers where EXPR` is Python's: `i` is a layer,
`n` the number of layers; + - * // %, comparisons, and, or, not, parentheses, whole numbers.
"""

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from lark import Token

from policy_dsl import diagnostics
from policy_dsl import policy as model
from policy_dsl.diagnostics import Diagnostic, Span, diagnostic, did_you_mean
from policy_dsl.language import parsing
from policy_dsl.language.parsing import Fragment, Syntax, children, parse, place, tokens
from policy_dsl.language.print_policy import print_selector, print_treatment
from policy_dsl.policy import Assertion, Prune, Rule, Selector, Words, all_of, any_of
from policy_dsl.quantities import parse_size
from policy_dsl.roles.name_index import pattern_defect
from policy_dsl.treatments import MAX_BITS, PLAIN_DTYPES, WHOLE_ROW, Written

_MAX_DIGITS = 9
_MAX_PRUNED_DIGITS = 6
# No expression this long can grow numbers that hang, or a tree too deep to walk.
MAX_EXPRESSION = 256
_EXPECTED = {
    "rule": "a rule",
    "prune": "a transform such as prune experts to 192 by reap",
    "test": "a test",
    "otherwise": "a treatment",
}
_RANGE = re.compile(r"([-+]?\d+)(?:\s*(?:\.\.|-)\s*([-+]?\d+))?")
_LARGEST = {"bits": MAX_BITS, "group_size": 1 << 20}
_NUMBER = re.compile(r"(?P<bits>[0-9]+)bits?|g(?P<group_size>-1|[0-9]+)")
Where = Span | Syntax | Token
# Loosest first. `ast.unparse` would not do: its parentheses differ between versions of Python.
_BINDING = ("or", "and", "not", "comparison", "sum", "product", "negative")


class StatementReader:
    """Reads one statement; `span` is where it is or what matters of it. `findings` grow."""

    def __init__(self, text: Fragment, words: Words = model.WORDS) -> None:
        self.text = text
        self.span = text.span
        self.findings: list[Diagnostic] = []
        self._spans: list[tuple[Selector, Span]] = []
        self._words = words
        # What the words of a treatment said, each with its word.
        self._said: dict[str, tuple[Any, Token]] = {}

    def statement(self, kinds: tuple[str, ...]) -> Rule | Prune | Assertion | Written | None:
        """What the statement says, None if that is unclear or it is none of these `kinds`."""
        tree, first = parse(self.text), self.text.text.split(maxsplit=1)[:1]
        value: Rule | Prune | Assertion | Written | None = None
        # "This is not a transform" says more than what the grammar expected inside one.
        if isinstance(tree, Diagnostic) and (kinds != ("prune",) or first in ([], ["prune"])):
            self.findings.append(tree)
        elif isinstance(tree, Diagnostic) or (body := children(tree)[0]).data not in kinds:
            self.report("not-here", self.span, word=first[0], expected=_EXPECTED[kinds[0]])
        else:
            # Methods are called as the nodes of the grammar are.
            value = getattr(self, f"_{body.data}")(body)
        # Half a rule would match the wrong tensors, and every check after it would be noise.
        return None if self.findings else value

    def report(self, code: str, where: Where, *, cure: str | None = None, **facts: Any) -> None:
        """Adds a defect at a place, or where a node of the tree is."""
        span = where if isinstance(where, Span) else place(self.text, where)
        self.findings.append(diagnostic(code, span, suggestion=cure, **facts))

    def _rule(self, tree: Syntax) -> Rule:
        parts = children(tree)
        selector, (treatment, optional) = self._selector(parts[0]), self._treatment(parts[1])
        spans = (place(self.text, parts[0]), place(self.text, parts[1]), tuple(self._spans))
        return Rule(selector, treatment, optional, None, self.span, *spans)

    def _prune(self, tree: Syntax) -> Prune | None:
        component, *words = tokens(tree)
        if component != "experts":
            self.report("unprunable", component, component=component)
        elif listed := children(tree):
            return Prune(keep=_apart(self._ranges(listed[0], signed=False)))
        # Length first: Python itself refuses numbers of thousands of digits.
        elif len(words[0]) > _MAX_PRUNED_DIGITS or int(words[0]) < 1:
            high = 10**_MAX_PRUNED_DIGITS - 1
            self.report("number-out-of-range", words[0], written=words[0], low=1, high=high)
        else:
            return Prune(to=int(words[0]), by=str([*words, "reap"][1]))
        return None

    def _otherwise(self, tree: Syntax) -> Written:
        (words,) = children(tree)
        self.span = place(self.text, words)
        return self._mandatory(words)

    def _test(self, statement: Syntax) -> Assertion:
        (tree,) = children(statement)
        self.span = place(self.text, tree)
        if not tokens(tree):
            selector_tree, treatment_tree = children(tree)
            selector = self._selector(selector_tree)
            treatment = self._mandatory(treatment_tree)
            text = f"{print_selector(selector)} is {print_treatment(treatment)}"
            return Assertion(text, "treatment", "is", treatment, selector, self.span)
        measure, relation, number = tokens(tree)
        groups = children(tree)
        of = self._selector(children(groups[0])[0]) if groups else None
        # `90 GiB` and `90GiB` are one test, also when policies are compared.
        quantity = "".join(number.split())
        # A unit on a plain measure, as in `bpw <= 3GB`, is a mistake and not a number.
        plain = float(quantity) if re.fullmatch("[0-9.]{1,20}", quantity) else None
        value = parse_size(quantity) if measure == "size" else plain
        if value is None:
            self.report("bad-quantity", number, measure=measure, written=quantity)
        if of is None and measure not in ("bpw", "size"):
            cure = f'write "{measure}(experts.down_proj)"'
            self.report("measure-of-nothing", measure, cure=cure, measure=measure)
        text = f"{measure}{f'({print_selector(of)})' if of else ''} {relation} {quantity}"
        return Assertion(text, str(measure), str(relation), float(value or 0), of, self.span)

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
            elif word != "by":
                self._word(word)
            elif (method := next(words, None)) is None:
                self.report("missing-method", word)
            elif method in self._words.methods:
                self._say(method, "method", str(method))
            else:
                cure = did_you_mean(method, self._words.methods)
                self.report("unknown-method", method, cure=cure, method=method)
        if not self._said and len(self.findings) == before:
            self.report("missing-treatment", tree)
        said = {name: value for name, (value, _) in self._said.items()}
        return Written(said.pop("action", "quantize"), **said), optional

    def _word(self, word: Token) -> None:
        known = _meanings(self._words)
        if number := _NUMBER.fullmatch(word):
            field = number.lastgroup or ""
            value = int(number[field]) if len(number[field]) <= _MAX_DIGITS else 0
            if value == WHOLE_ROW or 1 <= value <= _LARGEST[field]:
                self._say(word, field, value)
            else:
                self.report("number-out-of-range", word, written=word, low=1, high=_LARGEST[field])
        elif word in known:
            for field, value in known[word].items():
                self._say(word, field, value)
        else:
            numbered = re.fullmatch("[0-9]+", word) and f"{word}bit"
            other = parsing.mistakes()["treatments"].get(word.lower(), numbered)
            near = did_you_mean(word, (*known, "4bit", "optional"))
            cure = f'did you mean "{other}"?' if other else near
            self.report("unknown-scheme", word, cure=cure, scheme=word)

    def _say(self, word: Token, field: str, value: object) -> None:
        said, clash = self._said, None
        if field in said:
            clash = said[field][1]
        # What is not quantized has no width, scheme or method, and the other way round.
        elif said and (field == "action" or "action" in said):
            clash = said.get("action", next(iter(said.values())))[1]
        if clash is not None and clash is not word:
            self.report("contradicting-treatment", word, one=str(clash), other=str(word))
        said.setdefault(field, (value, word))

    def _selector(self, tree: Syntax) -> Selector:
        base, *excluded = [self._union(part) for part in children(tree)]
        return model.without(base, any_of(*excluded)) if excluded else base

    def _union(self, tree: Syntax) -> Selector:
        terms = children(tree)
        words = [next(iter(tokens(term)), None) for term in terms]
        for before, word, term in zip(words, words[1:], terms[1:], strict=False):
            # `a, b in layers 0-1` binds to b alone, which is rarely meant: asked, not guessed.
            if word is not None and before is None:
                text, split = self.text.text, word.start_pos or 0
                start, stop = terms[0].meta.start_pos, term.meta.end_pos
                cure = f'write "({text[start:split].strip()}) {text[split:stop]}"'
                place = self.text.place(start, stop)
                self.report("ambiguous-in", place, cure=cure, word=str(word))
                break
        return any_of(*(all_of(*map(self._item, children(term))) for term in terms))

    def _item(self, tree: Syntax) -> Selector:
        words, parts = tokens(tree), children(tree)
        leaf: Selector = model.All()
        match tree.data:
            case "group":
                return self._selector(parts[0])
            case "middle":
                leaf = model.Middle()
            case "layers":
                leaf = model.Layers(self._ranges(parts[0]), boundary=bool(words))
            case "layers_where":
                leaf = model.LayersWhere(self.expression(parts[0]))
            case "boundary":
                leaf = model.Boundary(self._boundary(words[1]))
            case "family":
                leaf = model.Family(str(words[0]))
            case "role":
                leaf = self._role(tree)
            case "glob":
                leaf = self._checked(model.Glob(parsing.unquote(words[0])), tree)
            case "regex":
                leaf = self._checked(model.Regex(words[0][1:-1].replace("\\/", "/")), tree)
        self._spans.append((leaf, place(self.text, tree)))
        return leaf

    def _boundary(self, count: Token) -> int:
        if count.isdecimal() and len(count) <= _MAX_DIGITS and int(count):
            return int(count)
        cure = None if count.isdecimal() else f'write "boundary layers {count}"'
        self.report("bad-boundary", count, cure=cure, written=count)
        return 1

    def _role(self, tree: Syntax) -> Selector:
        name, *dotted = tokens(tree)
        # Checkpoints call both the router and an expert's projection so.
        if name == "gate":
            cure = 'did you mean "experts.gate_proj" or "router"?'
            self.report("ambiguous-gate", name, cure=cure)
        numbers = children(tree)
        if not numbers:
            return model.Name(str(name))
        if name != "experts":
            self.report("numbered-name", tree, cure='write "experts[0-15].down_proj"', name=name)
        return model.Name("".join((name, *dotted)), self._ranges(numbers[0], signed=False))

    def _checked(self, pattern: model.Glob | model.Regex, tree: Syntax) -> Selector:
        if not pattern.pattern:
            self.report("empty-pattern", tree)
        if defect := pattern_defect(pattern):
            kind = "regular expression" if isinstance(pattern, model.Regex) else "name pattern"
            self.report("bad-regex", tree, cure=defect.cure, kind=kind, reason=defect)
        return pattern

    def _ranges(self, tree: Syntax, *, signed: bool = True) -> tuple[model.LayerRange, ...]:
        """The numbers that a `ranges` node says, from the end too if they may be signed."""
        ranges = []
        for token in tokens(tree):
            first, last = _RANGE.findall(token)[0]
            if max(len(first), len(last)) > _MAX_DIGITS:
                self.report("number-too-large", token, written=token)
                first = last = "0"
            start, stop = int(first), int(last or first)
            # `2..-3` depends on the number of layers; only ranges of one sign are known empty.
            if start > stop and (start < 0) == (stop < 0):
                meant = f"{stop}..{start}" if stop < 0 else f"{stop}-{start}"
                self.report("empty-range", token, cure=f'did you mean "{meant}"?', written=token)
            if start < 0 and not signed:
                self.report("negative-expert", token, written=token)
            ranges.append(model.LayerRange(start, stop))
        return tuple(ranges)

    def expression(self, tree: Syntax) -> str:
        """The text of an `expression` node with single spaces and no needless parentheses."""
        before = len(self.findings)
        written = self.text.text[tree.meta.start_pos : tree.meta.end_pos]
        if len("".join(written.split())) > MAX_EXPRESSION:
            self.report("statement-too-long", tree, limit=MAX_EXPRESSION)
            return "i"
        for token in tree.scan_values(lambda value: isinstance(value, Token)):
            if token.type == "NAME" and token not in ("i", "n"):
                cure = 'to add a condition, write "(layers where …) and …"'
                self.report("unknown-expression-name", token, cure=cure, name=token)
            elif token.type == "INT" and len(token) > _MAX_DIGITS:
                self.report("number-too-large", token, written=token)
        # Any whole expression will do after a finding: it stops the policy.
        return "i" if len(self.findings) > before else _arithmetic(tree.children[0])


@cache
def _meanings(words: Words) -> dict[str, dict[str, Any]]:
    """What the words of treatments say, field by field."""
    return {
        **{word: {"method": word} for word in words.methods},
        **{word: {"scheme": word} for word in words.schemes},
        **{"sym": {"symmetric": True}, "asym": {"symmetric": False}},
        **{word: {"action": "cast", "dtype": word} for word in PLAIN_DTYPES},
        **{word: {"action": word} for word in ("keep", "raw", "drop")},
    }


def _apart(ranges: Iterable[model.LayerRange]) -> tuple[model.LayerRange, ...]:
    """The same numbers as ascending ranges that do not touch: one form for equal lists."""
    merged: list[model.LayerRange] = []
    for added in sorted(ranges, key=lambda numbers: numbers.start):
        if merged and added.start <= merged[-1].stop + 1:
            merged[-1] = model.LayerRange(merged[-1].start, max(added.stop, merged[-1].stop))
        else:
            merged.append(added)
    return tuple(merged)


def layers_where(expression: str, n_layers: int, span: Span | None = None) -> frozenset[int]:
    """The layers i of 0 … n_layers - 1 for which the expression is true.

    span: where the expression is, for diagnostics.
    Raises: PolicyError if the expression is malformed or divides by zero for some layer.
    """
    fragment = Fragment.whole(diagnostics.SourceText("layers where", expression))
    tree = parse(fragment, "expression")
    if isinstance(tree, Diagnostic):
        raise diagnostics.PolicyError([tree])
    reader = StatementReader(fragment)
    text = reader.expression(tree)
    if reader.findings:
        raise diagnostics.PolicyError(reader.findings)
    # The grammar lets through numbers, i, n and operators alone, which Python reads alike.
    code = compile(text, "layers where", "eval")
    chosen = set()
    for layer in range(n_layers):
        try:
            if eval(code, {"__builtins__": {}}, {"i": layer, "n": n_layers}):
                chosen.add(layer)
        except ZeroDivisionError:
            facts = {"expression": expression, "layer": layer, "n_layers": n_layers}
            raise diagnostics.fail("division-by-zero", span, **facts) from None
    return frozenset(chosen)


def _arithmetic(node: Syntax | Token, outer: int = 0) -> str:
    if isinstance(node, Token):
        return str(int(node)) if node.type == "INT" else str(node)
    binding = _BINDING.index(node.data)
    # Operators are tokens between the operands; those of `or` and `not` are left out.
    tight = binding if node.data in ("not", "negative") else binding + 1
    parts = [_arithmetic(part, tight) for part in node.children]
    joint = {"or": " or ", "not": "", "negative": ""}.get(node.data, " ")
    text = f"{'not ' * (node.data == 'not')}{joint.join(parts)}"
    return f"({text})" if binding < outer else text
