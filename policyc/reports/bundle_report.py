"""What a build wrote, and what verifying a bundle found: blocks and the documented JSON."""

from collections.abc import Iterable, Sequence
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
from policyc.reports import Block, Facts, Rendered, Table, by_key, entries_of
from policyc.reports.findings import finding_json

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
    made = build_document(plan, folder, report, check)
    tensors, files = counted(made["tensors"], "tensor"), counted(len(made["files"]), "file")
    earlier = report.resumed_nbytes
    resumed = f" after {both_units(earlier)} of an earlier run" if earlier else ""
    facts = {
        "bundle": made["output"],
        "holds": f"{made['model']} by {made['policy']}, for {made['target']}",
        "tensors": f"{tensors}, {both_units(made['tensor_nbytes'])}",
        "files": f"{files}, {both_units(made['file_nbytes'])}",
        "bits": f"{made['bpw'] or 0:.4f} bpw",
        "time": f"{report.seconds:.1f} s{resumed}",
        "check": check,
    }
    return [Facts(list(facts.items()))]


def verify_document(report: VerifyReport) -> documents.VerifyDocument:
    """The report as JSON values."""
    errors: documents.ErrorTables | None = None
    if report.errors is not None:
        modules = [
            entry_of(
                documents.ModuleErrors, error, values=error.sums.values, **_figures(error.sums)
            )
            for error in report.errors
        ]
        errors = {"roles": role_errors(report.errors), "modules": modules}
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
        errors=errors,
    )


def role_errors(errors: Iterable[ModuleError]) -> list[documents.RoleErrors]:
    """The errors of all modules of one role added up, in the order of the bundle."""
    return [
        {
            "role": role,
            "modules": len(members),
            "treatments": list(dict.fromkeys(error.treatment for error in members)),
            **_figures(sum((error.sums for error in members), Sums())),
        }
        for role, members in by_key(errors, lambda error: error.role).items()
    ]


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
        blocks += _error_tables(report.errors)
    return blocks


def _error_tables(errors: Sequence[ModuleError]) -> list[Block]:
    figures = ("relative error", "max abs", "cosine")
    rows = [
        (entry["role"], ", ".join(entry["treatments"]), f"{entry['modules']:,}", *_cells(entry))
        for entry in role_errors(errors)
    ]
    # An average hides the one layer that went wrong.
    worst = sorted(errors, key=lambda error: error.sums.relative or 0.0, reverse=True)[:_WORST]
    worst_rows = [(error.module, error.treatment, *_cells(_figures(error.sums))) for error in worst]
    by_role = Table(
        ("role", "treatment", "modules", *figures),
        rows,
        "Error by role, |W - D| / |W| against the source",
        right=("modules", *figures),
        leaving=("treatment",),
    )
    columns = ("module", "treatment", *figures)
    return [by_role, Table(columns, worst_rows, "Largest errors", right=figures)]


def _figures(sums: Sums) -> documents.ErrorFigures:
    return {"relative_frobenius": sums.relative, "max_abs": sums.largest, "cosine": sums.cosine}


def _cells(figures: documents.ErrorFigures) -> tuple[str, str, str]:
    relative, cosine = figures["relative_frobenius"], figures["cosine"]
    return (
        "-" if relative is None else f"{relative:.5f}",
        f"{figures['max_abs']:.4g}",
        "-" if cosine is None else f"{cosine:.6f}",
    )
