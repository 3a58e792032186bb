"""The documents of commands other than `plan`."""

from typing import Annotated, Any, Literal, TypedDict

from policy_dsl.documents import Count, Document, FindingEntry, Layer, Limits, RuleAt, saved


class NamedReason(TypedDict):
    """Something that is left out, and why."""

    name: str
    reason: str


class AgainstEntry(TypedDict):
    """A model and target that a policy was checked for."""

    model: str
    target: str


class CheckedPolicy(TypedDict):
    """The findings about one policy."""

    policy: str
    name: str | None
    against: list[AgainstEntry]
    alone: str
    findings: list[FindingEntry]


class CheckDocument(Document):
    """What `policyc check --format json` prints"""

    kind: Literal["check"]
    policies: list[CheckedPolicy]
    errors: Count
    warnings: Count
    notes: Count
    other_files: Count


class FindingsDocument(Document):
    """What a command with `--format json` prints to stderr about findings"""

    kind: Literal["findings"]
    findings: list[FindingEntry]


class ProgressDocument(Document):
    """One line of what `policyc build --progress json` prints to stderr"""

    kind: Literal["progress"]
    stage: str
    done: Count
    total: Count
    bytes_per_second: Count
    seconds_left: Count | None


class BuildDocument(Document):
    """What `policyc build --format json` prints"""

    kind: Literal["build"]
    output: str
    policy: str
    target: str
    model: str
    tensors: Count
    tensor_nbytes: Count
    file_nbytes: Count
    bpw: float | None
    files: dict[str, Count]
    seconds: float
    resumed_nbytes: Count
    record_digest: str
    verify: str


class PolicyDigest(TypedDict):
    """A policy by name and digest."""

    name: str
    digest: str


class NamesakeEntry(TypedDict):
    """The expert whose tensor has this name in the source; expert is null if it is pruned."""

    source_expert: Count
    expert: Count | None


class MatchedRule(TypedDict):
    """A rule that matches the tensor, and what became of it."""

    rule: str
    rule_at: RuleAt | None
    text: str
    outcome: Literal["decided", "lost", "guarded", "without effect"]


class ExplainedTensor(TypedDict):
    """An output tensor of the module."""

    name: str
    part: str
    dtype: str
    shape: list[Count]
    nbytes: Count
    file: str
    start: Count


class ExplainDocument(Document):
    """What `policyc explain --format json` prints"""

    kind: Literal["explain"]
    policy: PolicyDigest
    target: str
    model: str
    name: str
    role: str | None
    layer: Layer | None
    expert: Count | None
    source_expert: Count | None
    namesake: NamesakeEntry | None
    left_out: str | None
    guarded: bool
    rules: list[MatchedRule]
    alike: list[str]
    module: str | None
    treatment: str | None
    rule: str | None
    rule_at: RuleAt | None
    tensors: list[ExplainedTensor]
    nbytes: Count
    parameters: Count
    bpw: float | None
    sources: Count
    added: Annotated[int, Limits(minimum=0, about="experts that only pad the first axis")]


class SideEntry(TypedDict):
    """One side of a comparison."""

    title: str
    target: str
    model: str
    tensor_nbytes: Count
    parameters: Count
    bpw: float | None
    experts: Count | None
    pruned: str | None


class ChangeEntry(TypedDict):
    """Modules that changed alike."""

    role: str
    layers: list[Layer]
    before: str | None
    after: str | None
    before_rule: str | None
    before_rule_at: RuleAt | None
    after_rule: str | None
    after_rule_at: RuleAt | None
    modules: list[str]
    parameters: Count
    nbytes_delta: int


class DiffDocument(Document):
    """What `policyc diff --format json` prints"""

    kind: Literal["diff"]
    a: SideEntry
    b: SideEntry
    changed: list[ChangeEntry]
    added: list[ChangeEntry]
    removed: list[ChangeEntry]
    experts: str | None
    nbytes_delta: int
    bpw_delta: float | None


class SchemeEntry(TypedDict):
    """What a target offers of one scheme; the first value of each list is the default."""

    name: str
    bits: list[Count]
    group_sizes: list[Annotated[int, Limits(minimum=-1)]]
    methods: list[str]
    symmetric: bool | None
    symmetric_choices: list[Literal["sym", "asym"]]
    about: str


class FillEntry(TypedDict):
    """The scheme that a width without one is filled in with."""

    tensors: str
    bits: Count | None
    scheme: str


class MethodEntry(TypedDict):
    """A method, and the statistics that it uses."""

    name: str
    statistics: str | None
    needed: bool


class FamilyEntry(TypedDict):
    """What a target makes of a family; `readers`: those that no fact of the family rules out."""

    family: str
    model_types: list[str]
    target: str
    supported: bool
    reason: str | None
    readers: list[str]


class FormatEntry(TypedDict):
    """What one target can hold."""

    name: str
    about: str
    schemes: list[SchemeEntry]
    fill: list[FillEntry]
    methods: list[MethodEntry]
    plain_dtypes: list[str]
    fp8_rules: list[str]
    families: list[FamilyEntry]
    runtimes: dict[str, str]
    shard_nbytes: Annotated[int, Limits(minimum=1)] | None
    layouts: list[str]
    expert_multiples: dict[str, Annotated[int, Limits(minimum=1)]]
    settings: list[str]
    metadata: Annotated[dict[str, dict[str, Any]], Limits(about="key: JSON Schema of its values")]


class FormatsDocument(Document):
    """What `policyc formats --format json` prints"""

    kind: Literal["formats"]
    formats: list[FormatEntry]


class ContainerEntry(TypedDict):
    """A model in one file."""

    form: str
    arch_id: Count
    family: str | None
    tokenizer: bool
    chat_template: bool


class DtypeEntry(TypedDict):
    """What the tensors of one dtype add up to."""

    dtype: str
    tensors: Count
    nbytes: Count


class SourceRole(TypedDict):
    """What the tensors of one role add up to in a source."""

    role: str
    layers: list[Layer]
    dtypes: list[str]
    tensors: Count
    parameters: Count
    nbytes: Count


class InspectDocument(Document):
    """What `policyc inspect --format json` prints about a source"""

    kind: Literal["inspect"]
    id: str
    family: str | None
    layers: Count | None
    experts: Count | None
    tied_head: bool | None
    ignored: list[NamedReason]
    parameters: Count | None
    tensors: Count
    nbytes: Count
    quantization: str | None
    container: ContainerEntry | None
    dtypes: list[DtypeEntry]
    roles: list[SourceRole]
    files: dict[str, Count]
    side_files: dict[str, Count] | None
    notes: list[str]
    findings: list[FindingEntry]


class InspectBundleDocument(Document):
    """What `policyc inspect --format json` prints about a bundle"""

    kind: Literal["inspect_bundle"]
    title: str
    target: str
    model: str
    experts: Count | None
    experts_added: Count
    tensor_nbytes: Count
    parameters: Count
    bpw: float | None
    transforms: list[saved.TransformEntry]
    groups: list[saved.GroupEntry]


class CatalogEntry(TypedDict):
    """A model of the catalog."""

    name: str
    id: str
    model_type: str | None
    tensors: Count
    nbytes: Count
    notes: list[str]


class ModelsDocument(Document):
    """What `policyc models --format json` prints"""

    kind: Literal["models"]
    models: list[CatalogEntry]
    families: list[FamilyEntry]


class CheckEntry(TypedDict):
    """One check of a bundle."""

    check: str
    result: Literal["passed", "failed", "not possible"]
    about: str


class ErrorFigures(TypedDict):
    """How far decoded values are from the source."""

    relative_frobenius: float | None
    max_abs: float
    cosine: float | None


class RoleErrors(TypedDict):
    """The errors of the modules of one role, against the source."""

    role: str
    modules: Count
    treatments: list[str]
    relative_frobenius: float | None
    max_abs: float
    cosine: float | None


class ModuleErrors(TypedDict):
    """The error of one module, against the source."""

    module: str
    role: str
    treatment: str
    values: Count
    judged_by: Literal["equal", "coded again", "nearest codes", "as a whole"]
    wrong: Count
    relative_frobenius: float | None
    max_abs: float
    cosine: float | None


class ErrorTables(TypedDict):
    """The errors against the source, by role and by module."""

    roles: list[RoleErrors]
    modules: list[ModuleErrors]


class VerifyDocument(Document):
    """What `policyc verify --format json` prints"""

    kind: Literal["verify"]
    bundle: str
    ok: bool
    record: bool
    files: Count
    tensors: Count
    nbytes: Count
    checks: list[CheckEntry]
    findings: list[FindingEntry]
    errors: ErrorTables | None
