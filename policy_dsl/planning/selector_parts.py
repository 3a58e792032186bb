"""Parts of a selector that match nothing in a model, though the rest of it may match.

A name pattern, a regular expression or a number is written for one model: each must match
something. Roles, boundaries and families serve many models and may match nothing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from typing import NamedTuple

from policy_dsl.diagnostics import Diagnostic, diagnostic, nearest
from policy_dsl.language.selector_text import print_selector
from policy_dsl.linear_patterns import WILDCARDS
from policy_dsl.planning.decisions import Reach
from policy_dsl.planning.matching import CompiledRule, is_guarded, is_spelled, nodes, span_of
from policy_dsl.quantities import counted, layer_list
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.roles.name_index import NameIndex, full_match, pattern_defect
from policy_dsl.roles.published_names import llama_cpp_names, llama_cpp_roles
from policy_dsl.selectors import (
    And,
    Except,
    Family,
    Glob,
    LayerRange,
    Layers,
    Name,
    Or,
    Regex,
    Selector,
    all_of,
    any_of,
)

Pattern = Glob | Regex
# A role, and its layer.
_Place = tuple[str, int | None]

# What regular expressions are made of and names are not.
_OF_REGEX = frozenset("\\^$()|+{}")
# As they begin, or go on where a name would have its next dot: `experts.*down_proj`.
_SEARCHED = re.compile(r"^\.\*|\.\*(?=[^.])")
_OTHER_TOOLS = "re:"
_ENDS = ("", ".weight")
_NUMBERED = ("layers", "experts")
# A number that a star may make longer: `layers.1*`; in a regular expression `layers\.1.*`.
_OPEN_GLOB = re.compile(r"(?<=\.)(\d+)\*")
_OPEN_REGEX = re.compile(r"(?<=\.)(\d+)\.[*+]")


class Cure(NamedTuple):
    """What to write instead, if it is known, and what it is based on."""

    suggestion: str | None
    notes: tuple[str, ...]


class PatternCures:
    """The names of a model's tensors, as patterns look for them."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._names = model.names
        self._taken: dict[Pattern, tuple[str, Pattern] | None] = {}

    def cure(self, pattern: Pattern, *, excepted: bool) -> Cure:
        """What helps against a pattern that matches nothing.

        excepted: whether it says what a rule leaves out, so that guarded tensors count too.
        """
        body = pattern.pattern.removeprefix(_OTHER_TOOLS)
        if isinstance(pattern, Regex) or body == pattern.pattern:
            return self._cure(pattern, excepted)
        found = Cure(None, (_REGEX_NOTE,))
        if pattern_defect(Regex(body)) is None:
            found = self._cure(Regex(body), excepted)
        note = f'"{_OTHER_TOOLS}" is another tool\'s notation'
        return found._replace(notes=(note, *found.notes))

    def _cure(self, pattern: Pattern, excepted: bool) -> Cure:
        if beside := self._beside_weights(pattern):
            return Cure(None, (beside,))
        for find in (self._renamed, self._llama_cpp, self._widened, self._misspelt):
            found = find(pattern, excepted)
            if found is not None:
                return found
        return Cure(None, tuple(self._other_numbers(pattern)))

    def more_taken(self, pattern: Pattern) -> tuple[str, Pattern] | None:
        """The numbers that `layers.1*` takes beyond 1, and the pattern that takes 1 alone."""
        if pattern not in self._taken:
            self._taken[pattern] = self._more_taken(pattern)
        return self._taken[pattern]

    def _more_taken(self, pattern: Pattern) -> tuple[str, Pattern] | None:
        for opened in _open_numbers(pattern):
            names = self._names.matching(opened.longer)
            taken = {one for name in names for one in _longer(name, opened.number)}
            if taken and self._names.matching(opened.exact):
                return f"{opened.kind} {layer_list(taken)}", opened.exact
        return None

    def _first(self, tried: Iterable[Pattern], excepted: bool) -> Pattern | None:
        """The first pattern that would do: one that matches and may touch what it matches."""
        for pattern in filter(_is_taken, tried):
            names = self._names.matching(pattern)
            may_all = excepted or is_spelled(pattern)
            if names and (may_all or any(name in self._unguarded for name in names)):
                return pattern
        return None

    @cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(part for name in self._names for part in name.split("."))

    @cached_property
    def _unguarded(self) -> frozenset[str]:
        open_ones = (one for one in self._model.tensors if not is_guarded(one))
        return frozenset(tensor.source.name for tensor in open_ones)

    def _renamed(self, pattern: Pattern, excepted: bool) -> Cure | None:
        """The pattern with what is missing at its ends."""
        text = pattern.pattern
        if isinstance(pattern, Glob):
            note = "no name matches; with .weight at the end {count} would"
            found = self._tried([Glob(f"{text}.weight")], note, excepted)
            if found is not None or not (_OF_REGEX & set(text) or _SEARCHED.search(text)):
                return found
        return self._tried(_regexes(text), _REGEX_NOTE, excepted)

    def _widened(self, pattern: Pattern, excepted: bool) -> Cure | None:
        """The pattern as it would match names of which it spells a part."""
        if isinstance(pattern, Regex):
            return None
        note = "a name pattern is matched against the whole name; so {count} would match"
        return self._tried(_wider(pattern.pattern), note, excepted)

    def _tried(self, tried: Iterable[Pattern], note: str, excepted: bool) -> Cure | None:
        found = self._first(tried, excepted)
        if found is None:
            return None
        count = f"{len(self._names.matching(found)):,}"
        return Cure(f"write {print_selector(found)}", (note.format(count=count),))

    def _llama_cpp(self, pattern: Pattern, excepted: bool) -> Cure | None:
        """The role whose matrices llama.cpp calls so."""
        text, own = pattern.pattern, print_selector(pattern)
        variants: list[Pattern] = [pattern]
        if isinstance(pattern, Glob):
            variants += [Glob(f"{text}.weight"), Glob(f"*.{text}.weight")]
        else:
            variants += _regexes(text)
        for variant in filter(_is_taken, variants):
            called = self._called(variant)
            meant = _by_role(place for place in self._places if place in called)
            if meant:
                selector = self._selector(meant)
                named = ", ".join(meant)
                note = f"{own} is llama.cpp's name: the role is {named}"
                return Cure(f"write {_enclosed(selector)}", (note,))
            if called:
                named = ", ".join(role for role in llama_cpp_roles() if role in dict(called))
                return Cure(
                    None, (f"{own} is llama.cpp's name of {named}, which this model lacks",)
                )
        return None

    def _called(self, pattern: Pattern) -> set[_Place]:
        """What has a name of llama.cpp that the pattern matches, in this model or not."""
        names = self._llama_index.matching(pattern)
        return {place for name in names for place in self._llama_names[name]}

    @cached_property
    def _llama_index(self) -> NameIndex:
        return NameIndex(self._llama_names)

    @cached_property
    def _llama_names(self) -> Mapping[str, Sequence[_Place]]:
        found: dict[str, list[_Place]] = defaultdict(list)
        for place in product(llama_cpp_roles(), (None, *range(self._model.n_layers))):
            for name in llama_cpp_names(*place):
                found[name].append(place)
        return found

    @cached_property
    def _places(self) -> tuple[_Place, ...]:
        places = {(tensor.role, tensor.layer) for tensor in self._model.tensors}
        order = {role: at for at, role in enumerate(llama_cpp_roles())}
        named = [place for place in places if place[0] in order]
        return tuple(sorted(named, key=lambda place: order[place[0]]))

    def _selector(self, meant: dict[str, set[int]]) -> Selector:
        """The roles; in the layers that are meant, if they have others too."""
        names = any_of(*(Name(role) for role in meant))
        wanted = set.union(*meant.values())
        every = {layer for role, layer in self._places if role in meant and layer is not None}
        if wanted == every:
            return names
        ranges = tuple(LayerRange(layer, layer) for layer in sorted(wanted))
        return all_of(names, Layers(ranges))

    def _misspelt(self, pattern: Pattern, excepted: bool) -> Cure | None:
        """The pattern with a word that names have for each that none has."""
        if isinstance(pattern, Regex):
            return None
        near = _near(pattern.pattern, self._words)
        tried = [Glob(f"{text}{end}") for text in near for end in _ENDS]
        found = self._first(tried, excepted)
        return None if found is None else Cure(f"did you mean {print_selector(found)}?", ())

    def _beside_weights(self, pattern: Pattern) -> str | None:
        """What the pattern matches in the source and not in the model, if anything."""
        full = full_match(pattern)
        for ignored, reason in self._model.ignored:
            if full(ignored.name):
                return f"{ignored.name} is not a weight of the model: {reason}"
        for tensor in self._model.tensors:
            if tensor.scale is not None and full(tensor.scale.name):
                return f"{tensor.scale.name} is read with its weight, and has no treatment"
        return None

    def _other_numbers(self, pattern: Pattern) -> Iterator[str]:
        """The note that only the numbers of a pattern are those of no tensor, if so."""
        any_number = re.sub(r"(?<=\.)\d+(?=\.|\\\.|$)", "*", pattern.pattern)
        other = Glob(any_number)
        if isinstance(pattern, Glob) and other != pattern and _is_taken(other):
            example = min(self._names.matching(other), default=None)
            if example is not None:
                yield f"with other numbers it would match, as {example}"


_REGEX_NOTE = "a regular expression is written /…/ and is matched against the whole name"


def _is_taken(pattern: Pattern) -> bool:
    """Whether what was made of a pattern is one too."""
    return pattern_defect(pattern) is None


def _regexes(text: str) -> Iterator[Regex]:
    """A regular expression that was meant to be searched for, made to match whole names."""
    core = text.removeprefix("^").removesuffix("$")
    start = "" if core.startswith(".*") else ".*"
    end = "" if core.endswith(".*") else ".*"
    yield Regex(core)
    yield Regex(rf"{core}\.weight")
    yield Regex(rf"{start}{core}\.weight")
    yield Regex(f"{core}{end}")
    yield Regex(f"{start}{core}{end}")


def _wider(text: str) -> Iterator[Glob]:
    """A name pattern that was meant to match a part of names."""
    tail = text.partition(".")[2]
    if text.startswith("*."):
        # Nothing is before the first part of a name.
        yield Glob(text.removeprefix("*."))
    for tried in (f"{text}.*", f"*.{text}", f"*.{text}.weight", f"*.{text}.*", f"*{text}*"):
        yield Glob(tried)
    # Below another prefix than the one that it spells.
    if "." in tail.removesuffix(".weight"):
        yield from (Glob(f"*.{tail}"), Glob(f"*.{tail}.weight"), Glob(f"*.{tail}.*"))


def _by_role(places: Iterable[_Place]) -> dict[str, set[int]]:
    """The layers of each role."""
    found: dict[str, set[int]] = {}
    for role, layer in places:
        layers = found.setdefault(role, set())
        layers |= set() if layer is None else {layer}
    return found


def _near(text: str, known: Collection[str]) -> Iterator[str]:
    """A pattern with known words for those that no name has, and without the latter."""
    parts = text.split(".")
    unknown = [part for part in parts if _is_word(part) and part.strip("*?") not in known]
    meant = {part: _known_word(part, known) for part in unknown}
    yield ".".join(meant.get(part, part) for part in parts)
    # Names of another library's models may have one more part.
    fewer = [part for part in parts if part not in unknown]
    if any(map(_is_word, fewer)):
        yield ".".join(fewer)


def _known_word(part: str, known: Collection[str]) -> str:
    word = part.strip("*?")
    return part.replace(word, nearest(word, known) or word)


def _is_word(part: str) -> bool:
    """Whether a part of a pattern spells a word, perhaps with stars around it."""
    word = part.strip("*?")
    return bool(word) and not word.isdecimal() and not WILDCARDS & set(word)


def _enclosed(selector: Selector) -> str:
    text = print_selector(selector)
    return text if isinstance(selector, Name) else f"({text})"


class _Opened(NamedTuple):
    """A number in a pattern that a star continues: with more digits, and by itself."""

    kind: str
    number: str
    longer: Pattern
    exact: Pattern


def _open_numbers(pattern: Pattern) -> Iterator[_Opened]:
    is_regex, text = isinstance(pattern, Regex), pattern.pattern
    digit, dot, many = (r"\d", r"\.", ".*") if is_regex else ("[0-9]", ".", "*")
    for found in (_OPEN_REGEX if is_regex else _OPEN_GLOB).finditer(text):
        before, number, rest = text[: found.start(1)], found[1], text[found.end() :]
        end = rest if rest.startswith(dot) else f"{dot}{many}{rest}"
        kind = next((word for word in _NUMBERED if word in before[-9:]), "numbers")
        longer = type(pattern)(f"{before}{number}{digit}{many}{rest}")
        exact = type(pattern)(f"{before}{number}{end}")
        if _is_taken(longer) and _is_taken(exact):
            yield _Opened(kind, number, longer, exact)


def _longer(name: str, number: str) -> Iterator[int]:
    """The first number in a name that begins with these digits and goes on."""
    for part in name.split("."):
        if part.isdecimal() and part.startswith(number) and len(number) < len(part) < 8:
            yield int(part)
            return


# A list of names from another model has hundreds that are all wrong in the same way.
_MOST_SHOWN = 10
_MOST_CURED = 50
OPTIONAL = "write `optional` after the treatment if that is expected"


class _Candidate(NamedTuple):
    """A tensor that a part may mean; whether the rest of the selector lets it be touched."""

    tensor: ModelTensor
    is_open: bool


class SelectorParts:
    """The parts of rules' selectors against the tensors of one model.

    cure: what is offered where nothing better is known.
    """

    def __init__(self, model: Model, reach: Reach, *, cure: str | None = OPTIONAL) -> None:
        self._model = model
        self._reach = reach
        self._n_cured = 0
        self._cure = cure
        self.names = model.names
        self.family = model.architecture.family

    def unmatched(self, compiled: CompiledRule) -> list[Diagnostic]:
        """An error for each pattern that no name of the model matches, up to a number."""
        patterns = self._patterns(compiled)
        dead = [pattern for pattern in patterns if not self.names.matching(pattern)]
        found = [
            self._unmatched(compiled, pattern, excepted=patterns[pattern])
            for pattern in dead[:_MOST_SHOWN]
        ]
        if len(dead) > _MOST_SHOWN:
            more, example = len(dead) - _MOST_SHOWN, print_selector(dead[-1])
            note = f"{more:,} more patterns of this rule match nothing, such as {example}"
            found[-1] = replace(found[-1], notes=(*found[-1].notes, note))
        return found

    def taking_more(self, compiled: CompiledRule) -> list[Diagnostic]:
        """A warning for each pattern such as `layers.1*` that takes other numbers too."""
        found = []
        for pattern in self._patterns(compiled):
            more = self._cures.more_taken(pattern)
            if more is not None:
                numbers, narrower = more
                found.append(
                    diagnostic(
                        "pattern-takes-more",
                        span_of(compiled.rule, pattern),
                        suggestion=f"write {print_selector(narrower)}",
                        pattern=print_selector(pattern),
                        numbers=numbers,
                    )
                )
        return found

    def idle(self, compiled: CompiledRule) -> list[Diagnostic]:
        """An error for each part that matches only what the rest of the selector leaves out."""
        if compiled.rule.optional or compiled.inapplicable:
            return []
        search = _Search(compiled, self)
        found = search.idle(compiled.rule.selector, None, excepted=False)
        return [self._idle(compiled, part, candidates) for part, candidates in found]

    def candidates(
        self, compiled: CompiledRule, part: Selector, *, excepted: bool
    ) -> Iterator[_Candidate]:
        """What a part of a rule's selector may mean by itself."""
        tensors = self._reach.candidates(compiled, part)
        return (_Candidate(one, excepted or compiled.may_touch(one)) for one in tensors)

    @cached_property
    def _cures(self) -> PatternCures:
        return PatternCures(self._model)

    def _patterns(self, compiled: CompiledRule) -> dict[Glob | Regex, bool]:
        """The patterns of a rule that must match, and whether all it says is what to except."""
        if compiled.rule.optional or compiled.inapplicable:
            return {}
        found: dict[Glob | Regex, bool] = {}
        for pattern, excepted in _patterns(compiled.rule.selector, self.family):
            found[pattern] = excepted and found.get(pattern, True)
        return found

    def _unmatched(
        self, compiled: CompiledRule, pattern: Glob | Regex, *, excepted: bool
    ) -> Diagnostic:
        self._n_cured += 1
        # To look for what was meant takes a while for each.
        looked = self._n_cured <= _MOST_CURED
        found = self._cures.cure(pattern, excepted=excepted) if looked else Cure(None, ())
        suggestion, notes = found
        return diagnostic(
            "pattern-matches-nothing",
            span_of(compiled.rule, pattern),
            suggestion=suggestion or self._cure,
            notes=notes,
            pattern=print_selector(pattern),
            model=self._model.id,
        )

    def _idle(
        self, compiled: CompiledRule, part: Selector, candidates: Sequence[_Candidate]
    ) -> Diagnostic:
        matches = compiled.predicates[part]
        guarded = [one.tensor for one in candidates if matches(one.tensor)[0]]
        return diagnostic(
            "part-matches-nothing",
            span_of(compiled.rule, part),
            suggestion=self._cure,
            notes=guard_notes(guarded),
            part=print_selector(part),
            model=self._model.id,
        )


def guard_notes(guarded: Sequence[ModelTensor]) -> list[str]:
    """The note that a selector only covers tensors that it may not touch, if there are any."""
    if not guarded:
        return []
    example = guarded[0]
    covered = counted(len(guarded), "guarded tensor")
    return [
        f"it covers {covered} such as {example.source.name}; "
        f'only a rule that names "{example.role}" may touch them'
    ]


class _Search(NamedTuple):
    """Looks for parts that none of the tensors which are left to them reaches."""

    compiled: CompiledRule
    parts: SelectorParts

    def idle(
        self, node: Selector, left: Sequence[_Candidate] | None, *, excepted: bool
    ) -> Iterator[tuple[Selector, Sequence[_Candidate]]]:
        """Each such part, with what is left to it.

        left: what the parts around it allow, None for anything. excepted: whether it says what
        is not meant, so that it may be guarded.
        """
        if not _is_specific(node) or _is_foreign(node, self.parts.family):
            return
        if isinstance(node, Or):
            for part in node.parts:
                yield from self.idle(part, left, excepted=excepted)
        elif isinstance(node, Except):
            yield from self.idle(node.base, left, excepted=excepted)
            # What is excepted may be anywhere in the model.
            yield from self.idle(node.excluded, None, excepted=True)
        elif not any(self._reaches(node, one) for one in self._left(node, left, excepted)):
            yield node, list(self._left(node, left, excepted))
        elif isinstance(node, And):
            # What reaches all parts reaches each of them; of alternatives it may be but one.
            for part in node.parts:
                if not isinstance(part, Or | Except) or not _is_specific(part):
                    continue
                others = [other for other in node.parts if other is not part]
                allowed = self._narrowed(self._left(node, left, excepted), others)
                yield from self.idle(part, allowed, excepted=excepted)

    def _left(
        self, node: Selector, left: Sequence[_Candidate] | None, excepted: bool
    ) -> Iterable[_Candidate]:
        if left is not None:
            return left
        return self.parts.candidates(self.compiled, node, excepted=excepted)

    def _reaches(self, node: Selector, candidate: _Candidate) -> bool:
        matches, by_name = self.compiled.predicates[node](candidate.tensor)
        return matches and (by_name or candidate.is_open)

    def _narrowed(self, left: Iterable[_Candidate], parts: Sequence[Selector]) -> list[_Candidate]:
        """What the parts leave of it, opened where one of them names the tensor."""
        for part in parts:
            predicate = self.compiled.predicates[part]
            asked = ((one, predicate(one.tensor)) for one in left)
            left = [
                _Candidate(one.tensor, one.is_open or by_name)
                for one, (matches, by_name) in asked
                if matches
            ]
        return list(left)


def _patterns(
    selector: Selector, family: str, *, excepted: bool = False
) -> Iterator[tuple[Glob | Regex, bool]]:
    """The name patterns of a selector but for those of other families; whether excepted."""
    if _is_foreign(selector, family):
        return
    if isinstance(selector, Glob | Regex):
        yield selector, excepted
    elif isinstance(selector, And | Or):
        for part in selector.parts:
            yield from _patterns(part, family, excepted=excepted)
    elif isinstance(selector, Except):
        yield from _patterns(selector.base, family, excepted=excepted)
        yield from _patterns(selector.excluded, family, excepted=True)


def _is_specific(selector: Selector) -> bool:
    """Whether it holds a name pattern or numbers, which are written for one model."""
    return any(
        isinstance(node, Glob | Regex | Layers) or (isinstance(node, Name) and node.experts)
        for node in nodes(selector)
    )


def _is_foreign(selector: Selector, family: str) -> bool:
    """Whether it is bound to other families, as in `"*.w1.weight" and family mixtral`."""
    if not isinstance(selector, And):
        return False
    for part in selector.parts:
        bound = part.parts if isinstance(part, Or) else (part,)
        names = [one.name for one in bound if isinstance(one, Family)]
        if len(names) == len(bound) and family not in names:
            return True
    return False
