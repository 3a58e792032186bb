"""An Outline as text, markdown, and the documented JSON document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from policy_dsl.plan import Pruning
from policy_dsl.planning.outline import Group, Outline, groups
from policy_dsl.quantities import both_units, column_unit, in_unit, layer_list
from policyc.reports.report import Block, Column, Facts, Table, render_markdown, render_text


def outline_text(made: Outline, *, width: int | None = None) -> str:
    """The outline as text."""
    return render_text(_blocks(made), width=width)


def outline_markdown(made: Outline) -> str:
    """The outline as GitHub markdown."""
    return render_markdown(_blocks(made))


def outline_document(made: Outline) -> dict[str, Any]:
    """The outline as JSON values."""
    return {
        "schema_version": 1,
        "kind": "inspect_bundle",
        "title": made.title,
        "target": made.target,
        "model": made.model,
        "experts": made.experts,
        "experts_added": made.added,
        "tensor_nbytes": made.nbytes,
        "parameters": made.parameters,
        "bpw": made.bpw,
        "transforms": transforms_json(made.pruning),
        "groups": [group_json(group) for group in groups(made.modules)],
    }


def transforms_json(pruning: Pruning | None) -> list[dict[str, Any]]:
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


def group_json(group: Group) -> dict[str, Any]:
    """A group as a JSON object; `rule` is empty where it is not known."""
    return {
        "role": group.role,
        "layers": list(group.layers),
        "treatment": group.treatment,
        # Bundles do not know rules; plans do.
        "rule": group.rule,
        "tensors": group.tensors,
        "parameters": group.parameters,
        "nbytes": group.nbytes,
        "bpw": group.bpw,
    }


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


def _blocks(made: Outline) -> list[Block]:
    word, scale = column_unit(made.nbytes)
    figures = tuple(Column(title, right=True) for title in ("tensors", "parameters", word, "bpw"))
    columns = (Column("role"), Column("layers"), Column("treatment"), *figures)
    rows = tuple(
        (*group_cells(group, scale), _bits(group.bpw, 3)) for group in groups(made.modules)
    )
    return [Facts(tuple(_facts(made))), Table(columns, rows)]


def _facts(made: Outline) -> Iterator[tuple[str, str]]:
    yield "bundle", made.title
    yield "target", made.target
    yield "model", made.model
    if not any(module.role for module in made.modules):
        yield "record", "none: names stand for roles, and parameters are what tensors hold"
    if made.experts:
        more = f", and {made.added:,} that only pad" if made.added else ""
        yield "experts", f"{made.experts:,} a layer{more}"
    if made.pruning:
        yield "pruned", made.pruning.about
    yield "size", both_units(made.nbytes)
    if made.unread:
        yield "bits", f"not known; {made.parameters:,} parameters are in modules that are"
    else:
        yield "bits", f"{made.bpw or 0:.4f} bpw of {made.parameters:,} parameters"


def _bits(bpw: float | None, digits: int) -> str:
    return "-" if bpw is None else f"{bpw:.{digits}f}"
