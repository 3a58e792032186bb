"""The files of a JANGTQ bundle beside its shards, written from a plan and read back.

Source: jang 2.5.50, its converter for MiniMax, its rebundler and `build_jangtq_sidecar`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from emitters.jangtq_prestack.config import config, jang_config
from emitters.jangtq_prestack.names import MXTQ, SEED
from emitters.jangtq_prestack.order import file_order
from emitters.jangtq_prestack.padding import added
from emitters.jangtq_prestack.sidecar import SIDECAR, Code, sidecar
from emitters.jangtq_prestack.sizes import flat, row_length
from emitters.jangtq_prestack.spec import AFFINE_WIDTHS, SPEC
from emitters.jangtq_prestack.structure import CONFIG, JANG_CONFIG, defects
from emitters.jangtq_prestack.templates import edited
from emitters.jangtq_prestack.widths import Widths, read_widths, widths_of
from policy_dsl.diagnostics import fail
from policy_dsl.formats import Claim, Forms, TensorForm, document
from policy_dsl.plan import Plan, coded_modules
from policy_dsl.treatments import Coded

__all__ = ["added", "claims", "defects", "edited", "metadata"]

INDEX = "model.safetensors.index.json"
_MXTQ_PARTS = {"tq_packed", "tq_norms", "tq_bits"}
_GROUP_PARTS = {"scales", "biases"}


def metadata(plan: Plan) -> dict[str, bytes]:
    """`config.json`, `jang_config.json`, the index and the runtime's tables, by name."""
    widths = widths_of(plan)
    return {
        CONFIG: _json(config(plan, widths)),
        JANG_CONFIG: _json(jang_config(plan, widths)),
        INDEX: _json(_index(plan)),
        SIDECAR: sidecar(_codes(plan)),
    }


def claims(files: Mapping[str, bytes], forms: Forms) -> dict[str, Claim]:
    """What jang's readers understand of these files: quantized module -> scheme, width, shape.

    Modules that lack a part are among them, with the shape that the others tell.
    Raises: ValueError if the files are not those of a JANGTQ bundle; PolicyError if
    config.json says that they are, and they are broken or of another seed.
    """
    known = document(files, CONFIG)
    marked = known.get("weight_format") == "mxtq"
    try:
        # jang's loader does without this one.
        jang = document({JANG_CONFIG: b"{}", **files}, JANG_CONFIG)
        if not marked and jang.get("weight_format") != "mxtq":
            raise ValueError("weight_format is not mxtq")
        if jang.get("mxtq_seed", SEED) != SEED:
            raise ValueError(f"mxtq_seed is {jang['mxtq_seed']!r}, and only {SEED} is known")
        return dict(_claims(flat(known), read_widths(known, jang), forms))
    except ValueError as error:
        # No other format may make something of what this one's mark stands on.
        if marked:
            path = f"{CONFIG} or {JANG_CONFIG}"
            raise fail("bad-bundle-metadata", path=path, reason=str(error)) from None
        raise


def _claims(known: Mapping[str, Any], widths: Widths, forms: Forms) -> Iterator[tuple[str, Claim]]:
    for path, parts in forms.items():
        if parts.keys() & _MXTQ_PARTS:
            yield path, _mxtq_claim(path, parts, known, widths)
        elif parts.keys() & _GROUP_PARTS or parts.get("weight", ("",))[0] == "U32":
            own = widths.modules.get(path)
            coded = own if isinstance(own, Coded) else widths.affine
            is_told = coded is own or widths.affine_is_told
            yield path, _affine_claim(parts, coded, is_told=is_told)


def _mxtq_claim(
    path: str, parts: Mapping[str, TensorForm], known: Mapping[str, Any], widths: Widths
) -> Claim:
    packed = parts["tq_packed"][1] if "tq_packed" in parts else ()
    rows = parts["tq_norms"][1] if "tq_norms" in parts else packed[:-1]
    key, columns = row_length(known, path)
    if type(columns) is not int:
        raise ValueError(f"{key} is {columns!r}, and no length of rows")
    bits = widths.coded(path)
    if bits is None:
        words = packed[-1] if packed else 0
        fitting = (width for width in range(1, 5) if -(-columns // (32 // width)) == words)
        bits = next(fitting, 0)
    return Claim(Coded(MXTQ, bits, 0, True, ""), (*rows, columns), "F32")


def _affine_claim(parts: Mapping[str, TensorForm], treatment: Coded, *, is_told: bool) -> Claim:
    """The claim about affine groups; a width that no file tells follows from the shapes."""
    codes, (dtype, groups) = (parts.get(part, ("F16", ())) for part in ("weight", "scales"))
    columns = groups[-1] * treatment.group_size if groups else 0
    if not is_told:
        bits = codes[1][-1] * 32 // columns if columns and codes[1] else 0
        treatment = replace(treatment, bits=bits if bits in AFFINE_WIDTHS else 8)
    return Claim(treatment, (*codes[1][:-1], columns) if columns else (), dtype)


def _index(plan: Plan) -> dict[str, Any]:
    order = file_order(plan.modules)
    places = {tensor.name: tensor.file for module in plan.modules for tensor in module.tensors}
    held: dict[str, list[str]] = {}
    for tensor in order:
        held.setdefault(places[tensor.name], []).append(tensor.name)
    about: dict[str, Any] = {
        "format": "jangtq",
        # The files' bytes, headers included, as jang's rebundler counts them.
        "total_size": sum(file.nbytes or 0 for file in plan.files if file.kind == "tensors"),
    }
    if SPEC.layout(plan.policy) == "prestacked":
        about["rebundled_layout"] = "prestacked-switch_mlp"
    weight_map = {name: file for file, names in held.items() for name in names}
    return {"metadata": about, "weight_map": weight_map}


def _codes(plan: Plan) -> Iterator[Code]:
    for module, coded in coded_modules(plan.modules):
        if coded.scheme == MXTQ:
            yield module.shape[-1], coded.bits


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode()
