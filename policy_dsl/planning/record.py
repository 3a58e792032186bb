"""`policyc.json`, the provenance record of a plan: what a bundle is made of, and every hash.

It names no time, no machine and no path, so that equal builds have equal records. What many
modules share is said once, as a form, and a module is a row of known length: the record's size
is arithmetic.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from functools import cache
from pathlib import PurePath
from typing import Any, NamedTuple, cast

from policy_dsl.documents.common import RuleAt
from policy_dsl.documents.record import (
    ModuleRow,
    RecordDocument,
    RecordedForm,
    RecordedOmission,
    RecordedTransform,
    RecordedTreatment,
)
from policy_dsl.escaping import decoded
from policy_dsl.language.print_policy import canonical_text
from policy_dsl.plan import Module, Omission, Plan
from policy_dsl.resources import version
from policy_dsl.treatments import Coded, Plain, describe, has_symmetry_choice
from policy_dsl.views import View

RECORD = "policyc.json"
# Every hash has this length, so that the record's size is known before any hash is.
UNKNOWN_HASH = "0" * 64
_HASH_NBYTES = len(f'"{UNKNOWN_HASH}"')
_SEPARATOR_NBYTES = len(", ")
_NO_ROWS = '"rows": []'
_json = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode


class Shared(NamedTuple):
    """What modules have in common: one module of each form, and the form of every module."""

    examples: Sequence[Module]
    numbers: Sequence[int]


def record(
    plan: Plan, *, files: Mapping[str, tuple[int, str]], tensors: Mapping[str, str]
) -> tuple[bytes, str]:
    """The record of a bundle, as canonical JSON text, and its digest.

    files: name -> (bytes, SHA-256) of every file but the record itself; tensors: name ->
    SHA-256. `digest` is the SHA-256 of the record without it, compact and with sorted keys.
    """
    document = record_document(plan, files=files, tensors=tensors)
    document["digest"] = record_digest(document)
    rows = ",\n".join(f"   {_json(row)}" for row in document["modules"]["rows"])
    modules = {**document["modules"], "rows": []}
    text = _lines({**document, "modules": modules})
    return text.replace(_NO_ROWS, f'"rows": [\n{rows}\n  ]', 1).encode(), document["digest"]


def record_nbytes(plan: Plan, files: Mapping[str, int]) -> int:
    """Bytes of the record that a build writes. files: bytes of every other file of the bundle."""
    unknown = {name: (nbytes, UNKNOWN_HASH) for name, nbytes in files.items()}
    shared = by_form(plan.modules)
    document = _document(plan, UNKNOWN_HASH, unknown, shared, [])
    size = len(_lines(document).encode()) + len("\n\n  ") + len(plan.modules) * len("   ,\n")
    forms = [
        len(str(number)) + len(example.tensors) * (_HASH_NBYTES + _SEPARATOR_NBYTES)
        for number, example in enumerate(shared.examples)
    ]
    layers = {layer: len(_json(layer)) for layer in {module.layer for module in plan.modules}}
    row = len('["", , , , [') - _SEPARATOR_NBYTES + len("]]") + _HASH_NBYTES
    for module, form in zip(plan.modules, shared.numbers, strict=True):
        size += row + _nbytes(module.name) + layers[module.layer] + forms[form]
    # No comma after the last row.
    return size - len(",\n")


def _nbytes(text: str) -> int:
    """Bytes of a text in JSON, without its quotes."""
    is_plain = text.isascii() and text.isprintable() and '"' not in text and "\\" not in text
    return len(text) if is_plain else len(_json(text).encode()) - 2


def record_document(
    plan: Plan, *, files: Mapping[str, tuple[int, str]], tensors: Mapping[str, str]
) -> RecordDocument:
    """The record as JSON values; its `digest` is unknown."""
    shared = by_form(plan.modules)
    made = list(recipes(plan, shared))
    rows: list[ModuleRow] = []
    for module, form, recipe in zip(plan.modules, shared.numbers, made, strict=True):
        hashes = [tensors[tensor.name] for tensor in module.tensors]
        rows.append((module.name, module.layer, form, recipe, hashes))
    return _document(plan, _plan_digest(plan, made), files, shared, rows)


def record_digest(document: Mapping[str, Any]) -> str:
    """SHA-256, as hex, of a record's contents but for its own `digest`."""
    return _digest({key: value for key, value in document.items() if key != "digest"})


def by_form(modules: Sequence[Module]) -> Shared:
    """The modules by what they have in common; forms in the order in which they appear."""
    forms: dict[tuple[object, ...], int] = {}
    examples: list[Module] = []
    numbers = []
    for module in modules:
        form = (
            *(module.role, module.treatment, module.written, module.decided_by),
            *(module.shape, module.dtype, module.added, suffixes(module)),
            tuple(sorted({view.tensor.dtype for view in module.sources})),
        )
        number = forms.setdefault(form, len(forms))
        numbers.append(number)
        if number == len(examples):
            examples.append(module)
    return Shared(examples, numbers)


def suffixes(module: Module) -> tuple[str, ...]:
    """What the names of a module's tensors have beyond its own; empty if nothing."""
    known = len(f"{module.name}.")
    return tuple([tensor.name[known:] for tensor in module.tensors])


def recipes(plan: Plan, shared: Shared) -> Iterator[str]:
    """SHA-256, as hex, of all that decides a module's bytes but the weights and the encoder.

    Where the values are in the source and how they become those of the model; what happens to
    them, and with which statistics. Of two modules that have one recipe, one codec version and
    equal shards, the bytes are equal.
    """
    texts = [_json(_decisive(plan, example)) for example in shared.examples]
    for module, form in zip(plan.modules, shared.numbers, strict=True):
        tails = [_short(tensor.tail) for tensor in module.tensors if tensor.tail]
        own = _json([[_origin(view) for view in module.sources], tails])
        yield hashlib.sha256(f"{texts[form]}{own}".encode()).hexdigest()


def _decisive(plan: Plan, module: Module) -> list[Any]:
    """What the modules of a form share, and what decides their bytes."""
    method = module.treatment.method if isinstance(module.treatment, Coded) else ""
    used = [file for file in plan.statistics if method in file.methods]
    statistics = {file.name: file.sha256 for file in used}
    parts = [[part.part, part.dtype, part.shape, part.by_columns] for part in module.tensors]
    return [
        *(plan.target, plan.fp8_rule, statistics, astuple(module.treatment)),
        *(module.dtype, module.shape, module.added, module.together, parts),
    ]


def _origin(view: View) -> list[Any]:
    return [view.tensor.name, view.scale and view.scale.name, *map(repr, view.operations)]


def plan_digest(plan: Plan) -> str:
    """SHA-256, as hex, of all that decides the bytes of the tensor files.

    Where a rule stands and what the policy says besides do not matter.
    """
    return _plan_digest(plan, recipes(plan, by_form(plan.modules)))


def _plan_digest(plan: Plan, made: Iterable[str]) -> str:
    # Not the rules: where a policy file lies must not make another plan of it.
    digest = hashlib.sha256(plan.source_digest.encode())
    for module, recipe in zip(plan.modules, made, strict=True):
        places = [(tensor.file, tensor.start) for tensor in module.tensors]
        digest.update(f"{module.name!r} {recipe} {places}\n".encode())
    return digest.hexdigest()


def source_id(name: str) -> str:
    """The source's name without the place where it lies on this machine."""
    # A record that names a path would differ from machine to machine.
    path = PurePath(name)
    return path.name if path.is_absolute() else name


def _document(
    plan: Plan,
    plan_digest: str,
    files: Mapping[str, tuple[int, str]],
    shared: Shared,
    rows: list[ModuleRow],
) -> RecordDocument:
    policy = plan.policy
    return {
        "schema_version": 2,
        "kind": "bundle",
        "policyc": version(),
        "policy": {
            "name": policy.name,
            "digest": plan.policy_digest,
            "text": policy.source.text if policy.source else None,
            "variables": dict(policy.vars),
            # With `extends` or `--set` the author's own file is only a part of the policy.
            "resolved": canonical_text(policy),
        },
        "target": plan.target,
        "codec_version": plan.codec_version,
        "plan_digest": plan_digest,
        "source": {
            "id": source_id(plan.model.id),
            "digest": plan.source_digest,
            "nbytes": plan.source_nbytes,
            "fp8_rule": plan.fp8_rule,
            "commit": plan.source_commit,
            "files": {
                name: {"nbytes": nbytes, "sha256": None}
                for name, nbytes in plan.source_files.items()
            },
        },
        "statistics": {
            file.name: {
                "file": decoded(PurePath(file.path).name),
                "sha256": file.sha256 or UNKNOWN_HASH,
            }
            for file in plan.statistics
        },
        "calibration": None,
        "transforms": _transforms(plan),
        # Those of pruned experts follow from the numbers of the others.
        "omitted": [_omission(omission) for omission in plan.omitted if omission.expert is None],
        "files": {
            name: {"nbytes": nbytes, "sha256": sha256} for name, (nbytes, sha256) in files.items()
        },
        "forms": [_form(plan, module) for module in shared.examples],
        "modules": {"columns": ("name", "layer", "form", "recipe", "sha256"), "rows": rows},
        "digest": UNKNOWN_HASH,
    }


def _transforms(plan: Plan) -> list[RecordedTransform]:
    """What was done to the model: which experts of each layer the bundle has, by old number."""
    pruning = plan.pruning
    if pruning is None:
        return []
    kept = {str(layer): list(numbers) for layer, numbers in pruning.kept.items()}
    return [
        {
            "prune": "experts",
            "by": pruning.by or None,
            "before": pruning.before,
            "to": pruning.count,
            "kept": kept,
        }
    ]


def _omission(omission: Omission) -> RecordedOmission:
    entry: RecordedOmission = {"name": omission.tensor.name, "reason": omission.reason}
    if omission.equals:
        # A build compares them before it writes anything.
        entry["equals"] = omission.equals
    return entry


def _form(plan: Plan, module: Module) -> RecordedForm:
    form: RecordedForm = {
        "role": module.role,
        "treatment": _treatment(module),
        "shape": list(module.shape),
        "dtype": module.dtype,
        "parts": list(suffixes(module)),
        "rule": plan.rule_text(module),
        "rule_at": _rule_at(plan, module),
    }
    if module.added:
        form["added"] = module.added
    return form


def _rule_at(plan: Plan, module: Module) -> RuleAt | None:
    """Where the rule that decided is, from the folder of the policy; its file's name elsewhere."""
    place, source = plan.rule_at(module), plan.policy.source
    if place is None or source is None:
        return place
    path, folder = PurePath(place["path"]), PurePath(source.name).parent
    inside = path.relative_to(folder) if path.is_relative_to(folder) else PurePath(path.name)
    return {**place, "path": inside.as_posix()}


def _treatment(module: Module) -> RecordedTreatment:
    # What a scheme does not have is left out rather than null.
    coded = module.treatment
    document: RecordedTreatment = {"action": cast("Any", module.written)}
    if isinstance(coded, Plain):
        if module.written != "raw":
            document["dtype"] = describe(coded)
        return document
    document |= {"scheme": coded.scheme, "bits": coded.bits, "method": coded.method}
    if coded.group_size:
        document["group_size"] = coded.group_size
    if has_symmetry_choice(coded.scheme):
        document["symmetric"] = coded.symmetric
    return document


def _lines(document: Mapping[str, Any]) -> str:
    """The document as text: its keys in order, and every entry of them a line."""
    parts = []
    for key in sorted(document):
        value = document[key]
        if isinstance(value, dict) and value:
            inner = ",\n".join(f"  {_json(name)}: {_json(value[name])}" for name in sorted(value))
            text = f"{{\n{inner}\n }}"
        elif isinstance(value, list) and value:
            inner = ",\n".join(f"  {_json(entry)}" for entry in value)
            text = f"[\n{inner}\n ]"
        else:
            text = _json(value)
        parts.append(f" {_json(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


@cache
def _short(content: bytes) -> str:
    """The digest of some bytes of a tensor, of which thousands may have the same."""
    return hashlib.sha256(content).hexdigest() if content else ""


def _digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
