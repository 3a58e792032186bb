"""What readers of HFQ files stumble over although every tensor has the size of its code.

Source: Kaden-Schutt/hipfire, crates/hipfire-runtime/src/hfq.rs at 9d90364, read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from emitters.hipfire_hfq.headers import first_defect
from emitters.hipfire_hfq.minimax import Defect, minimax_defects
from emitters.hipfire_hfq.names import ARCH_IDS, SCALE
from emitters.tensor_io.read import Source, file_facts
from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.formats import Claim
from policy_dsl.sources.hfq_codes import ARCH_FAMILIES, QUANT_CODES
from policy_dsl.sources.hfq_container import HfqContainer, HfqTensor, read_container
from policy_dsl.sources.local_files import local_files

_NO_TOKENIZER = "build it again with a tokenizer.json beside the source's weights"
_MINIMAX = ARCH_IDS["minimax_m2"]
# Qwen2 has two numbers: its own, and Qwen3's, which hipfire's first versions gave it.
_ARCH_IDS = {
    **{family: (number,) for family, number in ARCH_IDS.items()},
    "qwen2": (ARCH_IDS["qwen2"], ARCH_IDS["qwen3"]),
}
# Codes whose groups are rotated: inputs are rotated 256 at a time within a row.
_ROTATED = (13, 14, 15, 17, 18, 19, 20, 30)
_ROTATION = 256
# A config of a million layers would make a million findings.
_MOST_DEFECTS = 100


def defects(
    folder: Path, files: Mapping[str, bytes], shards: Collection[str], claims: Mapping[str, Claim]
) -> Iterator[Diagnostic]:
    """What readers of the file would miss, or read without a word of complaint.

    shards: the file. claims: of every coded tensor, found to be right. All data is read, block
    by block.
    Raises: PolicyError if the file cannot be read any more.
    """
    (file,) = shards
    container = read_container(local_files(folder, weights=file), file)
    if str(container.metadata.get("tokenizer")).strip() in ("", "{}"):
        yield diagnostic("no-tokenizer", target="hipfire_hfq", suggestion=_NO_TOKENIZER)
    source = Source(folder, file_facts(folder, shards))
    for name, reason in islice(_defects(container), _MOST_DEFECTS):
        yield _told(file, name, reason)
    padding = container.payload_start - container.index_stop
    if source.read(file, container.index_stop, padding).any():
        yield _told(file, "", "there is something between its index and its first tensor")
    for name, tensor in container.tensors.items():
        found = first_defect(source, tensor, positive=name.endswith(f".{SCALE}.weight"))
        if found is not None:
            yield _told(file, name, found)


def _told(file: str, tensor: str, reason: str) -> Diagnostic:
    if tensor:
        return diagnostic("bad-tensor-entry", file=file, tensor=tensor, reason=reason)
    return diagnostic("bad-bundle-metadata", path=file, reason=reason)


def _defects(container: HfqContainer) -> Iterator[Defect]:
    yield from _metadata(container)
    for tensor in container.tensors.values():
        yield from _entry(tensor)
    if container.arch_id == _MINIMAX:
        yield from minimax_defects(container.metadata["config"], container.tensors)


def _metadata(container: HfqContainer) -> Iterable[Defect]:
    told = container.metadata
    kind, number = told["config"].get("model_type"), container.arch_id
    wanted = _ARCH_IDS.get(kind) if isinstance(kind, str) else None
    if wanted is not None and number not in wanted:
        called = ARCH_FAMILIES.get(number, "unknown")
        yield "", f"its arch_id is {number} ({called}), and its config says {kind}"
    yield from _texts(told)


def _texts(told: Mapping[str, Any]) -> Iterator[Defect]:
    tokenizer = told.get("tokenizer")
    # Loaders ask for a text, and find none in an object.
    if not isinstance(tokenizer, str):
        yield "", "its tokenizer is no text"
    else:
        try:
            parse_json(tokenizer.encode(), what="its tokenizer")
        except ValueError as error:
            yield "", str(error)
    for key in ("tokenizer_config", "generation_config"):
        if not isinstance(told.get(key), dict | None):
            yield "", f"its {key} is no object"


def _entry(tensor: HfqTensor) -> Iterator[Defect]:
    """What an entry of the index says and readers do not compare."""
    name, known = tensor.info.name, QUANT_CODES.get(tensor.code)
    if known is None:
        return
    group = known.group if known.group and known.group > 1 else 0
    if known.group and tensor.group_size != group:
        says = f"its entry says groups of {tensor.group_size}"
        yield name, f"{says}, and {known.name} has {group or 'none'}"
    shape = tensor.info.shape
    if tensor.code in _ROTATED and (not shape or shape[-1] % _ROTATION):
        columns = shape[-1] if shape else 1
        yield name, f"it is rotated, and its {columns} columns are no multiple of {_ROTATION}"
