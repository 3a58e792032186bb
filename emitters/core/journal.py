"""The journal of an unfinished build: what it is a build of, and which output rows are on disk.

One JSON document a line: the identity first, then lists of [module, first row, end row]. A
line is written only after the rows that it names; what a crash tore off at the end is dropped.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, TypedDict

from emitters.core.preconditions import ensure_room
from emitters.core.run_unit import Receipt, Work
from emitters.core.work_units import Spans, Unit, merge_spans
from emitters.core.workspace import Workspace
from emitters.tensor_io.files import append, create_file, flush, writing
from policy_dsl import version
from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import PolicyError, fail
from policy_dsl.documents import first_defect
from policy_dsl.documents.saved import Size
from policy_dsl.formats import Container, in_order
from policy_dsl.plan import Plan, PlannedFile, PlannedTensor
from policy_dsl.planning.bundle_files import header_bytes, preface
from policy_dsl.regular_files import read_whole

# How long finished work may be lost to a crash.
SAVE_SECONDS = 1.0
# A hundred times what the largest builds write.
_LARGEST = 64 * 2**20
_CURE = "--force starts over, and so does deleting that folder"
# What parts of an identity are called in messages, if not by their names.
_PARTS = {
    "policyc": "version of policyc",
    "source": "source, or of another state of it",
    "statistics": "file of statistics",
}


class _Begun(TypedDict):
    identity: dict[str, Any]


class _Done(TypedDict):
    done: list[tuple[Size, Size, Size]]


class TensorFile(NamedTuple):
    """A file of tensors, all that comes before them in it, and these."""

    file: PlannedFile
    header: bytes
    tensors: list[PlannedTensor]


class Journal:
    """An open journal; `done`: module -> finished spans of output rows when it was opened.

    It takes finished units, and saves them now and then: first their files are flushed. A crash,
    of the machine too, loses the work of a few seconds and never its truth.
    """

    def __init__(self, path: Path, folder: Path, done: Mapping[int, Spans]) -> None:
        self.done, self._path, self._folder = done, path, folder
        self._rows: list[list[int]] = []
        self._files: set[str] = set()
        # Flushing waits for the disk; meanwhile units go on.
        self._saver = ThreadPoolExecutor(1, "savepoint")
        self._saving = self._save()

    def close(self) -> None:
        """Save what waits, whatever ended the build. Raises: PolicyError if a save failed."""
        with self._saver:
            last = self._save()
        for saving in (self._saving, last):
            saving.result()

    def add(self, unit: Unit, receipt: Receipt) -> None:
        """Take a finished unit, and save now and then. Raises: PolicyError if a save failed."""
        self._rows.append([unit.module, *unit.span])
        if not receipt.is_durable:
            self._files.update([tensor.file for tensor in unit.output.tensors])
        # Asking whether a save is done takes a lock.
        if monotonic() - self._saved_at > SAVE_SECONDS and self._saving.done():
            self._saving.result()
            self._saving = self._save()

    def _save(self) -> Future[None]:
        saving = self._saver.submit(self._write, self._rows, self._files)
        self._rows, self._files, self._saved_at = [], set(), monotonic()
        return saving

    def _write(self, rows: list[list[int]], files: set[str]) -> None:
        # In this order: a line of the journal must never be ahead of its rows.
        for file in sorted(files):
            flush(self._folder / file)
        if rows:
            append(self._path, _line({"done": rows}))


def open_journal(
    workspace: Workspace, plan: Plan, work: Work, created: Iterable[TensorFile], *, force: bool
) -> Journal:
    """The journal to resume, and the shards that it speaks of, new or from an earlier run.

    Raises: PolicyError if the disk has no room, or the unfinished build there is another one or
    damaged, some of it is done, and `force` does not allow to throw it away.
    """
    facts = work.reader.source.facts
    files = dict(zip(facts, map(list, facts.values()), strict=True))
    identity = {
        "policyc": version(),
        "source": {"digest": plan.source_digest, "files": files},
        "policy": plan.policy_digest,
        # Not their names: a file that was moved is the same.
        "statistics": {file.name: file.sha256 for file in plan.statistics},
        "plan": plan.digest,
    }
    path, spans = workspace.journal, defaultdict(list)
    if lines := _read(path):
        for module, start, stop in chain.from_iterable(line["done"] for line in lines[1:]):
            spans[module].append((start, stop))
        refusal = _refusal(workspace, plan, lines[0]["identity"], identity)
        if refusal is None:
            ensure_room(plan, workspace.bundle)
            done = {module: merge_spans(listed) for module, listed in spans.items()}
            return Journal(path, workspace.bundle, done)
        # Where nothing is done yet, nothing is lost.
        if spans and not force:
            raise refusal
    # Without a journal nothing says what a file holds: whatever is there is of no use.
    workspace.clear(file.name for file in plan.files)
    ensure_room(plan, workspace.bundle)
    _create_files(workspace, created)
    with writing(path):
        path.write_bytes(_line({"identity": identity}))
    flush(path)
    # The file's own name must survive a crash as well.
    flush(path.parent)
    return Journal(path, workspace.bundle, {})


def _refusal(workspace: Workspace, plan: Plan, found: Any, wanted: Any) -> PolicyError | None:
    root = str(workspace.root)
    for part in wanted:
        if found.get(part) != wanted[part]:
            return fail("other-build", path=root, what=_PARTS.get(part, part), suggestion=_CURE)
    for file in plan.tensor_files:
        path = workspace.bundle / file.name
        if not path.is_file() or path.stat().st_size != file.nbytes:
            reason = f"{file.name} is not there, or is not as long as it was"
            return fail("damaged-partial", path=root, reason=reason, suggestion=_CURE)
    return None


def tensor_files(plan: Plan, work: Work) -> list[TensorFile]:
    """Every tensor file, with all that comes before its tensors, and these."""
    spec, held, files = work.format.spec, defaultdict(list), []
    for tensor in in_order(plan.modules):
        held[tensor.file].append(tensor)
    for file in plan.tensor_files:
        if isinstance(spec.tensor_files, Container):
            header = preface(plan, work.format, work.reader.source.whole(spec.embedded_files))
        else:
            header = header_bytes(held[file.name], spec.tensor_files.metadata)
        files.append(TensorFile(file, header, held[file.name]))
    return files


def _create_files(workspace: Workspace, created: Iterable[TensorFile]) -> None:
    """Every tensor file at its full length with its header, on the disk when this returns."""
    for file, header, tensors in created:
        path = workspace.bundle / file.name
        create_file(path, header, tensors, file.nbytes or 0)
        flush(path)
    # The journal comes next, and speaks of files that must be there after a crash.
    for folder in (workspace.bundle, workspace.root, workspace.root.parent):
        flush(folder)


def _read(path: Path) -> list[Any]:
    """The lines of an earlier run's journal, none if it cannot be resumed; cut where it is torn."""
    documents: list[Any] = []
    with writing(path):
        content = read_whole(path, most=_LARGEST) if path.is_file() else b""
        nbytes = 0
        for line in content.splitlines(keepends=True):
            document: Any = None
            # One that is torn has no end.
            with suppress(ValueError):
                document = parse_json(line) if line.endswith(b"\n") else None
            if first_defect(document, _Done if documents else _Begun) is not None:
                break
            if any(start >= stop for _, start, stop in document.get("done", ())):
                break
            documents.append(document)
            nbytes += len(line)
        # Lines appended after a torn one would be lost with it.
        if documents and nbytes < len(content):
            os.truncate(path, nbytes)
    return documents


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"
