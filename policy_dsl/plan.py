"""The plan: every output tensor, where it comes from, who decided, and its exact place."""

from __future__ import annotations

from dataclasses import dataclass, field

from policy_dsl.diagnostics import Diagnostic, Span
from policy_dsl.inventory import TensorInfo
from policy_dsl.policy import Policy, Treatment
from policy_dsl.roles.classify import Model


@dataclass(frozen=True, slots=True)
class SourceRows:
    """`count` rows of a source tensor, from `first`, that become output rows from `at`.

    Rows are those of the tensor viewed as [rows, last axis]. scale: the FP8 block scales.
    """

    tensor: TensorInfo
    scale: TensorInfo | None
    first: int
    count: int
    at: int


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the output: `start` is its byte offset in `file`, header included.

    tail: its last bytes, where the plan decides them and no source; all of them if it is a
    constant such as a width.
    """

    name: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    start: int
    tail: bytes = b""

    def placed(self, file: str, start: int) -> PlannedTensor:
        """The tensor at that place."""
        # `replace` takes twice as long, and a plan may have 150,000 of them.
        return PlannedTensor(
            self.name, self.part, self.dtype, self.shape, self.nbytes, file, start, self.tail
        )

    @property
    def is_constant(self) -> bool:
        """Whether no source has a part in it."""
        return bool(self.tail) and len(self.tail) == self.nbytes


@dataclass(frozen=True, slots=True)
class Module:
    """What one decision produces: the output tensors of a matrix, a stack, or a plain tensor.

    shape: logical, [experts, out, in], [out, in] or that of a plain tensor. dtype: safetensors
    name of the values that are encoded or written. rule: `file:line` of the deciding
    rule, or `defaults.otherwise`. parameters: logical values. added: how many of the first
    axis, at its end, are experts that no source has; their rows are zero bytes. together:
    rows that are coded as one.
    """

    name: str
    role: str
    layer: int | None
    treatment: Treatment
    shape: tuple[int, ...]
    dtype: str
    rule: str
    sources: tuple[SourceRows, ...]
    tensors: tuple[PlannedTensor, ...]
    parameters: int
    added: int = 0
    together: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Omission:
    """A source tensor that the bundle leaves out, and why."""

    tensor: TensorInfo
    role: str
    layer: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A reader of the format that cannot load a bundle, and why."""

    runtime: str
    reason: str


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file of the bundle. kind: tensors, metadata, edited, copied, record.

    nbytes is None where it is not known; `reason` says why, and `least` is the part of it that
    is known.
    """

    name: str
    kind: str
    nbytes: int | None
    reason: str = ""
    least: int = 0


@dataclass(frozen=True, slots=True)
class StatisticsFile:
    """A file of statistics that a build reads.

    name: of the statistic, such as `imatrix`. path: as it was written, in a policy at `span`,
    or else on the command line. sha256: in hex, of its contents; empty until they are read.
    """

    name: str
    path: str
    span: Span | None = field(default=None, compare=False, repr=False)
    sha256: str = ""


@dataclass(frozen=True)
class Plan:
    """All that a build will do: complete, printable, comparable; nothing is decided later."""

    policy: Policy
    policy_digest: str
    target: str
    model: Model
    source_digest: str
    source_nbytes: int
    modules: tuple[Module, ...]
    omitted: tuple[Omission, ...] = ()
    files: tuple[PlannedFile, ...] = ()
    fp8_rule: str = ""
    statistics: tuple[StatisticsFile, ...] = ()
    pending: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    remarks: tuple[tuple[str, str], ...] = ()
    findings: tuple[Diagnostic, ...] = field(default=(), compare=False)
