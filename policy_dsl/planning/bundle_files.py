"""Everything of a bundle but its tensors: metadata, the source's side files, the record.

Whether side files can be used is asked of a source before anything is written, and of a bundle
by `verify`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic
from policy_dsl.formats import Format, FormatSpec
from policy_dsl.inventory import Inventory
from policy_dsl.plan import OmittedFile, Plan, PlannedFile
from policy_dsl.planning.record import RECORD, record_nbytes
from policy_dsl.quantities import counted
from policy_dsl.regular_files import LOOKED_AT_NBYTES, refuse_placeholder
from policy_dsl.sources.checkpoint import CONFIG, MAX_JSON_NBYTES, CheckpointFiles, read_json
from policy_dsl.sources.local_files import LocalFiles
from policy_dsl.sources.side_files import (
    ALWAYS_COPIED,
    SIDE_FILES,
    VOCABULARIES,
    is_one_of,
    odd_tokens,
    tokenizer_faults,
    tokens_beyond,
    why_left_out,
)

_UNKNOWN_SIDE_FILES = "tokenizer, template and licence files"
_CURE = "download it again; the tokenizers library does not load it"
_ODD = "download it again, or write the numbers of the tokens"


def with_files(plan: Plan, inventory: Inventory, format: Format) -> Plan:
    """The plan with every file of the bundle; sizes are exact where they can be known.

    What depends on side files that are not known has `nbytes` None and the reason.
    """
    side_files = inventory.side_files or {}
    beside: Mapping[str, bytes] | None = None
    if inventory.root is not None:
        names = (*format.spec.edited_files, *format.spec.embedded_files)
        files = LocalFiles(inventory.root, side_files)
        beside = {
            name: files.read(name, 0, side_files[name]) for name in names if name in side_files
        }
    plan = _with_preface(plan, format, beside)
    planned = [
        *plan.tensor_files,
        *(
            PlannedFile(name, "metadata", len(content))
            for name, content in format.files().metadata(plan).items()
        ),
    ]
    planned += _edited(plan, format, beside, side_files)
    planned += _copied(inventory, format.spec, {RECORD, *(file.name for file in planned)})
    held = {*format.spec.embedded_files, *(file.name for file in planned)}
    omitted = {name: nbytes for name, nbytes in side_files.items() if name not in held}
    left_out: dict[str, int | None] = {**omitted, **dict.fromkeys(inventory.unread)}
    return replace(
        plan,
        files=(*planned, _record_file(plan, planned)),
        omitted_files=tuple(
            OmittedFile(name, left_out[name], why_left_out(name, plan.target))
            for name in sorted(left_out)
        ),
    )


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


def copied_names(spec: FormatSpec) -> tuple[str, ...]:
    """Patterns of the side files that a format's bundles take over as they are."""
    return (*spec.copied_files, *ALWAYS_COPIED)


def source_findings(plan: Plan, inventory: Inventory, spec: FormatSpec) -> list[Diagnostic]:
    """What is wrong with the side files that a bundle would take from its source.

    Nothing where the source's files cannot be read.
    """
    name = plan.policy.output.file_name
    if spec.container and name and is_one_of(name, (*copied_names(spec), *spec.edited_files)):
        span = dict(plan.policy.key_spans).get("output.file_name")
        reason = "the bundle takes files of such names from the source"
        return [diagnostic("bad-file-name", span, name=name, reason=reason)]
    if inventory.root is None or inventory.side_files is None:
        return []
    patterns = (*copied_names(spec), *spec.edited_files, *spec.embedded_files)
    taken = [name for name in inventory.side_files if is_one_of(name, patterns)]
    embeddings = [one.shape[0] for one in plan.model.tensors if one.role == "embed"]
    findings, beyond = _read(inventory, taken, max(embeddings, default=0))
    if not _has_vocabulary(taken):
        findings.append(_no_tokenizer(plan.target, inventory.side_files))
    return [*findings, *beyond]


def bundle_findings(
    target: str, inventory: Inventory, recorded: Iterable[str], embeddings: Iterable[int]
) -> list[Diagnostic]:
    """What is wrong with the side files of a bundle.

    recorded: files that its record names; those that are missing are found by that. embeddings:
    rows of its embeddings.
    """
    # Of a container, its format looks at what is inside.
    if inventory.container or inventory.root is None or inventory.side_files is None:
        return []
    taken = [name for name in inventory.side_files if is_one_of(name, SIDE_FILES)]
    found, beyond = _read(inventory, taken, max(embeddings, default=0))
    if not _has_vocabulary([*taken, *recorded]):
        found.append(_no_tokenizer(target, ()))
    return [*found, *beyond]


def _read(
    inventory: Inventory, names: Iterable[str], rows: int
) -> tuple[list[Diagnostic], list[Diagnostic]]:
    """What is wrong with these files, and the tokens that are not among `rows` embeddings."""
    found: list[Diagnostic] = []
    beyond: list[Diagnostic] = []
    files = LocalFiles(inventory.root or Path(), inventory.side_files or {})
    for name in names:
        try:
            document = _document(files, name)
        except PolicyError as error:
            found += error.diagnostics
            continue
        # One after the other: a folder of them has no bound that memory would have.
        found += _tokenizer_findings(name, document)
        beyond += _beyond(rows, name, document)
    return found, [*beyond, *_beyond(rows, CONFIG, inventory.config)]


def _document(files: CheckpointFiles, name: str) -> Mapping[str, Any]:
    """The JSON object in a file; an empty one of a file that need not be read so far.

    Raises: PolicyError if the file is not what its name says.
    """
    size = files.sizes[name]
    if name.endswith(".json") and size <= MAX_JSON_NBYTES:
        return read_json(files, name)
    refuse_placeholder(name, files.read(name, 0, min(size, LOOKED_AT_NBYTES)), size)
    return {}


def _tokenizer_findings(file: str, document: Mapping[str, Any]) -> Iterator[Diagnostic]:
    name = file.rpartition("/")[2]
    for reason in tokenizer_faults(document) if name == "tokenizer.json" else ():
        yield diagnostic("bad-source-json", suggestion=_CURE, file=file, reason=reason)
    for reason in odd_tokens(name, document):
        yield diagnostic("odd-token-ids", suggestion=_ODD, file=file, reason=reason)


def _has_vocabulary(names: Iterable[str]) -> bool:
    return any(is_one_of(name, VOCABULARIES) for name in names)


def _no_tokenizer(target: str, beside: Iterable[str]) -> Diagnostic:
    others = [name for name in beside if is_one_of(name, VOCABULARIES)]
    cure = "put the tokenizer's files beside the weights"
    if others:
        cure = f"make a tokenizer.json of {others[0]}: transformers' save_pretrained writes it"
    return diagnostic("no-tokenizer", target=target, suggestion=cure)


def _beyond(rows: int, name: str, document: Mapping[str, Any]) -> Iterator[Diagnostic]:
    # Without an embedding there is nothing to compare with.
    tokens = tokens_beyond(name, document, rows) if rows else []
    if tokens:
        shown = ", ".join(tokens[:3]) + (", …" if len(tokens) > 3 else "")
        ids = counted(len(tokens), "token id")
        yield diagnostic("token-beyond-embedding", file=name, ids=ids, tokens=shown, rows=rows)


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
        module.with_tensors(tuple([t.placed(t.file, t.start + size) for t in module.tensors]))
        for module in plan.modules
    ]
    placed = replace(container, nbytes=size + container.least, reason="", least=0)
    return replace(plan, modules=tuple(modules), files=(placed,))


def _edited(
    plan: Plan, format: Format, beside: Mapping[str, bytes] | None, known: Mapping[str, int]
) -> Iterator[PlannedFile]:
    if beside is not None:
        for name, content in edited_files(plan, format, beside).items():
            yield PlannedFile(name, "edited", len(content))
        return
    # Side files that are known by their sizes only, or not at all, which is said elsewhere.
    for name in format.spec.edited_files:
        if name in known:
            reason = f"the text of the source's {name} is not known"
            yield PlannedFile(name, "edited", None, reason)


def _copied(inventory: Inventory, spec: FormatSpec, taken: set[str]) -> Iterator[PlannedFile]:
    """The source's side files that the bundle takes over; `taken` are names of its own."""
    # Recorded headers of a model may not say what lay beside its weights.
    if inventory.side_files is None:
        reason = f"the side files of {inventory.id} are not known"
        yield PlannedFile(_UNKNOWN_SIDE_FILES, "copied", None, reason)
        return
    patterns = copied_names(spec)
    for name, nbytes in sorted(inventory.side_files.items()):
        if name not in taken and is_one_of(name, patterns):
            yield PlannedFile(name, "copied", nbytes)


def _record_file(plan: Plan, files: list[PlannedFile]) -> PlannedFile:
    sizes = {file.name: file.nbytes for file in files if file.nbytes is not None}
    if len(sizes) < len(files):
        return PlannedFile(RECORD, "record", None, "it lists the side files, which are not known")
    if plan.pending:
        reason = "it names the statistics, and what they decide, that are not there yet"
        return PlannedFile(RECORD, "record", None, reason)
    return PlannedFile(RECORD, "record", record_nbytes(plan, sizes))
