"""A VerifyReport as blocks and as the documented JSON document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from emitters.core.verdicts import Sums
from emitters.core.verify import VerifyReport
from emitters.core.verify_source import ModuleError
from policy_dsl.diagnostics import count_text, render
from policy_dsl.documents.reports import (
    CheckEntry,
    ErrorFigures,
    ErrorTables,
    ModuleErrors,
    RoleErrors,
    VerifyDocument,
)
from policy_dsl.documents.values import entry_of
from policy_dsl.quantities import both_units, counted
from policyc.reports.blocks import Block, Facts, Rendered, Table, by_key
from policyc.reports.findings import finding_json

# A wrong config has a finding a module; JSON holds them all.
_SHOWN_FINDINGS = 20
_WORST = 5


def role_errors(errors: Iterable[ModuleError]) -> list[RoleErrors]:
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


def verify_document(report: VerifyReport) -> VerifyDocument:
    """The report as JSON values."""
    errors: ErrorTables | None = None
    if report.errors is not None:
        modules = [
            entry_of(ModuleErrors, error, values=error.sums.values, **_figures(error.sums))
            for error in report.errors
        ]
        errors = {"roles": role_errors(report.errors), "modules": modules}
    return {
        "schema_version": 1,
        "kind": "verify",
        "bundle": str(report.folder),
        "ok": report.ok,
        "record": report.has_record,
        "files": report.n_files,
        "tensors": report.n_tensors,
        "nbytes": report.nbytes,
        "checks": [entry_of(CheckEntry, check, check=check.name) for check in report.checks],
        "findings": [finding_json(finding) for finding in report.findings],
        "errors": errors,
    }


def verify_blocks(report: VerifyReport) -> list[Block]:
    """The report for people."""
    facts = (
        ("bundle", str(report.folder)),
        ("holds", f"{counted(report.n_tensors, 'tensor')}, {both_units(report.nbytes)}"),
        ("result", "all is well" if report.ok else count_text(report.findings)),
    )
    rows = tuple((check.name, check.result, check.about) for check in report.checks)
    blocks: list[Block] = [Facts(facts), Table(("check", "result", "of"), rows)]
    if report.findings:
        shown = [render([finding]) for finding in report.findings[:_SHOWN_FINDINGS]]
        more = len(report.findings) - len(shown)
        blocks.append(Rendered((*shown, *([f"and {more} more"] if more else [])), "Findings"))
    if report.errors:
        blocks += _error_tables(report.errors)
    return blocks


def _error_tables(errors: Sequence[ModuleError]) -> list[Block]:
    figures = ("relative error", "max abs", "cosine")
    rows = tuple(
        (entry["role"], ", ".join(entry["treatments"]), f"{entry['modules']:,}", *_cells(entry))
        for entry in role_errors(errors)
    )
    # An average hides the one layer that went wrong.
    worst = sorted(errors, key=lambda error: error.sums.relative or 0.0, reverse=True)[:_WORST]
    worst_rows = tuple(
        (error.module, error.treatment, *_cells(_figures(error.sums))) for error in worst
    )
    return [
        Table(
            ("role", "treatment", "modules", *figures),
            rows,
            "Error by role, |W - D| / |W| against the source",
            right=("modules", *figures),
            leaving=("treatment",),
        ),
        Table(("module", "treatment", *figures), worst_rows, "Largest errors", right=figures),
    ]


def _figures(sums: Sums) -> ErrorFigures:
    return {"relative_frobenius": sums.relative, "max_abs": sums.largest, "cosine": sums.cosine}


def _cells(figures: ErrorFigures) -> tuple[str, str, str]:
    relative, cosine = figures["relative_frobenius"], figures["cosine"]
    return (
        "-" if relative is None else f"{relative:.5f}",
        f"{figures['max_abs']:.4g}",
        "-" if cosine is None else f"{cosine:.6f}",
    )
