"""The values of a source: rows of a tensor, exact or in another value type."""

from __future__ import annotations

from typing import NamedTuple

from emitters.core.decoding import opened
from emitters.core.fp8_rows import dequantized_rows
from emitters.numerics.rounding import cast
from emitters.numerics.value_types import Array
from emitters.tensor_io.read import picked_rows
from policy_dsl.diagnostics import fail
from policy_dsl.inventory import Inventory
from policy_dsl.roles.classify import Model, ModelTensor


class Cast(NamedTuple):
    """How values become another type. rule: of FP8. by_way_of: a type between, if there is one.

    cuts_off: whether values that become F16 are rounded toward zero.
    """

    dtype: str
    rule: str = "f32"
    by_way_of: str = ""
    cuts_off: bool = False


class SourceValues:
    """A source opened for reading, as the model that is made of it. Threads may share it.

    Raises: PolicyError if the source has no readable weights.
    """

    def __init__(self, source: Inventory, model: Model) -> None:
        if source.root is None:
            raise fail("not-comparable", reason=f"{source.id} is known by its headers alone")
        self.model = model
        self._source = opened(source, source.root)

    def rows(self, tensor: ModelTensor, first: int, count: int) -> Array:
        """float32 [count, in]: rows of a plain tensor of the model, from its row `first`.

        Raises: PolicyError if a file cannot be read any more, or FP8 blocks have no size.
        """
        return self.cast(tensor, (first, count), Cast("F32"))

    def cast(self, tensor: ModelTensor, span: tuple[int, int], how: Cast) -> Array:
        """[count, in]: rows of a plain tensor of the model in another value type.

        span: first row and count. Raises: PolicyError as `rows` does.
        """

        def read(first: int, count: int) -> Array:
            stored = self._source.rows(tensor.source, first, count)
            if tensor.scale is not None:
                return dequantized_rows(
                    self._source,
                    self.model.config,
                    (tensor.source, tensor.scale),
                    stored,
                    first=first,
                    rule=how.rule,
                    out_dtype=how.dtype,
                )
            step = how.by_way_of or tensor.source.dtype
            stored = cast(stored, tensor.source.dtype, step)
            return cast(stored, step, how.dtype, cuts_off=how.cuts_off)

        # Of the tensor as it is stored, which may hold other tensors of the model before.
        stored = span[0] + tensor.first_row, span[1]
        return picked_rows(read, tensor.source, tensor.picked, stored)
