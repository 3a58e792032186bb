"""What comes before the tensors of an HFQ file, written from a plan, and their order.

Source: Kaden-Schutt/hipfire, crates/hipfire-quantize at 91e58a5, run on a CPU.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import PolicyError, fail
from policy_dsl.formats import FileContents, in_order
from policy_dsl.plan import Module, Plan, PlannedTensor
from policy_dsl.reader_config import written_config
from policy_dsl.sources.hfq_container import QUANT_CODES

READER = "hipfire"
SCALE = "awq_scale_gate_up"
_MAGIC, _VERSION, _ALIGNMENT = b"HFQM", 1, 4096
_HEADER = struct.Struct("<4sIIIQQ")
_CODE_OF = {code.name: number for number, code in QUANT_CODES.items()}


def file_order(modules: Sequence[Module]) -> list[PlannedTensor]:
    """All tensors by the bytes of their names; a layer's scale comes before its experts."""
    first = f".{SCALE}.weight"
    tensors = in_order(modules)
    return sorted(tensors, key=lambda tensor: tensor.name.replace(first, ".experts").encode())


def preface(plan: Plan, files: FileContents | None) -> bytes:
    """Header, metadata, index and padding; without files, header and index alone.

    files: the source's tokenizer, template and generation config.
    Raises: PolicyError if one of them is not UTF-8 text or not JSON.
    """
    order = file_order(plan.modules)
    index = struct.pack("<I", len(order)) + b"".join(_entry(tensor) for tensor in order)
    described = b"" if files is None else _described(plan, files)
    size = _HEADER.size + len(described) + len(index)
    # Readers map the file: tensors begin on a page.
    padding = 0 if files is None else -size % _ALIGNMENT
    arch_id = plan.model.architecture.facts(plan.target)["arch_id"]
    header = _HEADER.pack(_MAGIC, _VERSION, arch_id, len(order), _HEADER.size, size + padding)
    return header + described + index + bytes(padding)


def _entry(tensor: PlannedTensor) -> bytes:
    name, code = tensor.name.encode(), _CODE_OF[tensor.dtype]
    group = QUANT_CODES[code].group or 0
    return b"".join(
        (
            struct.pack("<H", len(name)),
            name,
            struct.pack(f"<BB{len(tensor.shape)}I", code, len(tensor.shape), *tensor.shape),
            # One element is not a group to readers.
            struct.pack("<IQ", group if group > 1 else 0, tensor.nbytes),
        )
    )


def _described(plan: Plan, files: FileContents) -> bytes:
    config = written_config(plan, READER)
    texts: dict[str, str] = {
        "architecture": _written(config.get("model_type", "llama"), "config.json"),
        "config": _written(config, "config.json"),
        # A text, which loaders parse themselves.
        "tokenizer": _written(_text(files, "tokenizer.json") or "{}", "tokenizer.json"),
        "tokenizer_config": _written(_tokenizer_config(files), "tokenizer_config.json"),
    }
    name = "generation_config.json"
    if name in files:
        texts["generation_config"] = _written(_parsed(files, name), name)
    return ("{" + ",".join(f'"{key}":{texts[key]}' for key in sorted(texts)) + "}").encode()


def _tokenizer_config(files: FileContents) -> Any:
    document = _parsed(files, "tokenizer_config.json")
    template = _text(files, "chat_template.jinja") or _older_template(files)
    # Without a place of its own in the file, a template that nothing holds would be lost.
    held = {} if document is None else document
    if template and isinstance(held, dict) and held.get("chat_template") is None:
        return {**held, "chat_template": template}
    return document


def _older_template(files: FileContents) -> Any:
    """The template as processors of transformers before 4.51 saved it."""
    document = _parsed(files, "chat_template.json")
    return document.get("chat_template") if isinstance(document, dict) else None


def _parsed(files: FileContents, name: str) -> Any:
    try:
        return parse_json(files[name]) if name in files else None
    except ValueError as error:
        raise _bad(name, error) from None


def _text(files: FileContents, name: str) -> str | None:
    try:
        return files[name].decode() if name in files else None
    except UnicodeDecodeError:
        raise fail("unreadable-file", path=name, reason="it is not UTF-8 text") from None


def _written(value: Any, file: str) -> str:
    """A value of one of the source's files as JSON that every reader takes."""
    try:
        text = _compact(value)
        # Half a surrogate pair is not a character, though JSON has escapes for it.
        text.encode()
    except (ValueError, RecursionError) as error:
        raise _bad(file, error) from None
    return text


def _compact(value: Any) -> str:
    """JSON with sorted keys and the shortest floats, as the format's own writer has it."""
    if isinstance(value, Mapping):
        pairs = (f"{_compact(key)}:{_compact(value[key])}" for key in sorted(value))
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(_compact(item) for item in value) + "]"
    if isinstance(value, float):
        return _shortest(value)
    return json.dumps(value, ensure_ascii=False)


def _shortest(value: float) -> str:
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a number in JSON")
    digits, found, exponent = repr(value).partition("e")
    if not found:
        return digits
    if int(exponent) == -5:
        return f"{value:.{len(digits.replace('.', '').lstrip('-')) + 4}f}"
    return f"{digits}e{int(exponent)}"


def _bad(file: str, error: Exception) -> PolicyError:
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    return fail("bad-source-json", file=file, reason=reason)
