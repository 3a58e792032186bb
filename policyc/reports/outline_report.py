"""An Outline as blocks and as the documented JSON document."""

from __future__ import annotations

from collections.abc import Iterator

from policy_dsl.documents import GroupEntry, TransformEntry
from policy_dsl.documents.reports import InspectBundleDocument
from policy_dsl.documents.values import entry_of
from policy_dsl.plan import Pruning
from policy_dsl.planning.outline import Group, Outline, groups
from policy_dsl.quantities import both_units, column_unit, in_unit, layer_list
from policyc.reports.blocks import Block, Facts, Table


def outline_document(bundle: Outline) -> InspectBundleDocument:
    """The outline as JSON values."""
    return entry_of(
        InspectBundleDocument,
        bundle,
        schema_version=1,
        kind="inspect_bundle",
        experts_added=bundle.added,
        tensor_nbytes=bundle.nbytes,
        transforms=transform_entries(bundle.pruning),
        groups=[entry_of(GroupEntry, group) for group in groups(bundle.modules)],
    )


def transform_entries(pruning: Pruning | None) -> list[TransformEntry]:
    """What was done to the model; `kept` is null while nobody chose the experts that stay."""
    if pruning is None:
        return []
    kept = {str(layer): list(numbers) for layer, numbers in pruning.kept.items()}
    return [
        {
            "prune": "experts",
            "by": pruning.by or None,
            "before": pruning.before,
            "to": pruning.count,
            "layers": len(pruning.kept),
            "kept": kept if pruning.chosen else None,
        }
    ]


def group_cells(group: Group, scale: int) -> tuple[str, ...]:
    """Role, layers, treatment, tensors, parameters and bytes of a group, as cells."""
    return (
        group.role,
        layer_list(group.layers),
        group.treatment,
        f"{group.tensors:,}",
        f"{group.parameters:,}",
        in_unit(group.nbytes, scale),
    )


def outline_blocks(bundle: Outline) -> list[Block]:
    """The outline for people."""
    word, scale = column_unit(bundle.nbytes)
    figures = ("tensors", "parameters", word, "bpw")
    columns = ("role", "layers", "treatment", *figures)
    rows = tuple(
        (*group_cells(group, scale), "-" if group.bpw is None else f"{group.bpw:.3f}")
        for group in groups(bundle.modules)
    )
    return [Facts(tuple(_facts(bundle))), Table(columns, rows, right=figures)]


def _facts(bundle: Outline) -> Iterator[tuple[str, str]]:
    yield "bundle", bundle.title
    yield "target", bundle.target
    yield "model", bundle.model
    if not any(module.role for module in bundle.modules):
        yield "record", "none: names are shown as roles, and parameters are what tensors hold"
    if bundle.experts:
        more = f", and {bundle.added:,} that only pad" if bundle.added else ""
        yield "experts", f"{bundle.experts:,} a layer{more}"
    if bundle.pruning:
        yield "pruned", bundle.pruning.about
    yield "size", both_units(bundle.nbytes)
    if bundle.unread:
        yield "bits", f"not known; {bundle.parameters:,} parameters are in modules that are"
    else:
        yield "bits", f"{bundle.bpw or 0:.4f} bpw of {bundle.parameters:,} parameters"
