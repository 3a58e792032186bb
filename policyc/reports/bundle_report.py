"""What a build wrote, and what verifying a bundle found: blocks and the documented JSON."""

from collections.abc import Iterable, Sequence
from heapq import nlargest
from operator import attrgetter
from pathlib import Path

from emitters.core.build import BuildReport
from emitters.core.verify import VerifyReport
from emitters.core.verify_source import ModuleError
from emitters.numerics.reach import Sums
from policy_dsl.diagnostics import count_text, render
from policy_dsl.documents import entry_of
from policy_dsl.documents import reports as documents
from policy_dsl.plan import Plan
from policy_dsl.planning.outline import outline
from policy_dsl.quantities import both_units, counted
from policyc.reports import Block, Facts, Rendered, Table, by_key, entries_of, finding_json

# A wrong config has a finding a module; JSON holds them all.
_SHOWN_FINDINGS = 20
_WORST = 5


def build_document(
    plan: Plan, folder: Path, report: BuildReport, check: str
) -> documents.BuildDocument:
    """The build as JSON values. folder: as it was given. check: the command that verifies it."""
    bundle = outline(plan)
    return entry_of(
        documents.BuildDocument,
        report,
        schema_version=1,
        kind="build",
        output=str(folder),
        policy=plan.policy.name,
        target=plan.target,
        model=plan.model.id,
        tensors=bundle.tensors,
        tensor_nbytes=bundle.nbytes,
        file_nbytes=report.nbytes,
        bpw=bundle.bpw,
        files=dict(sorted(report.sizes.items())),
        record_digest=report.digest,
        verify=check,
    )


def build_blocks(plan: Plan, folder: Path, report: BuildReport, check: str) -> list[Block]:
    """The build for people."""
    made, earlier = build_document(plan, folder, report, check), report.resumed_nbytes
    tensors, files = counted(made["tensors"], "tensor"), counted(len(made["files"]), "file")
    resumed = f" after {both_units(earlier)} of an earlier run" if earlier else ""
    facts = [
        ("bundle", made["output"]),
        ("holds", f"{made['model']} by {made['policy']}, for {made['target']}"),
        ("tensors", f"{tensors}, {both_units(made['tensor_nbytes'])}"),
        ("files", f"{files}, {both_units(made['file_nbytes'])}"),
        ("bits", f"{made['bpw'] or 0:.4f} bpw"),
        ("time", f"{report.seconds:.1f} s{resumed}"),
        ("check", check),
    ]
    return [Facts(facts)]


def verify_document(report: VerifyReport) -> documents.VerifyDocument:
    """The report as JSON values."""
    return entry_of(
        documents.VerifyDocument,
        report,
        schema_version=1,
        kind="verify",
        bundle=str(report.folder),
        record=report.has_record,
        files=report.n_files,
        tensors=report.n_tensors,
        checks=entries_of(documents.CheckEntry, report.checks, check="name"),
        findings=list(map(finding_json, report.findings)),
        errors=None if report.errors is None else _error_entries(report.errors),
    )


def _error_entries(errors: Sequence[ModuleError]) -> documents.ErrorTables:
    figures = {"relative_frobenius": "sums.relative", "max_abs": "sums.largest"}
    renamed = {**figures, "cosine": "sums.cosine", "values": "sums.values"}
    modules = entries_of(documents.ModuleErrors, errors, **renamed)
    return {"roles": role_errors(errors), "modules": modules}


def role_errors(errors: Iterable[ModuleError]) -> list[documents.RoleErrors]:
    """The errors of all modules of one role added up, in the order of the bundle."""
    entries = []
    for role, members in by_key(errors, attrgetter("role")).items():
        sums = sum((error.sums for error in members), Sums())
        treatments = list(dict.fromkeys(error.treatment for error in members))
        said = {"role": role, "modules": len(members), "treatments": treatments}
        figures = {"relative_frobenius": sums.relative, "max_abs": sums.largest}
        entries.append(entry_of(documents.RoleErrors, sums, **said, **figures))
    return entries


def verify_blocks(report: VerifyReport) -> list[Block]:
    """The report for people."""
    facts = [
        ("bundle", str(report.folder)),
        ("holds", f"{counted(report.n_tensors, 'tensor')}, {both_units(report.nbytes)}"),
        ("result", "all is well" if report.ok else count_text(report.findings)),
    ]
    rows = [(check.name, check.result, check.about) for check in report.checks]
    blocks: list[Block] = [Facts(facts), Table(("check", "result", "of"), rows)]
    if report.findings:
        shown = [render([finding]) for finding in report.findings[:_SHOWN_FINDINGS]]
        more = len(report.findings) - len(shown)
        blocks.append(Rendered([*shown, *([f"and {more} more"] if more else [])], "Findings"))
    if report.errors:
        blocks += _error_tables(_error_entries(report.errors))
    return blocks


def _error_tables(errors: documents.ErrorTables) -> list[Block]:
    figures = ("relative error", "max abs", "cosine")
    rows = [
        (role["role"], ", ".join(role["treatments"]), f"{role['modules']:,}", *_cells(role))
        for role in errors["roles"]
    ]
    columns, right = ("role", "treatment", "modules", *figures), ("modules", *figures)
    title = "Error by role, |W - D| / |W| against the source"
    by_role = Table(columns, rows, title, right=right, leaving=("treatment",))
    # An average hides the one layer that went wrong.
    worst = nlargest(_WORST, errors["modules"], key=lambda one: one["relative_frobenius"] or 0.0)
    worst_rows = [(one["module"], one["treatment"], *_cells(one)) for one in worst]
    largest = Table(("module", "treatment", *figures), worst_rows, "Largest errors", right=figures)
    return [by_role, largest]


def _cells(figures: documents.ErrorFigures) -> tuple[str, str, str]:
    relative, cosine = figures["relative_frobenius"], figures["cosine"]
    shown = "-" if relative is None else f"{relative:.5f}"
    return shown, f"{figures['max_abs']:.4g}", "-" if cosine is None else f"{cosine:.6f}"
