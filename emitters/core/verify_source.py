"""How far a bundle's decoded values are from its source, block by block in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod, sqrt

import numpy as np

import emitters
from emitters.core.bundle_reading import Bundle, BundleModule
from emitters.core.decoding import Decoder, opened
from emitters.numerics.distance import distance
from emitters.numerics.fp8 import fp8_dequantize
from emitters.numerics.rounding import to_float32
from emitters.numerics.value_types import Array
from emitters.tensor_io.read import Source, columns
from policy_dsl.diagnostics import Diagnostic, diagnostic, fail
from policy_dsl.formats import FormatSpec
from policy_dsl.inventory import Inventory
from policy_dsl.planning.fill import describe
from policy_dsl.planning.outline import stored_as
from policy_dsl.roles.classify import Model, ModelTensor, classify
from policy_dsl.roles.scales import block_size

# Stored, dequantized and decoded values of a block stay in a core's cache.
_BLOCK_VALUES = 2**18


@dataclass(frozen=True, slots=True)
class Sums:
    """What blocks add up to: squares of source, decoded and difference; products; maximum."""

    source: float = 0.0
    decoded: float = 0.0
    difference: float = 0.0
    product: float = 0.0
    largest: float = 0.0
    values: int = 0
    not_finite: int = 0

    def __add__(self, other: Sums) -> Sums:
        """The sums of both."""
        return Sums(
            self.source + other.source,
            self.decoded + other.decoded,
            self.difference + other.difference,
            self.product + other.product,
            max(self.largest, other.largest),
            self.values + other.values,
            self.not_finite + other.not_finite,
        )

    @property
    def relative(self) -> float | None:
        """Relative Frobenius error |W - D| / |W|; None where the source is all zeros."""
        return sqrt(self.difference / self.source) if self.source else None

    @property
    def cosine(self) -> float | None:
        """Cosine of source and decoded values; None where one is all zeros."""
        # Two roots, because the product of the squares may overflow.
        norm = sqrt(self.source) * sqrt(self.decoded)
        return self.product / norm if norm else None


@dataclass(frozen=True, slots=True)
class ModuleError:
    """The error of one module against its source."""

    module: str
    role: str
    treatment: str
    sums: Sums


@dataclass(frozen=True)
class _Pair:
    """A source and a bundle, opened for reading."""

    source: Source
    bundle: Decoder
    model: Model


def compare(
    bundle: Bundle, source: Inventory, *, jobs: int
) -> tuple[tuple[ModuleError, ...], tuple[Diagnostic, ...]]:
    """The error of every module, and what cannot be compared or decodes to no numbers.

    The source counts with its exact values: FP8 codes times scales in float32.
    Raises: PolicyError if the source has no readable weights, or names without roles.
    """
    pair, stacks = _opened(bundle, source)
    findings = list(_unmatched(bundle, stacks))
    comparable = [
        (module, stacks[module.name])
        for module in bundle.modules
        if module.name in stacks and _fits(module, stacks[module.name])
    ]
    with ThreadPoolExecutor(jobs, "compare") as workers:
        found = tuple(workers.map(lambda item: _module_error(pair, *item), comparable))
    for error in found:
        if error.sums.not_finite:
            count = error.sums.not_finite
            findings.append(diagnostic("non-finite-decoded", tensor=error.module, count=count))
    return found, tuple(findings)


def _opened(
    bundle: Bundle, source: Inventory
) -> tuple[_Pair, dict[str, tuple[ModelTensor, ...]]]:
    """Both sides opened, and the source's tensors by the bundle's module that holds them."""
    if source.root is None:
        raise fail("not-comparable", reason=f"{source.id} is known by its headers alone")
    emitter, model = emitters.get(bundle.target), classify(source)
    stacks: dict[str, list[ModelTensor]] = {}
    for tensor in model.tensors:
        if emitter.spec.omission(tensor, model) is None:
            stacks.setdefault(emitter.spec.module_path(tensor, model), []).append(tensor)
    ordered = {
        path: tuple(sorted(stack, key=lambda tensor: tensor.expert or 0))
        for path, stack in stacks.items()
    }
    pair = _Pair(opened(source, source.root), Decoder(bundle), model)
    return pair, _named_as(bundle, ordered, emitter.spec)


def _named_as(
    bundle: Bundle, stacks: Mapping[str, tuple[ModelTensor, ...]], spec: FormatSpec
) -> dict[str, tuple[ModelTensor, ...]]:
    """The stacks by the names of the bundle, in which experts may lie apart."""
    names = {module.name for module in bundle.modules}
    found = {}
    for path, stack in stacks.items():
        apart = next(
            (layout for layout in spec.layouts.values() if layout and layout(path, 0) in names),
            None,
        )
        if stack[0].expert is None or path in names or apart is None:
            found[path] = stack
        else:
            found |= {apart(path, one.expert or 0): (one,) for one in stack}
    return found


def _unmatched(
    bundle: Bundle, stacks: Mapping[str, tuple[ModelTensor, ...]]
) -> Iterator[Diagnostic]:
    """Modules that one side lacks or that have another shape."""
    names = {module.name for module in bundle.modules}
    # What the policy dropped on purpose is not missing.
    dropped = {entry["name"] for entry in bundle.record["omitted"]} if bundle.record else set()
    for path, stack in stacks.items():
        if path not in names and not dropped.issuperset(one.source.name for one in stack):
            yield diagnostic("not-comparable", reason=f"the bundle has no {path}")
    for module in bundle.modules:
        if module.added and module.added == module.shape[0]:
            # An expert that was added has no source to be compared with.
            continue
        if module.name not in stacks:
            yield diagnostic("not-comparable", reason=f"the source has no {module.name}")
        elif not _fits(module, stacks[module.name]):
            shape = list(module.shape)
            reason = f"{module.name} of shape {shape} is no plain stack of the source's tensors"
            yield diagnostic("not-comparable", reason=reason)


def _fits(module: BundleModule, stack: tuple[ModelTensor, ...]) -> bool:
    plain = all(
        not one.transposed and one.row_step == 1 and not one.mxfp4 and one.first_column == 0
        for one in stack
    )
    elements = sum(prod(one.shape) for one in stack)
    first = module.shape[0] - module.added if module.shape else 1
    return plain and elements == first * prod(module.shape[1:])


def _module_error(
    pair: _Pair, module: BundleModule, stack: tuple[ModelTensor, ...]
) -> ModuleError:
    sums, at = Sums(), 0
    for tensor in stack:
        rows = prod(tensor.shape[:-1])
        step = max(1, _BLOCK_VALUES // columns(tensor.shape))
        for first in range(0, rows, step):
            count = min(step, rows - first)
            wanted = _source_values(pair, tensor, tensor.first_row + first, count)
            # Decoded by the format's own decoder, as its readers see the values.
            found = pair.bundle.rows(module, at + first, count)
            # A row of the bundle may be longer: a bias, by the experts that were added.
            sums += _sums(wanted, found[:, : wanted.shape[1]])
        at += rows
    plain = next(iter(module.tensors.values())).dtype
    quantized = module.treatment.action == "quantize"
    treatment = describe(module.treatment) if quantized else stored_as(module.treatment, plain)
    return ModuleError(module.name, stack[0].role, treatment, sums)


def _source_values(pair: _Pair, tensor: ModelTensor, first: int, count: int) -> Array:
    """float32 [count, in]: rows of a source tensor, FP8 times its scales."""
    stored = pair.source.rows(tensor.source, first, count)
    if tensor.scale is None:
        return to_float32(stored, tensor.source.dtype)
    block = block_size(pair.model.config)
    if block is None:
        raise fail("missing-scale", count=1, names=tensor.source.name)
    # A stack's matrices each have a grid of their own.
    height, grid_height = tensor.source.shape[-2], tensor.scale.shape[-2]
    parts = []
    for start, stop in _within_matrices(first, count, height):
        matrix, row = divmod(start, height)
        grid = pair.source.rows(tensor.scale, matrix * grid_height, grid_height)
        codes = stored[start - first : stop - first]
        scales = to_float32(grid, tensor.scale.dtype)
        parts.append(
            fp8_dequantize(
                codes, scales, block=block, first_row=row, rule="f32", out_dtype="F32"
            )
        )
    return np.concatenate(parts)


def _within_matrices(first: int, count: int, height: int) -> Iterator[tuple[int, int]]:
    """Spans of rows that do not cross from one matrix of a stack into the next."""
    start, end = first, first + count
    while start < end:
        stop = min(end, (start // height + 1) * height)
        yield start, stop
        start = stop


def _sums(wanted: Array, found: Array) -> Sums:
    apart = distance(wanted, found)
    return Sums(
        source=apart.true,
        decoded=apart.decoded,
        difference=apart.difference,
        product=apart.product,
        largest=apart.largest,
        values=apart.values,
        not_finite=apart.not_finite,
    )
