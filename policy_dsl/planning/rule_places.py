"""How a rule's place reads in a table: short, and never that of another rule."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from policy_dsl.policy import Rule


def rule_places(rules: Sequence[Rule]) -> tuple[str, ...]:
    """`file:line` of each rule, with its column where its line has several.

    Of files with one name, such as those of an `extends` chain, as many folders are shown as
    tell them apart. Empty for a rule that no text holds.
    """
    spans = [rule.span for rule in rules]
    names = _short_names({span.source.name for span in spans if span})
    lines = Counter((span.source.name, span.line) for span in spans if span)
    places = []
    for span in spans:
        if span is None:
            places.append("")
            continue
        line, column = span.source.position(span.start)
        alone = lines[span.source.name, line] == 1
        places.append(f"{names[span.source.name]}:{line}" + ("" if alone else f":{column}"))
    return tuple(places)


def _short_names(paths: set[str]) -> dict[str, str]:
    """Path -> its last parts, as many as no other path ends with."""
    parts = {path: path.replace("\\", "/").split("/") for path in paths}
    short = {path: "/".join(found) for path, found in parts.items()}
    for length in range(max(map(len, parts.values()), default=0), 0, -1):
        ends: dict[str, list[str]] = defaultdict(list)
        for path, found in parts.items():
            ends["/".join(found[-length:])].append(path)
        short |= {alike[0]: end for end, alike in ends.items() if len(alike) == 1}
    return short
