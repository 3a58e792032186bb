"""What a format is to the build: a capability record, a codec, metadata and its reading."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

from policy_dsl.formats import FormatSpec
from policy_dsl.plan import Plan
from policy_dsl.policy import Treatment

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


class Encode(Protocol):
    """values [rows, in] of value type `dtype` -> part -> array [rows, …].

    Pure, the values stay as they are. It gets one block of rows at a time, from many threads.
    """

    def __call__(self, values: Array, dtype: str, treatment: Treatment) -> dict[str, Array]: ...


class Decode(Protocol):
    """The parts of rows, as `Encode` gives them -> float32 values [rows, in]."""

    def __call__(
        self, parts: Mapping[str, Array], dtype: str, treatment: Treatment
    ) -> Array: ...


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

    def metadata(self, plan: Plan) -> dict[str, bytes]:
        """The bundle's metadata files, by name, whole; the same bytes for the same plan."""
        return cast("dict[str, bytes]", self._load("metadata").metadata(plan))

    def claims(self, files: Mapping[str, bytes]) -> dict[str, Treatment]:
        """What metadata files tell readers: quantized module -> scheme, bits, group size."""
        return cast("dict[str, Treatment]", self._load("metadata").claims(files))

    def _load(self, module: str) -> ModuleType:
        # By name: the formats stand above this module, which must know none of them.
        return import_module(f"{self.package}.{module}")

    def default_claim(self, files: Mapping[str, bytes]) -> Treatment | None:
        """What metadata files tell readers about quantized modules that they do not name."""
        return cast("Treatment | None", self._load("metadata").default_claim(files))
