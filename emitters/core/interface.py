"""What a format is to the build: a capability record, a codec, metadata and its reading."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import Diagnostic
from policy_dsl.formats import FormatSpec
from policy_dsl.plan import Plan
from policy_dsl.policy import Treatment

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from emitters.numerics.reach import Slack
    from emitters.tensor_io.imatrix import Imatrix

    Array = NDArray[Any]


# Dtype and shape of a tensor on disk.
TensorForm = tuple[str, tuple[int, ...]]
# Module -> part -> form: a bundle's tensors by their names up to the last dot.
Forms = Mapping[str, Mapping[str, TensorForm]]


class Claim(NamedTuple):
    """What a bundle tells readers about a quantized module.

    shape: logical, as far as the tensors tell, else empty. dtype: of the values it decodes to.
    unread: why it is not known what readers understand; then the treatment is `UNKNOWN`.
    """

    treatment: Treatment
    shape: tuple[int, ...]
    dtype: str
    unread: str = ""


class UnreadError(ValueError):
    """Metadata are those of a format, and describe something that is not read."""


class UnstorableError(Exception):
    """A block of rows holds one, `row` of the block, that the format has no numbers for.

    reason: why, with the cure, if it is not that its values are too large.
    """

    def __init__(self, row: int, reason: str = "") -> None:
        super().__init__(f"row {row}")
        self.row = row
        self.reason = reason


class Prepared(NamedTuple):
    """What statistics decide about tensors and modules, by their names.

    contents: of a tensor, all its bytes. column_scales: float32 [in], by which a module's
    columns are multiplied before coding. importance: float32 [in], mean squares of what meets
    its columns, for the encoder.
    """

    contents: Mapping[str, bytes]
    column_scales: Mapping[str, Array]
    importance: Mapping[str, Array]

    @classmethod
    def nothing(cls) -> Prepared:
        """What no statistics decide."""
        return cls({}, {}, {})


class Statistics(NamedTuple):
    """What is known of the inputs of a model's matrices; None is what was not given."""

    imatrix: Imatrix | None = None


class Encode(Protocol):
    """values [rows, in] of value type `dtype` -> part -> array [rows, …].

    Parts whose rows lie by columns are [lines, rows …]. Pure, the values stay as they are. It
    gets one block of rows at a time, from many threads. importance: of the columns; only
    formats whose `prepare` gives one take it.
    Raises: UnstorableError for values that are finite and that the format cannot store.
    """

    def __call__(
        self, values: Array, dtype: str, treatment: Treatment, importance: Array = ...
    ) -> dict[str, Array]: ...


class Decode(Protocol):
    """The parts of rows, as `Encode` gives them -> float32 values [rows, columns]."""

    def __call__(
        self, parts: Mapping[str, Array], dtype: str, treatment: Treatment, columns: int
    ) -> Array: ...


class Beyond(Protocol):
    """float32 values [rows, columns], and the parts stored for them -> bool, of that shape.

    True where rounding to the nearest code would not have led to that code, whatever is lost
    by rounding scales, quotients and products; slack: what was rounded before.
    """

    def __call__(
        self,
        values: Array,
        parts: Mapping[str, Array],
        dtype: str,
        treatment: Treatment,
        slack: Slack,
    ) -> Array: ...


class ForeignMetadataError(ValueError):
    """Metadata files lack what every bundle of the format that was asked has."""


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


class Emitter:
    """A format by its name and the package that holds its modules spec, encode and metadata.

    Only what is asked for is imported: a plan needs no kernels. It can be sent to another
    machine.
    """

    def __init__(self, name: str, package: str) -> None:
        self.name = name
        self.package = package

    @property
    def spec(self) -> FormatSpec:
        """What the format can hold."""
        return cast("FormatSpec", self._load("spec").SPEC)

    @property
    def encode(self) -> Encode:
        """The encoder of quantized modules."""
        return cast("Encode", self._load("encode").encode)

    @property
    def decode(self) -> Decode:
        """The inverse of the encoder."""
        return cast("Decode", self._load("encode").decode)

    @property
    def beyond(self) -> Beyond:
        """Which values codes are not the nearest ones of."""
        return cast("Beyond", self._load("encode").beyond)

    def metadata(self, plan: Plan) -> dict[str, bytes]:
        """The bundle's metadata files, by name, whole; the same bytes for the same plan."""
        return cast("dict[str, bytes]", self._load("metadata").metadata(plan))

    def edited(self, plan: Plan, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """The source's side files of `spec.edited_files`, as the bundle holds them.

        Raises: PolicyError if one of them is not what it must be.
        """
        return cast("dict[str, bytes]", self._load("metadata").edited(plan, files))

    def preface(self, plan: Plan, files: Mapping[str, bytes] | None) -> bytes:
        """What stands before the tensors of the plan's one container.

        files: those of `spec.embedded_files` that the source has; None for a preface without
        anything about the model, and without padding.
        Raises: PolicyError if one of them is not what it must be.
        """
        return cast("bytes", self._load("metadata").preface(plan, files))

    def prepare(self, plan: Plan, statistics: Statistics) -> Prepared:
        """What statistics decide: the bytes of companions, scales of columns.

        Raises: PolicyError if the statistics are not those of this model.
        """
        return cast("Prepared", self._load("statistics").prepare(plan, statistics))

    def claims(self, files: Mapping[str, bytes], forms: Forms) -> dict[str, Claim]:
        """What metadata files tell readers about each quantized module of these tensors.

        Raises: PolicyError if they are broken; ValueError if they may be
        another format's. Anything else is a mistake of the format's own code.
        """
        return cast("dict[str, Claim]", self._load("metadata").claims(files, forms))

    def added(
        self, files: Mapping[str, bytes], shapes: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, int]:
        """Module -> how many of its first axis, at its end, are experts that only pad.

        files: metadata that `claims` has read; shapes: logical, by module. Formats whose
        metadata say nothing of them do not define it.
        """
        find = getattr(self._load("metadata"), "added", None)
        return {} if find is None else cast("Mapping[str, int]", find(files, shapes))

    def defects(
        self,
        folder: Path,
        files: Mapping[str, bytes],
        shards: Collection[str],
        claims: Mapping[str, Claim],
    ) -> Iterable[Diagnostic]:
        """What the format's readers need besides tensors of the widths that they are told.

        files: metadata that `claims` has read. Formats whose readers need no more do not
        define it.
        """
        check = getattr(self._load("metadata"), "defects", None)
        if check is None:
            return ()
        return cast("Iterable[Diagnostic]", check(folder, files, shards, claims))

    def _load(self, module: str) -> ModuleType:
        # By name: the formats stand above this module, which must know none of them.
        return import_module(f"{self.package}.{module}")


def forms_of(tensors: Mapping[str, TensorForm]) -> dict[str, dict[str, TensorForm]]:
    """Tensors by the module that their names tell: all up to the last dot."""
    forms: dict[str, dict[str, TensorForm]] = {}
    for name, form in tensors.items():
        path, _, part = name.rpartition(".")
        forms.setdefault(path, {})[part] = form
    return forms
