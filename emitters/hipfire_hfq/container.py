"""What comes before the tensors of an HFQ file, written from a plan, and their order.

Source: Kaden-Schutt/hipfire, crates/hipfire-quantize at 91e58a5, run on a CPU.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from emitters.checkpoints import text_of
from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import fail
from policy_dsl.formats import FileContents, in_order
from policy_dsl.plan import Module, Plan, PlannedTensor
from policy_dsl.reader_config import written_config
from policy_dsl.sources.hfq_container import QUANT_CODES

READER = "hipfire"
SCALE = "awq_scale_gate_up"
CODE_OF = {code.name: number for number, code in QUANT_CODES.items()}
# One element is not a group to readers.
GROUPS = {number: code.group if code.group > 1 else 0 for number, code in QUANT_CODES.items()}
EMBEDDED = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json"),
    "generation_config.json",
)
_TOKENIZER, _SETTINGS, _TEMPLATE, _OLDER_TEMPLATE, _GENERATION = EMBEDDED
_MAGIC, _VERSION, _ALIGNMENT = b"HFQM", 1, 4096
_HEADER = struct.Struct("<4sIIIQQ")


def file_order(modules: Sequence[Module]) -> list[PlannedTensor]:
    """All tensors by the bytes of their names; a layer's scale comes before its experts."""
    first, tensors = f".{SCALE}.weight", in_order(modules)
    return sorted(tensors, key=lambda tensor: tensor.name.replace(first, ".experts").encode())


def preface(plan: Plan, files: FileContents | None) -> bytes:
    """Header, metadata, index and padding; without files, header and index alone.

    files: the source's tokenizer, template and generation config.
    Raises: PolicyError if one of them is not UTF-8 text or not JSON.
    """
    order = file_order(plan.modules)
    index = struct.pack("<I", len(order)) + b"".join(map(_entry, order))
    described = b"" if files is None else _described(plan, files)
    size = _HEADER.size + len(described) + len(index)
    # Readers map the file: tensors begin on a page.
    padding = 0 if files is None else -size % _ALIGNMENT
    arch_id = plan.model.architecture.facts(plan.target)["arch_id"]
    header = _HEADER.pack(_MAGIC, _VERSION, arch_id, len(order), _HEADER.size, size + padding)
    return header + described + index + bytes(padding)


def _entry(tensor: PlannedTensor) -> bytes:
    name, code, rank = tensor.name.encode(), CODE_OF[tensor.dtype], len(tensor.shape)
    form = struct.pack(f"<BB{rank}IIQ", code, rank, *tensor.shape, GROUPS[code], tensor.nbytes)
    return struct.pack("<H", len(name)) + name + form


def _described(plan: Plan, files: FileContents) -> bytes:
    config = written_config(plan, READER)
    template = text_of(files, _TEMPLATE)
    if not template:
        # As processors of transformers before 4.51 saved it.
        older = _parsed(files, _OLDER_TEMPLATE)
        template = older.get("chat_template") if isinstance(older, dict) else None
    settings = _parsed(files, _SETTINGS)
    # Without a place of its own in the file, a template that nothing holds would be lost.
    held = {} if settings is None else settings
    if template and isinstance(held, dict) and held.get("chat_template") is None:
        settings = {**held, "chat_template": template}
    texts = {
        "architecture": _written(config.get("model_type", "llama"), "config.json"),
        "config": _written(config, "config.json"),
        # A text, which loaders parse themselves.
        "tokenizer": _written(text_of(files, _TOKENIZER) or "{}", _TOKENIZER),
        "tokenizer_config": _written(settings, _SETTINGS),
    }
    if _GENERATION in files:
        texts["generation_config"] = _written(_parsed(files, _GENERATION), _GENERATION)
    return ("{" + ",".join(f'"{key}":{texts[key]}' for key in sorted(texts)) + "}").encode()


def _parsed(files: FileContents, name: str) -> Any:
    try:
        return parse_json(files[name]) if name in files else None
    except ValueError as error:
        raise fail("bad-source-json", file=name, reason=str(error)) from None


def _written(value: Any, file: str) -> str:
    """A value of one of the source's files as JSON that every reader takes."""
    try:
        text = _compact(value)
        # Half a surrogate pair is not a character, though JSON has escapes for it.
        text.encode()
    except (RecursionError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise fail("bad-source-json", file=file, reason=reason) from None
    return text


def _compact(value: Any) -> str:
    """JSON with sorted keys and the shortest floats, as the format's own writer has it."""
    if isinstance(value, Mapping):
        pairs = (f"{_compact(key)}:{_compact(value[key])}" for key in sorted(value))
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(map(_compact, value)) + "]"
    if not isinstance(value, float):
        return json.dumps(value, ensure_ascii=False)
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a number in JSON")
    digits, found, exponent = repr(value).partition("e")
    if not found:
        return digits
    if int(exponent) == -5:
        return f"{value:.{len(digits.replace('.', '').lstrip('-')) + 4}f}"
    return f"{digits}e{int(exponent)}"
