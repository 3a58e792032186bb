"""What a source holds: roles with their parameters and bytes, dtypes, quantization.

Inventory ── survey ──> Survey ── survey_blocks | survey_document
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, errors, render
from policy_dsl.documents.reports import InspectDocument, SourceRole
from policy_dsl.documents.values import entry_of
from policy_dsl.inventory import Inventory
from policy_dsl.quantities import both_units, column_unit, counted, in_unit, layer_list
from policy_dsl.roles.classify import classify, classify_hfq
from policy_dsl.roles.model import Model, ModelTensor
from policy_dsl.roles.quantization import Quantization, leftover, quantization_of
from policyc.reports.blocks import Block, Facts, Items, Rendered, Table
from policyc.reports.findings import finding_json


@dataclass
class RoleTotals:
    """What the tensors of one role add up to; bytes include FP8 scales, parameters do not."""

    role: str
    tensors: int = 0
    parameters: int = 0
    nbytes: float = 0
    dtypes: set[str] = field(default_factory=set)
    layers: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Survey:
    """A source as it is. model: None if its names have no roles; `findings` say why."""

    inventory: Inventory
    model: Model | None
    roles: tuple[RoleTotals, ...]
    dtypes: tuple[tuple[str, int, int], ...]
    quantization: str | None
    findings: tuple[Diagnostic, ...]

    @property
    def parameters(self) -> int | None:
        """Parameters of all roles; None if they are not known."""
        return sum(role.parameters for role in self.roles) if self.model else None

    @property
    def is_broken(self) -> bool:
        """Whether the names could not be given roles, or something else is wrong."""
        return bool(errors(self.findings))


def survey(inventory: Inventory) -> Survey:
    """The survey of an inventory. Names without roles become findings, not an exception."""
    quantization = quantization_of(inventory)
    model, findings = _classified(inventory, quantization)
    dtypes: dict[str, tuple[int, int]] = {}
    for tensor in inventory.tensors.values():
        count, nbytes = dtypes.get(tensor.dtype, (0, 0))
        dtypes[tensor.dtype] = (count + 1, nbytes + tensor.nbytes)
    return Survey(
        inventory=inventory,
        model=model,
        roles=_roles(model.tensors) if model else (),
        dtypes=tuple((name, *dtypes[name]) for name in sorted(dtypes)),
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
        if not in_container and quantization is not None and quantization.read == "no":
            # Names that another tool gave have no roles; the form says why.
            return None, (quantization.finding(inventory.id, allowed=True),)
        if not in_container:
            return None, error.diagnostics
        # Its loaders know more families than have a table here, so the file is not at fault.
        reason = error.diagnostics[0].message
        unknown = diagnostic("hfq-without-roles", model=inventory.id, reason=reason)
        return None, (unknown,)


def survey_document(source: Survey) -> InspectDocument:
    """The survey as JSON values."""
    inventory, model = source.inventory, source.model
    return entry_of(
        InspectDocument,
        inventory,
        schema_version=1,
        kind="inspect",
        family=model.architecture.family if model else None,
        layers=model.n_layers if model else None,
        experts=model.n_experts if model else None,
        tied_head=model.tied if model else None,
        ignored=[
            {"name": tensor.name, "reason": reason}
            for tensor, reason in (model.ignored if model else ())
        ],
        parameters=source.parameters,
        tensors=len(inventory.tensors),
        quantization=source.quantization,
        container=inventory.container._asdict() if inventory.container else None,
        dtypes=[
            {"dtype": dtype, "tensors": count, "nbytes": nbytes}
            for dtype, count, nbytes in source.dtypes
        ],
        roles=[
            entry_of(
                SourceRole,
                role,
                layers=sorted(role.layers),
                dtypes=sorted(role.dtypes),
                nbytes=round(role.nbytes),
            )
            for role in source.roles
        ],
        files=dict(inventory.file_nbytes),
        # Null is not empty: headers from the hub do not say.
        side_files=None if inventory.side_files is None else dict(inventory.side_files),
        findings=[finding_json(finding) for finding in source.findings],
    )


def _roles(tensors: Iterable[ModelTensor]) -> tuple[RoleTotals, ...]:
    totals: dict[str, RoleTotals] = {}
    for tensor in tensors:
        role = totals.setdefault(tensor.role, RoleTotals(tensor.role))
        role.tensors += 1
        role.parameters += prod(tensor.shape)
        role.nbytes += _nbytes(tensor)
        role.dtypes.add(tensor.source.dtype)
        if tensor.layer is not None:
            role.layers.add(tensor.layer)
    return tuple(totals.values())


def _nbytes(tensor: ModelTensor) -> float:
    """The tensor's share of its source, which may hold several, and of the scales."""
    whole = tensor.source.nbytes + (tensor.scale.nbytes if tensor.scale else 0)
    elements = prod(tensor.source.shape)
    # MXFP4 packs two values into a byte; other bytes are FP8 under the name of an integer.
    packed = 2 if tensor.mxfp4 else 1
    return whole * prod(tensor.shape) / max(1, elements * packed)


def survey_blocks(source: Survey) -> list[Block]:
    """The survey for people."""
    word, scale = column_unit(source.inventory.nbytes)
    blocks: list[Block] = [Facts(tuple(_facts(source)))]
    # Both tables have the same figures.
    figures = ("tensors", "parameters", word)
    if source.roles:
        rows = tuple(
            (
                role.role,
                layer_list(role.layers),
                ", ".join(sorted(role.dtypes)),
                f"{role.tensors:,}",
                f"{role.parameters:,}",
                in_unit(round(role.nbytes), scale),
            )
            for role in source.roles
        )
        blocks.append(Table(("role", "layers", "dtype", *figures), rows, "Roles", right=figures))
    dtype_rows = tuple(
        (dtype, f"{count:,}", in_unit(nbytes, scale)) for dtype, count, nbytes in source.dtypes
    )
    columns = ("dtype", "tensors", word)
    blocks.append(Table(columns, dtype_rows, "Dtypes, scales included", right=figures))
    if source.model and source.model.ignored:
        lines = tuple(f"{tensor.name}: {reason}" for tensor, reason in source.model.ignored)
        more = (f"and {len(lines) - 10} more",) if len(lines) > 10 else ()
        blocks.append(Items(lines[:10] + more, "Not weights"))
    if source.findings:
        blocks.append(Rendered((render(source.findings),), "Findings"))
    return blocks


def _facts(source: Survey) -> Iterable[tuple[str, str]]:
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
    size = both_units(inventory.nbytes)
    yield "tensors", f"{counted(len(inventory.tensors), 'tensor')}, {size}"
    if inventory.file_nbytes:
        total = sum(inventory.file_nbytes.values())
        files = counted(len(inventory.file_nbytes), "file")
        yield "files", f"{files} of tensors, {both_units(total)}"
    yield "precision", source.quantization or "as released, not quantized by somebody else"
