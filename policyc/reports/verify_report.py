"""A VerifyReport as text, markdown, and the documented JSON document."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from emitters.core.tally import Sums
from emitters.core.verify import VerifyReport
from emitters.core.verify_source import ModuleError
from policy_dsl.diagnostics import render
from policy_dsl.quantities import both_units, counted
from policyc.reports.findings import count_text, finding_json
from policyc.reports.report import (
    Block,
    Column,
    Facts,
    Rendered,
    Table,
    render_markdown,
    render_text,
)

# A wrong config has a finding a module; JSON holds them all.
_SHOWN_FINDINGS = 20
_WORST = 5


@dataclass(frozen=True, slots=True)
class RoleError:
    """The errors of all modules of one role and treatment, added up."""

    role: str
    treatments: tuple[str, ...]
    modules: int
    sums: Sums


def role_errors(found: Iterable[ModuleError]) -> tuple[RoleError, ...]:
    """The errors by role, in the order of the bundle."""
    by_role: dict[str, list[ModuleError]] = {}
    for error in found:
        by_role.setdefault(error.role, []).append(error)
    return tuple(
        RoleError(
            role,
            tuple(dict.fromkeys(error.treatment for error in members)),
            len(members),
            sum((error.sums for error in members), Sums()),
        )
        for role, members in by_role.items()
    )


def verify_text(report: VerifyReport, *, width: int | None = None) -> str:
    """The report as text."""
    return render_text(_blocks(report), width=width)


def verify_markdown(report: VerifyReport) -> str:
    """The report as GitHub markdown."""
    return render_markdown(_blocks(report))


def verify_document(report: VerifyReport) -> dict[str, Any]:
    """The report as JSON values."""
    errors: dict[str, Any] | None = None
    if report.errors is not None:
        errors = {
            "roles": [
                {
                    "role": one.role,
                    "modules": one.modules,
                    "treatments": list(one.treatments),
                    **_sums(one.sums),
                }
                for one in role_errors(report.errors)
            ],
            "modules": [
                {
                    "module": one.module,
                    "role": one.role,
                    "treatment": one.treatment,
                    "values": one.sums.values,
                    "judged_by": one.judged_by,
                    "wrong": one.wrong,
                    **_sums(one.sums),
                }
                for one in report.errors
            ],
        }
    return {
        "schema_version": 1,
        "kind": "verify",
        "bundle": str(report.folder),
        "ok": report.ok,
        "record": report.has_record,
        "files": report.n_files,
        "tensors": report.n_tensors,
        "nbytes": report.nbytes,
        "checks": [
            {"check": check.name, "result": check.result, "about": check.about}
            for check in report.checks
        ],
        "findings": [finding_json(found) for found in report.findings],
        "errors": errors,
    }


def _blocks(report: VerifyReport) -> list[Block]:
    facts = (
        ("bundle", str(report.folder)),
        ("holds", f"{counted(report.n_tensors, 'tensor')}, {both_units(report.nbytes)}"),
        ("result", "all is well" if report.ok else count_text(report.findings)),
    )
    columns = (Column("check"), Column("result"), Column("of"))
    rows = tuple((check.name, check.result, check.about) for check in report.checks)
    blocks: list[Block] = [Facts(facts), Table(columns, rows)]
    if report.findings:
        shown = [render([found]) for found in report.findings[:_SHOWN_FINDINGS]]
        more = len(report.findings) - len(shown)
        blocks.append(Rendered((*shown, *([f"and {more} more"] if more else [])), "Findings"))
    if report.errors:
        blocks += _error_tables(report.errors)
    return blocks


def _error_tables(errors: tuple[ModuleError, ...]) -> list[Block]:
    figures = (
        Column("relative error", right=True),
        Column("max abs", right=True),
        Column("cosine", right=True),
    )
    columns = (Column("role"), Column("treatment", drop=1), Column("modules", right=True))
    rows = tuple(
        (one.role, ", ".join(one.treatments), f"{one.modules:,}", *_figures(one.sums))
        for one in role_errors(errors)
    )
    # An average hides the one layer that went wrong.
    worst = sorted(errors, key=lambda error: error.sums.relative or 0.0, reverse=True)[:_WORST]
    worst_rows = tuple((one.module, one.treatment, *_figures(one.sums)) for one in worst)
    return [
        Table((*columns, *figures), rows, "Error by role, |W - D| / |W| against the source"),
        Table((Column("module"), Column("treatment"), *figures), worst_rows, "Largest errors"),
    ]


def _figures(sums: Sums) -> tuple[str, str, str]:
    relative = "-" if sums.relative is None else f"{sums.relative:.5f}"
    cosine = "-" if sums.cosine is None else f"{sums.cosine:.6f}"
    return relative, f"{sums.largest:.4g}", cosine


def _sums(sums: Sums) -> dict[str, float | None]:
    return {"relative_frobenius": sums.relative, "max_abs": sums.largest, "cosine": sums.cosine}
