"""The values of a source: rows of a tensor, exact or in another value type."""

from __future__ import annotations

from emitters.core.decoding import opened
from emitters.numerics.value_types import Array
from emitters.tensor_io.view_rows import Cast, ViewReader
from policy_dsl.diagnostics import fail
from policy_dsl.inventory import Inventory
from policy_dsl.roles.classify import Model, ModelTensor


class SourceValues:
    """A source opened for reading, as the model that is made of it. Threads may share it.

    Raises: PolicyError if the source has no readable weights.
    """

    def __init__(self, source: Inventory, model: Model) -> None:
        if source.root is None:
            raise fail("not-comparable", reason=f"{source.id} is known by its headers alone")
        self.model = model
        self._reader = ViewReader(opened(source, source.root), model.config)

    def rows(self, tensor: ModelTensor, first: int, count: int) -> Array:
        """float32 [count, in]: rows of a plain tensor of the model, from its row `first`.

        Raises: PolicyError if a file cannot be read any more, or FP8 blocks have no size.
        """
        return self.cast(tensor, (first, count), Cast("F32"))

    def cast(self, tensor: ModelTensor, span: tuple[int, int], how: Cast) -> Array:
        """[count, in]: rows of a plain tensor of the model in another value type.

        span: first row and count. Raises: PolicyError as `rows` does.
        """

        return self._reader.rows(tensor.view, *span, how)
