"""Name patterns against the names of a model: what was probably meant by one that matches none.

Usually `.weight` is missing, a regular expression was meant to match a part of the name, or the
notation is another tool's, or the names are llama.cpp's.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import NamedTuple

from policy_dsl.diagnostics import nearest
from policy_dsl.language.print_policy import print_selector
from policy_dsl.linear_patterns import WILDCARDS
from policy_dsl.planning.matching import is_guarded, is_spelled
from policy_dsl.policy import Glob, LayerRange, Layers, Name, Regex, Selector, all_of, any_of
from policy_dsl.quantities import layer_list
from policy_dsl.roles.classify import Model
from policy_dsl.roles.model import llama_cpp_names, llama_cpp_roles
from policy_dsl.roles.name_index import NameIndex, full_match, pattern_defect

Pattern = Glob | Regex
# A role, and its layer.
_Place = tuple[str, int | None]

# What regular expressions are made of and names are not.
_OF_REGEX = frozenset("\\^$()|+{}")
# As they begin, or go on where a name would have its next dot: `experts.*down_proj`.
_SEARCHED = re.compile(r"^\.\*|\.\*(?=[^.])")
_OTHER_TOOLS = "re:"
_REGEX_NOTE = "a regular expression is written /…/ and is matched against the whole name"
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
            return next(self._cures(pattern, excepted), Cure(None, ()))
        notes, found = (
            (f'"{_OTHER_TOOLS}" is another tool\'s notation',),
            Cure(None, (_REGEX_NOTE,)),
        )
        if _is_taken(Regex(body)):
            found = next(self._cures(Regex(body), excepted), Cure(None, ()))
        return found._replace(notes=notes + found.notes)

    def more_taken(self, pattern: Pattern) -> tuple[str, Pattern] | None:
        """The numbers that `layers.1*` takes beyond 1, and the pattern that takes 1 alone."""
        if pattern not in self._taken:
            self._taken[pattern] = next(self._more_taken(pattern), None)
        return self._taken[pattern]

    def _more_taken(self, pattern: Pattern) -> Iterator[tuple[str, Pattern]]:
        for kind, number, longer, exact in _open_numbers(pattern):
            names = self._names.matching(longer)
            taken = {more for name in names for more in _longer(name, number)}
            if taken and self._names.matching(exact):
                yield f"{kind} {layer_list(taken)}", exact

    def _cures(self, pattern: Pattern, excepted: bool) -> Iterator[Cure]:
        """What would help, the likeliest first."""
        text, is_glob = pattern.pattern, isinstance(pattern, Glob)
        yield from self._beside_weights(pattern)
        if is_glob:
            note = "no name matches; with .weight at the end {count} would"
            yield from self._tried([Glob(f"{text}.weight")], note, excepted)
        if not is_glob or _OF_REGEX & set(text) or _SEARCHED.search(text):
            yield from self._tried(_regexes(text), _REGEX_NOTE, excepted)
        yield from self._llama_cpp(pattern)
        if is_glob:
            note = "a name pattern is matched against the whole name; so {count} would match"
            yield from self._tried(_wider(text), note, excepted)
            near = [f"{near}{end}" for near in _near(text, self._words) for end in _ENDS]
            yield from self._tried(map(Glob, near), "", excepted)
            yield from self._other_numbers(text)

    def _tried(self, tried: Iterable[Pattern], note: str, excepted: bool) -> Iterator[Cure]:
        """The first pattern that would do: one that matches and may touch what it matches.

        note: why it does; empty if it is but a guess.
        """
        for pattern in filter(_is_taken, tried):
            names, shown = self._names.matching(pattern), print_selector(pattern)
            may_all = excepted or is_spelled(pattern)
            if names and (may_all or not names.isdisjoint(self._unguarded)):
                notes = (note.format(count=f"{len(names):,}"),)
                yield Cure(f"write {shown}", notes) if note else Cure(f"did you mean {shown}?", ())

    @cached_property
    def _unguarded(self) -> frozenset[str]:
        open_ones = (one for one in self._model.tensors if not is_guarded(one))
        return frozenset(tensor.source.name for tensor in open_ones)

    def _llama_cpp(self, pattern: Pattern) -> Iterator[Cure]:
        text, own = pattern.pattern, print_selector(pattern)
        more = [Glob(f"{text}.weight"), Glob(f"*.{text}.weight")]
        variants = [pattern, *(more if isinstance(pattern, Glob) else _regexes(text))]
        index, names = self._llama_names
        for variant in filter(_is_taken, variants):
            called = {place for name in index.matching(variant) for place in names[name]}
            if meant := [place for place in self._places if place in called]:
                selector, roles = self._selector(meant), ", ".join(dict(meant))
                shown = print_selector(selector)
                shown = shown if isinstance(selector, Name) else f"({shown})"
                yield Cure(f"write {shown}", (f"{own} is llama.cpp's name: the role is {roles}",))
            elif called:
                named = ", ".join(role for role in llama_cpp_roles() if role in dict(called))
                note = f"{own} is llama.cpp's name of {named}, which this model lacks"
                yield Cure(None, (note,))

    @cached_property
    def _llama_names(self) -> tuple[NameIndex, Mapping[str, Sequence[_Place]]]:
        found: dict[str, list[_Place]] = defaultdict(list)
        for place in product(llama_cpp_roles(), (None, *range(self._model.n_layers))):
            for name in llama_cpp_names(*place):
                found[name].append(place)
        return NameIndex(found), found

    @cached_property
    def _places(self) -> tuple[_Place, ...]:
        places = {(tensor.role, tensor.layer) for tensor in self._model.tensors}
        order = {role: at for at, role in enumerate(llama_cpp_roles())}
        named = [place for place in places if place[0] in order]
        return tuple(sorted(named, key=lambda place: order[place[0]]))

    def _selector(self, meant: Sequence[_Place]) -> Selector:
        """The roles; in the layers that are meant, if they have others too."""
        roles = dict(meant)
        names = any_of(*map(Name, roles))
        wanted = {layer for _, layer in meant if layer is not None}
        if wanted == {layer for role, layer in self._places if role in roles} - {None}:
            return names
        return all_of(names, Layers(tuple(LayerRange(layer, layer) for layer in sorted(wanted))))

    @cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(part for name in self._names for part in name.split("."))

    def _beside_weights(self, pattern: Pattern) -> Iterator[Cure]:
        """What the pattern matches in the source and not in the model, if anything."""
        full = full_match(pattern)
        for ignored, reason in self._model.ignored:
            if full(ignored.name):
                yield Cure(None, (f"{ignored.name} is not a weight of the model: {reason}",))
        scales = (tensor.scale.name for tensor in self._model.tensors if tensor.scale is not None)
        for scale in filter(full, scales):
            yield Cure(None, (f"{scale} is read with its weight, and has no treatment",))

    def _other_numbers(self, text: str) -> Iterator[Cure]:
        """The note that only the numbers of a glob are those of no tensor, if so."""
        other = Glob(re.sub(r"(?<=\.)\d+(?=\.|\\\.|$)", "*", text))
        if other.pattern != text and _is_taken(other):
            example = min(self._names.matching(other), default=None)
            if example is not None:
                yield Cure(None, (f"with other numbers it would match, as {example}",))


def _is_taken(pattern: Pattern) -> bool:
    return pattern_defect(pattern) is None


def _regexes(text: str) -> list[Pattern]:
    core = text.removeprefix("^").removesuffix("$")
    start = "" if core.startswith(".*") else ".*"
    end = "" if core.endswith(".*") else ".*"
    tried = core, rf"{core}\.weight", rf"{start}{core}\.weight", core + end, start + core + end
    return list(map(Regex, tried))


def _wider(text: str) -> list[Pattern]:
    # Nothing is before the first part of a name.
    tried = [text.removeprefix("*.")] if text.startswith("*.") else []
    tried += [f"{text}.*", f"*.{text}", f"*.{text}.weight", f"*.{text}.*", f"*{text}*"]
    # Below another prefix than the one that it spells.
    tail = text.partition(".")[2]
    if "." in tail.removesuffix(".weight"):
        tried += [f"*.{tail}", f"*.{tail}.weight", f"*.{tail}.*"]
    return list(map(Glob, tried))


def _near(text: str, known: Collection[str]) -> Iterator[str]:
    parts = text.split(".")
    unknown = [part for part in parts if _is_word(part) and part.strip("*?") not in known]
    words = {part: part.strip("*?") for part in unknown}
    meant = {part: part.replace(word, nearest(word, known) or word) for part, word in words.items()}
    yield ".".join(meant.get(part, part) for part in parts)
    # Names of another library's models may have one more part.
    fewer = [part for part in parts if part not in unknown]
    if any(map(_is_word, fewer)):
        yield ".".join(fewer)


def _is_word(part: str) -> bool:
    word = part.strip("*?")
    return bool(word) and not word.isdecimal() and not WILDCARDS & set(word)


def _open_numbers(pattern: Pattern) -> Iterator[tuple[str, str, Pattern, Pattern]]:
    """Numbers that a star continues: kind, number, the pattern with more digits, and without."""
    is_regex, text = isinstance(pattern, Regex), pattern.pattern
    digit, dot, many = (r"\d", r"\.", ".*") if is_regex else ("[0-9]", ".", "*")
    for found in (_OPEN_REGEX if is_regex else _OPEN_GLOB).finditer(text):
        before, number, rest = text[: found.start(1)], found[1], text[found.end() :]
        end = rest if rest.startswith(dot) else f"{dot}{many}{rest}"
        kind = next((word for word in _NUMBERED if word in before[-9:]), "numbers")
        longer = type(pattern)(f"{before}{number}{digit}{many}{rest}")
        exact = type(pattern)(f"{before}{number}{end}")
        if _is_taken(longer) and _is_taken(exact):
            yield kind, number, longer, exact


def _longer(name: str, number: str) -> Iterator[int]:
    for part in name.split("."):
        if part.isdecimal() and part.startswith(number) and len(number) < len(part) < 8:
            yield int(part)
            return
