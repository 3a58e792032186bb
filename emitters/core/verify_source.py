"""Whether a bundle's values are those of its source, and how far they are from it.

Block by block, in bounded memory, by as many threads as there are cores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from emitters.core.bundle_reading import Bundle
from emitters.core.matching import (
    Piece,
    fits,
    in_order,
    match,
    other_experts,
    pieces_of,
    with_added,
)
from emitters.core.own_head import as_in_bundle, differing_heads, heads_left_out
from emitters.core.record import BundleModule
from emitters.core.rows_check import RowsCheck
from emitters.core.verdicts import Compared, Sums, Tally, judged
from emitters.numerics.value_types import VALUE_TYPES
from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.inventory import Inventory, source_digest
from policy_dsl.planning.outline import stored_as
from policy_dsl.planning.pruning import pruned
from policy_dsl.quantities import counted
from policy_dsl.roles.classify import ModelTensor, classify
from policy_dsl.treatments import Coded

Stacks = Mapping[str, tuple[ModelTensor, ...]]
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class ModuleError:
    """The error of one module against its source.

    judged_by: what decided about its values; wrong: how many are not what they must be.
    """

    module: str
    role: str
    treatment: str
    sums: Sums
    judged_by: str
    wrong: int


def compare(
    bundle: Bundle, source: Inventory, *, jobs: int
) -> tuple[tuple[ModuleError, ...], tuple[Diagnostic, ...]]:
    """The error of every module, and all that is wrong with values or cannot be compared.

    Relative error and cosine are against the source's exact values: FP8 codes times scales in
    float32. Raises: PolicyError if the source has no readable weights, or names without roles.
    """
    model, pruning = classify(source), bundle.record.pruning if bundle.record else None
    reason = other_experts(bundle, model, pruning)
    # Every module of experts would say so, and none of them why.
    if reason is not None:
        return (), (diagnostic("not-comparable", reason=reason),)
    model, _ = pruned(model, pruning)
    bundle = with_added(bundle, model)
    model = as_in_bundle(model, bundle)
    heads = differing_heads(source, model, heads_left_out(model, bundle))
    check = RowsCheck(bundle, source, model)
    stacks = match(bundle, model)
    findings = [*_other_source(bundle, source), *_unmatched(bundle, stacks), *heads]
    comparable = [
        module
        for module in bundle.modules
        if module.name in stacks
        and fits(module, stacks[module.name])
        and _foreign_dtype(module) is None
    ]
    padding = [module for module in bundle.modules if _only_added(module)]
    pieces = (
        piece
        for module in (*comparable, *padding)
        for piece in pieces_of(module, stacks.get(module.name, ()), check.block_rows)
    )
    compared = _compared(pieces, check, jobs)
    settled, wrong = judged(compared)
    return tuple(_errors(comparable, settled, stacks)), (*findings, *wrong)


def _compared(pieces: Iterable[Piece], check: RowsCheck, jobs: int) -> list[Compared]:
    """Every matrix after its comparison, in the order of the pieces."""

    def tally(piece: Piece) -> tuple[Piece, Tally]:
        return piece, check.tally(piece)

    done = in_order(tally, pieces, jobs=jobs)
    found = []
    # Rows of experts that were added are judged apart from those that have a source.
    for (name, is_added), parts in groupby(
        done, key=lambda item: (item[0].name, item[0].tensor is None)
    ):
        first, *rest = parts
        module, total = first[0].whole, first[1]
        for _, part in rest:
            total += part
        found.append(Compared(name, module, check.way(module), total, is_added))
    return found


def _errors(
    modules: Iterable[BundleModule], compared: Iterable[Compared], stacks: Stacks
) -> Iterator[ModuleError]:
    """The error of every module, all its matrices added up."""
    of_module: dict[str, list[Compared]] = {}
    for one in compared:
        of_module.setdefault(one.module.name, []).append(one)
    for module in modules:
        found = of_module[module.name]
        plain = next(iter(module.tensors.values())).dtype
        treatment = stored_as(module.treatment, plain)
        yield ModuleError(
            module=module.name,
            role=stacks[module.name][0].role,
            treatment=treatment,
            sums=sum((one.tally.sums for one in found), Sums()),
            judged_by=found[0].way,
            wrong=sum(one.tally.wrong for one in found),
        )


def _other_source(bundle: Bundle, source: Inventory) -> Iterator[Diagnostic]:
    """The finding that the record names another source, if it does."""
    if bundle.record is None:
        return
    given = source_digest(source)
    if bundle.record.source_digest != given:
        yield diagnostic("other-source", recorded=bundle.record.source, given=source.id)


def _unmatched(bundle: Bundle, stacks: Stacks) -> Iterator[Diagnostic]:
    """Modules that one side lacks or that have another shape: a finding for each kind."""
    names = {module.name for module in bundle.modules}
    # What the policy dropped on purpose is not missing.
    dropped = bundle.record.omitted.keys() if bundle.record else ()
    lost = [
        tensor.source.name
        for path, stack in stacks.items()
        if path not in names
        for tensor in stack
        if tensor.source.name not in dropped
    ]
    if lost:
        lost = [*dict.fromkeys(lost)]
        tensors = counted(len(lost), "tensor")
        yield diagnostic("source-tensors-missing", tensors=tensors, names=_some(lost))
    # Scales of columns have no source, nor has an expert that was added.
    scales = {module.name for module in bundle.scales.values()}
    unknown, other, unread = [], [], []
    for module in bundle.modules:
        if module.name in scales or _only_added(module):
            continue
        if module.name not in stacks:
            unknown.append(module.name)
        elif not fits(module, stacks[module.name]):
            other.append(f"{module.name} {list(module.shape)}")
        elif (dtype := _foreign_dtype(module)) is not None:
            unread.append(f"{module.name} ({dtype})")
    reasons = [
        reason.format(_some(modules))
        for modules, reason in (
            (unknown, "the source has no {}"),
            (other, "the shapes of {} are not those of the source's tensors"),
            (unread, "{} cannot be decoded here"),
        )
        if modules
    ]
    if reasons:
        yield diagnostic("not-comparable", reason="; ".join(reasons))


def _some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _only_added(module: BundleModule) -> bool:
    return bool(module.added) and module.added == module.shape[0]


def _foreign_dtype(module: BundleModule) -> str | None:
    """The dtype of a module that nothing says how to decode, if it is such a one."""
    if isinstance(module.treatment, Coded):
        return None
    dtypes = (tensor.dtype for tensor in module.tensors.values())
    return next((dtype for dtype in dtypes if dtype not in VALUE_TYPES), None)
