"""A bundle's provenance record, read: each of its fields is checked before it is used."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import isfinite, prod
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.protocols import Validator
from jsonschema.validators import extend

from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import fail
from policy_dsl.formats import TensorForm
from policy_dsl.inventory import TensorInfo
from policy_dsl.plan import Pruning
from policy_dsl.planning.record import RECORD, SCHEMA_VERSION, record_digest
from policy_dsl.regular_files import read_whole, refuse_placeholder
from policy_dsl.resources import document_schemas
from policy_dsl.treatments import Action, Coded, Plain, Stored, Unread

# Three times that of the largest model, with a module for every expert.
LARGEST_RECORD = 128 * 2**20
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
    (bytes, SHA-256). owners: tensor -> its module. tensors: tensor -> SHA-256.
    """

    policyc: str
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
        document: Any = parse_json(content)
        _require_version(document)
        digest = _digest(document)
        record = parse_record(document)
        # The hashes in it are worth nothing if anyone can edit them.
        if document["digest"] != digest:
            raise ValueError("it was edited: its own digest does not fit")
    except ValueError as error:
        raise fail("bad-record", path=str(folder), reason=str(error)) from None
    return record


def parse_record(document: Any) -> Record:
    """The record that JSON values are. Raises: ValueError at the first that it cannot have."""
    defect = next(record_defects(document), None)
    if defect is not None:
        raise ValueError(defect)
    owners = {name: path for path, held in document["modules"].items() for name in held["tensors"]}
    return Record(
        policyc=document["policyc"],
        policy=document["policy"]["name"],
        target=document["target"],
        source=document["source"]["id"],
        source_digest=document["source"]["digest"],
        fp8_rule=document["source"]["fp8_rule"],
        statistics=frozenset(document.get("statistics", ())),
        pruning=_pruning(document["transforms"]),
        omitted={entry["name"]: entry.get("equals", "") for entry in document["omitted"]},
        modules={name: _module(name, held) for name, held in document["modules"].items()},
        files={name: (file["nbytes"], file["sha256"]) for name, file in document["files"].items()},
        owners=owners,
        tensors=document["tensors"],
    )


def _module(name: str, held: Mapping[str, Any]) -> BundleModule:
    said = held["treatment"]
    stored: Stored = Plain(held["dtype"])
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
        role=held["role"],
        layer=held["layer"],
        treatment=stored,
        shape=tuple(held["shape"]),
        dtype=held["dtype"],
        tensors={},
        added=held.get("added", 0),
        written=said["action"],
    )


def _pruning(transforms: list[Mapping[str, Any]]) -> Pruning | None:
    """The experts that a record says its bundle keeps; None if it says nothing of them."""
    for transform in transforms:
        kept = {int(layer): tuple(old) for layer, old in transform["kept"].items()}
        return Pruning(transform["before"], kept, transform["by"] or "")
    return None


def _digest(document: Any) -> str:
    """What a record's own digest must be. Raises: ValueError if its text is not Unicode."""
    # Before its fields, whose findings would repeat such text.
    try:
        return record_digest(document) if isinstance(document, dict) else ""
    except UnicodeEncodeError:
        raise ValueError("it has text that is not Unicode: half of a surrogate pair") from None


def _require_version(document: Any) -> None:
    version = document.get("schema_version") if isinstance(document, dict) else None
    # A later version may well be right, only not for this program.
    if isinstance(version, int) and version != SCHEMA_VERSION:
        raise ValueError(f"its schema_version is {version}; this policyc reads {SCHEMA_VERSION}")


def record_defects(document: Any) -> Iterator[str]:
    """What of a record is not as the schema says, with the place of each field; lazily.

    Stricter than JSON Schema in this: 2.0 is not a whole number, and NaN is not a number.
    """
    defect = None
    for defect in _checks().iter_errors(document):
        place = ".".join(str(key) for key in defect.absolute_path)
        reason = defect.message.split("\n", 1)[0]
        yield (f"{place}: {reason}" if place else reason)[:_LONGEST]
    if defect is None:
        yield from _repeated(document["modules"])


def _repeated(modules: Mapping[str, Any]) -> Iterator[str]:
    """Tensors of two modules, and parts that a module has twice."""
    owners: dict[str, str] = {}
    for path, module in modules.items():
        parts = set()
        for name in module["tensors"]:
            part = name.rpartition(".")[2]
            if part in parts or owners.setdefault(name, path) != path:
                yield f"modules.{path}.tensors: {name} is listed twice"[:_LONGEST]
            parts.add(part)


@cache
def record_schema() -> dict[str, Any]:
    """The published JSON Schema of the record."""
    text = (document_schemas() / "bundle.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


@cache
def _checks() -> Validator:
    types = Draft202012Validator.TYPE_CHECKER.redefine_many(
        {
            "integer": lambda _, value: type(value) is int,
            "number": lambda _, value: type(value) in (int, float) and isfinite(value),
        }
    )
    strict = extend(Draft202012Validator, type_checker=types)  # type: ignore[no-untyped-call]
    checks: Validator = strict(record_schema())
    return checks
