"""The files beside the weights: which ones a bundle takes, and whether they can be used.

Asked of a source before anything is written, and of a bundle by `verify`, by the same code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic
from policy_dsl.formats import FormatSpec
from policy_dsl.inventory import Inventory
from policy_dsl.plan import Plan
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
)

_CURE = "download it again; the tokenizers library does not load it"
_ODD = "download it again, or write the numbers of the tokens"


def copied_names(spec: FormatSpec) -> tuple[str, ...]:
    """Patterns of the side files that a format's bundles take over as they are."""
    return (*spec.copied_files, *ALWAYS_COPIED)


def source_findings(plan: Plan, inventory: Inventory, spec: FormatSpec) -> list[Diagnostic]:
    """What is wrong with the side files that a bundle would take from its source.

    Nothing where the source's files cannot be read.
    """
    if inventory.root is None or inventory.side_files is None:
        return []
    patterns = (*copied_names(spec), *spec.edited_files, *spec.embedded_files)
    taken = [name for name in inventory.side_files if is_one_of(name, patterns)]
    embeddings = [one.shape[0] for one in plan.model.tensors if one.role == "embed"]
    found, beyond = _read(inventory, taken, max(embeddings, default=0))
    if not _has_vocabulary(taken):
        found.append(_no_tokenizer(plan.target, inventory.side_files))
    return [*found, *beyond]


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
