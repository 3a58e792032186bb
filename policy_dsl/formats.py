"""What a format is: the types of its parts. Each `emitters/<name>/` defines one `Format`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from policy_dsl.bounded_json import parse_json

# Capabilities load without what a plan and a model are: `check` starts at once.
if TYPE_CHECKING:
    from numpy.typing import NDArray

    from policy_dsl.diagnostics import Diagnostic
    from policy_dsl.plan import Module, Plan, PlannedTensor, Refusal
    from policy_dsl.policy import Policy
    from policy_dsl.roles.classify import Model, ModelTensor
    from policy_dsl.treatments import Coded, Stored, Unread

    Array = NDArray[Any]

# What an entry of a policy's `metadata` may be: one of these texts, of a type, a mapping.
MetadataValues = type | tuple[str, ...] | Mapping[str, "MetadataValues"]


@dataclass(frozen=True, slots=True)
class SchemeSpec:
    """A scheme of a format. Of widths, group sizes, methods, symmetries the first is the default.

    One width means that the scheme's name fixes it. An empty group_sizes means no groups.
    values: the dtype in which its encoder takes the values, None for the format's plain dtype.
    flat: groups run over the whole tensor, so that they need not divide its rows.
    """

    name: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    methods: tuple[str, ...] = ("rtn",)
    symmetries: tuple[bool, ...] = (False,)
    values: str | None = None
    flat: bool = False
    about: str = ""


@dataclass(frozen=True, slots=True)
class PartShape:
    """One output tensor of a module: the suffix of its name, safetensors dtype, shape.

    constant: all its bytes where the treatment alone decides them; else it has equal bytes for
    every logical row of the module. nbytes: of dtypes that are no safetensors' one. together:
    logical rows that are coded as one, where groups run on from row to row. by_columns: whether
    these rows lie along its second axis, and not along the first. whole: whether all of it
    belongs to every row.
    """

    part: str
    dtype: str
    shape: tuple[int, ...]
    constant: bytes = b""
    nbytes: int | None = None
    together: int = 1
    by_columns: bool = False
    whole: bool = False


@dataclass(frozen=True, slots=True)
class ExpertsApart:
    """A layout with a module for each expert, where its scheme is one of `schemes`.

    path(path of the stack, expert) -> the expert's module. None is what is not quantized.
    """

    path: Callable[[str, int], str]
    schemes: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class ExpertPadding:
    """Experts that readers want added: up to a `multiple`, of zeros, never to be chosen.

    router_bias: what the added experts get as their score correction.
    """

    multiple: int
    router_bias: float

    def added(self, n_experts: int) -> int:
        """How many experts are added to a layer of `n_experts`."""
        return -n_experts % self.multiple


@dataclass(frozen=True, slots=True)
class Shards:
    """Tensors in numbered safetensors files. nbytes: largest shard; metadata: of each header.

    name(index from 1, count) -> file name. overfull: whether a shard is closed by the tensor
    that reaches that size, and not by the one that would pass it.
    """

    nbytes: int
    name: Callable[[int, int], str]
    metadata: Mapping[str, str] = field(default_factory=dict)
    overfull: bool = False


@dataclass(frozen=True, slots=True)
class Container:
    """All tensors in one file, without gaps after a preface that the emitter makes.

    name(policy, modules) -> file name. embedded_files: side files of the source that the
    preface holds.
    """

    name: Callable[[Policy, Sequence[Module]], str]
    embedded_files: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FormatSpec:
    """What a format can hold and how its bundle is named and laid out. Functions are pure.

    codec_version: raised with every change of the bytes that an encoder makes.
    What can be stored
      fill: rows (role class, bits or None for any, scheme), first match wins; role classes are
        `experts`, `embed` (embed and lm_head), `matrix` (any other matrix), `any`.
      plain_dtypes: of what is not quantized. plain_dtype(tensor, model): the one of a kept
        tensor, and of a quantized one's values. cuts_off: whether values that become F16 are
        rounded toward zero.
      fp8_rules: how FP8 sources may be dequantized; the first is the format's own.
    Which models, and which of their tensors
      families: family -> None if supported, else the reason why it is refused.
      omission(tensor, model): why the format does not carry this tensor, else None.
    What readers would not take
      unsupported(tensor, model, treatment): why they cannot take a tensor stored like that,
        else None.
      conflicts(modules): what they need several modules to share and they do not.
      config_readers: the tables of readers that say what config.json means to them.
      runtimes: reader -> what it is. refusals(plan): those that cannot load a bundle, and why.
    What modules and their tensors are
      module_path(tensor, model): the output module of a tensor; tensors with equal paths are
        stacked along a leading expert axis. A path that ends as the source's name does
        (`.bias`) means a bare tensor.
      part_shapes(treatment, shape, dtype): the output tensors of a module of a logical
        shape [..., in] whose values are of `dtype`; one part unless it is quantized.
      layouts: ways to store experts, the first is the default; None is stacks of all. Empty:
        stacks, no choice.
      padding: family -> experts that are added, unless the policy says no.
      companions(modules): tensors that no source has and whose bytes statistics decide.
      column_scale(module): the tensor by whose values a module's columns were multiplied, if
        the bundle has it.
      statistics: method -> what it needs to know of the model's inputs.
      optional_statistics: method -> what it does better with, and can do without.
    Where tensors lie
      tensor_files: in shards, or in one container.
      file_order(modules): the order in which files are filled, None as modules are.
    Which other files there are
      copied_files: name patterns of the source's side files that the bundle copies.
      edited_files: those that it holds in another form.
      metadata_files: JSON files that describe a bundle to its readers, also those that other
        tools write; no other is read.
    Which words of a policy are used
      settings: keys beside its rules, such as `output.shard_size`.
      metadata_keys: keys of its `metadata` -> the values allowed there, their type, or of a
        mapping its keys -> the same.
      remarks(policy, modules): what a plan says about choices that no treatment shows.
    """

    name: str
    about: str
    codec_version: int = 1

    schemes: tuple[SchemeSpec, ...]
    fill: tuple[tuple[str, int | None, str], ...]
    plain_dtypes: tuple[str, ...]
    plain_dtype: Callable[[ModelTensor, Model], str]
    cuts_off: bool = False
    fp8_rules: tuple[str, ...]

    families: Mapping[str, str | None]
    omission: Callable[[ModelTensor, Model], str | None]

    unsupported: Callable[[ModelTensor, Model, Stored], str | None]
    conflicts: Callable[[Sequence[Module]], list[str]] | None = None
    config_readers: tuple[str, ...] = ()
    runtimes: Mapping[str, str] = field(default_factory=dict)
    refusals: Callable[[Plan], tuple[Refusal, ...]] | None = None

    module_path: Callable[[ModelTensor, Model], str]
    part_shapes: Callable[[Stored, tuple[int, ...], str], tuple[PartShape, ...]]
    layouts: Mapping[str, ExpertsApart | None] = field(default_factory=dict)
    padding: Mapping[str, ExpertPadding] = field(default_factory=dict)
    companions: Callable[[Sequence[Module]], tuple[Module, ...]] | None = None
    column_scale: Callable[[str], str | None] | None = None
    statistics: Mapping[str, str] = field(default_factory=dict)
    optional_statistics: Mapping[str, str] = field(default_factory=dict)

    tensor_files: Shards | Container
    file_order: Callable[[Sequence[Module]], Sequence[PlannedTensor]] | None = None

    copied_files: tuple[str, ...]
    edited_files: tuple[str, ...] = ()
    metadata_files: tuple[str, ...] = ()

    settings: tuple[str, ...] = ()
    metadata_keys: Mapping[str, MetadataValues] = field(default_factory=dict)
    remarks: Callable[[Policy, Sequence[Module]], tuple[tuple[str, str], ...]] | None = None

    @property
    def container(self) -> Container | None:
        """The one file that holds all tensors, None if they lie in shards."""
        return self.tensor_files if isinstance(self.tensor_files, Container) else None

    @property
    def embedded_files(self) -> tuple[str, ...]:
        """Side files of the source that a container holds; none of shards do."""
        return self.container.embedded_files if self.container else ()

    def layout(self, policy: Policy) -> str:
        """The layout of experts that a policy chooses; empty where there is no choice."""
        return policy.output.layout or next(iter(self.layouts), "")

    def scheme(self, name: str) -> SchemeSpec | None:
        """The scheme of that name, or None."""
        return next((scheme for scheme in self.schemes if scheme.name == name), None)


# Dtype and shape of a tensor on disk.
TensorForm = tuple[str, tuple[int, ...]]
# Module -> part -> form: a bundle's tensors by their names up to the last dot.
Forms = Mapping[str, Mapping[str, TensorForm]]


class Claim(NamedTuple):
    """What a bundle says to readers about a quantized module.

    shape: logical, as far as the tensors show it, else empty. dtype: of the values it decodes
    to.
    """

    treatment: Coded | Unread
    shape: tuple[int, ...]
    dtype: str


class ForeignMetadataError(ValueError):
    """Metadata files lack what every bundle of the format that was asked has."""


class UnreadError(ValueError):
    """Metadata are those of a format, and describe something that is not read."""


class UnstorableError(Exception):
    """The format has no numbers for a value in `row` of a block of rows.

    reason: why, with the cure, unless the value is simply too large.
    """

    def __init__(self, row: int, reason: str = "") -> None:
        super().__init__(f"row {row}")
        self.row = row
        self.reason = reason


class Slack(NamedTuple):
    """What was rounded before: relative error, and the smallest error, of the values coded.

    arithmetic: relative error of a tool's operations, if it computes in the source's type.
    """

    relative: float = 0.0
    floor: float = 0.0
    arithmetic: float = 0.0


class Encode(Protocol):
    """values [rows, in] of value type `dtype` -> part -> array [rows, …].

    Parts that are stored by columns are [lines, rows …]. Pure, the values stay as they are. It
    gets one block of rows at a time, from many threads.
    Raises: UnstorableError for values that are finite and that the format cannot store.
    """

    def __call__(self, values: Array, dtype: str, treatment: Coded) -> dict[str, Array]: ...


class Decode(Protocol):
    """The parts of rows, as `Encode` gives them -> float32 values [rows, columns]."""

    def __call__(
        self, parts: Mapping[str, Array], dtype: str, treatment: Coded, columns: int
    ) -> Array: ...


class Beyond(Protocol):
    """float32 values [rows, columns], and the parts stored for them -> bool, of that shape.

    True where rounding to the nearest code would not have led to that code, whatever is lost
    by rounding scales, quotients and products; slack: what was rounded before.
    """

    def __call__(
        self, values: Array, parts: Mapping[str, Array], dtype: str, treatment: Coded, slack: Slack
    ) -> Array: ...


@dataclass(frozen=True, slots=True)
class Codec:
    """How values become stored parts, and what readers compute of these."""

    encode: Encode
    decode: Decode
    beyond: Beyond


class Metadata(Protocol):
    """The bundle's metadata files, by name, whole; the same bytes for the same plan."""

    def __call__(self, plan: Plan) -> dict[str, bytes]: ...


class Claims(Protocol):
    """What metadata files say to readers about each quantized module of these tensors.

    Raises: PolicyError if they are broken; ValueError if they may be another format's.
    Anything else is a mistake of the format's own code.
    """

    def __call__(self, files: Mapping[str, bytes], forms: Forms) -> dict[str, Claim]: ...


class Defects(Protocol):
    """What the format's readers need besides tensors of the widths that files state.

    files: metadata that `Claims` has read; shards: the files with tensors.
    """

    def __call__(
        self,
        folder: Path,
        files: Mapping[str, bytes],
        shards: Collection[str],
        claims: Mapping[str, Claim],
    ) -> Iterable[Diagnostic]: ...


class Added(Protocol):
    """Module -> how many of its first axis, at its end, are experts that only pad.

    files: metadata that `Claims` has read; shapes: logical, by module.
    """

    def __call__(
        self, files: Mapping[str, bytes], shapes: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, int]: ...


class Edited(Protocol):
    """The source's side files of `spec.edited_files`, as the bundle holds them.

    Raises: PolicyError if one of them is not what it must be.
    """

    def __call__(self, plan: Plan, files: Mapping[str, bytes]) -> dict[str, bytes]: ...


class Preface(Protocol):
    """What comes before the tensors of the plan's one container.

    files: those of `spec.embedded_files` that the source has; None for a preface without
    anything about the model, and without padding.
    Raises: PolicyError if one of them is not what it must be.
    """

    def __call__(self, plan: Plan, files: Mapping[str, bytes] | None) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """What a format's files hold besides tensors, written and read back."""

    metadata: Metadata
    claims: Claims
    defects: Defects | None = None
    added: Added | None = None
    edited: Edited | None = None
    preface: Preface | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A bundle format, whole. What codes and files need is imported when it is asked for."""

    spec: FormatSpec
    codec: Callable[[], Codec]
    files: Callable[[], Files]
    prepare: Callable[[Plan, Any], Any] | None = None

    @property
    def name(self) -> str:
        """What policies call it."""
        return self.spec.name


def document(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object that a metadata file holds.

    Raises: ForeignMetadataError if there is no such file, or none in it.
    """
    if name not in files:
        raise ForeignMetadataError(f"it has no {name}")
    try:
        found = parse_json(files[name], what=name)
    except ValueError as error:
        raise ForeignMetadataError(str(error)) from None
    if not isinstance(found, dict):
        raise ForeignMetadataError(f"{name} is not a JSON object")
    return found


def forms_of(tensors: Mapping[str, TensorForm]) -> dict[str, dict[str, TensorForm]]:
    """Tensors by their module: all of a name up to its last dot."""
    forms: dict[str, dict[str, TensorForm]] = {}
    for name, form in tensors.items():
        path, _, part = name.rpartition(".")
        forms.setdefault(path, {})[part] = form
    return forms
