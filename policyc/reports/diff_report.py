"""A PlanDiff as blocks and as the documented JSON document."""

from collections.abc import Iterator, Sequence

from policy_dsl.documents import entry_of
from policy_dsl.documents.reports import ChangeEntry, DiffDocument, SideEntry
from policy_dsl.planning.outline import Change, Outline, PlanDiff
from policy_dsl.quantities import both_units, layer_list, signed_bytes
from policyc.reports import Block, Facts, Table


def diff_document(changes: PlanDiff) -> DiffDocument:
    """The difference as JSON values."""
    return entry_of(
        DiffDocument,
        changes,
        schema_version=1,
        kind="diff",
        a=_side(changes.before),
        b=_side(changes.after),
        changed=list(map(_entry, changes.changed)),
        added=list(map(_entry, changes.added)),
        removed=list(map(_entry, changes.removed)),
        experts=changes.experts or None,
    )


def _side(side: Outline) -> SideEntry:
    pruned = side.pruning.about if side.pruning else None
    return entry_of(SideEntry, side, tensor_nbytes=side.nbytes, pruned=pruned)


def _entry(change: Change) -> ChangeEntry:
    before, after = change.before_rule or None, change.after_rule or None
    names = list(change.names)
    return entry_of(ChangeEntry, change, before_rule=before, after_rule=after, modules=names)


def diff_blocks(changes: PlanDiff) -> list[Block]:
    """The difference for people, one line for modules that changed alike."""
    sides = []
    for letter, side in (("A", changes.before), ("B", changes.after)):
        pruned = f", {side.pruning.about}" if side.pruning else ""
        sides.append((letter, f"{side.title}, {side.target}, {side.model}{pruned}"))
    titled = {"Changed": changes.changed, "Added": changes.added, "Removed": changes.removed}
    tables = [_table(title, members) for title, members in titled.items() if members]
    return [Facts(sides), *tables, Facts(list(_totals(changes)), "Totals")]


def _table(title: str, changes: Sequence[Change]) -> Table:
    columns = ("role", "layers", "treatment", "modules", "bytes", "decided by")
    figures, leaving = ("modules", "bytes"), ("modules", "decided by")
    rows = []
    for change in changes:
        what = change.role, layer_list(change.layers), _arrow(change.before, change.after)
        sizes = f"{len(change.names):,}", signed_bytes(change.nbytes_delta)
        rows.append((*what, *sizes, _arrow(change.before_rule, change.after_rule)))
    return Table(columns, rows, title, right=figures, leaving=leaving)


def _arrow(before: str | None, after: str | None) -> str:
    # A change of the rule alone shows one name, not an arrow to itself.
    return " -> ".join(dict.fromkeys(filter(None, (before, after))))


def _totals(changes: PlanDiff) -> Iterator[tuple[str, str]]:
    before, after = changes.before, changes.after
    if changes.experts:
        yield "experts", changes.experts
    sizes = f"{both_units(before.nbytes)} -> {both_units(after.nbytes)}"
    yield "size", f"{sizes}, {signed_bytes(changes.nbytes_delta)}"
    if before.bpw is not None and after.bpw is not None:
        change = after.bpw - before.bpw
        yield "bpw", f"{before.bpw:.4f} -> {after.bpw:.4f}, {change:+.4f}"
    # An empty page would leave the reader in doubt.
    if changes.is_empty:
        yield "result", "no tensor is treated differently"
