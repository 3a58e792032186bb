"""What a source or a bundle holds, by role: blocks and the documented JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, render
from policy_dsl.documents import entry_of
from policy_dsl.documents import reports as documents
from policy_dsl.documents.saved import GroupEntry, TransformEntry
from policy_dsl.inventory import Inventory
from policy_dsl.plan import Pruning
from policy_dsl.planning.outline import Group, Outline, groups
from policy_dsl.quantities import both_units, column_unit, counted, in_unit, layer_list
from policy_dsl.roles.classify import classify, classify_hfq
from policy_dsl.roles.model import Model, ModelTensor
from policy_dsl.roles.quantization import Quantization, leftover, quantization_of
from policyc.reports import Block, Facts, Items, Rendered, Table, by_key, entries_of, finding_json

_SHOWN_IGNORED = 10


@dataclass(frozen=True)
class Survey:
    """A source as it is. model: None if its names have no roles; `findings` say why."""

    inventory: Inventory
    model: Model | None
    roles: Sequence[documents.SourceRole]
    dtypes: Sequence[documents.DtypeEntry]
    quantization: str | None
    findings: Sequence[Diagnostic]

    @property
    def parameters(self) -> int | None:
        """Parameters of all roles; None if they are not known."""
        return sum(role["parameters"] for role in self.roles) if self.model else None


def survey(inventory: Inventory) -> Survey:
    """The survey of an inventory. Names without roles become findings, not an exception."""
    quantization = quantization_of(inventory)
    model, findings = _classified(inventory, quantization)
    roles = by_key(model.tensors if model else (), lambda tensor: tensor.role)
    dtypes = by_key(inventory.tensors.values(), lambda tensor: tensor.dtype)
    return Survey(
        inventory=inventory,
        model=model,
        roles=[_role_entry(role, tensors) for role, tensors in roles.items()],
        dtypes=[
            {"dtype": dtype, "tensors": len(held), "nbytes": sum(each.nbytes for each in held)}
            for dtype, held in sorted(dtypes.items())
        ],
        quantization=quantization.form if quantization else None,
        findings=(*inventory.findings, *leftover(inventory), *findings),
    )


def _classified(
    inventory: Inventory, quantization: Quantization | None
) -> tuple[Model | None, Sequence[Diagnostic]]:
    """The model, None if its names have no roles, and what is wrong with it."""
    # A source without roles can still be looked at: dtypes and sizes need none.
    in_container = inventory.container is not None
    try:
        return (classify_hfq if in_container else classify)(inventory), ()
    except PolicyError as error:
        if in_container:
            # Its loaders know more families than have a table here, so the file is not at fault.
            reason = error.diagnostics[0].message
            return None, (diagnostic("hfq-without-roles", model=inventory.id, reason=reason),)
        if quantization is not None and quantization.read == "no":
            # Names that another tool gave have no roles; the form says why.
            return None, (quantization.finding(inventory.id, allowed=True),)
        return None, error.diagnostics


def _role_entry(role: str, tensors: Sequence[ModelTensor]) -> documents.SourceRole:
    """What the tensors of a role add up to; bytes include FP8 scales, parameters do not."""
    nbytes = 0.0
    for tensor in tensors:
        # Its share of a stored tensor, which may hold several, and of the scales. MXFP4 packs two
        # values into a byte; other bytes are FP8 under the name of an integer.
        whole = tensor.source.nbytes + (tensor.scale.nbytes if tensor.scale else 0)
        held = prod(tensor.source.shape) * (2 if tensor.mxfp4 else 1)
        nbytes += whole * prod(tensor.shape) / max(1, held)
    return {
        "role": role,
        "layers": sorted({tensor.layer for tensor in tensors if tensor.layer is not None}),
        "dtypes": sorted({tensor.source.dtype for tensor in tensors}),
        "tensors": len(tensors),
        "parameters": sum(prod(tensor.shape) for tensor in tensors),
        "nbytes": round(nbytes),
    }


def survey_document(source: Survey) -> documents.InspectDocument:
    """The survey as JSON values."""
    inventory, model = source.inventory, source.model
    side_files, ignored = inventory.side_files, model.ignored if model else ()
    return entry_of(
        documents.InspectDocument,
        inventory,
        schema_version=1,
        kind="inspect",
        family=model and model.architecture.family,
        layers=model and model.n_layers,
        experts=model and model.n_experts,
        tied_head=model and model.tied,
        ignored=[{"name": tensor.name, "reason": reason} for tensor, reason in ignored],
        parameters=source.parameters,
        tensors=len(inventory.tensors),
        quantization=source.quantization,
        container=inventory.container._asdict() if inventory.container else None,
        dtypes=list(source.dtypes),
        roles=list(source.roles),
        files=dict(inventory.file_nbytes),
        # Null is not empty: headers from the hub do not say.
        side_files=None if side_files is None else dict(side_files),
        findings=list(map(finding_json, source.findings)),
    )


def survey_blocks(source: Survey) -> list[Block]:
    """The survey for people."""
    word, scale = column_unit(source.inventory.nbytes)
    # Both tables have the same figures.
    figures = ("tensors", "parameters", word)
    role_rows, dtype_rows = [], []
    for role in source.roles:
        words = role["role"], layer_list(role["layers"]), ", ".join(role["dtypes"])
        counts = f"{role['tensors']:,}", f"{role['parameters']:,}"
        role_rows.append((*words, *counts, in_unit(role["nbytes"], scale)))
    for row in source.dtypes:
        dtype_rows.append((row["dtype"], f"{row['tensors']:,}", in_unit(row["nbytes"], scale)))
    roles = Table(("role", "layers", "dtype", *figures), role_rows, "Roles", right=figures)
    columns, title = ("dtype", "tensors", word), "Dtypes, scales included"
    dtypes = Table(columns, dtype_rows, title, right=figures)
    blocks: list[Block] = [Facts(list(_survey_facts(source))), *([roles] if role_rows else [])]
    blocks.append(dtypes)
    if source.model and source.model.ignored:
        lines = [f"{tensor.name}: {reason}" for tensor, reason in source.model.ignored]
        more = len(lines) - _SHOWN_IGNORED
        lines[_SHOWN_IGNORED:] = [f"and {more} more"] if more > 0 else []
        blocks.append(Items(lines, "Not weights"))
    if source.findings:
        blocks.append(Rendered([render(source.findings)], "Findings"))
    return blocks


def _survey_facts(source: Survey) -> Iterator[tuple[str, str]]:
    inventory, model = source.inventory, source.model
    yield "source", inventory.id
    for note in inventory.notes:
        yield "note", note
    if container := inventory.container:
        family = container.family or "a family that is not known"
        yield "container", f"{container.form}, arch_id {container.arch_id}: {family}"
        has = {"tokenizer": container.tokenizer, "chat template": container.chat_template}
        yield "embedded", ", ".join(part if there else f"no {part}" for part, there in has.items())
    if model is not None:
        experts = f", {counted(model.n_experts, 'expert')} a layer" if model.n_experts else ""
        tied = ", the head is tied to the embeddings" if model.tied else ""
        layers = counted(model.n_layers, "layer")
        yield "family", f"{model.architecture.family}, {layers}{experts}{tied}"
        yield "parameters", f"{source.parameters:,} (without scales)"
    yield "tensors", f"{counted(len(inventory.tensors), 'tensor')}, {both_units(inventory.nbytes)}"
    if inventory.file_nbytes:
        total = both_units(sum(inventory.file_nbytes.values()))
        yield "files", f"{counted(len(inventory.file_nbytes), 'file')} of tensors, {total}"
    yield "precision", source.quantization or "as released, not quantized by somebody else"


def outline_document(bundle: Outline) -> documents.InspectBundleDocument:
    """The outline of a bundle as JSON values."""
    return entry_of(
        documents.InspectBundleDocument,
        bundle,
        schema_version=1,
        kind="inspect_bundle",
        experts_added=bundle.added,
        tensor_nbytes=bundle.nbytes,
        transforms=transform_entries(bundle.pruning),
        groups=entries_of(GroupEntry, groups(bundle.modules)),
    )


def transform_entries(pruning: Pruning | None) -> list[TransformEntry]:
    """What was done to the model; `kept` is null while nobody chose the experts that stay."""
    if pruning is None:
        return []
    kept = pruning.entry["kept"] if pruning.chosen else None
    changed: dict[str, Any] = {**pruning.entry, "layers": len(pruning.kept), "kept": kept}
    return [entry_of(TransformEntry, None, **changed)]


def group_cells(group: Group, scale: int) -> tuple[str, ...]:
    """Role, layers, treatment, tensors, parameters and bytes of a group, as cells."""
    figures = (f"{group.tensors:,}", f"{group.parameters:,}", in_unit(group.nbytes, scale))
    return (group.role, layer_list(group.layers), group.treatment, *figures)


def outline_blocks(bundle: Outline) -> list[Block]:
    """The outline of a bundle for people."""
    word, scale = column_unit(bundle.nbytes)
    figures = ("tensors", "parameters", word, "bpw")
    rows = [
        (*group_cells(group, scale), "-" if group.bpw is None else f"{group.bpw:.3f}")
        for group in groups(bundle.modules)
    ]
    table = Table(("role", "layers", "treatment", *figures), rows, right=figures)
    return [Facts(list(_outline_facts(bundle))), table]


def _outline_facts(bundle: Outline) -> Iterator[tuple[str, str]]:
    yield "bundle", bundle.title
    yield "target", bundle.target
    yield "model", bundle.model
    if not any(module.role for module in bundle.modules):
        yield "record", "none: names are shown as roles, and parameters are what tensors hold"
    if bundle.experts:
        more = f", and {bundle.added:,} that only pad" if bundle.added else ""
        yield "experts", f"{bundle.experts:,} a layer{more}"
    if bundle.pruning:
        yield "pruned", bundle.pruning.about
    yield "size", both_units(bundle.nbytes)
    if bundle.unread:
        yield "bits", f"not known; {bundle.parameters:,} parameters are in modules that are"
    else:
        yield "bits", f"{bundle.bpw or 0:.4f} bpw of {bundle.parameters:,} parameters"
