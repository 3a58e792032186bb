"""What a format is: the types of its parts. Each `emitters/<name>/` defines one `Format`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

# Capabilities load without what a plan and a model are: `check` starts at once.
if TYPE_CHECKING:
    from numpy.typing import NDArray

    from policy_dsl.diagnostics import Diagnostic, PolicyError
    from policy_dsl.inventory import TensorInfo
    from policy_dsl.plan import Draft, Module, Plan, PlannedTensor, Refusal
    from policy_dsl.policy import Policy
    from policy_dsl.roles.architecture import Architecture
    from policy_dsl.roles.classify import Model, ModelTensor
    from policy_dsl.treatments import Coded, Stored, Unread

    Array = NDArray[Any]

# What an entry of a policy's `metadata` may be: one of these texts, of a type, a mapping.
MetadataValues = type | tuple[str, ...] | Mapping[str, "MetadataValues"]
# Dtype and shape of a tensor on disk.
TensorForm = tuple[str, tuple[int, ...]]
# Module -> part -> form: a bundle's tensors by their names up to the last dot.
Forms = Mapping[str, Mapping[str, TensorForm]]
# Of a bundle, by name: its tensors; the content of its metadata files.
Tensors = Mapping[str, "TensorInfo"]
FileContents = Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class SchemeSpec:
    """A scheme of a format. Of widths, group sizes, methods, symmetries the first is the default.

    bits: one means that the scheme's name fixes it. group_sizes: empty for no groups.
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

    constant: all its bytes where the treatment alone decides them; else every logical row of the
    module has equally many. nbytes: None where dtype and shape decide it. together: logical rows
    that are coded as one, where groups run on from row to row. order: whether these rows are
    along its first axis, along its second, or have all of it in common.
    """

    part: str
    dtype: str
    shape: tuple[int, ...]
    constant: bytes = b""
    nbytes: int | None = None
    together: int = 1
    order: Literal["rows", "columns", "whole"] = "rows"


@dataclass(frozen=True, slots=True)
class ExpertsApart:
    """A layout with a module for each expert whose scheme is one of these; None is plain.

    path(path of the stack, expert) -> the expert's module.
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


def in_order(modules: Sequence[Module]) -> Sequence[PlannedTensor]:
    """The tensors of the modules, in their order."""
    return [tensor for module in modules for tensor in module.tensors]


def filled(
    tensors: Sequence[PlannedTensor], limit: int, *, past: bool = False
) -> Iterator[list[PlannedTensor]]:
    """The tensors of each shard: one that would pass the limit begins the next.

    past: the one that reaches the limit is the last of its shard.
    """
    shard: list[PlannedTensor] = []
    nbytes = 0
    for tensor in tensors:
        if shard and nbytes + (1 if past else tensor.nbytes) > limit:
            yield shard
            shard, nbytes = [], 0
        shard.append(tensor)
        nbytes += tensor.nbytes
    yield shard


@dataclass(frozen=True, slots=True)
class Shards:
    """Tensors in numbered safetensors files. nbytes: largest shard; metadata: of each header.

    name(index from 1, count) -> file name. order(modules): in which shards are filled.
    fill(tensors, nbytes): those of each shard.
    """

    nbytes: int
    name: Callable[[int, int], str]
    metadata: Mapping[str, str] = field(default_factory=dict)
    order: Callable[[Sequence[Module]], Sequence[PlannedTensor]] = in_order
    fill: Callable[[Sequence[PlannedTensor], int], Iterator[list[PlannedTensor]]] = filled


@dataclass(frozen=True, slots=True)
class Container:
    """All tensors in one file, without gaps after a preface.

    name(policy, modules) -> file name. embedded_files: side files of the source in the preface.
    preface(plan, those of them that the source has): what comes before the tensors; if they are
    None, without anything about the model and without padding. order(modules): of the tensors.
    """

    name: Callable[[Policy, Sequence[Module]], str]
    embedded_files: tuple[str, ...]
    preface: Callable[[Plan, FileContents | None], bytes]
    order: Callable[[Sequence[Module]], Sequence[PlannedTensor]] = in_order


@dataclass(frozen=True, kw_only=True)
class FormatSpec:
    """What a format can hold and how its bundle is named and laid out. Functions are pure.

    codec_version: raised with every change of the bytes that an encoder makes.
    fill: rows (role class, bits or None for any, scheme), first match wins; role classes are
      `experts`, `embed` (embed and lm_head), `matrix` (any other matrix), `any`.
    plain_dtypes: of what is not quantized. plain_dtype(tensor, model): the one of a kept tensor,
      and of a quantized one's values. cuts_off: whether values that become F16 are rounded
      toward zero. fp8_rules: how FP8 sources may be dequantized; the first is the format's own.
    families: family -> None if it is taken, else why not; None: as the families' tables say.
    config_readers: the tables of readers that say what config.json means to them.
    runtimes: reader -> what it is.
    arrangement(tensor, model): the tensors that its readers make of one; None: all as they are.
    module_path(tensor, model): the output module of a tensor; tensors with equal paths are
      stacked along a leading expert axis, or joined in their places. A path that ends as the
      source's name does (`.bias`) means a bare tensor.
    part_shapes(treatment, shape, dtype): the output tensors of a module of a logical shape
      [..., in] whose values are of `dtype`; one part unless it is quantized.
    layouts: ways to store experts, the first is the default; None is stacks of all. Empty:
      stacks, no choice. padding: family -> experts that are added, unless the policy says no.
    copied_files: name patterns of the source's side files that the bundle copies; edited_files:
      those that it holds in another form. metadata_files: JSON files that describe a bundle to
      its readers, also those that other tools write; no other is read.
    settings: the keys of a policy beside its rules that are used, such as `output.shard_size`.
    metadata_keys: keys of its `metadata` -> the values allowed there, their type, or of a
      mapping its keys -> the same.
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
    families: Mapping[str, str | None] | None = None
    config_readers: tuple[str, ...] = ()
    runtimes: Mapping[str, str] = field(default_factory=dict)
    arrangement: Callable[[ModelTensor, Model], Sequence[ModelTensor]] | None = None
    module_path: Callable[[ModelTensor, Model], str]
    part_shapes: Callable[[Stored, tuple[int, ...], str], tuple[PartShape, ...]]
    layouts: Mapping[str, ExpertsApart | None] = field(default_factory=dict)
    padding: Mapping[str, ExpertPadding] = field(default_factory=dict)
    tensor_files: Shards | Container
    copied_files: tuple[str, ...]
    edited_files: tuple[str, ...] = ()
    metadata_files: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    metadata_keys: Mapping[str, MetadataValues] = field(default_factory=dict)

    @property
    def container(self) -> Container | None:
        """The one file that holds all tensors, None if they are in shards."""
        return self.tensor_files if isinstance(self.tensor_files, Container) else None

    @property
    def embedded_files(self) -> tuple[str, ...]:
        """Side files of the source that a container holds; shards hold none."""
        return self.container.embedded_files if self.container else ()

    def parts(self, tensor: ModelTensor, model: Model) -> Sequence[ModelTensor]:
        """What the format's readers make of a tensor: itself, or its parts."""
        return (tensor,) if self.arrangement is None else self.arrangement(tensor, model)

    def arranged(self, model: Model) -> Model:
        """The model with the tensors that the format's readers want."""
        if self.arrangement is None:
            return model
        made = [part for tensor in model.tensors for part in self.arrangement(tensor, model)]
        return replace(model, tensors=tuple(made))

    def layout(self, policy: Policy) -> str:
        """The layout of experts that a policy chooses; empty where there is no choice."""
        return policy.output.layout or next(iter(self.layouts), "")

    def scheme(self, name: str) -> SchemeSpec | None:
        """The scheme of that name, or None."""
        return next((scheme for scheme in self.schemes if scheme.name == name), None)

    def refusal(self, table: Architecture) -> str | None:
        """Why the format does not take a family; None if it does."""
        if self.families is None:
            return table.refusal(self.name)
        return self.families.get(table.family, "its tensor names in this format are not known")


class Claim(NamedTuple):
    """What a bundle says to readers about a quantized module.

    shape: logical, as far as the tensors show it, else empty. dtype: of what it decodes to.
    """

    treatment: Coded | Unread
    shape: tuple[int, ...]
    dtype: str


Claims = Mapping[str, Claim]


class ForeignMetadataError(ValueError):
    """Metadata files lack what every bundle of the format that was asked has."""


class UnreadError(ValueError):
    """Metadata are those of a format, and describe something that is not read."""


class UnstorableError(Exception):
    """The format has no numbers for a value in `row` of a block of rows.

    reason: why, with the cure, unless the value is simply too large.
    """

    def __init__(self, row: int, reason: str = "") -> None:
        super().__init__(row, reason)
        self.row, self.reason = row, reason


class Slack(NamedTuple):
    """What was rounded before: relative error, and the smallest error, of the values coded.

    arithmetic: relative error of a tool's operations, if it computes in the source's type.
    """

    relative: float = 0.0
    floor: float = 0.0
    arithmetic: float = 0.0


# The parts of a block of rows, by the last part of their tensors' names: [rows, …]; those that
# are stored by columns are [lines, rows …].
Parts = Mapping[str, "Array"]
Encode = Callable[["Array", str, "Coded"], dict[str, "Array"]]


@dataclass(frozen=True, slots=True)
class Codec:
    """How values become stored parts, and what readers compute of these. All of it is pure.

    encode(values [rows, in], their value type, treatment) -> parts. It gets one block of rows
    at a time, from many threads; UnstorableError for finite values that cannot be stored.
    decode(parts, value type, treatment, columns) -> float32 values [rows, columns].
    beyond(float32 values, parts, value type, treatment, slack) -> bool, of the values' shape:
    true where rounding to the nearest code would not have led to that code, whatever is lost by
    rounding scales, quotients and products.
    value_defects(folder, tensors, claims): stored values that readers cannot compute with; a
    build does not ask it of what it just encoded.
    """

    encode: Encode
    decode: Callable[[Parts, str, Coded, int], Array]
    beyond: Callable[[Array, Parts, str, Coded, Slack], Array]
    value_defects: Callable[[Path, Tensors, Claims], Iterable[Diagnostic]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """What a format's files hold besides tensors, written and read back.

    metadata(plan): the metadata files, whole; the same bytes for the same plan.
    claims(files, forms): what they say to readers about each quantized module of these tensors.
    PolicyError if they are broken; ValueError if they may be another format's; anything else
    is a mistake of the format's own code. The others get metadata that `claims` has read:
    defects(folder, files, tensors, claims): what readers need besides tensors of these widths.
    added(files, shapes): module -> how many of its first axis, at its end, only pad.
    edited(plan, files): the source's `edited_files` as the bundle holds them, or PolicyError.
    """

    metadata: Callable[[Plan], dict[str, bytes]]
    claims: Callable[[FileContents, Forms], dict[str, Claim]]
    defects: Callable[[Path, FileContents, Tensors, Claims], Iterable[Diagnostic]] | None = None
    added: Callable[[FileContents, Mapping[str, tuple[int, ...]]], Mapping[str, int]] | None = None
    edited: Callable[[Plan, FileContents], dict[str, bytes]] | None = None


class Statistics(Protocol):
    """Squared inputs of a model over tokens; PolicyError for a matrix of which nothing is known."""

    def of_matrix(self, module: Module, source: int) -> Array:
        """float32 [in]: means, 1 without tokens, of a module's source of this index."""

    def of_layer(self, role: str, module: Module) -> Array:
        """float32 [n_matrices, in]: sums of a role in a module's layer, experts in order."""

    def once(self, key: object, made: Callable[[], Array]) -> Array:
        """What is made for this key; the last few are kept."""

    def unusable(self, module: Module, reason: str, cure: str) -> PolicyError:
        """The error of an entry that is well formed and that a method cannot take."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a method computed once for a matrix, and shares between its blocks.

    scale: float32 [in], by which columns are multiplied before they are coded; None: by 1.
    """

    encode: Encode
    scale: Array | None = None


@dataclass(frozen=True, slots=True)
class Solver:
    """What a method computes from statistics; PolicyError if it cannot use them.

    context(plan, module, index of one of its sources, statistics).
    contents(plan, statistics): name -> all bytes of the tensors that the method adds.
    """

    context: Callable[[Plan, Module, int, Statistics], Context]
    contents: Callable[[Plan, Statistics], Mapping[str, bytes]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How codes are chosen.

    needs: the statistic without which there are no codes; uses: one that makes them better.
    added(modules): tensors that no source has, and whose bytes statistics decide.
    column_scale(module): the added tensor by whose values a module's columns were multiplied.
    remarks(policy, modules): what a plan says about choices that no treatment shows.
    solver: imported when statistics are there; without it the codec's own encoder decides.
    """

    needs: str = ""
    uses: str = ""
    added: Callable[[Sequence[Module]], tuple[Module, ...]] | None = None
    column_scale: Callable[[str], str | None] | None = None
    remarks: Callable[[Policy, Sequence[Module]], tuple[tuple[str, str], ...]] | None = None
    solver: Callable[[], Solver] | None = None


# (role, layer, stored) -> what readers have against it.
Judge = Callable[[str, "int | None", "Stored"], "Refusal | None"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """What readers of a format would not take.

    left_out(tensor, model): why none of them has a place for a tensor, else None.
    held(tensor, model, stored): why none of them can take it stored like that, else None.
    bundle(draft): what they cannot load, or load and then compute wrongly.
    usual(module, model): its bits by their own conversion, 16 if plain; None: as all others.
    """

    left_out: Callable[[ModelTensor, Model], str | None]
    held: Callable[[ModelTensor, Model, Stored], str | None]
    bundle: Callable[[Draft], Iterator[Refusal]]
    usual: Callable[[Module, Model], int | None] | None = None

    def tensor(self, tensor: ModelTensor, model: Model, stored: Stored) -> Refusal | None:
        """What all readers have against one tensor stored like that."""
        from policy_dsl.plan import Refusal  # noqa: PLC0415

        name = tensor.source.name
        if (reason := self.left_out(tensor, model)) is not None:
            return Refusal(name, "", reason, "omitted")
        if (reason := self.held(tensor, model, stored)) is not None:
            return Refusal(name, "", reason, "error")
        return None

    def judge(self, model: Model) -> Judge:
        """judge(role, layer, stored): what they have against a role of a layer, without a plan.

        Cheap enough to be asked thousands of times.
        """
        alike: dict[tuple[str, int | None], dict[tuple[int, ...], ModelTensor]] = {}
        for tensor in model.tensors:
            # The experts of a layer have one answer.
            alike.setdefault((tensor.role, tensor.layer), {}).setdefault(tensor.shape, tensor)

        @cache
        def judge(role: str, layer: int | None, stored: Stored) -> Refusal | None:
            tensors = alike.get((role, layer), {}).values()
            return next(filter(None, (self.tensor(one, model, stored) for one in tensors)), None)

        return judge


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A bundle format, whole. What codes and files need is imported when it is asked for.

    methods: by the names that the spec's schemes use.
    """

    spec: FormatSpec
    codec: Callable[[], Codec]
    files: Callable[[], Files]
    review: Review
    methods: Mapping[str, Method]

    @property
    def name(self) -> str:
        """What policies call it."""
        return self.spec.name

    def column_scale(self, module: str) -> str | None:
        """The tensor with what a module's columns were multiplied by, if a bundle has it."""
        finders = (method.column_scale for method in self.methods.values())
        return next(filter(None, (find(module) for find in finders if find)), None)
