"""What JANG's readers stumble over in a bundle whose widths are right: files and counts.

Source: jang 2.5.50, `load_jangtq` and `verify_jangtq_prestacked`; osaurus-ai/vmlx-swift at
b298324c (read).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from emitters.jangtq_prestack.names import MXTQ, projection_of
from emitters.jangtq_prestack.sidecar import SIDECAR, wrong_tables
from emitters.jangtq_prestack.sizes import flat, told_count
from emitters.jangtq_prestack.widths import told_widths
from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic
from policy_dsl.formats import Claim, document
from policy_dsl.inventory import EXPERT_NAME
from policy_dsl.treatments import Coded

CONFIG = "config.json"
JANG_CONFIG = "jang_config.json"
# A cache that engines write for themselves; in a bundle it would hide the bundle's own stacks.
_CACHES = ("jangtq_stacked.safetensors", "jangtq_stacked.json")
_SHARDS = "model-*.safetensors"


def defects(
    folder: Path, files: Mapping[str, bytes], shards: Collection[str], claims: Mapping[str, Claim]
) -> Iterator[Diagnostic]:
    """What readers of the format would miss, or read without a word of complaint.

    shards: the files with the bundle's tensors. claims: of every module, found to be right.
    """
    known, jang = document(files, CONFIG), {}
    for file in shards:
        if not fnmatchcase(file, _SHARDS):
            yield _wrong(file, f"jang's loader reads {_SHARDS} only, and leaves experts random")
    if JANG_CONFIG in files:
        jang = document(files, JANG_CONFIG)
    else:
        yield _wrong(JANG_CONFIG, "it is not there; engines know the format by it")
    for file in _CACHES:
        if (folder / file).exists():
            yield _wrong(file, "it hides the bundle's own experts from jang's loader")
    yield from _several_widths(known, jang)
    yield from _experts(known, jang, claims)
    yield from _tables(folder, claims)


def _several_widths(known: Mapping[str, Any], jang: Mapping[str, Any]) -> Iterator[Diagnostic]:
    told = told_widths(known, jang)
    if len({json.dumps(widths, sort_keys=True) for widths in told.values()}) > 1:
        shown = ", ".join(f"{place} {json.dumps(widths)}" for place, widths in told.items())
        yield _wrong(CONFIG, f"the width of experts differs from place to place: {shown}")


def _experts(
    known: Mapping[str, Any], jang: Mapping[str, Any], claims: Mapping[str, Claim]
) -> Iterator[Diagnostic]:
    """Stacks of another height than the config's count, experts with other numbers."""
    _, count = told_count(flat(known))
    apart: dict[str, set[int]] = defaultdict(set)
    if count is None:
        return
    for path, claim in claims.items():
        if found := EXPERT_NAME.fullmatch(path):
            apart[f"{found[1]}.experts.*.{found[3]}"].add(int(found[2]))
        elif projection_of(path) and claim.shape[0] != count:
            reason = f"it has {count!r} experts, {path} has {claim.shape[0]}"
            yield _wrong(CONFIG, reason, of=path)
    for path, numbers in apart.items():
        if numbers != set(range(len(numbers))) or len(numbers) != count:
            reason = f"it has {count!r} experts, {path} has {len(numbers)} others"
            yield _wrong(CONFIG, reason, of=path)
    if apart and jang.get("routed_expert_layout") == "prestacked":
        yield _wrong(JANG_CONFIG, "it says prestacked, but experts lie apart")


def _tables(folder: Path, claims: Mapping[str, Claim]) -> Iterator[Diagnostic]:
    if not (folder / SIDECAR).exists():
        yield _wrong(SIDECAR, "it is not there; Osaurus and older Swift readers demand it")
        return
    codes = {
        (claim.shape[-1], claim.treatment.bits)
        for claim in claims.values()
        if isinstance(claim.treatment, Coded) and claim.treatment.scheme == MXTQ
    }
    try:
        for reason in wrong_tables(folder, codes):
            yield _wrong(SIDECAR, reason)
    except PolicyError as error:
        yield from error.diagnostics


def _wrong(file: str, reason: str, *, of: str = "") -> Diagnostic:
    return diagnostic("bad-bundle-metadata", of=of, path=file, reason=reason)
