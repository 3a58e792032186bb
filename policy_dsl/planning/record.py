"""`policyc.json`, the provenance record of a plan: what a bundle is made of, and every hash.

It names no time, no machine and no path, so that equal builds have equal records. What many
modules share is said once, as a form, and a module is a row of known length: the record's size
is arithmetic.
"""

import hashlib
import json
from collections.abc import Mapping
from json.encoder import encode_basestring
from pathlib import PurePath
from typing import Any, cast

from policy_dsl import version
from policy_dsl.documents import RuleAt, saved
from policy_dsl.escaping import decoded
from policy_dsl.language.print_policy import canonical_text
from policy_dsl.plan import Module, Omission, Plan
from policy_dsl.treatments import Plain, describe

RECORD = "policyc.json"
# Every hash has this length, so that the record's size is known before any hash is.
UNKNOWN_HASH = "0" * 64
_HASH_NBYTES = len(f'"{UNKNOWN_HASH}"')
_SEPARATOR_NBYTES = len(", ")
_NO_ROWS = '"rows": []'
_json = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode


def record(
    plan: Plan, *, files: Mapping[str, tuple[int, str]], tensors: Mapping[str, str]
) -> tuple[bytes, str]:
    """The record of a bundle, as canonical JSON text, and its digest.

    files: name -> (bytes, SHA-256) of every file but the record itself; tensors: name ->
    SHA-256. `digest` is the SHA-256 of the record without it, compact and with sorted keys.
    """
    entries: list[saved.ModuleRow] = []
    for module, form, recipe in zip(plan.modules, plan.forms.numbers, plan.recipes, strict=True):
        hashes = [tensors[tensor.name] for tensor in module.tensors]
        entries.append((module.name, module.layer, form, recipe, hashes))
    document = _document(plan, plan.digest, files, entries)
    document["digest"] = record_digest(document)
    rows = ",\n".join(f"   {_json(row)}" for row in entries)
    text = _lines({**document, "modules": {**document["modules"], "rows": []}})
    return text.replace(_NO_ROWS, f'"rows": [\n{rows}\n  ]', 1).encode(), document["digest"]


def record_nbytes(plan: Plan, files: Mapping[str, int]) -> int:
    """Bytes of the record that a build writes. files: bytes of every other file of the bundle."""
    unknown = {name: (nbytes, UNKNOWN_HASH) for name, nbytes in files.items()}
    document = _document(plan, UNKNOWN_HASH, unknown, [])
    size = len(_lines(document).encode()) + len("\n\n  ") + len(plan.modules) * len("   ,\n")
    hash_nbytes = _HASH_NBYTES + _SEPARATOR_NBYTES
    examples = enumerate(plan.forms.examples)
    forms = [len(str(number)) + len(one.tensors) * hash_nbytes for number, one in examples]
    layers = {layer: len(_json(layer)) for layer in {module.layer for module in plan.modules}}
    row = len("[, , , , [") - _SEPARATOR_NBYTES + len("]]") + _HASH_NBYTES
    for module, form in zip(plan.modules, plan.forms.numbers, strict=True):
        name = len(encode_basestring(module.name).encode())
        size += row + name + layers[module.layer] + forms[form]
    # No comma after the last row.
    return size - len(",\n")


def record_digest(document: Mapping[str, Any]) -> str:
    """SHA-256, as hex, of a record's contents but for its own `digest`."""
    values = {key: value for key, value in document.items() if key != "digest"}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def source_id(name: str) -> str:
    """The source's name without its place on this machine."""
    # A record that names a path would differ from machine to machine.
    path = PurePath(name)
    return path.name if path.is_absolute() else name


def _document(
    plan: Plan, plan_digest: str, files: Mapping[str, tuple[int, str]], rows: list[saved.ModuleRow]
) -> saved.RecordDocument:
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
            "files": {name: {"nbytes": n, "sha256": None} for name, n in plan.source_files.items()},
        },
        "statistics": {
            one.name: {
                "file": decoded(PurePath(one.path).name),
                "sha256": one.sha256 or UNKNOWN_HASH,
            }
            for one in plan.statistics
        },
        "calibration": None,
        "transforms": [plan.pruning.entry] if plan.pruning else [],
        # Those of pruned experts follow from the numbers of the others.
        "omitted": [_omission(omission) for omission in plan.omitted if omission.expert is None],
        "files": {name: {"nbytes": n, "sha256": sha256} for name, (n, sha256) in files.items()},
        "forms": [_form(plan, module) for module in plan.forms.examples],
        "modules": {"columns": ("name", "layer", "form", "recipe", "sha256"), "rows": rows},
        "digest": UNKNOWN_HASH,
    }


def _omission(omission: Omission) -> saved.RecordedOmission:
    entry: saved.RecordedOmission = {"name": omission.tensor.name, "reason": omission.reason}
    if omission.equals:
        # A build compares them before it writes anything.
        entry["equals"] = omission.equals
    return entry


def _form(plan: Plan, module: Module) -> saved.RecordedForm:
    form: saved.RecordedForm = {
        "role": module.role,
        "treatment": _treatment(module),
        "shape": list(module.shape),
        "dtype": module.dtype,
        "parts": list(module.suffixes),
        "rule": plan.rule_of(module)[0],
        "rule_at": _rule_at(plan, module),
    }
    if module.added:
        form["added"] = module.added
    return form


def _rule_at(plan: Plan, module: Module) -> RuleAt | None:
    """Where the rule that decided is, from the folder of the policy; its file's name elsewhere."""
    place, source = plan.rule_of(module)[1], plan.policy.source
    if place is None or source is None:
        return place
    path, folder = PurePath(place["path"]), PurePath(source.name).parent
    inside = path.relative_to(folder) if path.is_relative_to(folder) else PurePath(path.name)
    return {**place, "path": inside.as_posix()}


def _treatment(module: Module) -> saved.RecordedTreatment:
    # What a scheme does not have is left out rather than null.
    coded = module.treatment
    document: saved.RecordedTreatment = {"action": cast("Any", module.written)}
    if isinstance(coded, Plain):
        return document if module.written == "raw" else {**document, "dtype": describe(coded)}
    document |= {"scheme": coded.scheme, "bits": coded.bits, "method": coded.method}
    document["symmetric"] = coded.symmetric
    if coded.group_size:
        document["group_size"] = coded.group_size
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
