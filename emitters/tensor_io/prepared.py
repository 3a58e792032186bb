"""What statistics decide about a build."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from emitters.numerics.value_types import Array
from emitters.tensor_io.imatrix import Imatrix


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
