"""The documents that are read back: saved plans, and the records of bundles.

What thousands of modules share is said once, as a form; a module is a row. `RecordDocumentV1`
is the record of earlier versions, which is still read.
"""

from typing import Annotated, Literal, NotRequired, TypedDict

from policy_dsl.documents import Count, Document, FindingEntry, Layer, Limits, RuleAt

# Offsets and sizes of files are signed 64-bit numbers wherever they are used.
Size = Annotated[int, Limits(minimum=0, maximum=2**63 - 1)]
Sha256 = Annotated[str, Limits(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Limits(least=1)]
Experts = Annotated[int, Limits(minimum=0, maximum=65536)]
SomeExperts = Annotated[int, Limits(minimum=1, maximum=65536)]
_SomeKept = dict[str, Annotated[list[Experts], Limits(least=1, most=65536)]]
_Kept = dict[str, Annotated[list[Experts], Limits(least=1)]]
Shape = Annotated[list[Size], Limits(most=64)]
_LINKED = "shards of the source that are links out of its folder: their targets"
_STATISTICS = "files that a build reads, by what they hold"
_DIGEST = "SHA-256 of this document without `digest`, compact, keys sorted"
Digest = Annotated[str, Limits(pattern="^[0-9a-f]{64}$", about=_DIGEST)]


class TransformEntry(TypedDict):
    """Experts that were pruned; `kept` is null while nobody chose those that stay.

    `kept` maps a layer to the old numbers of its experts, in the order of the new ones.
    """

    prune: Literal["experts"]
    by: str | None
    before: SomeExperts
    to: SomeExperts
    layers: SomeExperts
    kept: Annotated[_Kept, Limits(least=1, most=65536, keys="^(0|[1-9][0-9]{0,4})$")] | None


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


class PlanDocument(Document):
    """What `policyc plan --format json` prints; `plan --save` has forms and rows for tensors"""

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
    linked_files: Annotated[dict[str, str], Limits(about=_LINKED)]
    fp8_rule: str | None
    statistics: Annotated[dict[str, str], Limits(about=_STATISTICS)]
    pending: list[str]
    refusals: list[RefusalEntry]
    tests: list[TestEntry]
    findings: list[FindingEntry]
    tensors: NotRequired[list[TensorEntry]]
    forms: NotRequired[list[PlannedForm]]
    columns: NotRequired[Columns]
    rows: NotRequired[list[PlannedModule]]


class RecordedPolicy(TypedDict):
    """The policy: its author's text, and all rules in force, whose SHA-256 is `digest`."""

    name: str
    digest: Sha256
    text: str | None
    variables: dict[str, bool | float | str]
    resolved: str


class SourceFile(TypedDict):
    """A shard of the source; its hash is null where nobody computed it."""

    nbytes: Size
    sha256: Sha256 | None


class RecordedSourceV1(TypedDict):
    """The checkpoint; `id` is a folder name or hub id, never a path."""

    id: str
    digest: Sha256
    nbytes: Size
    fp8_rule: str


class RecordedSource(RecordedSourceV1):
    """The checkpoint; `id` is a folder name or hub id, never a path, `commit` the hub's."""

    commit: str | None
    files: dict[str, SourceFile]


class RecordedStatistics(TypedDict):
    """A file about the model's inputs that decided values; `file` is its name, never a path."""

    file: Name
    sha256: Sha256


class RecordedCalibration(RecordedStatistics):
    """What statistics were computed from when the build computed them itself, and by what."""

    samples: Size
    tokens: Size
    software: dict[str, str]


class RecordedTransform(TypedDict):
    """Experts that were pruned; `kept` maps a layer to the old numbers of its experts."""

    prune: Literal["experts"]
    by: str | None
    before: Experts
    to: Experts
    kept: Annotated[_SomeKept, Limits(least=1, keys="^(0|[1-9][0-9]{0,6})$")]


class RecordedOmission(TypedDict):
    """A source tensor that the bundle leaves out; `equals` names another with its values."""

    name: str
    reason: Name
    equals: NotRequired[Name]


class RecordedTreatment(TypedDict):
    """What happened to the values of a module."""

    action: Literal["quantize", "keep", "cast", "raw"]
    bits: NotRequired[Annotated[int, Limits(minimum=1, maximum=64)]]
    group_size: NotRequired[Annotated[int, Limits(minimum=-1, maximum=2**31 - 1)]]
    scheme: NotRequired[str]
    method: NotRequired[str]
    symmetric: NotRequired[bool]
    dtype: NotRequired[str]


class RecordedForm(TypedDict):
    """What modules have in common: the role, the treatment, the rule that decided.

    shape: logical; dtype: of the values that were encoded or written. parts: the last parts of
    the names of its tensors; empty if a tensor has the module's own name. `added` experts at
    the end of the first axis only pad.
    """

    role: str
    treatment: RecordedTreatment
    shape: Shape
    dtype: str
    added: NotRequired[SomeExperts]
    parts: Annotated[list[Annotated[str, Limits(pattern="^[^.]*$")]], Limits(least=1)]
    rule: str
    rule_at: RuleAt | None


ModuleRow = tuple[str, Layer | None, Size, Sha256, list[Sha256]]


class RecordedModules(TypedDict):
    """The modules: name, layer, number of the form, recipe, and SHA-256 of each of its tensors.

    A recipe is the SHA-256 of all that decides a module's bytes but the weights: where they are
    in the source, the treatment, the statistics that were used.
    """

    columns: tuple[
        Literal["name"], Literal["layer"], Literal["form"], Literal["recipe"], Literal["sha256"]
    ]
    rows: list[ModuleRow]


class HashedFile(TypedDict):
    """A file's size and hash."""

    nbytes: Size
    sha256: Sha256


class RecordDocument(TypedDict):
    """`policyc.json`, the record of a bundle"""

    schema_version: Literal[2]
    kind: Literal["bundle"]
    policyc: Name
    policy: RecordedPolicy
    target: Name
    codec_version: Annotated[Size, Limits(about="raised when an encoder of the target changes")]
    plan_digest: Sha256
    source: RecordedSource
    statistics: dict[str, RecordedStatistics]
    calibration: RecordedCalibration | None
    transforms: Annotated[list[RecordedTransform], Limits(most=1)]
    omitted: list[RecordedOmission]
    files: dict[str, HashedFile]
    forms: list[RecordedForm]
    modules: RecordedModules
    digest: Digest


class RecordedModuleV1(TypedDict):
    """A module by its logical shape; `added` experts at the end of its first axis only pad."""

    role: str
    layer: Layer | None
    shape: Shape
    added: NotRequired[SomeExperts]
    dtype: str
    treatment: RecordedTreatment
    tensors: Annotated[list[str], Limits(least=1)]


class RecordDocumentV1(Document):
    """`policyc.json` of version 1"""

    kind: Literal["bundle"]
    policyc: Name
    policy: RecordedPolicy
    target: Name
    plan_digest: Sha256
    source: RecordedSourceV1
    statistics: NotRequired[dict[str, RecordedStatistics]]
    transforms: Annotated[list[RecordedTransform], Limits(most=1)]
    omitted: list[RecordedOmission]
    modules: dict[str, RecordedModuleV1]
    files: dict[str, HashedFile]
    tensors: Annotated[dict[str, Sha256], Limits(about="SHA-256 of every tensor's bytes")]
    digest: Digest
