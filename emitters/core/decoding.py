"""The values that a bundle's readers compute with: rows of a module, decoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np

from emitters.core.bundle_reading import Bundle
from emitters.core.record import BundleModule
from emitters.numerics.rounding import to_float32
from emitters.numerics.value_types import VALUE_TYPES, Array
from emitters.tensor_io.read import Source, columns, file_facts
from emitters.tensor_io.view_rows import ViewReader
from policy_dsl.diagnostics import fail
from policy_dsl.formats import PartShape
from policy_dsl.inventory import Inventory, TensorInfo
from policy_dsl.roles.classify import Model
from policy_dsl.treatments import Coded, coded

# Stored, dequantized and decoded values of a block stay in a core's cache.
_BLOCK_VALUES = 2**18
_PLAIN = PartShape("", "", ())


def opened(inventory: Inventory, root: Path) -> Source:
    """A checkpoint or bundle, opened for reading in the state in which it is."""
    files = {tensor.file for tensor in inventory.tensors.values() if tensor.file}
    return Source(root, file_facts(root, files))


def source_reader(source: Inventory, model: Model) -> ViewReader:
    """What reads rows of a source's tensors.

    Raises: PolicyError if the source has no readable weights.
    """
    if source.root is None:
        raise fail("not-comparable", reason=f"{source.id} is known by its headers alone")
    return ViewReader(opened(source, source.root), model.config)


class Decoder:
    """Decodes modules of one bundle. Many threads may share it."""

    def __init__(self, bundle: Bundle) -> None:
        self._format, self._scales = bundle.format, bundle.scales
        self._source = opened(bundle.inventory, bundle.folder)
        # Thousands of modules have the same form.
        self._shapes = lru_cache(256)(bundle.format.spec.part_shapes)

    def block_rows(self, module: BundleModule) -> int:
        """How many logical rows to ask for at once."""
        forms = self._forms(module) if isinstance(module.treatment, Coded) else ()
        together = max((form.together for form in forms), default=1)
        # Rows stored by columns are read in pieces, which should be long.
        values = _BLOCK_VALUES * (16 if any(form.order == "columns" for form in forms) else 1)
        return max(1, values // columns(module.shape) // together) * together

    def rows(self, module: BundleModule, first: int, count: int) -> Array:
        """float32 [count, last axis]: logical rows of a module, as its readers see them.

        Columns that were scaled before they were coded have their own size again.

        Raises: PolicyError if a file cannot be read any more.
        """
        if not isinstance(module.treatment, Coded):
            return to_float32(*self.stored(module, first, count))
        return self.decoded(module, self.parts(module, first, count), count)

    def stored(self, module: BundleModule, first: int, count: int) -> tuple[Array, str]:
        """[count, last axis]: rows of a plain module as they are stored, and their dtype."""
        (tensor,) = module.tensors.values()
        return self._read(tensor, _PLAIN, module, (first, count)), tensor.dtype

    def parts(self, module: BundleModule, first: int, count: int) -> dict[str, Array]:
        """What is stored for rows of a quantized module, as its format's encoder gives it."""
        return {
            form.part: self._read(module.tensors[form.part], form, module, (first, count))
            for form in self._forms(module)
            if not form.constant
        }

    def decoded(self, module: BundleModule, parts: Mapping[str, Array], count: int) -> Array:
        """float32 [count, last axis]: the values of the parts of so many rows."""
        width = columns(module.shape)
        decoded = self._format.codec().decode(parts, module.dtype, coded(module.treatment), width)
        # What fills up the last of the groups that run over all rows is none of them.
        values: Array = decoded.reshape(-1, width)[:count]
        scale = self.column_scale(module)
        if scale is None:
            return values
        # A damaged scale gives values that are not finite, which is found.
        with np.errstate(divide="ignore", invalid="ignore"):
            return values / scale

    def wrong_constants(self, module: BundleModule) -> Iterator[str]:
        """The parts of a module that do not hold what its treatment says."""
        # Plain tensors have none, whatever they are called.
        for form in self._forms(module) if isinstance(module.treatment, Coded) else ():
            held = module.tensors.get(form.part)
            if form.constant and held and self._all(held).tobytes() != form.constant:
                yield form.part

    def column_scale(self, module: BundleModule) -> Array | None:
        """float32 [in]: what the columns were multiplied by, if the bundle has it."""
        held = self._scales.get(module.name)
        return None if held is None else self.rows(held, 0, 1)[0]

    def _forms(self, module: BundleModule) -> tuple[PartShape, ...]:
        return self._shapes(coded(module.treatment), module.shape, module.dtype)

    def _all(self, tensor: TensorInfo) -> Array:
        return self._source.read(tensor.file or "", tensor.start, tensor.nbytes)

    def _read(
        self, tensor: TensorInfo, form: PartShape, module: BundleModule, span: tuple[int, int]
    ) -> Array:
        """The share of a part that belongs to these logical rows, first and count.

        [count / together, …]; of a part by columns [lines, …]; or all of it.
        """
        known = VALUE_TYPES.get(tensor.dtype)
        words = {"U32": np.uint32, "I32": np.int32}
        dtype = np.dtype(known.storage if known else words.get(tensor.dtype, np.uint8))
        file, n_rows = tensor.file or "", max(1, prod(module.shape[:-1]))
        if form.order == "whole":
            return self._all(tensor).view(dtype)
        n_lines = tensor.shape[0] if form.order == "columns" else 1
        stride = tensor.nbytes // n_lines
        start, stop = (row * stride // n_rows for row in (span[0], sum(span)))
        shape = n_lines, stop - start
        stored = self._source.lines(file, tensor.start + start, shape, stride).view(dtype)
        return stored if form.order == "columns" else stored.reshape(span[1] // form.together, -1)
