"""`policyc schema`, `formats`, `models`: what the program knows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from policy_dsl.cli import console, options
from policy_dsl.diagnostics import did_you_mean, fail

if TYPE_CHECKING:
    from policy_dsl.formats import FormatSpec
    from policy_dsl.reports.report import Block

# Kept as files, so that other tools can take them from the package.
SCHEMAS = Path(__file__).parent.parent / "document_schemas"


@console.guarded
def schema(
    document: Annotated[
        str,
        typer.Argument(
            metavar="[DOCUMENT]", help="policy, or a --format json document: plan, diff, …"
        ),
    ] = "policy",
) -> None:
    """Print the JSON Schema of a policy, or of a document that a command prints.

    \b
    Examples:
      policyc schema > policy.schema.json
      policyc schema plan
    """
    if document == "policy":
        from policy_dsl.language.schema import json_schema

        console.write_json(json_schema())
        return
    known = sorted(path.stem for path in SCHEMAS.glob("*.json"))
    if document not in known:
        reason = f"there is no schema of {document}; there are policy, {', '.join(known)}"
        meant = did_you_mean(document, ["policy", *known])
        raise fail("bad-argument", option="DOCUMENT", reason=reason, suggestion=meant)
    console.write((SCHEMAS / f"{document}.json").read_text(encoding="utf-8"))


@console.guarded
def formats(
    target: Annotated[
        str | None, typer.Argument(metavar="[TARGET]", help="Only this target.")
    ] = None,
    format: options.AnyReport = "text",
) -> None:
    """Show what each target can hold: schemes, widths, groups, fill-in table, families."""
    import emitters
    from policy_dsl.reports.report import render_markdown, render_text
    from policy_dsl.vocabulary import TARGETS

    specs = emitters.specs()
    if target is not None and target not in specs:
        # The language knows targets that this version cannot write yet.
        code = "unavailable-target" if target in TARGETS else "unknown-target"
        cure = did_you_mean(target, specs)
        raise fail(code, suggestion=cure, target=target, known=", ".join(specs))
    chosen = [spec for name, spec in specs.items() if target in (None, name)]
    if format == "json":
        console.write_json(
            {
                "schema_version": 1,
                "kind": "formats",
                "formats": [_spec_json(spec) for spec in chosen],
            }
        )
        return
    blocks = [block for spec in chosen for block in _spec_blocks(spec)]
    if format == "markdown":
        console.write(render_markdown(blocks))
    else:
        console.write(render_text(blocks, width=console.stdout_width()))


@console.guarded
def models(format: options.AnyReport = "text") -> None:
    """List the catalog: models that are planned at once, without a download."""
    from policy_dsl.reports.report import Column, Table, render_markdown, render_text
    from policy_dsl.sources.reference import catalog_names, open_catalog
    from policy_dsl.units import both_units

    # Opened rather than listed: a broken entry must show here, not in a plan.
    found = [(name, open_catalog(name)) for name in catalog_names()]
    entries = [(name, inventory) for name, inventory in found if inventory is not None]
    if format == "json":
        rows = [
            {
                "name": name,
                "id": inventory.id,
                "model_type": inventory.config.get("model_type"),
                "tensors": len(inventory.tensors),
                "nbytes": inventory.nbytes,
                "notes": list(inventory.notes),
            }
            for name, inventory in entries
        ]
        console.write_json({"schema_version": 1, "kind": "models", "models": rows})
        return
    columns = (
        Column("name"),
        Column("model"),
        Column("type"),
        Column("tensors", right=True),
        Column("size"),
    )
    cells = tuple(
        (
            name,
            inventory.id,
            str(inventory.config.get("model_type")),
            f"{len(inventory.tensors):,}",
            both_units(inventory.nbytes),
        )
        for name, inventory in entries
    )
    table = Table(columns, cells)
    console.write(render_markdown([table]) if format == "markdown" else render_text([table]))


def _spec_blocks(spec: FormatSpec) -> list[Block]:
    from policy_dsl.planning.fill import PLAIN_WORDS
    from policy_dsl.reports.report import Column, Facts, Items, Table

    scheme_columns = tuple(map(Column, ("scheme", "bits", "groups", "methods", "about")))
    schemes = tuple(
        (one.name, _listed(one.bits), _listed(one.group_sizes), _listed(one.methods), one.about)
        for one in spec.schemes
    )
    fill = tuple(
        (kind, "any" if bits is None else str(bits), scheme) for kind, bits, scheme in spec.fill
    )
    facts = (
        ("target", f"{spec.name}: {spec.about}"),
        (
            "plain dtypes",
            ", ".join(PLAIN_WORDS.get(dtype, dtype) for dtype in spec.plain_dtypes),
        ),
        ("fp8 rules", f"{', '.join(spec.fp8_rules)} (the first is the default)"),
        (
            "families",
            ", ".join(name for name, reason in spec.families.items() if reason is None),
        ),
        ("readers", ", ".join(f"{name} ({about})" for name, about in spec.runtimes.items())),
    )
    # A refusal without its reason would read like an oversight.
    refused = [f"{name}: {reason}" for name, reason in spec.families.items() if reason]
    blocks: list[Block] = [
        Facts(facts),
        Table(scheme_columns, schemes, "Schemes, the first value of each is the default"),
        Table(
            tuple(map(Column, ("tensors", "bits", "scheme"))),
            fill,
            "A width without a scheme is filled in by this table, the first match wins",
        ),
    ]
    if refused:
        blocks.append(Items(tuple(refused), "Families refused, and why"))
    return blocks


def _spec_json(spec: FormatSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "about": spec.about,
        "schemes": [
            {
                "name": one.name,
                "bits": list(one.bits),
                "group_sizes": list(one.group_sizes),
                "methods": list(one.methods),
                "symmetric": one.symmetric,
                "about": one.about,
            }
            for one in spec.schemes
        ],
        "fill": [
            {"tensors": kind, "bits": bits, "scheme": scheme}
            for kind, bits, scheme in spec.fill
        ],
        "plain_dtypes": list(spec.plain_dtypes),
        "fp8_rules": list(spec.fp8_rules),
        "families": [
            {"family": name, "supported": reason is None, "reason": reason}
            for name, reason in spec.families.items()
        ],
        "runtimes": dict(spec.runtimes),
    }


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(str(value) for value in values) or "-"
