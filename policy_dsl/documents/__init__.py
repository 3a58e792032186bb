"""What JSON documents hold: records, saved plans, and everything `--format json` prints.

Each document is a TypedDict. Its limits are keywords of JSON Schema in `Annotated`. Here is what
several documents share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NotRequired, TypedDict


@dataclass(frozen=True, slots=True)
class Limits:
    """What `Annotated` adds to a type: ranges of numbers and of sizes, patterns, a description.

    minimum, maximum: of a number. least, most: of the length of a text, list or mapping.
    pattern: of a text. keys: of the keys of a mapping.
    """

    minimum: int | None = None
    maximum: int | None = None
    least: int | None = None
    most: int | None = None
    pattern: str | None = None
    keys: str | None = None
    about: str | None = None


Count = Annotated[int, Limits(minimum=0)]
# Offsets and sizes of files are signed 64-bit numbers wherever they are used.
Size = Annotated[int, Limits(minimum=0, maximum=2**63 - 1)]
Sha256 = Annotated[str, Limits(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Limits(least=1)]
Layer = Annotated[int, Limits(minimum=0, maximum=65535)]
Experts = Annotated[int, Limits(minimum=0, maximum=65536)]
SomeExperts = Annotated[int, Limits(minimum=1, maximum=65536)]


class RuleAt(TypedDict):
    """Where the rule is that decided; null where no rule did."""

    path: str
    line: Annotated[int, Limits(minimum=1)]
    column: Annotated[int, Limits(minimum=1)]


class FindingEntry(TypedDict):
    """One finding; file, line and column are null without a place."""

    code: str
    severity: Literal["error", "warning"]
    message: str
    file: str | None
    line: Count | None
    column: Count | None
    suggestion: str | None
    notes: list[str]


class TransformEntry(TypedDict):
    """Experts that were pruned; `kept` is null while nobody chose those that stay.

    `kept` maps a layer to the old numbers of its experts, in the order of the new ones.
    """

    prune: Literal["experts"]
    by: str | None
    before: SomeExperts
    to: SomeExperts
    layers: SomeExperts
    kept: (
        Annotated[
            dict[str, Annotated[list[Experts], Limits(least=1)]],
            Limits(least=1, most=65536, keys="^(0|[1-9][0-9]{0,4})$"),
        ]
        | None
    )


class GroupEntry(TypedDict):
    """Modules of one role with one treatment and one reason; `rule` is empty if not known."""

    role: str
    layers: list[Layer]
    treatment: str
    rule: str
    rule_at: NotRequired[RuleAt | None]
    tensors: Count
    parameters: Count
    nbytes: Count
    bpw: float | None


class NamedReason(TypedDict):
    """Something that is left out, and why."""

    name: str
    reason: str
