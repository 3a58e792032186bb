"""How a build reports its progress: an interface that the loop calls, and two plain forms."""

from __future__ import annotations

import json
from contextlib import suppress
from time import monotonic
from typing import Protocol, TextIO

from policy_dsl.documents.reports import ProgressDocument


class Progress(Protocol):
    """What a build calls, from one thread at a time: begin, advance …, end, for every stage.

    Stages: `encode` in bytes of source weights, `hash` in bytes of the bundle.
    """

    def begin(self, stage: str, total: int, done: int) -> None:
        """A stage starts; of its `total` bytes an earlier run has `done` some."""

    def advance(self, nbytes: int) -> None:
        """Advance by `nbytes`."""

    def end(self) -> None:
        """The stage is over, complete or not."""


class Silent:
    """Reports nothing."""

    def begin(self, stage: str, total: int, done: int) -> None:
        """Nothing."""

    def advance(self, nbytes: int) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


class Lines:
    """A line of text, or a JSON object, every few seconds and at the end of a stage."""

    def __init__(self, stream: TextIO, *, as_json: bool = False, every: float = 5.0) -> None:
        self._stream, self._as_json, self._every = stream, as_json, every

    def begin(self, stage: str, total: int, done: int) -> None:
        """Start a stage with a line."""
        self._stage, self._total, self._done, self._first = stage, total, done, done
        self._started = monotonic()
        self.end()

    def advance(self, nbytes: int) -> None:
        """Count; a line when it is time for one."""
        self._done += nbytes
        if monotonic() - self._written_at >= self._every:
            self.end()

    def end(self) -> None:
        """Write a line."""
        self._written_at = monotonic()
        # What an earlier run did says nothing about this one's pace.
        new = self._done - self._first
        rate = new / max(1e-9, self._written_at - self._started)
        left = (self._total - self._done) / rate if new > 0 else None
        # A full disk under a log must not end hours of work.
        with suppress(OSError):
            form = self._document if self._as_json else self._text
            self._stream.write(form(rate, left) + "\n")
            self._stream.flush()

    def _text(self, rate: float, left: float | None) -> str:
        share = 100 * self._done // max(1, self._total)
        done, total = self._done / 1e9, self._total / 1e9
        text = f"{self._stage} {share:3d} %  {done:.2f} of {total:.2f} GB"
        return f"{text}  {rate / 1e6:.0f} MB/s  {clock(left)} left" if left else text

    def _document(self, rate: float, left: float | None) -> str:
        document: ProgressDocument = {
            "schema_version": 1,
            "kind": "progress",
            "stage": self._stage,
            "done": self._done,
            "total": self._total,
            "bytes_per_second": round(rate),
            "seconds_left": None if left is None else round(left),
        }
        return json.dumps(document)


def clock(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
