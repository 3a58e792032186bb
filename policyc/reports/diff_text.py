"""A PlanDiff as text, markdown, and the documented JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from policy_dsl.planning.diff import Change, PlanDiff
from policy_dsl.planning.outline import Outline
from policy_dsl.quantities import both_units, layer_list, signed_bytes
from policyc.reports.report import Block, Column, Facts, Table, render_markdown, render_text

SCHEMA_VERSION = 1


def diff_text(found: PlanDiff, *, width: int | None = None) -> str:
    """The difference as text, one line for modules that changed alike."""
    return render_text(_blocks(found), width=width)


def diff_markdown(found: PlanDiff) -> str:
    """The difference as GitHub markdown."""
    return render_markdown(_blocks(found))


def diff_document(found: PlanDiff) -> dict[str, Any]:
    """The difference as JSON values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "diff",
        "a": _side(found.before),
        "b": _side(found.after),
        "changed": [_change(change) for change in found.changed],
        "added": [_change(change) for change in found.added],
        "removed": [_change(change) for change in found.removed],
        "experts": found.experts or None,
        "nbytes_delta": found.nbytes_delta,
        "bpw_delta": found.bpw_delta,
    }


def _blocks(found: PlanDiff) -> list[Block]:
    blocks: list[Block] = [Facts((("A", _title(found.before)), ("B", _title(found.after))))]
    for title, changes in (
        ("Changed", found.changed),
        ("Added", found.added),
        ("Removed", found.removed),
    ):
        if changes:
            blocks.append(_table(title, changes))
    blocks.append(Facts(tuple(_totals(found)), title="Totals"))
    return blocks


def _title(side: Outline) -> str:
    pruned = f", {side.pruning.about}" if side.pruning else ""
    return f"{side.title}, {side.target}, {side.model}{pruned}"


def _table(title: str, changes: Sequence[Change]) -> Table:
    columns = (
        Column("role"),
        Column("layers"),
        Column("treatment"),
        Column("modules", right=True, drop=1),
        Column("bytes", right=True),
        Column("decided by", drop=2),
    )
    return Table(columns, tuple(_row(change) for change in changes), title)


def _row(change: Change) -> tuple[str, ...]:
    return (
        change.role,
        layer_list(change.layers),
        _arrow(change.before, change.after),
        f"{len(change.names):,}",
        signed_bytes(change.nbytes_delta),
        _arrow(change.before_rule, change.after_rule),
    )


def _arrow(before: str | None, after: str | None) -> str:
    # A change of the rule alone shows one name, not an arrow to itself.
    if before and after and before != after:
        return f"{before} -> {after}"
    return before or after or ""


def _totals(found: PlanDiff) -> list[tuple[str, str]]:
    sizes = f"{both_units(found.before.nbytes)} -> {both_units(found.after.nbytes)}"
    totals = [("size", f"{sizes}, {signed_bytes(found.nbytes_delta)}")]
    if found.experts:
        totals.insert(0, ("experts", found.experts))
    if found.before.bpw is not None and found.after.bpw is not None:
        change = found.after.bpw - found.before.bpw
        totals.append(("bpw", f"{found.before.bpw:.4f} -> {found.after.bpw:.4f}, {change:+.4f}"))
    # An empty page would leave the reader in doubt.
    if found.is_empty:
        totals.append(("result", "no tensor is treated differently"))
    return totals


def _side(side: Outline) -> dict[str, Any]:
    return {
        "title": side.title,
        "target": side.target,
        "model": side.model,
        "tensor_nbytes": side.nbytes,
        "parameters": side.parameters,
        "bpw": side.bpw,
        "experts": side.experts,
        "pruned": side.pruning.about if side.pruning else None,
    }


def _change(change: Change) -> dict[str, Any]:
    return {
        "role": change.role,
        "layers": list(change.layers),
        "before": change.before,
        "after": change.after,
        "before_rule": change.before_rule or None,
        "after_rule": change.after_rule or None,
        "modules": list(change.names),
        "parameters": change.parameters,
        "nbytes_delta": change.nbytes_delta,
    }
