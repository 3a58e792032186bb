"""Selector -> its text in one fixed form, which reads back as the same selector."""

from __future__ import annotations

from collections.abc import Iterable

from policy_dsl.language.fragments import escape_variables
from policy_dsl.language.quoting import quote
from policy_dsl.selectors import (
    All,
    And,
    Boundary,
    Except,
    Family,
    Glob,
    LayerRange,
    Layers,
    LayerSet,
    LayersWhere,
    Middle,
    Name,
    Or,
    Regex,
    Selector,
)


def print_selector(selector: Selector) -> str:
    """The selector as a policy says it, such as `experts.down_proj in layers 2-59`."""
    match selector:
        case Except(base, excluded):
            left = _within(base, (Except,))
            return f"{left} except {_within(excluded, (Except,))}"
        case Or(parts):
            return ", ".join(_alternative(part) for part in parts)
        case And(parts):
            return _conditions(parts)
        case Layers() | LayersWhere() | Boundary() | Middle():
            return _layer_set(selector)
    return _leaf(selector)


def _layer_set(selector: LayerSet) -> str:
    match selector:
        case Layers(ranges, boundary):
            return f"{'boundary ' * boundary}layers {print_ranges(ranges)}"
        case LayersWhere(expression):
            return f"layers where {expression}"
        case Boundary(count):
            return f"boundary {count}"
    return "middle"


def _leaf(selector: All | Name | Family | Glob | Regex) -> str:
    match selector:
        case Name():
            return _name(selector)
        case Family(name):
            return f"family {name}"
        case Glob(pattern):
            return escape_variables(quote(pattern))
        case Regex(pattern):
            return escape_variables(f"/{_slashes_escaped(pattern)}/")
    return "all"


def print_ranges(ranges: Iterable[LayerRange]) -> str:
    """Ranges as `0-1,-2..-1`."""
    return ",".join(_range(each) for each in ranges)


def _within(part: Selector, looser: tuple[type, ...]) -> str:
    text = print_selector(part)
    return f"({text})" if isinstance(part, looser) else text


def _alternative(part: Selector) -> str:
    # `a, b in layers 0-1` would be refused, so a bound alternative stands in parentheses.
    bound = isinstance(part, And) and any(isinstance(leaf, LayerSet) for leaf in part.parts[1:])
    return f"({print_selector(part)})" if bound else _within(part, (Or, Except))


def _conditions(parts: tuple[Selector, ...]) -> str:
    text = ""
    for index, part in enumerate(parts):
        # An expression would swallow the `and` after it.
        greedy = isinstance(part, LayersWhere) and index < len(parts) - 1
        word = _within(part, (LayersWhere,) if greedy else (And, Or, Except))
        if index:
            text += " in " if isinstance(part, LayerSet) else " and "
        text += word
    return text


def _name(name: Name) -> str:
    if not name.experts:
        return name.text
    return f"experts[{print_ranges(name.experts)}]{name.text.removeprefix('experts')}"


def _range(each: LayerRange) -> str:
    if each.start == each.stop:
        return str(each.start)
    dots = ".." if each.start < 0 or each.stop < 0 else "-"
    return f"{each.start}{dots}{each.stop}"


def _slashes_escaped(pattern: str) -> str:
    out, escaped = "", False
    for char in pattern:
        out += "\\/" if char == "/" and not escaped else char
        escaped = char == "\\" and not escaped
    return out
