"""The plan: every output tensor, where it comes from, who decided, and its exact place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from policy_dsl.diagnostics import Diagnostic, Span
from policy_dsl.inventory import Inventory, TensorInfo
from policy_dsl.policy import Policy, rule_places
from policy_dsl.quantities import counted
from policy_dsl.treatments import Action, Coded, Stored
from policy_dsl.views import View

if TYPE_CHECKING:
    from policy_dsl.documents import RuleAt
    from policy_dsl.documents.saved import RecordedTransform
    from policy_dsl.roles.model import Model

_as_json = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode
# What a plan names for tensors that no rule reached.
OTHERWISE: Final = "defaults.otherwise"


# The digest of some bytes of a tensor, of which thousands may have the same.
_short = cache(lambda content: hashlib.sha256(content).hexdigest())


class Forms(NamedTuple):
    """What modules have in common: one module of each form, and the form of every module."""

    examples: list[Module]
    numbers: list[int]


class PlannedTensor(NamedTuple):
    """One tensor of the output: `start` is its byte offset in `file`, header included.

    by_columns: whether logical rows are along its second axis. tail: its last bytes, where the
    plan decides them and no source; all of them if it is a constant such as a width.
    """

    name: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    start: int
    by_columns: bool = False
    tail: bytes = b""

    def rows_at(self, first: int, n_rows: int) -> tuple[int, int]:
        """Where the share of a module's row `first`, of `n_rows`, begins in the file.

        Every row has equally many bytes. By columns, rows follow each other within each line,
        and the second number is the bytes of a line, else 0.
        """
        stride = self.nbytes // self.shape[0] if self.by_columns else 0
        return self.start + (stride or self.nbytes) * first // max(1, n_rows), stride

    @property
    def is_constant(self) -> bool:
        """Whether no source has a part in it."""
        return bool(self.tail) and len(self.tail) == self.nbytes


class Module(NamedTuple):
    """What one decision produces: the output tensors of a matrix, a stack, or a plain tensor.

    shape: logical, [experts, out, in], [out, in] or that of a plain tensor. dtype: safetensors
    name of the values that are encoded or written. decided_by: which of the policy's rules
    did, None where none reached it. parameters: logical values. added: how many of the first
    axis, at its end, are experts that no source has; their rows are zero bytes. together:
    rows that are coded as one. written: what the rule did, such as `keep`.
    """

    name: str
    role: str
    layer: int | None
    treatment: Stored
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[View, ...]
    tensors: tuple[PlannedTensor, ...]
    parameters: int
    added: int = 0
    together: int = 1
    decided_by: int | None = None
    written: Action = "quantize"

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum([tensor.nbytes for tensor in self.tensors])

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What the names of its tensors have beyond its own; empty if nothing."""
        known = len(self.name) + 1
        return tuple([tensor.name[known:] for tensor in self.tensors])


def coded_modules(modules: Iterable[Module]) -> Iterator[tuple[Module, Coded]]:
    """The quantized ones among the modules, each with how it is coded."""
    for module in modules:
        if isinstance(module.treatment, Coded):
            yield module, module.treatment


@dataclass(frozen=True, slots=True)
class Omission:
    """A source tensor that the bundle leaves out with its FP8 scales, and why.

    expert: the source's number of one that was pruned. equals: the source tensor that replaces
    it in the bundle; a build refuses if their values differ.
    """

    tensor: TensorInfo
    role: str
    layer: int | None
    reason: str
    scale: TensorInfo | None = None
    expert: int | None = None
    equals: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor and its scales."""
        return self.tensor.nbytes + (self.scale.nbytes if self.scale else 0)


@dataclass(frozen=True)
class Pruning:
    """The experts that a plan keeps, in their old order with new numbers.

    before: experts of every layer of the source. kept: layer -> their old numbers, ascending, as
    many in each. by: what ranks them, empty where the policy lists them. chosen: whether they are
    known, or the first ones are taken until they are.
    """

    before: int
    kept: Mapping[int, tuple[int, ...]]
    by: str = ""
    chosen: bool = True

    @classmethod
    def of_entries(cls, transforms: Iterable[Mapping[str, Any]]) -> Pruning | None:
        """What a record or a saved plan says was done to the model; None if nothing was."""
        for entry in transforms:
            ranking, kept = entry["by"] or "", entry["kept"]
            if kept is not None:
                numbers = {int(layer): tuple(old) for layer, old in kept.items()}
                return cls(entry["before"], numbers, ranking)
            # As many numbers take their place, as in the plan itself; all layers share them.
            numbers = dict.fromkeys(range(entry["layers"]), tuple(range(entry["to"])))
            return cls(entry["before"], numbers, ranking, chosen=False)
        return None

    @property
    def entry(self) -> RecordedTransform:
        """It as a record says it."""
        return {
            "prune": "experts",
            "by": self.by or None,
            "before": self.before,
            "to": self.count,
            "kept": {str(layer): list(numbers) for layer, numbers in self.kept.items()},
        }

    @property
    def count(self) -> int:
        """Experts of every layer that stay."""
        return len(next(iter(self.kept.values())))

    @property
    def about(self) -> str:
        """`256 -> 192 experts in 62 layers by reap`; that the first are taken, if they are."""
        experts, layers = counted(self.count, "expert"), counted(len(self.kept), "layer")
        how = f"by {self.by}" if self.by else "as listed"
        unranked = "; not ranked yet, so planned with the first of each layer"
        return f"{self.before} -> {experts} in {layers} {how}{'' if self.chosen else unranked}"

    @property
    def reason(self) -> str:
        """Why a tensor of an expert that does not stay is left out."""
        how = f"by {self.by}" if self.by else "as the policy lists them"
        ranked = "" if self.chosen else " (not ranked yet)"
        return f"pruned: {self.count} of {self.before} experts stay, {how}{ranked}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a reader would not take, and why.

    subject: the tensor or module, empty for the bundle as a whole. reader: empty for all of them.
    severity: error (there is no plan), fatal (no plan for a policy that names this reader),
    warning, omitted (the bundle does without the tensor), or inexact (its answers differ).
    """

    subject: str
    reader: str
    reason: str
    severity: Literal["error", "fatal", "warning", "omitted", "inexact"] = "warning"


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file of the bundle. kind: tensors, metadata, edited, copied, record.

    nbytes: None where it is not known; `reason` says why, `least` is the part that is known.
    """

    name: str
    kind: str
    nbytes: int | None
    reason: str = ""
    least: int = 0


@dataclass(frozen=True, slots=True)
class OmittedFile:
    """A file or folder (`name/`, whose nbytes is None) of the source that is left out, and why."""

    name: str
    nbytes: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class StatisticsFile:
    """A file of statistics that a build reads.

    name: of the statistic, such as `imatrix`. path: as it was written, in a policy at `span`,
    or else on the command line. sha256: in hex, of its contents; empty until they are read.
    state: bytes and modification time, in ns, when it was first opened; None until then.
    methods: those that use it; none use what ranks experts.
    """

    name: str
    path: str
    span: Span | None = field(default=None, compare=False, repr=False)
    sha256: str = ""
    state: tuple[int, int] | None = field(default=None, compare=False, repr=False)
    methods: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What a bundle will hold, before its tensors have places: all that readers are asked about."""

    policy: Policy
    model: Model
    modules: tuple[Module, ...]


@dataclass(frozen=True, kw_only=True)
class Plan(Draft):
    """All that a build will do: complete, printable, comparable; nothing is decided later.

    source_files: bytes of every shard of the source, as far as they are known. source_commit: of
    the hub. linked_files: shards that are links out of its folder, and where they lead.
    inventory: the source, if a build is to need nothing else.
    """

    policy_digest: str
    target: str
    source_digest: str
    source_nbytes: int
    omitted: tuple[Omission, ...] = ()
    files: tuple[PlannedFile, ...] = ()
    omitted_files: tuple[OmittedFile, ...] = ()
    fp8_rule: str = ""
    statistics: tuple[StatisticsFile, ...] = ()
    pending: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    remarks: tuple[tuple[str, str], ...] = ()
    pruning: Pruning | None = None
    codec_version: int = 1
    source_files: Mapping[str, int] = field(default_factory=dict)
    source_commit: str | None = None
    linked_files: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    findings: tuple[Diagnostic, ...] = field(default=(), compare=False)
    inventory: Inventory | None = field(default=None, compare=False, repr=False)

    @property
    def not_loaded(self) -> tuple[Refusal, ...]:
        """Why readers cannot load the bundle, without those whose answers only differ."""
        return tuple(one for one in self.refusals if one.severity != "inexact")

    @cached_property
    def forms(self) -> Forms:
        """The modules by what they have in common; forms in the order in which they appear."""
        known: dict[tuple[object, ...], int] = {}
        examples: list[Module] = []
        numbers: list[int] = []
        for module in self.modules:
            form = (
                *(module.role, module.treatment, module.written, module.decided_by),
                *(module.shape, module.dtype, module.added, module.suffixes),
                *sorted({view.tensor.dtype for view in module.sources}),
            )
            numbers.append(known.setdefault(form, len(known)))
            if len(known) > len(examples):
                examples.append(module)
        return Forms(examples, numbers)

    @cached_property
    def recipes(self) -> tuple[str, ...]:
        """SHA-256, as hex, of all that decides a module's bytes but weights and encoder.

        Where the values are in the source and how they become those of the model; what happens
        to them, and with which statistics. Of two modules that have one recipe, one codec
        version and equal shards, the bytes are equal.
        """
        texts, recipes = [], []
        for example in self.forms.examples:
            method = example.treatment.method if isinstance(example.treatment, Coded) else ""
            used = {file.name: file.sha256 for file in self.statistics if method in file.methods}
            parts = [[one.part, one.dtype, one.shape, one.by_columns] for one in example.tensors]
            decisive = [
                *(self.target, self.fp8_rule, used, astuple(example.treatment)),
                *(example.dtype, example.shape, example.added, example.together, parts),
            ]
            texts.append(_as_json(decisive))
        for module, form in zip(self.modules, self.forms.numbers, strict=True):
            # Names can be printed: none has a tab or the end of a line.
            lines = [texts[form]]
            for view in module.sources:
                scale = view.scale.name if view.scale else ""
                added = [f"+{view.added}"] if view.added else []
                done = [*map(repr, view.operations), *added]
                lines.append("\t".join([view.tensor.name, scale, *done]))
            lines += [_short(tensor.tail) for tensor in module.tensors if tensor.tail]
            recipes.append(hashlib.sha256("\n".join(lines).encode()).hexdigest())
        return tuple(recipes)

    @cached_property
    def digest(self) -> str:
        """SHA-256, as hex, of all that decides the bytes of the tensor files.

        Where a rule is written and what the policy says besides do not matter.
        """
        digest = hashlib.sha256(self.source_digest.encode())
        for module, recipe in zip(self.modules, self.recipes, strict=True):
            places = [(tensor.file, tensor.start) for tensor in module.tensors]
            digest.update(f"{module.name!r} {recipe} {places}\n".encode())
        return digest.hexdigest()

    @cached_property
    def rule_places(self) -> list[tuple[str, RuleAt | None]]:
        """Where each rule of the policy is written, as text and in parts."""
        return rule_places(self.policy.rules)

    def rule_of(self, module: Module) -> tuple[str, RuleAt | None]:
        """Where the rule that decided is written; `defaults.otherwise` and None if none did."""
        at = module.decided_by
        return (OTHERWISE, None) if at is None else self.rule_places[at]

    @cached_property
    def added_experts(self) -> int:
        """Experts of every layer that no source has."""
        return max((module.added for module in self.modules if module.role == "router"), default=0)

    @property
    def tensor_files(self) -> list[PlannedFile]:
        """The files that hold tensors."""
        return [file for file in self.files if file.kind == "tensors"]

    @property
    def source_experts(self) -> int:
        """Experts of every layer of the source."""
        return self.pruning.before if self.pruning else self.model.n_experts

    def old_experts(self, layer: int | None) -> Sequence[int]:
        """The source's numbers of a layer's experts, in their order."""
        if self.pruning is None or layer is None:
            return range(self.model.n_experts)
        return self.pruning.kept[layer]
