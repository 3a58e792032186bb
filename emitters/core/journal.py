"""The journal of an unfinished build: what it is a build of, and which output rows are on disk.

One JSON document a line: the identity first, then lists of [module, first row, end row]. A
line is written only after the rows that it names; what a crash tore off at the end is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

from emitters.core.run_unit import Receipt
from emitters.core.work_units import Spans, Unit, merge_spans
from emitters.tensor_io.shards import append, flush, writing
from policy_dsl.bounded_json import parse_json
from policy_dsl.regular_files import read_whole

Identity = Mapping[str, Any]
# How long finished work may be lost to a crash.
SAVE_SECONDS = 1.0
# A hundred times what the largest builds write.
_LARGEST = 64 * 2**20


class Journal:
    """An open journal; `done`: module -> finished spans of output rows when it was opened."""

    def __init__(self, path: Path, done: Mapping[int, Spans]) -> None:
        self.path = path
        self.done = done

    @classmethod
    def create(cls, path: Path, identity: Identity) -> Journal:
        """A new journal that begins with `identity`; it is on the disk before this returns.

        Raises: PolicyError if it cannot be written.
        """
        with writing(path):
            path.write_bytes(_line({"identity": identity}))
        flush(path)
        # The file's own name must survive a crash as well.
        flush(path.parent)
        return cls(path, {})

    @classmethod
    def resume(cls, path: Path) -> tuple[Journal, Identity] | None:
        """The journal of an earlier run and its identity; None if there is none to resume.

        A torn last line is cut off.
        Raises: PolicyError if it cannot be read or cut.
        """
        with writing(path):
            content = read_whole(path, most=_LARGEST) if path.is_file() else b""
            lines, nbytes = _parsed(content)
            if not lines:
                return None
            # Lines appended after a torn one would be lost with it.
            if nbytes < len(content):
                os.truncate(path, nbytes)
        spans: dict[int, list[tuple[int, int]]] = {}
        for line in lines[1:]:
            for module, start, stop in line["done"]:
                spans.setdefault(module, []).append((start, stop))
        done = {module: merge_spans(found) for module, found in spans.items()}
        return cls(path, done), lines[0]["identity"]

    def add(self, units: Sequence[Unit]) -> None:
        """Write down finished units whose rows are on the disk.

        Raises: PolicyError if that fails.
        """
        rows = [[unit.module, *unit.span] for unit in units]
        append(self.path, _line({"done": rows}))


class Savepoints:
    """Finished units on their way into the journal: first their files are flushed.

    A crash, of the machine too, loses the work of a few seconds and never a journal's truth.
    """

    def __init__(self, journal: Journal, folder: Path) -> None:
        self._journal = journal
        self._folder = folder
        self._waiting: list[tuple[Unit, Receipt]] = []
        self._saved_at = monotonic()
        # Flushing waits for the disk; meanwhile units go on.
        self._saver = ThreadPoolExecutor(1, "savepoint")
        self._saving: Future[None] | None = None

    def __enter__(self) -> Savepoints:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Save what waits, whatever ended the build. Raises: PolicyError if a save failed."""
        with self._saver:
            last = self._saver.submit(self._save, self._taken())
        for saving in (self._saving, last):
            if saving is not None:
                saving.result()

    def add(self, unit: Unit, receipt: Receipt) -> None:
        """Take a finished unit, and now and then save those that wait.

        Raises: PolicyError if an earlier save failed.
        """
        self._waiting.append((unit, receipt))
        if self._saving is not None and self._saving.done():
            self._saving.result()
            self._saving = None
        if self._saving is None and monotonic() - self._saved_at > SAVE_SECONDS:
            self._saving = self._saver.submit(self._save, self._taken())

    def _taken(self) -> Sequence[tuple[Unit, Receipt]]:
        units, self._waiting = self._waiting, []
        self._saved_at = monotonic()
        return units

    def _save(self, units: Sequence[tuple[Unit, Receipt]]) -> None:
        """Flush and write down units. Raises: PolicyError; the next run does them again then."""
        flushed = {
            tensor.file
            for unit, receipt in units
            if not receipt.is_durable
            for tensor in unit.output.tensors
        }
        # In this order: a line of the journal must never be ahead of its rows.
        for file in sorted(flushed):
            flush(self._folder / file)
        if units:
            self._journal.add([unit for unit, _ in units])


def _parsed(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The documents of all whole lines, up to one that is none, and the bytes they take."""
    found: list[dict[str, Any]] = []
    nbytes = 0
    for line in content.splitlines(keepends=True):
        try:
            document = parse_json(line) if line.endswith(b"\n") else None
        except ValueError:
            break
        if not isinstance(document, dict) or not (_is_done if found else _is_first)(document):
            break
        found.append(document)
        nbytes += len(line)
    return found, nbytes


def _is_first(document: Mapping[str, Any]) -> bool:
    return isinstance(document.get("identity"), dict)


def _is_done(document: Mapping[str, Any]) -> bool:
    """Whether it is a list of modules with their first row and the row after the last."""
    done = document.get("done")
    return isinstance(done, list) and all(
        isinstance(span, list)
        and [type(number) for number in span] == [int, int, int]
        and 0 <= span[1] < span[2]
        for span in done
    )


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"
