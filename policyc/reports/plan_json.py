"""A plan as the documented JSON document, and saved plans read back.

Plan ── plan_document ──> {…} ── json ──> plan.json ── saved_outline ──> Outline
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import fail, json_text
from policy_dsl.documents import GroupEntry, TransformEntry
from policy_dsl.documents.saved import (
    DroppedFile,
    DroppedTensor,
    FileEntry,
    PlanDocument,
    PlannedForm,
    PlannedModel,
    PlannedPart,
    PlannedPolicy,
    PlannedTotals,
    RefusalEntry,
    RoleEntry,
    TensorEntry,
    TestEntry,
)
from policy_dsl.documents.values import entry_of, first_defect
from policy_dsl.plan import Module, Plan, PlannedFile, PlannedTensor, Pruning
from policy_dsl.planning.assertions import TestResult
from policy_dsl.planning.outline import (
    Outline,
    OutlineModule,
    groups,
    outline,
    source_dtypes,
    stored_as,
    treatment_of,
)
from policy_dsl.regular_files import read_whole
from policyc.reports.blocks import by_key
from policyc.reports.findings import finding_json
from policyc.reports.outline_report import transform_entries

SCHEMA_VERSION = 1
# Half as much again as that of the largest model, with a module for every expert.
LARGEST_NBYTES = 128 * 2**20


def plan_document(
    plan: Plan, tests: Sequence[TestResult] = (), *, tensors: bool = True
) -> PlanDocument:
    """The plan as JSON values; with `tensors`, every output tensor and its sources.

    bpw = 8 x bytes of all output tensors / parameters of the logical model after transforms.
    """
    bundle = outline(plan)
    document = entry_of(
        PlanDocument,
        # Not of the plan's attributes: `forms` means something else there.
        None,
        schema_version=SCHEMA_VERSION,
        kind="plan",
        target=plan.target,
        pending=list(plan.pending),
        policy=entry_of(PlannedPolicy, plan.policy, digest=plan.policy_digest),
        model=entry_of(
            PlannedModel,
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
        roles=_roles(bundle),
        groups=[entry_of(GroupEntry, group) for group in groups(bundle.modules)],
        dropped=[entry_of(DroppedTensor, each, name=each.tensor.name) for each in plan.omitted],
        files=[_file(file) for file in plan.files],
        dropped_files=[entry_of(DroppedFile, file) for file in plan.omitted_files],
        linked_files=dict(plan.linked_files),
        fp8_rule=plan.fp8_rule or None,
        statistics={file.name: file.path for file in plan.statistics},
        refusals=[
            entry_of(RefusalEntry, refusal, runtime=refusal.reader) for refusal in plan.refusals
        ],
        tests=[entry_of(TestEntry, test, test=test.text) for test in tests],
        findings=[finding_json(finding) for finding in plan.findings],
    )
    if tensors:
        document["tensors"] = [
            _tensor(plan, module, tensor, first=at == 0)
            for module in plan.modules
            for at, tensor in enumerate(module.tensors)
        ]
    return document


def saved_document(plan: Plan, tests: Sequence[TestResult] = ()) -> PlanDocument:
    """The plan as `--save` writes it: what modules have in common is said once."""
    document = plan_document(plan, tests, tensors=False)
    shared = plan.forms
    numbers = {file.name: number for number, file in enumerate(plan.files)}
    document["forms"] = [_form(plan, module) for module in shared.examples]
    document["columns"] = ("name", "layer", "form", "sources", "places")
    document["rows"] = [
        (
            *(module.name, module.layer, form, _source_names(module)),
            [(numbers[tensor.file], tensor.start) for tensor in module.tensors],
        )
        for module, form in zip(plan.modules, shared.numbers, strict=True)
    ]
    return document


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


def read_saved_plan(path: Path) -> Outline:
    """The outline of a saved plan's file.

    Raises: PolicyError if it cannot be read, or is not a plan with its tensors.
    """
    return saved_outline(read_whole(path, most=LARGEST_NBYTES), str(path))


def saved_outline(content: bytes, path: str) -> Outline:
    """The outline of a saved plan. path: how to call it.

    Raises: PolicyError (bad-saved-plan) if the content is not a plan with its tensors.
    """
    try:
        document = parse_json(content)
    except ValueError as error:
        raise fail("bad-saved-plan", path=path, reason=str(error)) from None
    saved = _checked(document, path)
    model = saved["model"]
    return Outline(
        title=f"{saved['policy']['name']} ({path})",
        target=saved["target"],
        model=model["id"],
        modules=tuple(_outline_modules(saved)),
        experts=model["experts"],
        pruning=_pruning(saved["transforms"]),
        added=model["experts_added"],
    )


def _checked(document: Any, path: str) -> PlanDocument:
    """The document as a plan with its tensors. Raises: PolicyError (bad-saved-plan)."""
    reason = None
    # `diff` takes any .json file that it is given.
    if not isinstance(document, dict) or document.get("kind") != "plan":
        reason = "it is JSON, but not a plan"
    # A plan of another version may mean something else by the same words.
    elif (version := repr(document.get("schema_version"))) != str(SCHEMA_VERSION):
        reason = f"schema_version is {version:.120}, not {SCHEMA_VERSION}"
    elif not document.keys() & {"tensors", "rows"}:
        reason = "it was written without --tensors; `plan --save` keeps them"
    # Later versions may add fields, and people who edit a plan notes.
    elif (defect := first_defect(_as_of_now(document), PlanDocument, "ignore")) is not None:
        reason = f"something is missing or of the wrong type: {defect}"
    elif (number := _unknown_form(document)) is not None:
        reason = f"forms: no form {number}, which rows name"
    if reason is not None:
        raise fail("bad-saved-plan", path=path, reason=reason)
    return cast("PlanDocument", _as_of_now(document))


def _as_of_now(document: dict[str, Any]) -> dict[str, Any]:
    """The document with what plans of older versions do not say: nothing of these kinds."""
    model = document.get("model")
    model = {"experts_added": 0, **model} if isinstance(model, dict) else model
    return {"transforms": [], "dropped_files": [], "linked_files": {}, **document, "model": model}


def _pruning(transforms: Sequence[TransformEntry]) -> Pruning | None:
    """What a saved plan says was done to the model."""
    for entry in transforms:
        ranking, kept = entry["by"] or "", entry["kept"]
        if kept is not None:
            numbers = {int(layer): tuple(old) for layer, old in kept.items()}
            return Pruning(entry["before"], numbers, ranking)
        # As many numbers take their place, as in the plan itself.
        numbers = dict.fromkeys(range(entry["layers"]), tuple(range(entry["to"])))
        return Pruning(entry["before"], numbers, ranking, False)
    return None


def _unknown_form(document: Mapping[str, Any]) -> int | None:
    """The number of a form that the rows of a saved plan name and that it lacks."""
    largest = max((row[2] for row in document.get("rows", ())), default=-1)
    return largest if largest >= len(document.get("forms", ())) else None


def _outline_modules(saved: PlanDocument) -> Iterator[OutlineModule]:
    """The modules of a saved plan; of older versions, from the rows of their tensors."""
    if "tensors" in saved:
        yield from map(
            _outline_module, by_key(saved["tensors"], lambda row: row["module"]).values()
        )
        return
    forms = [_form_outline(form) for form in saved["forms"]]
    for name, layer, number, *_ in saved["rows"]:
        yield replace(forms[number], name=name, layer=layer)


def _form_outline(form: PlannedForm) -> OutlineModule:
    return OutlineModule(
        name="",
        role=form["role"],
        layer=None,
        treatment=form["treatment"],
        stored=form["stored"],
        rule=form["rule"],
        tensors=len(form["parts"]),
        parameters=form["parameters"],
        nbytes=sum(part["nbytes"] for part in form["parts"]),
        rule_at=form["rule_at"],
    )


def _outline_module(rows: list[TensorEntry]) -> OutlineModule:
    first = rows[0]
    return OutlineModule(
        name=first["module"],
        role=first["role"],
        layer=first["layer"],
        treatment=first["treatment"],
        stored=first["stored"],
        rule=first["rule"],
        tensors=len(rows),
        parameters=sum(row["parameters"] for row in rows),
        nbytes=sum(row["nbytes"] for row in rows),
        rule_at=first.get("rule_at"),
    )


def _totals(plan: Plan, bundle: Outline) -> PlannedTotals:
    # One unknown file makes the sum unknown; a guess would be taken for exact.
    unknown = [file for file in plan.files if file.nbytes is None]
    known = sum(file.nbytes or 0 for file in plan.files)
    return entry_of(
        PlannedTotals,
        bundle,
        tensor_nbytes=bundle.nbytes,
        file_nbytes=None if unknown or not plan.files else known,
        file_nbytes_unknown_because=unknown[0].reason if unknown else None,
        source_nbytes=plan.source_nbytes,
    )


def _roles(bundle: Outline) -> list[RoleEntry]:
    by_role = by_key(bundle.modules, lambda module: module.role)
    parts = {role: replace(bundle, modules=tuple(found)) for role, found in by_role.items()}
    return [entry_of(RoleEntry, part, role=role) for role, part in parts.items()]


def _file(file: PlannedFile) -> FileEntry:
    entry = entry_of(FileEntry, file, reason=file.reason or None)
    if file.least:
        entry["least_nbytes"] = file.least
    return entry


def _form(plan: Plan, module: Module) -> PlannedForm:
    return entry_of(
        PlannedForm,
        module,
        treatment=treatment_of(module),
        stored=stored_as(module.treatment, module.dtype),
        rule=plan.rule_text(module),
        rule_at=plan.rule_at(module),
        source_dtypes=list(source_dtypes(module)),
        parts=[
            entry_of(PlannedPart, tensor, part=suffix)
            for tensor, suffix in zip(module.tensors, module.suffixes, strict=True)
        ],
    )


def _source_names(module: Module) -> list[str]:
    # A dict keeps the order and drops the repeats of fused sources.
    pairs = ((view.tensor, view.scale) for view in module.sources)
    return list(dict.fromkeys(stored.name for pair in pairs for stored in pair if stored))


def _tensor(plan: Plan, module: Module, tensor: PlannedTensor, *, first: bool) -> TensorEntry:
    """The row of one output tensor; only the first of a module carries its parameters."""
    return entry_of(
        TensorEntry,
        tensor,
        module=module.name,
        role=module.role,
        layer=module.layer,
        treatment=treatment_of(module),
        stored=stored_as(module.treatment, module.dtype),
        # So that the column adds up: scales and biases are not parameters.
        parameters=module.parameters if first else 0,
        source_dtypes=list(source_dtypes(module)),
        sources=_source_names(module),
        rule=plan.rule_text(module),
        rule_at=plan.rule_at(module),
    )
