"""The document of a plan: what `plan --format json` prints and `plan --save` writes."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypedDict

from policy_dsl.documents import (
    Count,
    Experts,
    FindingEntry,
    GroupEntry,
    Layer,
    Limits,
    RuleAt,
    Size,
    TransformEntry,
)


class PlannedPolicy(TypedDict):
    """The policy that was planned."""

    name: str
    digest: str
    description: str


class PlannedModel(TypedDict):
    """What the plan is for; experts_added are those that only fill up the bundle."""

    id: str
    architecture: str
    parameters: Count
    layers: Count
    experts: Experts
    experts_added: Experts
    source_digest: str


class PlannedTotals(TypedDict):
    """Sums over the plan; the bytes of files are null with a reason where one is not known."""

    tensors: Count
    tensor_nbytes: Count
    file_nbytes: Count | None
    file_nbytes_unknown_because: str | None
    bpw: float | None
    source_nbytes: Count


class RoleEntry(TypedDict):
    """What the modules of one role add up to."""

    role: str
    tensors: Count
    parameters: Count
    nbytes: Count
    bpw: float | None


class DroppedTensor(TypedDict):
    """A source tensor that the bundle leaves out."""

    name: str
    role: str
    layer: Layer | None
    nbytes: Count
    reason: str


class FileEntry(TypedDict):
    """A file of the bundle; nbytes is null with a reason where it is not known."""

    name: str
    kind: Literal["tensors", "metadata", "edited", "copied", "record"]
    nbytes: Count | None
    least_nbytes: NotRequired[Count]
    reason: str | None


class DroppedFile(TypedDict):
    """A file or folder (name/) beside the source's weights that the bundle leaves out."""

    name: str
    nbytes: Count | None
    reason: str


class RefusalEntry(TypedDict):
    """A reader that does not load the bundle, and why."""

    runtime: str
    reason: str


class TestEntry(TypedDict):
    """A test of the policy, and what it found."""

    test: str
    passed: bool
    found: str


class TensorEntry(TypedDict):
    """An output tensor; only the first of a module carries its parameters."""

    name: str
    dtype: str
    shape: list[Count]
    nbytes: Size
    module: str
    role: str
    layer: Layer | None
    treatment: str
    stored: str
    parameters: Size
    source_dtypes: list[str]
    sources: list[str]
    rule: str
    rule_at: NotRequired[RuleAt | None]
    file: str
    start: Size


class PlannedPart(TypedDict):
    """An output tensor of every module of a form; `part` is what its name has beyond theirs."""

    part: str
    dtype: str
    shape: list[Count]
    nbytes: Size


class PlannedForm(TypedDict):
    """What modules of a saved plan have in common."""

    role: str
    treatment: str
    stored: str
    rule: str
    rule_at: RuleAt | None
    parameters: Size
    source_dtypes: list[str]
    parts: list[PlannedPart]


Columns = tuple[
    Literal["name"], Literal["layer"], Literal["form"], Literal["sources"], Literal["places"]
]
# A module of a saved plan: the number of its form, the names of its sources, and of each part
# the number of its file among `files` and its first byte there.
PlannedModule = tuple[str, Layer | None, Size, list[str], list[tuple[Size, Size]]]


class PlanDocument(TypedDict):
    """What `policyc plan --format json` prints; `plan --save` has forms and rows for tensors"""

    schema_version: Literal[1]
    kind: Literal["plan"]
    policy: PlannedPolicy
    target: str
    model: PlannedModel
    transforms: list[TransformEntry]
    totals: PlannedTotals
    roles: list[RoleEntry]
    groups: list[GroupEntry]
    dropped: list[DroppedTensor]
    files: list[FileEntry]
    dropped_files: list[DroppedFile]
    linked_files: Annotated[
        dict[str, str],
        Limits(about="shards of the source that are links out of its folder: their targets"),
    ]
    fp8_rule: str | None
    statistics: Annotated[
        dict[str, str], Limits(about="files that a build reads, by what they hold")
    ]
    pending: list[str]
    refusals: list[RefusalEntry]
    tests: list[TestEntry]
    findings: list[FindingEntry]
    tensors: NotRequired[list[TensorEntry]]
    forms: NotRequired[list[PlannedForm]]
    columns: NotRequired[Columns]
    rows: NotRequired[list[PlannedModule]]
