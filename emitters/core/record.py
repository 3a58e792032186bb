"""A bundle's provenance record, read: each of its fields is checked before it is used."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from policy_dsl import version
from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import fail
from policy_dsl.documents import first_defect
from policy_dsl.documents.saved import RecordDocument, RecordDocumentV1
from policy_dsl.escaping import shown
from policy_dsl.formats import TensorForm
from policy_dsl.inventory import TensorInfo
from policy_dsl.plan import Plan, Pruning
from policy_dsl.planning.record import RECORD, UNKNOWN_HASH, record_digest, source_id
from policy_dsl.regular_files import read_whole, refuse_placeholder
from policy_dsl.treatments import Action, Coded, Plain, Stored, Unread

# Three times that of the largest model, with a module for every expert.
LARGEST_RECORD = 128 * 2**20
_LONGEST = 200


class BundleModule(NamedTuple):
    """One module of a bundle. role is empty and layer None where no record names them.

    shape, dtype: of the values, logical. tensors: by part, as they are on disk. added: how many of
    the first axis, at its end, no source has. written: the action of the rule, such as `keep`.
    """

    name: str
    role: str
    layer: int | None
    treatment: Stored | Unread
    shape: tuple[int, ...]
    dtype: str
    tensors: Mapping[str, TensorInfo] = MappingProxyType({})
    added: int = 0
    written: Action = "quantize"

    @property
    def parts(self) -> dict[str, TensorForm]:
        """Dtype and shape of each of its tensors."""
        return {part: (tensor.dtype, tensor.shape) for part, tensor in self.tensors.items()}

    @property
    def parameters(self) -> int:
        """Values of the model in the module; 0 if that is not known."""
        values = 0 if isinstance(self.treatment, Unread) else prod(self.shape)
        return values - values // self.shape[0] * self.added if self.added else values


@dataclass(frozen=True)
class Record:
    """What a record says. modules: as it describes them, without their tensors.

    codec_version: None in records of version 1. policy, source: their names. statistics: names of
    those that decided values. omitted: source tensor -> the one that has its values, or an empty
    text. files: name -> (bytes, SHA-256). owners: tensor -> module. tensors: tensor -> SHA-256.
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
    """The bundle's provenance record, None without one. Raises: PolicyError if it is invalid."""
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
    fields = document if isinstance(document, dict) else {}
    version = fields.get("schema_version")
    # A later version may well be right, only not for this program.
    if isinstance(version, int) and version not in (1, 2):
        raise ValueError(f"its schema_version is {version}; this policyc reads 1 and 2")
    # Before its fields, whose findings would repeat such text.
    try:
        digest = record_digest(fields)
    except UnicodeEncodeError:
        raise ValueError("it has text that is not Unicode: half of a surrogate pair") from None
    is_first = type(version) is int and version == 1
    if defect := first_defect(document, RecordDocumentV1 if is_first else RecordDocument):
        raise ValueError(defect[:_LONGEST])
    modules, owners, tensors = (_modules_v1 if is_first else _modules)(document)
    # The hashes in it are worth nothing if anyone can edit them.
    if document["digest"] != digest:
        raise ValueError("it was edited: its own digest does not fit")
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
        pruning=Pruning.of_entries(document["transforms"]),
        omitted={entry["name"]: entry.get("equals", "") for entry in document["omitted"]},
        modules=modules,
        files={name: (file["nbytes"], file["sha256"]) for name, file in document["files"].items()},
        owners=owners,
        tensors=tensors,
    )


def planned_record(plan: Plan) -> Record:
    """What the record of a bundle will say, but for its modules and hashes."""
    files = {file.name: (file.nbytes or 0, UNKNOWN_HASH) for file in plan.files}
    files.pop(RECORD, None)
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
        modules={},
        files=files,
        owners={},
        tensors={},
    )


def _modules(document: Mapping[str, Any]) -> _Modules:
    forms = [(_module(form), form["parts"]) for form in document["forms"]]
    modules: dict[str, BundleModule] = {}
    listed: list[tuple[str, str, str]] = []
    rows = document["modules"]["rows"]
    for at, (name, layer, number, _, hashes) in enumerate(rows):
        form, parts = forms[number] if number < len(forms) else (None, ())
        if form is None or len(hashes) != len(parts):
            reason = f"there is no form {number} with {len(hashes)} parts"
            raise ValueError(f"modules.rows.{at}: {reason}")
        modules[name] = form._replace(name=name, layer=layer)
        names = (f"{name}.{part}" if part else name for part in parts)
        listed += [(tensor, name, sha256) for tensor, sha256 in zip(names, hashes, strict=True)]
    _refuse_repeated("modules.rows", [row[0] for row in rows])
    _refuse_repeated("modules.rows", [tensor for tensor, _, _ in listed])
    owners = {tensor: module for tensor, module, _ in listed}
    return modules, owners, {tensor: sha256 for tensor, _, sha256 in listed}


def _modules_v1(document: Mapping[str, Any]) -> _Modules:
    modules, listed = {}, []
    for path, entry in document["modules"].items():
        modules[path] = _module(entry)._replace(name=path, layer=entry["layer"])
        parts = [name.rpartition(".")[2] for name in entry["tensors"]]
        _refuse_repeated(f"modules.{path}.tensors", parts)
        listed += [(name, path) for name in entry["tensors"]]
    _refuse_repeated("modules.tensors", [name for name, _ in listed])
    return modules, dict(listed), document["tensors"]


def _refuse_repeated(where: str, names: Sequence[str]) -> None:
    """Raises: ValueError with the first name that is there twice."""
    if len(set(names)) < len(names):
        ((name, _),) = Counter(names).most_common(1)
        raise ValueError(f"{where}: {shown(name)} is listed twice"[:_LONGEST])


def _module(entry: Mapping[str, Any]) -> BundleModule:
    """A module as its form, or in version 1 its own entry, describes it; without a name."""
    said, dtype = entry["treatment"], entry["dtype"]
    stored: Stored = Plain(dtype)
    if said["action"] == "quantize":
        without = {"scheme": "", "bits": 0, "group_size": 0, "symmetric": False, "method": ""}
        stored = Coded(**{key: said.get(key, empty) for key, empty in without.items()})
    module = BundleModule("", entry["role"], None, stored, tuple(entry["shape"]), dtype)
    return module._replace(added=entry.get("added", 0), written=said["action"])
