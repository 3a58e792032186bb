"""Side files of a JANGTQ bundle: the runtime's tables, chat template and tokenizer configuration.

Source: jang 2.5.50, `build_jangtq_sidecar` (widths of 3-bit rows are the true ones) and
`convert_minimax_jangtq`.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from emitters.checkpoints import text_of, wrong_metadata
from emitters.jangtq_prestack.spec import MXTQ, SEED, TEMPLATE, TOKENIZER
from emitters.numerics import Array
from emitters.numerics.mxtq_tables import codebook, signs
from emitters.tensor_io.files import Source, file_facts
from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import Diagnostic, PolicyError, fail
from policy_dsl.formats import Claim, Claims, FileContents, Tensors
from policy_dsl.plan import Module, Plan, PlannedTensor
from policy_dsl.planning.bundle_files import header_bytes
from policy_dsl.sources.safetensors_header import LENGTH_NBYTES, header_nbytes, parse_header
from policy_dsl.treatments import Coded

SIDECAR = "jangtq_runtime.safetensors"
# MiniMax's template opens the thinking block whatever the caller wants.
_ALWAYS_THINKS = r"{{- ']~b]ai' ~ '\n' ~ '<think>' ~ '\n' }}"
_MAY_THINK = r"""{{- ']~b]ai' ~ '\n' }}
    {%- if enable_thinking is defined and enable_thinking is false -%}
    {%- else -%}
    {{- '<think>' ~ '\n' }}
    {%- endif -%}"""


def sidecar(modules: Iterable[Module]) -> bytes:
    """The file for a bundle of these modules, as the safetensors library would write it."""
    tables = _tables(modules)
    tensors = [
        PlannedTensor(name, "", "F32", table.shape, table.nbytes, SIDECAR, 0)
        for name, table in tables.items()
    ]
    return header_bytes(tensors, {}) + b"".join(tables[name].tobytes() for name in sorted(tables))


def value_defects(folder: Path, tensors: Tensors, claims: Claims) -> Iterator[Diagnostic]:
    """Tables of the runtime that are not those of the bundle's codes."""
    try:
        for reason in _wrong_tables(folder, claims) if (folder / SIDECAR).exists() else ():
            yield wrong_metadata(SIDECAR, reason)
    except PolicyError as error:
        yield from error.diagnostics


def _wrong_tables(folder: Path, claims: Claims) -> Iterator[str]:
    source = Source(folder, file_facts(folder, [SIDECAR]))
    size = source.facts[SIDECAR].nbytes
    prefix = source.read(SIDECAR, 0, min(size, LENGTH_NBYTES)).tobytes()
    length = header_nbytes(prefix, file=SIDECAR, file_nbytes=size)
    header = source.read(SIDECAR, LENGTH_NBYTES, length).tobytes()
    held = parse_header(header, file=SIDECAR, file_nbytes=size)
    for name, table in _tables(claims.values()).items():
        tensor = held.get(name)
        if tensor is None:
            yield f"it has no {name}"
        elif (tensor.dtype, tensor.shape) != ("F32", table.shape):
            yield f"{name} is {tensor.dtype} {list(tensor.shape)}, not F32 {list(table.shape)}"
        elif source.read(SIDECAR, tensor.start, tensor.nbytes).tobytes() != table.tobytes():
            yield f"{name} does not hold the values that the codes were made with"


def _tables(held: Iterable[Module | Claim]) -> dict[str, Array]:
    """Those of the codes that are held: name -> float32 values, little-endian."""
    codes = {
        (one.shape[-1], one.treatment.bits)
        for one in held
        if isinstance(one.treatment, Coded) and one.treatment.scheme == MXTQ
    }
    tables = {}
    for columns, bits in sorted(codes):
        tables[f"signs.{columns}.{SEED}"] = signs(columns, SEED).astype("<f4")
        tables[f"codebook.{columns}.{bits}"] = codebook(columns, bits).astype("<f4")
    return tables


def edited(plan: Plan, files: FileContents) -> dict[str, bytes]:
    """The template with the `enable_thinking` switch, and the tokenizer's file with all of it.

    files: the source's, by name. A file that needs no change stays as it is, byte for byte.
    Raises: PolicyError if one of them is not UTF-8, or the tokenizer's is not a JSON object.
    """
    written = dict(files)
    template, tokenizer = _text(files, TEMPLATE), _text(files, TOKENIZER)
    if template is not None and _ALWAYS_THINKS in template and _MAY_THINK not in template:
        template = template.replace(_ALWAYS_THINKS, _MAY_THINK)
        written[TEMPLATE] = template.encode()
    if tokenizer is None:
        return written
    try:
        document = parse_json(tokenizer.encode())
        if not isinstance(document, dict):
            raise ValueError("it is not a JSON object")
    except ValueError as error:
        raise fail("bad-source-json", file=TOKENIZER, reason=str(error)) from None
    # A class that only Python's newest tokenizers know; Swift reads the other one.
    if document.get("tokenizer_class") == "TokenizersBackend":
        document["tokenizer_class"] = "GPT2Tokenizer"
        written[TOKENIZER] = json.dumps(document, indent=2).encode()
    # Engines that look for the template here and nowhere else.
    if template is not None and document.get("chat_template") != template:
        document["chat_template"] = template
        text = json.dumps(document, indent=2, ensure_ascii=False)
        # JSON may escape halves of a character, which are not text: they stay escapes.
        written[TOKENIZER] = text.encode(errors="backslashreplace")
    return written


def _text(files: FileContents, name: str) -> str | None:
    # As a file opened for text is read: every end of line becomes the same.
    text = text_of(files, name)
    return text and text.replace("\r\n", "\n").replace("\r", "\n")
