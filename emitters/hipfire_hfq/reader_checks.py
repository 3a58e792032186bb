"""What readers of HFQ files understand, and stumble over although every tensor has its size.

Source: Kaden-Schutt/hipfire, crates/hipfire-runtime/src/hfq.rs at 9d90364, read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from emitters.checkpoints import wrong_metadata, wrong_tensor
from emitters.hipfire_hfq.container import SCALE
from emitters.hipfire_hfq.minimax import Defect, minimax_defects
from emitters.hipfire_hfq.spec import CODES, SPEC
from emitters.numerics.hfq import block_header, first_bad_header
from emitters.numerics.rounding import first_nonfinite
from emitters.numerics.value_types import VALUE_TYPES, Array
from emitters.tensor_io.read import Source, file_facts
from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.formats import Claim, FileContents, Forms, Tensors
from policy_dsl.plan import Plan
from policy_dsl.roles.architecture import architecture, facts_of, model_types
from policy_dsl.sources.hfq_container import (
    ARCH_FAMILIES,
    QUANT_CODES,
    HfqContainer,
    HfqTensor,
    read_container,
)
from policy_dsl.sources.local_files import local_files
from policy_dsl.treatments import Coded

_SCHEME_OF = {QUANT_CODES[code].name: key for key, code in CODES.items()}
_SCHEMES = {scheme.name: scheme for scheme in SPEC.schemes}
_NO_TOKENIZER = "build it again with a tokenizer.json beside the source's weights"
_ROTATION = 256
# A config of a million layers would make a million findings.
_MOST_DEFECTS = 100


# Read at once: large enough for the disk, small enough for any machine.
_MOST_NBYTES = 8 * 2**20
_WANTED = {
    "line": "a finite scale above 0 and a finite smallest value",
    "scale": "a finite scale that is not negative",
    "levels": "{n} finite levels in ascending order",
}


def metadata(plan: Plan) -> dict[str, bytes]:
    """Nothing: all that a loader reads is in the one file."""
    return {}


def claims(files: FileContents, forms: Forms) -> dict[str, Claim]:
    """What a loader understands of each coded tensor: its code alone says it.

    Raises: ValueError if a tensor is stored as none of these containers holds it.
    """
    dtypes = {dtype for parts in forms.values() for dtype, _ in parts.values()}
    if others := dtypes - {code.name for code in QUANT_CODES.values()}:
        raise ValueError(f"{min(others)} is not a quant code of HFQ files")
    described = {}
    for path, parts in forms.items():
        dtype, shape = parts.get("weight", ("", ()))
        if dtype in _SCHEME_OF:
            name, group = _SCHEME_OF[dtype]
            scheme = _SCHEMES[name]
            coded = Coded(name, scheme.bits[0], group, scheme.symmetries[0], "")
            described[path] = Claim(coded, shape, "F32")
    return described


def defects(
    folder: Path, files: FileContents, tensors: Tensors, claims: Mapping[str, Claim]
) -> Iterator[Diagnostic]:
    """What readers of the file would miss, or read without a word of complaint.

    claims: of every coded tensor, found to be right. All data is read, block by block.
    Raises: PolicyError if the file cannot be read any more.
    """
    (file,) = {tensor.file or "" for tensor in tensors.values()}
    container = read_container(local_files(folder, weights=file), file)
    if str(container.metadata.get("tokenizer")).strip() in ("", "{}"):
        yield diagnostic("no-tokenizer", target="hipfire_hfq", suggestion=_NO_TOKENIZER)
    source = Source(folder, file_facts(folder, [file]))
    for name, reason in islice(_defects(container), _MOST_DEFECTS):
        yield _wrong(file, name, reason)
    padding = container.payload_start - container.index_stop
    if source.read(file, container.index_stop, padding).any():
        yield _wrong(file, "", "there is something between its index and its first tensor")
    for name, tensor in container.tensors.items():
        defect = _first_defect(source, tensor, positive=name.endswith(f".{SCALE}.weight"))
        if defect is not None:
            yield _wrong(file, name, defect)


def _wrong(file: str, tensor: str, reason: str) -> Diagnostic:
    return wrong_tensor(file, tensor, reason) if tensor else wrong_metadata(file, reason)


def _defects(container: HfqContainer) -> Iterator[Defect]:
    yield from _metadata_defects(container)
    for tensor in container.tensors.values():
        yield from _entry(tensor)
    numbers = facts_of(SPEC.name, "arch_id")
    if any(numbers[family] == container.arch_id for family in facts_of(SPEC.name, "loader")):
        yield from minimax_defects(container.metadata["config"], container.tensors)


def _metadata_defects(container: HfqContainer) -> Iterator[Defect]:
    held, number = container.metadata, container.arch_id
    kind = held["config"].get("model_type")
    family = model_types().get(kind) if isinstance(kind, str) else None
    facts = architecture(family).facts(SPEC.name) if family else {}
    if "arch_id" in facts and number not in (facts["arch_id"], *facts.get("other_arch_ids", ())):
        called = ARCH_FAMILIES.get(number, "unknown")
        yield "", f"its arch_id is {number} ({called}), and its config says {kind}"
    tokenizer = held.get("tokenizer")
    # Loaders ask for a text, and find none in an object.
    if not isinstance(tokenizer, str):
        yield "", "its tokenizer is not a text"
    else:
        try:
            parse_json(tokenizer.encode(), what="its tokenizer")
        except ValueError as error:
            yield "", str(error)
    for key in ("tokenizer_config", "generation_config"):
        if not isinstance(held.get(key), dict | None):
            yield "", f"its {key} is not an object"


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
    if known.rotated and (not shape or shape[-1] % _ROTATION):
        columns = shape[-1] if shape else 1
        yield name, f"it is rotated, and its {columns} columns are not a multiple of {_ROTATION}"


def _first_defect(source: Source, tensor: HfqTensor, *, positive: bool) -> str | None:
    """What is wrong with a tensor's first bad block or value; None if nothing is."""
    info, known = tensor.info, QUANT_CODES.get(tensor.code)
    if known is None or not known.nbytes:
        return None
    step = _MOST_NBYTES // known.nbytes * known.nbytes
    for start in range(0, info.nbytes, step):
        count = min(step, info.nbytes - start)
        stored = source.read(info.file or "", info.start + start, count)
        first = start // known.nbytes
        if info.dtype in VALUE_TYPES:
            defect = _value_defect(stored, info.dtype, first, positive=positive)
        elif known.header:
            defect = _block_defect(stored.reshape(-1, known.nbytes), tensor.code, first)
        else:
            defect = None
        if defect is not None:
            return defect
    return None


def _value_defect(stored: Array, dtype: str, first: int, *, positive: bool) -> str | None:
    values = stored.view(VALUE_TYPES[dtype].storage)
    at = first_nonfinite(values, dtype)
    if at >= 0:
        return f"value {first + at} is not a finite number"
    if positive and not (values > 0).all():
        return f"value {first + int((values > 0).argmin())} is not above 0"
    return None


def _block_defect(blocks: Array, code: int, first: int) -> str | None:
    numbers = block_header(blocks, code)
    at = first_bad_header(numbers, code)
    if at < 0:
        return None
    held = ", ".join(f"{number:g}" for number in numbers[at].tolist())
    wanted = _WANTED[QUANT_CODES[code].header].format(n=numbers.shape[1])
    return f"block {first + at} begins with {held}, and readers need {wanted}"
