"""`policyc.json`, the provenance record: what a bundle was made of and by, and every hash.

It names no time, no machine and no path, so that equal builds have equal records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, astuple
from functools import cache
from pathlib import PurePath
from typing import Any

from policy_dsl.escaping import decoded
from policy_dsl.language.print_policy import canonical_text
from policy_dsl.plan import Module, Plan
from policy_dsl.resources import version
from policy_dsl.treatments import Plain, describe, has_symmetry_choice

RECORD = "policyc.json"
SCHEMA_VERSION = 1
# Every hash has this length, so that the record's size is known before any hash is.
UNKNOWN_HASH = "0" * 64


def record(
    plan: Plan, *, files: Mapping[str, tuple[int, str]], tensors: Mapping[str, str]
) -> tuple[bytes, str]:
    """The record of a bundle, as canonical JSON text, and its digest.

    files: name -> (bytes, SHA-256) of every file but the record itself; tensors: name ->
    SHA-256. `digest` is the SHA-256 of the record without it, compact and with sorted keys.
    """
    document = record_document(plan, files=files, tensors=tensors)
    document["digest"] = record_digest(document)
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False)
    return text.encode() + b"\n", document["digest"]


def record_document(
    plan: Plan, *, files: Mapping[str, tuple[int, str]], tensors: Mapping[str, str]
) -> dict[str, Any]:
    """The record as JSON values, without its `digest`."""
    policy = plan.policy
    return {
        "schema_version": SCHEMA_VERSION,
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
        "plan_digest": plan_digest(plan),
        "source": {
            "id": source_id(plan.model.id),
            "digest": plan.source_digest,
            "nbytes": plan.source_nbytes,
            "fp8_rule": plan.fp8_rule,
        },
        **_statistics(plan),
        "transforms": _transforms(plan),
        "omitted": [
            {
                "name": omission.tensor.name,
                "reason": omission.reason,
                # A build compares them before it writes anything.
                **({"equals": omission.equals} if omission.equals else {}),
            }
            for omission in plan.omitted
            # Those of pruned experts the numbers of the others tell.
            if omission.expert is None
        ],
        "modules": {module.name: _module(module) for module in plan.modules},
        "files": {
            name: {"nbytes": nbytes, "sha256": sha256} for name, (nbytes, sha256) in files.items()
        },
        "tensors": dict(tensors),
    }


def record_digest(document: Mapping[str, Any]) -> str:
    """SHA-256, as hex, of a record's contents but for its own `digest`."""
    return _digest({key: value for key, value in document.items() if key != "digest"})


def plan_digest(plan: Plan) -> str:
    """SHA-256, as hex, of all that decides the bytes of the tensor files.

    Where a rule stands and what the policy says besides do not matter.
    """
    # Not the rules: where a policy file lies must not make another plan of it.
    modules = [
        [
            module.name,
            astuple(module.treatment),
            module.dtype,
            module.shape,
            [
                [view.tensor.name, view.scale and view.scale.name, *map(repr, view.operations)]
                for view in module.sources
            ],
            [[*astuple(tensor)[:-1], _short(tensor.tail)] for tensor in module.tensors],
        ]
        for module in plan.modules
    ]
    return _digest([plan.target, plan.fp8_rule, plan.source_digest, modules])


def source_id(name: str) -> str:
    """The source's name without the place where it lies on this machine."""
    # A record that names a path would differ from machine to machine.
    path = PurePath(name)
    return path.name if path.is_absolute() else name


def _statistics(plan: Plan) -> dict[str, Any]:
    """The entry about files of statistics, if there are any."""
    files = {
        file.name: {
            "file": decoded(PurePath(file.path).name),
            "sha256": file.sha256 or UNKNOWN_HASH,
        }
        for file in plan.statistics
    }
    return {"statistics": files} if files else {}


def _transforms(plan: Plan) -> list[dict[str, Any]]:
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


def _module(module: Module) -> dict[str, Any]:
    return {
        "role": module.role,
        "layer": module.layer,
        "shape": list(module.shape),
        # Nearly always none: what every module would say says nothing.
        **({"added": module.added} if module.added else {}),
        "dtype": module.dtype,
        "treatment": _treatment(module),
        "tensors": [tensor.name for tensor in module.tensors],
    }


def _treatment(module: Module) -> dict[str, Any]:
    # What a scheme does not have is left out rather than null.
    coded = module.treatment
    if isinstance(coded, Plain):
        word = {} if module.written == "raw" else {"dtype": describe(coded)}
        return {"action": module.written, **word}
    document = {"action": "quantize", **asdict(coded)}
    if not coded.group_size:
        del document["group_size"]
    if not has_symmetry_choice(coded.scheme):
        del document["symmetric"]
    return document


@cache
def _short(content: bytes) -> str:
    """The digest of some bytes of a tensor, of which thousands may have the same."""
    return hashlib.sha256(content).hexdigest() if content else ""


def _digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
