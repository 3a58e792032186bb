"""A bundle's provenance record, read: each of its fields is checked before it is used."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from policy_dsl import version
from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import fail
from policy_dsl.documents.record import RecordDocument, RecordDocumentV1
from policy_dsl.documents.values import first_defect
from policy_dsl.escaping import shown
from policy_dsl.formats import TensorForm
from policy_dsl.inventory import TensorInfo
from policy_dsl.plan import Plan, Pruning
from policy_dsl.planning.record import RECORD, record_digest, source_id
from policy_dsl.regular_files import read_whole, refuse_placeholder
from policy_dsl.treatments import Action, Coded, Plain, Stored, Unread

# Three times that of the largest model, with a module for every expert.
LARGEST_RECORD = 128 * 2**20
# Version of a record -> the type of its document.
DOCUMENTS: Mapping[int, Any] = {1: RecordDocumentV1, 2: RecordDocument}
_LONGEST = 200


@dataclass(frozen=True, slots=True)
class BundleModule:
    """One module of a bundle. role is empty and layer None where no record names them.

    shape: logical, of the values that the tensors hold; dtype: of these values. tensors: by
    part, as they are on disk. added: how many of the first axis, at its end, no source has.
    written: the action of the rule, such as `keep`.
    """

    name: str
    role: str
    layer: int | None
    treatment: Stored | Unread
    shape: tuple[int, ...]
    dtype: str
    tensors: Mapping[str, TensorInfo]
    added: int = 0
    written: Action = "quantize"

    @property
    def parts(self) -> dict[str, TensorForm]:
        """Dtype and shape of each of its tensors."""
        return {part: (tensor.dtype, tensor.shape) for part, tensor in self.tensors.items()}

    @property
    def parameters(self) -> int:
        """Values of the model in the module; 0 if that is not known."""
        if isinstance(self.treatment, Unread):
            return 0
        values = prod(self.shape)
        return values - values // self.shape[0] * self.added if self.added else values

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Record:
    """What a record says. modules: as it describes them, without their tensors.

    policy: its name. source: its name. statistics: names of those that decided values.
    omitted: source tensor -> the one that has its values, or an empty text. files: name ->
    (bytes, SHA-256). owners: tensor -> its module. tensors: tensor -> SHA-256. codec_version:
    None in records of version 1.
    """

    policyc: str
    codec_version: int | None
    policy: str
    target: str
    source: str
    source_digest: str
    fp8_rule: str
    statistics: frozenset[str]
    pruning: Pruning | None
    omitted: Mapping[str, str]
    modules: Mapping[str, BundleModule]
    files: Mapping[str, tuple[int, str]]
    owners: Mapping[str, str]
    tensors: Mapping[str, str]


# Modules by name, tensor -> its module, tensor -> SHA-256.
_Modules = tuple[Mapping[str, BundleModule], Mapping[str, str], Mapping[str, str]]


def read_record(folder: Path) -> Record | None:
    """The bundle's provenance record, None if there is none.

    Raises: PolicyError (bad-record) if it is not what the published schema says, or its own
    digest does not fit.
    """
    path = folder / RECORD
    # Also a link that leads nowhere: somebody meant a record to be there.
    if not os.path.lexists(path):
        return None
    try:
        content = read_whole(path, most=LARGEST_RECORD)
        refuse_placeholder(RECORD, content, len(content))
        return _checked(parse_json(content))
    except ValueError as error:
        raise fail("bad-record", path=str(folder), reason=str(error)) from None


def _checked(document: Any) -> Record:
    """The record that JSON values are. Raises: ValueError at the first that it cannot have."""
    version = document.get("schema_version") if isinstance(document, dict) else None
    # A later version may well be right, only not for this program.
    if isinstance(version, int) and version not in DOCUMENTS:
        known = " and ".join(map(str, DOCUMENTS))
        raise ValueError(f"its schema_version is {version}; this policyc reads {known}")
    # Before its fields, whose findings would repeat such text.
    try:
        digest = record_digest(document) if isinstance(document, dict) else ""
    except UnicodeEncodeError:
        raise ValueError("it has text that is not Unicode: half of a surrogate pair") from None
    is_first = type(version) is int and version == 1
    defect = first_defect(document, DOCUMENTS[1 if is_first else 2])
    if defect is not None:
        raise ValueError(defect[:_LONGEST])
    record = record_of(document)
    # The hashes in it are worth nothing if anyone can edit them.
    if document["digest"] != digest:
        raise ValueError("it was edited: its own digest does not fit")
    return record


def record_of(document: Mapping[str, Any]) -> Record:
    """The record of a document whose fields are as its type says.

    Raises: ValueError if a module or tensor is listed twice, or a row names no form.
    """
    read = _modules_v1 if document["schema_version"] == 1 else _modules
    modules, owners, tensors = read(document)
    source = document["source"]
    return Record(
        policyc=document["policyc"],
        codec_version=document.get("codec_version"),
        policy=document["policy"]["name"],
        target=document["target"],
        source=source["id"],
        source_digest=source["digest"],
        fp8_rule=source["fp8_rule"],
        statistics=frozenset(document.get("statistics", ())),
        pruning=_pruning(document["transforms"]),
        omitted={entry["name"]: entry.get("equals", "") for entry in document["omitted"]},
        modules=modules,
        files={name: (file["nbytes"], file["sha256"]) for name, file in document["files"].items()},
        owners=owners,
        tensors=tensors,
    )


def planned_record(plan: Plan, files: Mapping[str, tuple[int, str]]) -> Record:
    """What the record of a bundle will say but for hashes of tensors. files: as `Record` has."""
    modules = {}
    for module in plan.modules:
        what = module.treatment, module.shape, module.dtype
        name, role, layer = module.name, module.role, module.layer
        modules[name] = BundleModule(name, role, layer, *what, {}, module.added, module.written)
    owners = {tensor.name: module.name for module in plan.modules for tensor in module.tensors}
    return Record(
        policyc=version(),
        codec_version=plan.codec_version,
        policy=plan.policy.name,
        target=plan.target,
        source=source_id(plan.model.id),
        source_digest=plan.source_digest,
        fp8_rule=plan.fp8_rule,
        statistics=frozenset(file.name for file in plan.statistics),
        pruning=plan.pruning,
        omitted={one.tensor.name: one.equals for one in plan.omitted if one.expert is None},
        modules=modules,
        files=files,
        owners=owners,
        tensors={},
    )


def _modules(document: Mapping[str, Any]) -> _Modules:
    forms = [(_module("", None, form), form["parts"]) for form in document["forms"]]
    modules: dict[str, BundleModule] = {}
    listed: list[tuple[str, str, str]] = []
    rows = document["modules"]["rows"]
    for at, (name, layer, number, _, hashes) in enumerate(rows):
        form, parts = forms[number] if number < len(forms) else (None, ())
        if form is None or len(hashes) != len(parts):
            reason = f"there is no form {number} with {len(hashes)} parts"
            raise ValueError(f"modules.rows.{at}: {reason}")
        what = form.treatment, form.shape, form.dtype
        modules[name] = BundleModule(name, form.role, layer, *what, {}, form.added, form.written)
        names = [f"{name}.{part}" if part else name for part in parts]
        listed += zip(names, [name] * len(names), hashes, strict=True)
    _refuse_repeated("modules.rows", len(modules), [row[0] for row in rows])
    owners = {tensor: module for tensor, module, _ in listed}
    _refuse_repeated("modules.rows", len(owners), [tensor for tensor, _, _ in listed])
    return modules, owners, {tensor: sha256 for tensor, _, sha256 in listed}


def _modules_v1(document: Mapping[str, Any]) -> _Modules:
    entries = document["modules"].items()
    modules = {path: _module(path, entry["layer"], entry) for path, entry in entries}
    owners = {name: path for path, entry in entries for name in entry["tensors"]}
    for path, entry in entries:
        parts = [name.rpartition(".")[2] for name in entry["tensors"]]
        _refuse_repeated(f"modules.{path}.tensors", len(set(parts)), parts)
    listed = [name for _, entry in entries for name in entry["tensors"]]
    _refuse_repeated("modules.tensors", len(owners), listed)
    return modules, owners, document["tensors"]


def _refuse_repeated(where: str, different: int, names: Sequence[str]) -> None:
    """Raises: ValueError with the first name that is there twice, if not all are different."""
    if different < len(names):
        ((name, _),) = Counter(names).most_common(1)
        raise ValueError(f"{where}: {shown(name)} is listed twice"[:_LONGEST])


def _module(name: str, layer: int | None, entry: Mapping[str, Any]) -> BundleModule:
    said = entry["treatment"]
    stored: Stored = Plain(entry["dtype"])
    if said["action"] == "quantize":
        stored = Coded(
            scheme=said.get("scheme", ""),
            bits=said.get("bits", 0),
            group_size=said.get("group_size", 0),
            symmetric=said.get("symmetric", False),
            method=said.get("method", ""),
        )
    return BundleModule(
        name=name,
        role=entry["role"],
        layer=layer,
        treatment=stored,
        shape=tuple(entry["shape"]),
        dtype=entry["dtype"],
        tensors={},
        added=entry.get("added", 0),
        written=said["action"],
    )


def _pruning(transforms: list[Mapping[str, Any]]) -> Pruning | None:
    """The experts that a record says its bundle keeps; None if it says nothing of them."""
    for transform in transforms:
        kept = {int(layer): tuple(old) for layer, old in transform["kept"].items()}
        return Pruning(transform["before"], kept, transform["by"] or "")
    return None
