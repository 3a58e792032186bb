"""A plan as the documented JSON document, and saved plans read back."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import fail, json_text
from policy_dsl.documents import entry_of, first_defect
from policy_dsl.documents import saved as documents
from policy_dsl.documents.saved import PlanDocument
from policy_dsl.plan import Module, Plan, Pruning
from policy_dsl.planning import outline as outlines
from policy_dsl.planning.assertions import TestResult
from policy_dsl.regular_files import read_whole
from policyc.reports import by_key, entries_of, finding_json
from policyc.reports.inspect_report import transform_entries

SCHEMA_VERSION = 1
# Half as much again as that of the largest model, with a module for every expert.
LARGEST_NBYTES = 128 * 2**20


def plan_document(
    plan: Plan, tests: Sequence[TestResult] = (), *, tensors: bool = True
) -> PlanDocument:
    """The plan as JSON values; with `tensors`, every output tensor and its sources.

    bpw = 8 x bytes of all output tensors / parameters of the logical model after transforms.
    """
    bundle, files = outlines.outline(plan), []
    for file in plan.files:
        files.append(entry_of(documents.FileEntry, file, reason=file.reason or None))
        if file.least:
            files[-1]["least_nbytes"] = file.least
    document = entry_of(
        PlanDocument,
        # Not of the plan's attributes: `forms` means something else there.
        None,
        schema_version=SCHEMA_VERSION,
        kind="plan",
        target=plan.target,
        pending=list(plan.pending),
        policy=entry_of(documents.PlannedPolicy, plan.policy, digest=plan.policy_digest),
        model=entry_of(
            documents.PlannedModel,
            plan.model,
            architecture=plan.model.architecture.family,
            parameters=bundle.parameters,
            layers=plan.model.n_layers,
            experts=plan.model.n_experts,
            # What only the bundle has: zeros up to a multiple that a reader needs.
            experts_added=bundle.added,
            source_digest=plan.source_digest,
        ),
        transforms=transform_entries(plan.pruning),
        totals=_totals(plan, bundle),
        roles=[
            entry_of(documents.RoleEntry, replace(bundle, modules=tuple(modules)), role=role)
            for role, modules in by_key(bundle.modules, attrgetter("role")).items()
        ],
        groups=entries_of(documents.GroupEntry, outlines.groups(bundle.modules)),
        dropped=entries_of(documents.DroppedTensor, plan.omitted, name="tensor.name"),
        files=files,
        dropped_files=entries_of(documents.DroppedFile, plan.omitted_files),
        linked_files=dict(plan.linked_files),
        fp8_rule=plan.fp8_rule or None,
        statistics={file.name: file.path for file in plan.statistics},
        refusals=entries_of(documents.RefusalEntry, plan.not_loaded, runtime="reader"),
        tests=entries_of(documents.TestEntry, tests, test="text"),
        findings=list(map(finding_json, plan.findings)),
    )
    if tensors:
        rows = document["tensors"] = []
        for module in plan.modules:
            said = {"module": module.name, "layer": module.layer, **_decision(plan, module)}
            said |= {"sources": _source_names(module), "parameters": module.parameters}
            for tensor in module.tensors:
                rows.append(entry_of(documents.TensorEntry, tensor, **said))
                # Only in the first, so that the column adds up: scales are not parameters.
                said["parameters"] = 0
    return document


def _totals(plan: Plan, bundle: outlines.Outline) -> documents.PlannedTotals:
    # One unknown file makes the sum unknown; a guess would be taken for exact.
    unknown = next((file for file in plan.files if file.nbytes is None), None)
    known = sum(file.nbytes or 0 for file in plan.files)
    return entry_of(
        documents.PlannedTotals,
        bundle,
        tensor_nbytes=bundle.nbytes,
        file_nbytes=None if unknown or not plan.files else known,
        file_nbytes_unknown_because=unknown.reason if unknown else None,
        source_nbytes=plan.source_nbytes,
    )


def saved_document(plan: Plan, tests: Sequence[TestResult] = ()) -> PlanDocument:
    """The plan as `--save` writes it: what modules have in common is said once."""
    document = plan_document(plan, tests, tensors=False)
    numbers = {file.name: number for number, file in enumerate(plan.files)}
    forms = document["forms"] = []
    for module in plan.forms.examples:
        named = zip(module.tensors, module.suffixes, strict=True)
        parts = [entry_of(documents.PlannedPart, tensor, part=suffix) for tensor, suffix in named]
        form = entry_of(documents.PlannedForm, module, parts=parts, **_decision(plan, module))
        forms.append(form)
    document["columns"] = ("name", "layer", "form", "sources", "places")
    document["rows"] = [
        (
            *(module.name, module.layer, form, _source_names(module)),
            [(numbers[tensor.file], tensor.start) for tensor in module.tensors],
        )
        for module, form in zip(plan.modules, plan.forms.numbers, strict=True)
    ]
    return document


def _decision(plan: Plan, module: Module) -> dict[str, Any]:
    """What a module's forms and tensors say alike: what becomes of it, and by which rule."""
    rule, rule_at = plan.rule_of(module)
    return {
        "role": module.role,
        "treatment": outlines.treatment_of(module),
        "stored": outlines.stored_as(module.treatment, module.dtype),
        "source_dtypes": list(outlines.source_dtypes(module)),
        "rule": rule,
        "rule_at": rule_at,
    }


def _source_names(module: Module) -> list[str]:
    # A dict keeps the order and drops the repeats of fused sources.
    pairs = ((view.tensor, view.scale) for view in module.sources)
    return list(dict.fromkeys(stored.name for pair in pairs for stored in pair if stored))


def document_text(document: Mapping[str, Any]) -> str:
    """A JSON document as text: indented, one line per tensor and file, newline at the end."""
    # Thousands of tensors, each a line: readable, and diffs of saved plans stay small.
    listed = {"tensors", "files", "dropped", "dropped_files", "entries", "forms", "rows"}
    parts = []
    for key, value in document.items():
        if key in listed:
            rows = ",\n".join(f"    {json_text(row)}" for row in value)
            shown = f"[\n{rows}\n  ]" if value else "[]"
        elif key == "columns":
            shown = json_text(value)
        else:
            shown = json_text(value, indent=2).replace("\n", "\n  ")
        parts.append(f"  {json_text(key)}: {shown}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def read_saved_plan(path: Path) -> outlines.Outline:
    """The outline of a saved plan. Raises: PolicyError if it is not a plan with its tensors."""
    content = read_whole(path, most=LARGEST_NBYTES)
    try:
        document = _of_all_versions(parse_json(content))
        reason = _defect(document)
    except ValueError as error:
        reason = str(error)
    if reason is not None:
        raise fail("bad-saved-plan", path=path, reason=reason)
    saved: PlanDocument = document
    model = saved["model"]
    return outlines.Outline(
        title=f"{saved['policy']['name']} ({path})",
        target=saved["target"],
        model=model["id"],
        modules=tuple(_outline_modules(saved)),
        experts=model["experts"],
        pruning=Pruning.of_entries(saved["transforms"]),
        added=model["experts_added"],
    )


def _of_all_versions(document: Any) -> Any:
    """The document with what plans of older versions do not say: nothing of these kinds."""
    if not isinstance(document, dict):
        return document
    model = document.get("model")
    model = {"experts_added": 0, **model} if isinstance(model, dict) else model
    return {"transforms": [], "dropped_files": [], "linked_files": {}, **document, "model": model}


def _defect(document: Any) -> str | None:
    """Why a document is not a plan with its tensors; None if it is."""
    # `diff` takes any .json file that it is given.
    if not isinstance(document, dict) or document.get("kind") != "plan":
        return "it is JSON, but not a plan"
    # A plan of another version may mean something else by the same words.
    if (version := repr(document.get("schema_version"))) != str(SCHEMA_VERSION):
        return f"schema_version is {version:.120}, not {SCHEMA_VERSION}"
    if not document.keys() & {"tensors", "rows"}:
        return "it was written without --tensors; `plan --save` keeps them"
    # Later versions may add fields, and people who edit a plan notes.
    if (defect := first_defect(document, PlanDocument, "ignore")) is not None:
        return f"something is missing or of the wrong type: {defect}"
    largest = max((row[2] for row in document.get("rows", ())), default=-1)
    if largest >= len(document.get("forms", ())):
        return f"forms: no form {largest}, which rows name"
    return None


def _outline_modules(saved: PlanDocument) -> Iterator[outlines.OutlineModule]:
    """The modules of a saved plan; of older versions, from the rows of their tensors."""
    modules: list[tuple[str, int | None, Mapping[str, Any]]] = []
    if "tensors" in saved:
        for name, rows in by_key(saved["tensors"], itemgetter("module")).items():
            parameters = sum(row["parameters"] for row in rows)
            form = {**rows[0], "parts": rows, "parameters": parameters}
            modules.append((name, rows[0]["layer"], form))
    else:
        modules = [(row[0], row[1], saved["forms"][row[2]]) for row in saved["rows"]]
    for name, layer, said in modules:
        words = (name, said["role"], layer, said["treatment"], said["stored"], said["rule"])
        counts = (len(said["parts"]), said["parameters"], sum(p["nbytes"] for p in said["parts"]))
        yield outlines.OutlineModule(*words, *counts, said.get("rule_at"))
