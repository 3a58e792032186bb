"""What a build wrote: blocks and the documented JSON document."""

from __future__ import annotations

from pathlib import Path

from emitters.core.build import BuildReport
from policy_dsl.documents.reports import BuildDocument
from policy_dsl.plan import Plan
from policy_dsl.planning.outline import outline
from policy_dsl.quantities import both_units, counted
from policyc.reports.blocks import Block, Facts


def build_document(plan: Plan, folder: Path, report: BuildReport, check: str) -> BuildDocument:
    """The build as JSON values. folder: as it was given. check: the command that verifies it."""
    bundle = outline(plan)
    return {
        "schema_version": 1,
        "kind": "build",
        "output": str(folder),
        "policy": plan.policy.name,
        "target": plan.target,
        "model": plan.model.id,
        "tensors": bundle.tensors,
        "tensor_nbytes": bundle.nbytes,
        "file_nbytes": report.nbytes,
        "bpw": bundle.bpw,
        "files": dict(sorted(report.sizes.items())),
        "seconds": report.seconds,
        "resumed_nbytes": report.resumed_nbytes,
        "record_digest": report.digest,
        "verify": check,
    }


def build_blocks(plan: Plan, folder: Path, report: BuildReport, check: str) -> list[Block]:
    """The build for people."""
    made = build_document(plan, folder, report, check)
    earlier = report.resumed_nbytes
    return [
        Facts(
            (
                ("bundle", made["output"]),
                ("holds", f"{made['model']} by {made['policy']}, for {made['target']}"),
                (
                    "tensors",
                    f"{counted(made['tensors'], 'tensor')}, {both_units(made['tensor_nbytes'])}",
                ),
                (
                    "files",
                    f"{counted(len(made['files']), 'file')}, {both_units(made['file_nbytes'])}",
                ),
                ("bits", f"{made['bpw'] or 0:.4f} bpw"),
                (
                    "time",
                    f"{report.seconds:.1f} s"
                    + (f" after {both_units(earlier)} of an earlier run" if earlier else ""),
                ),
                ("check", check),
            )
        )
    ]
