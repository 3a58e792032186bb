"""`policyc schema`, `formats`, `models`: what the program knows."""

from policy_dsl import document_schemas
from policy_dsl.diagnostics import did_you_mean, fail
from policyc.cli import console, options


@options.argument(
    "document",
    default="policy",
    help="policy, or the `kind` of a JSON document: plan, bundle (policyc.json), …",
)
def schema(document: str) -> None:
    """Print the JSON Schema of a policy, or of a document by its `kind`.

    \b
    Examples:
      policyc schema > policy.schema.json
      policyc schema plan
      policyc schema bundle                       of policyc.json in a bundle
    """
    if document == "policy":
        from policy_dsl.language.draft import SCHEMA

        console.write_json(SCHEMA)
        return
    folder = document_schemas()
    known = sorted(path.stem for path in folder.glob("*.json"))
    if document not in known:
        reason = f"there is no schema of {document}; there are policy, {', '.join(known)}"
        meant = did_you_mean(document, ["policy", *known])
        raise fail("bad-argument", option="DOCUMENT", reason=reason, suggestion=meant)
    console.write((folder / f"{document}.json").read_text(encoding="utf-8"))


@options.argument("target", required=False, help="Only this target.")
@options.any_report
def formats(target: str | None, format: str) -> None:
    """Show what each target can hold, and which settings of a policy it uses."""
    import emitters
    from policy_dsl.policy import WORDS
    from policyc.reports.formats_report import formats_blocks, formats_document

    known = emitters.FORMATS
    if target is not None and target not in known:
        # The language knows targets that this version cannot write yet.
        code = "unavailable-target" if target in WORDS.targets else "unknown-target"
        meant = did_you_mean(target, known)
        raise fail(code, suggestion=meant, target=target, known=", ".join(known))
    chosen = [known[name] for name in known if target in (None, name)]
    console.write_report(format, formats_document, formats_blocks, chosen)


@options.any_report
def models(format: str) -> None:
    """List the catalog: models that are planned at once, without a download."""
    from policy_dsl.sources.reference import catalog_names, open_catalog
    from policyc.reports.formats_report import models_blocks, models_document

    # Opened rather than listed: a broken entry must show here, not in a plan.
    opened = {name: open_catalog(name) for name in catalog_names()}
    known = {name: inventory for name, inventory in opened.items() if inventory is not None}
    console.write_report(format, models_document, models_blocks, known)
