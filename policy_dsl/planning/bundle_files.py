"""The files of a bundle: shards or container, metadata, the source's side files, the record.

The place of every tensor is known before a weight is read. Whether side files can be used is
asked of a source before anything is written, and of a bundle by `verify`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from json.encoder import encode_basestring
from typing import Any

from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, errors
from policy_dsl.formats import Container, Format, FormatSpec, Shards
from policy_dsl.inventory import Inventory
from policy_dsl.plan import Module, OmittedFile, Plan, PlannedFile, PlannedTensor
from policy_dsl.planning.record import RECORD, record_nbytes
from policy_dsl.policy import Policy
from policy_dsl.quantities import counted, parse_size
from policy_dsl.regular_files import LOOKED_AT_NBYTES, refuse_placeholder
from policy_dsl.sources import side_files
from policy_dsl.sources.checkpoint import CONFIG, MAX_JSON_NBYTES, CheckpointFiles, read_json
from policy_dsl.sources.local_files import LocalFiles

# The safetensors library writes wide dtypes first, so every tensor is aligned to its element.
_FILE_ORDER = (
    *("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
_RANK = {dtype: rank for rank, dtype in enumerate(_FILE_ORDER)}
_NO_PREFACE = "its metadata hold the source's tokenizer and template"
_UNKNOWN_SIDE_FILES = "tokenizer, template and licence files"
_CURE = "download it again; the tokenizers library does not load it"
_ODD = "download it again, or write the numbers of the tokens"


def placed(
    modules: Sequence[Module], policy: Policy, spec: FormatSpec
) -> tuple[tuple[Module, ...], tuple[PlannedFile, ...]]:
    """The modules with their tensors in places, and the files that hold them.

    In a container places count from the first tensor: what comes before is made of side files.
    """
    files = spec.tensor_files
    tensors = files.order(modules)
    if isinstance(files, Container):
        laid = {policy.output.file_name or files.name(policy, modules): (0, tensors)}
    else:
        limit = parse_size(policy.output.shard_size) if policy.output.shard_size else None
        laid = lay_out(tensors, replace(files, nbytes=limit) if limit else files)
    places: dict[str, PlannedTensor] = {}
    planned = []
    for file, (start, held) in laid.items():
        at = start
        for tensor in held:
            places[tensor.name] = tensor._replace(file=file, start=at)
            at += tensor.nbytes
        size = (None, _NO_PREFACE, at) if spec.container else (at,)
        planned.append(PlannedFile(file, "tensors", *size))
    # Offsets are known before a weight is read: workers write without asking each other.
    moved = [m._replace(tensors=tuple([places[one.name] for one in m.tensors])) for m in modules]
    return tuple(moved), tuple(planned)


def lay_out(
    tensors: Sequence[PlannedTensor], files: Shards
) -> dict[str, tuple[int, Sequence[PlannedTensor]]]:
    """Shard -> where its tensors begin, and these, as they are filled in the given order.

    A tensor that is larger than a shard has one of its own.
    """
    shards = [_in_file_order(shard) for shard in files.fill(tensors, files.nbytes)]
    names = [files.name(number, len(shards)) for number in range(1, len(shards) + 1)]
    starts = [len(header_bytes(shard, files.metadata)) for shard in shards]
    return dict(zip(names, zip(starts, shards, strict=True), strict=True))


def _in_file_order(tensors: Iterable[PlannedTensor]) -> list[PlannedTensor]:
    """The tensors of one file in the order of their bytes: wide dtypes first, then by name."""
    return sorted(tensors, key=lambda tensor: (_RANK[tensor.dtype], tensor.name))


def header_bytes(tensors: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> bytes:
    """Everything of a safetensors file before its tensors: length and padded JSON header.

    Source: safetensors 0.8, format description in its README; entries in the order that
    `save_file` writes.
    """
    dense, start = partial(json.dumps, separators=(",", ":"), ensure_ascii=False), 0
    entries = [f'"__metadata__":{dense(dict(metadata))}'] if metadata else []
    forms = {
        (dtype, shape): f':{{"dtype":"{dtype}","shape":{dense(shape)},"data_offsets":['
        for dtype, shape in {(one.dtype, one.shape) for one in tensors}
    }
    for tensor in _in_file_order(tensors):
        name, stop = encode_basestring(tensor.name), start + tensor.nbytes
        # As text: a JSON document of a hundred thousand entries takes three times as long.
        entries.append(f"{name}{forms[tensor.dtype, tensor.shape]}{start},{stop}]}}")
        start = stop
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def with_files(plan: Plan, inventory: Inventory, format: Format) -> Plan:
    """The plan with every file of the bundle; sizes are exact where they can be known.

    What depends on side files that are not known has `nbytes` None and the reason.
    Raises: PolicyError with every defect of the side files that the bundle takes.
    """
    findings, spec = source_findings(plan, inventory, format.spec), format.spec
    if errors(findings):
        raise PolicyError(errors(findings))
    known = inventory.side_files or {}
    beside: dict[str, bytes] | None = None
    if inventory.root is not None:
        files = LocalFiles(inventory.root, known)
        names = [name for name in (*spec.edited_files, *spec.embedded_files) if name in known]
        beside = {name: files.read(name, 0, known[name]) for name in names}
    plan = _with_preface(replace(plan, findings=(*plan.findings, *findings)), format, beside)
    planned = plan.tensor_files
    planned += _sized(format.files().metadata(plan), "metadata")
    planned += _edited(plan, format, beside, known)
    planned += _copied(inventory, spec, {RECORD, *(file.name for file in planned)})
    held = {*spec.embedded_files, *(file.name for file in planned)}
    unused = {name: nbytes for name, nbytes in known.items() if name not in held}
    sizes, why = unused | dict.fromkeys(inventory.unread), side_files.why_left_out
    omitted = [OmittedFile(name, sizes[name], why(name, plan.target)) for name in sorted(sizes)]
    recorded = _record_file(plan, planned)
    return replace(plan, files=(*planned, recorded), omitted_files=tuple(omitted))


def _sized(contents: Mapping[str, bytes], kind: str) -> list[PlannedFile]:
    return [PlannedFile(name, kind, len(content)) for name, content in contents.items()]


def edited_files(plan: Plan, format: Format, beside: Mapping[str, bytes]) -> dict[str, bytes]:
    """The side files that the format writes in another form. beside: the source's, by name."""
    given = {name: beside[name] for name in format.spec.edited_files if name in beside}
    edited = format.files().edited
    return edited(plan, given) if given and edited else {}


def preface(plan: Plan, format: Format, beside: Mapping[str, bytes] | None) -> bytes:
    """What comes before the tensors of the plan's one container.

    beside: the source's side files, by name; None if they cannot be read.
    """
    container = format.spec.container
    if beside is not None:
        beside = {name: beside[name] for name in format.spec.embedded_files if name in beside}
    return container.preface(plan, beside) if container else b""


def _with_preface(plan: Plan, format: Format, beside: Mapping[str, bytes] | None) -> Plan:
    """The plan with the places of a container's tensors, if its preface can be made here."""
    if format.spec.container is None:
        return plan
    (container,) = plan.files
    size = len(preface(plan, format, beside))
    if beside is None:
        # Its size without what it says of the model is a fact all the same.
        return replace(plan, files=(replace(container, least=size + container.least),))
    modules = [
        module._replace(tensors=tuple([t._replace(start=t.start + size) for t in module.tensors]))
        for module in plan.modules
    ]
    whole = PlannedFile(container.name, "tensors", size + container.least)
    return replace(plan, modules=tuple(modules), files=(whole,))


def _edited(
    plan: Plan, format: Format, beside: Mapping[str, bytes] | None, known: Mapping[str, int]
) -> list[PlannedFile]:
    if beside is not None:
        return _sized(edited_files(plan, format, beside), "edited")
    # Side files that are known by their sizes only, or not at all, which is said elsewhere.
    why = "the text of the source's {} is not known"
    edited = format.spec.edited_files
    return [PlannedFile(n, "edited", None, why.format(n)) for n in edited if n in known]


def _copied(inventory: Inventory, spec: FormatSpec, taken: set[str]) -> list[PlannedFile]:
    """The source's side files that the bundle takes over; `taken` are names of its own."""
    # Recorded headers of a model may not say what lay beside its weights.
    if inventory.side_files is None:
        reason = f"the side files of {inventory.id} are not known"
        return [PlannedFile(_UNKNOWN_SIDE_FILES, "copied", None, reason)]
    patterns, sizes = (*spec.copied_files, *side_files.ALWAYS_COPIED), inventory.side_files
    names = [name for name in sorted(sizes) if side_files.is_one_of(name, patterns)]
    return [PlannedFile(name, "copied", sizes[name]) for name in names if name not in taken]


def _record_file(plan: Plan, files: list[PlannedFile]) -> PlannedFile:
    sizes = {file.name: file.nbytes for file in files if file.nbytes is not None}
    reason = "it lists the side files, which are not known" if len(sizes) < len(files) else ""
    if plan.pending and not reason:
        reason = "it names the statistics, and what they decide, that are not there yet"
    return PlannedFile(RECORD, "record", None if reason else record_nbytes(plan, sizes), reason)


def source_findings(plan: Plan, inventory: Inventory, spec: FormatSpec) -> list[Diagnostic]:
    """What is wrong with side files that a bundle would take, if the source's can be read."""
    name = plan.policy.output.file_name
    patterns = (*spec.copied_files, *side_files.ALWAYS_COPIED, *spec.edited_files)
    if spec.container and name and side_files.is_one_of(name, patterns):
        span = plan.policy.key_spans.get("output.file_name")
        reason = "the bundle takes files of such names from the source"
        return [diagnostic("bad-file-name", span, name=name, reason=reason)]
    patterns = (*patterns, *spec.embedded_files)
    rows = (one.shape[0] for one in plan.model.tensors if one.role == "embed")
    return _findings(plan.target, inventory, patterns, (), max(rows, default=0))


def bundle_findings(
    target: str, inventory: Inventory, recorded: Iterable[str], embeddings: Iterable[int]
) -> list[Diagnostic]:
    """What is wrong with the side files of a bundle.

    recorded: files that its record names, whose absence is found by that. embeddings: their rows.
    """
    # Of a container, its format looks at what is inside.
    if inventory.container:
        return []
    patterns, rows = side_files.SIDE_FILES, max(embeddings, default=0)
    return _findings(target, inventory, patterns, recorded, rows)


def _findings(
    target: str, inventory: Inventory, patterns: Iterable[str], recorded: Iterable[str], rows: int
) -> list[Diagnostic]:
    """What is wrong with side files of these names; rows: of embeddings, for each token one."""
    if inventory.root is None or inventory.side_files is None:
        return []
    found: list[Diagnostic] = []
    beyond: list[Diagnostic] = []
    files = LocalFiles(inventory.root, inventory.side_files)
    taken = [name for name in inventory.side_files if side_files.is_one_of(name, patterns)]
    for name in taken:
        try:
            document = _document(files, name)
        except PolicyError as error:
            found += error.diagnostics
            continue
        # One after the other: a folder of them has no bound that memory would have.
        found += _tokenizer_findings(name, document)
        beyond += _beyond(rows, name, document)
    if not _vocabularies([*taken, *recorded]):
        cure = "put the tokenizer's files beside the weights"
        for other in _vocabularies(inventory.side_files)[:1]:
            cure = f"make a tokenizer.json of {other}: transformers' save_pretrained writes it"
        found.append(diagnostic("no-tokenizer", target=target, suggestion=cure))
    return [*found, *beyond, *_beyond(rows, CONFIG, inventory.config)]


def _vocabularies(names: Iterable[str]) -> list[str]:
    return [name for name in names if side_files.is_one_of(name, side_files.VOCABULARIES)]


def _tokenizer_findings(file: str, document: Mapping[str, Any]) -> Iterator[Diagnostic]:
    name = file.rpartition("/")[2]
    for reason in side_files.tokenizer_faults(document) if name == "tokenizer.json" else ():
        yield diagnostic("bad-source-json", suggestion=_CURE, file=file, reason=reason)
    for reason in side_files.odd_tokens(name, document):
        yield diagnostic("odd-token-ids", suggestion=_ODD, file=file, reason=reason)


def _document(files: CheckpointFiles, name: str) -> Mapping[str, Any]:
    """The JSON object in a file; an empty one of a file that need not be read so far.

    Raises: PolicyError if the file is not what its name says.
    """
    size = files.sizes[name]
    if name.endswith(".json") and size <= MAX_JSON_NBYTES:
        return read_json(files, name)
    refuse_placeholder(name, files.read(name, 0, min(size, LOOKED_AT_NBYTES)), size)
    return {}


def _beyond(rows: int, name: str, document: Mapping[str, Any]) -> Iterator[Diagnostic]:
    # Without an embedding there is nothing to compare with.
    tokens = side_files.tokens_beyond(name, document, rows) if rows else []
    if tokens:
        shown = ", ".join(tokens[:3]) + (", …" if len(tokens) > 3 else "")
        ids = counted(len(tokens), "token id")
        yield diagnostic("token-beyond-embedding", file=name, ids=ids, tokens=shown, rows=rows)
