"""How far a bundle's decoded values are from its source, block by block in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import sqrt

from emitters.core.bundle_reading import Bundle, BundleModule
from emitters.core.decoding import Decoder
from emitters.core.matching import fits, match, other_experts, rows_of, with_added
from emitters.core.record import recorded_pruning
from emitters.core.source_values import SourceValues
from emitters.numerics.distance import distance
from emitters.numerics.value_types import VALUE_TYPES, Array
from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.inventory import Inventory
from policy_dsl.planning.fill import describe
from policy_dsl.planning.outline import stored_as
from policy_dsl.planning.pruning import pruned
from policy_dsl.roles.classify import ModelTensor, classify
from policy_dsl.units import counted


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

    source: SourceValues
    bundle: Decoder


def compare(
    bundle: Bundle, source: Inventory, *, jobs: int
) -> tuple[tuple[ModuleError, ...], tuple[Diagnostic, ...]]:
    """The error of every module, and what cannot be compared or decodes to no numbers.

    The source counts with its exact values: FP8 codes times scales in float32.
    Raises: PolicyError if the source has no readable weights, or names without roles.
    """
    model, pruning = classify(source), recorded_pruning(bundle.record)
    reason = other_experts(bundle, model, pruning)
    # Every module of experts would say so, and none of them why.
    if reason is not None:
        return (), (diagnostic("not-comparable", reason=reason),)
    model, _ = pruned(model, pruning)
    bundle = with_added(bundle, model)
    pair = _Pair(SourceValues(source, model), Decoder(bundle))
    stacks = match(bundle, model)
    findings = list(_unmatched(bundle, stacks))
    comparable = [
        (module, stacks[module.name])
        for module in bundle.modules
        if module.name in stacks
        and fits(module, stacks[module.name])
        and _foreign_dtype(module) is None
    ]
    with ThreadPoolExecutor(jobs, "compare") as workers:
        found = tuple(workers.map(lambda item: _module_error(pair, *item), comparable))
    for error in found:
        if error.sums.not_finite:
            values = counted(error.sums.not_finite, "value")
            found_bad = diagnostic("non-finite-decoded", tensor=error.module, values=values)
            findings.append(found_bad)
    return found, tuple(findings)


def _unmatched(
    bundle: Bundle, stacks: Mapping[str, tuple[ModelTensor, ...]]
) -> Iterator[Diagnostic]:
    """Modules that one side lacks or that have another shape."""
    # Scales of columns have no source.
    scales = {module.name for module in bundle.scales.values()}
    names = {module.name for module in bundle.modules}
    # What the policy dropped on purpose is not missing.
    dropped = {entry["name"] for entry in bundle.record["omitted"]} if bundle.record else set()
    for path, stack in stacks.items():
        if path not in names and not dropped.issuperset(one.source.name for one in stack):
            yield diagnostic("not-comparable", reason=f"the bundle has no {path}")
    for module in bundle.modules:
        # Nor has an expert that was added.
        if module.name in scales or (module.added and module.added == module.shape[0]):
            continue
        if module.name not in stacks:
            yield diagnostic("not-comparable", reason=f"the source has no {module.name}")
        elif not fits(module, stacks[module.name]):
            shape = list(module.shape)
            reason = f"{module.name} of shape {shape} is no plain stack of the source's tensors"
            yield diagnostic("not-comparable", reason=reason)
        elif (dtype := _foreign_dtype(module)) is not None:
            reason = f"{module.name} is {dtype}, which is not decoded here"
            yield diagnostic("not-comparable", reason=reason)


def _foreign_dtype(module: BundleModule) -> str | None:
    """The dtype of a module that nothing says how to decode, if it is such a one."""
    if module.treatment.action == "quantize":
        return None
    dtypes = (tensor.dtype for tensor in module.tensors.values())
    return next((dtype for dtype in dtypes if dtype not in VALUE_TYPES), None)


def _module_error(
    pair: _Pair, module: BundleModule, stack: tuple[ModelTensor, ...]
) -> ModuleError:
    sums = Sums()
    for tensor, at, rows in rows_of(stack):
        step = pair.bundle.block_rows(module)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            wanted = pair.source.rows(tensor, first, count)
            # Decoded by the format's own decoder, as its readers see the values.
            found = pair.bundle.rows(module, at + first, count)
            # A row of the bundle may be longer: a bias, by the experts that were added.
            sums += _sums(wanted, found[:, : wanted.shape[1]])
    plain = next(iter(module.tensors.values())).dtype
    quantized = module.treatment.action == "quantize"
    treatment = describe(module.treatment) if quantized else stored_as(module.treatment, plain)
    return ModuleError(module.name, stack[0].role, treatment, sums)


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
