"""What the files of a JANGTQ bundle say to readers, and what readers stumble over in them.

Source: jang 2.5.50, its converter for MiniMax, `load_jangtq` and `verify_jangtq_prestacked`;
osaurus-ai/vmlx-swift at b298324c (read).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from emitters.checkpoints import CONFIG, document, wrong_metadata
from emitters.jangtq_prestack.side_files import SIDECAR, wrong_tables
from emitters.jangtq_prestack.spec import AFFINE_WIDTHS, JANG_CONFIG, MXTQ, SEED, projection_of
from emitters.jangtq_prestack.widths import (
    Widths,
    expert_count,
    expert_widths,
    flat,
    read_widths,
    row_length,
)
from policy_dsl.diagnostics import Diagnostic, PolicyError, fail
from policy_dsl.formats import Claim, FileContents, Forms, TensorForm, Tensors
from policy_dsl.inventory import EXPERT_NAME
from policy_dsl.roles.published_names import expert_of
from policy_dsl.treatments import Coded

_MXTQ_PARTS = {"tq_packed", "tq_norms", "tq_bits"}
_GROUP_PARTS = {"scales", "biases"}
# A cache that engines write for themselves; in a bundle it would hide the bundle's own stacks.
_CACHES = ("jangtq_stacked.safetensors", "jangtq_stacked.json")
_SHARDS = "model-*.safetensors"
# Tensors beside the stacks that have an entry for every expert.
_BY_EXPERT = frozenset({"gate", "e_score_correction_bias"})


def claims(files: FileContents, forms: Forms) -> dict[str, Claim]:
    """What jang's readers understand of these files: quantized module -> scheme, width, shape.

    Modules that lack a part are among them, with the shape that the others show.
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
        # No other format may make something of what this one's mark is on.
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
            is_stated = coded is own or widths.affine_is_stated
            yield path, _affine_claim(parts, coded, is_stated=is_stated)


def _mxtq_claim(
    path: str, parts: Mapping[str, TensorForm], known: Mapping[str, Any], widths: Widths
) -> Claim:
    packed = parts["tq_packed"][1] if "tq_packed" in parts else ()
    rows = parts["tq_norms"][1] if "tq_norms" in parts else packed[:-1]
    key, columns = row_length(known, path)
    if type(columns) is not int:
        raise ValueError(f"{key} is {columns!r}, not a length of rows")
    bits = widths.coded(path)
    if bits is None:
        words = packed[-1] if packed else 0
        fitting = (width for width in range(1, 5) if -(-columns // (32 // width)) == words)
        bits = next(fitting, 0)
    return Claim(Coded(MXTQ, bits, 0, True, ""), (*rows, columns), "F32")


def _affine_claim(parts: Mapping[str, TensorForm], treatment: Coded, *, is_stated: bool) -> Claim:
    """The claim about affine groups; a width that no file states follows from the shapes."""
    codes, (dtype, groups) = (parts.get(part, ("F16", ())) for part in ("weight", "scales"))
    columns = groups[-1] * treatment.group_size if groups else 0
    if not is_stated:
        bits = codes[1][-1] * 32 // columns if columns and codes[1] else 0
        treatment = replace(treatment, bits=bits if bits in AFFINE_WIDTHS else 8)
    return Claim(treatment, (*codes[1][:-1], columns) if columns else (), dtype)


def added(files: FileContents, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Module -> how many of its first axis, at its end, are experts that only pad.

    shapes: logical, by module. Modules without such experts are left out.
    """
    jang = document(files, JANG_CONFIG) if JANG_CONFIG in files else {}
    padding = jang.get("expert_padding")
    own = _count(padding, "original_num_local_experts")
    padded = _count(padding, "padded_num_local_experts")
    if not 0 < own < padded:
        return {}
    counts = {path: _added(path, shape, own, padded) for path, shape in shapes.items()}
    return {path: count for path, count in counts.items() if count}


def _count(padding: Any, key: str) -> int:
    """A count of experts; 0 where there is none that makes sense."""
    value = padding.get(key) if isinstance(padding, Mapping) else None
    return value if type(value) is int else 0


def _added(path: str, shape: tuple[int, ...], own: int, padded: int) -> int:
    number = expert_of(path)
    if number is not None:
        # A module of its own, nothing but added rows.
        return shape[0] if shape and number >= own else 0
    last = path.rpartition(".")[2]
    by_expert = last in _BY_EXPERT or projection_of(path) is not None
    return padded - own if by_expert and shape[:1] == (padded,) else 0


def defects(
    folder: Path, files: FileContents, tensors: Tensors, claims: Mapping[str, Claim]
) -> Iterator[Diagnostic]:
    """What readers of the format would miss, or read without a word of complaint.

    claims: of every module, found to be right.
    """
    known = document(files, CONFIG)
    for file in sorted({tensor.file or "" for tensor in tensors.values()}):
        if not fnmatchcase(file, _SHARDS):
            reason = f"jang's loader reads {_SHARDS} only, and leaves experts random"
            yield wrong_metadata(file, reason)
    jang = document(files, JANG_CONFIG) if JANG_CONFIG in files else {}
    if JANG_CONFIG not in files:
        yield wrong_metadata(JANG_CONFIG, "it is missing; engines know the format by it")
    for file in _CACHES:
        if (folder / file).exists():
            yield wrong_metadata(file, "it hides the bundle's own experts from jang's loader")
    stated = expert_widths(known, jang)
    if len({json.dumps(widths, sort_keys=True) for widths in stated.values()}) > 1:
        shown = ", ".join(f"{place} {json.dumps(widths)}" for place, widths in stated.items())
        yield wrong_metadata(CONFIG, f"the width of experts differs from place to place: {shown}")
    yield from _experts(known, jang, claims)
    yield from _tables(folder, claims)


def _experts(
    known: Mapping[str, Any], jang: Mapping[str, Any], claims: Mapping[str, Claim]
) -> Iterator[Diagnostic]:
    """Stacks of another height than the config's count, experts with other numbers."""
    _, count = expert_count(flat(known))
    apart: dict[str, set[int]] = defaultdict(set)
    if count is None:
        return
    for path, claim in claims.items():
        if match := EXPERT_NAME.fullmatch(path):
            apart[f"{match[1]}.experts.*.{match[3]}"].add(int(match[2]))
        elif projection_of(path) and claim.shape[0] != count:
            reason = f"it has {count!r} experts, {path} has {claim.shape[0]}"
            yield wrong_metadata(CONFIG, reason, of=path)
    for path, numbers in apart.items():
        if numbers != set(range(len(numbers))) or len(numbers) != count:
            reason = f"it has {count!r} experts, {path} has {len(numbers)} others"
            yield wrong_metadata(CONFIG, reason, of=path)
    if apart and jang.get("routed_expert_layout") == "prestacked":
        yield wrong_metadata(JANG_CONFIG, "it says prestacked, but experts are apart")


def _tables(folder: Path, claims: Mapping[str, Claim]) -> Iterator[Diagnostic]:
    if not (folder / SIDECAR).exists():
        reason = "it is missing; Osaurus and older Swift readers demand it"
        yield wrong_metadata(SIDECAR, reason)
        return
    codes = {
        (claim.shape[-1], claim.treatment.bits)
        for claim in claims.values()
        if isinstance(claim.treatment, Coded) and claim.treatment.scheme == MXTQ
    }
    try:
        for reason in wrong_tables(folder, codes):
            yield wrong_metadata(SIDECAR, reason)
    except PolicyError as error:
        yield from error.diagnostics
