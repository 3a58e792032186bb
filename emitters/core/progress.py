"""How a build reports its progress: an interface that the loop calls, and two plain forms."""

from __future__ import annotations

import json
from contextlib import suppress
from time import monotonic
from typing import Protocol, TextIO


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


class Pace:
    """Bytes of a stage against the clock: rate and time that is left."""

    def __init__(self, total: int, done: int) -> None:
        self.total = total
        self.done = done
        self._first = done
        self._started = monotonic()

    @property
    def rate(self) -> float:
        """Bytes a second, of this run alone."""
        # What an earlier run did says nothing about this one's pace.
        return (self.done - self._first) / max(1e-9, monotonic() - self._started)

    @property
    def seconds_left(self) -> float | None:
        """Seconds to go at this rate; None before there is one."""
        return (self.total - self.done) / self.rate if self.done > self._first else None


class Lines:
    """A line of text, or a JSON object, every few seconds and at the end of a stage."""

    def __init__(self, stream: TextIO, *, as_json: bool = False, every: float = 5.0) -> None:
        self._stream = stream
        self._as_json = as_json
        self._every = every
        self._stage = ""
        self._pace = Pace(0, 0)
        self._written_at = 0.0

    def begin(self, stage: str, total: int, done: int) -> None:
        """Start a stage with a line."""
        self._stage, self._pace = stage, Pace(total, done)
        self._write()

    def advance(self, nbytes: int) -> None:
        """Count; a line when it is time for one."""
        self._pace.done += nbytes
        if monotonic() - self._written_at >= self._every:
            self._write()

    def end(self) -> None:
        """Close the stage with a line."""
        self._write()

    def _write(self) -> None:
        self._written_at = monotonic()
        # A full disk under a log must not end hours of work.
        with suppress(OSError):
            self._stream.write((self._document() if self._as_json else self._text()) + "\n")
            self._stream.flush()

    def _text(self) -> str:
        pace = self._pace
        share = 100 * pace.done // max(1, pace.total)
        done, total = pace.done / 1e9, pace.total / 1e9
        text = f"{self._stage} {share:3d} %  {done:.2f} of {total:.2f} GB"
        left = pace.seconds_left
        return f"{text}  {pace.rate / 1e6:.0f} MB/s  {clock(left)} left" if left else text

    def _document(self) -> str:
        pace, left = self._pace, self._pace.seconds_left
        return json.dumps(
            {
                "schema_version": 1,
                "kind": "progress",
                "stage": self._stage,
                "done": pace.done,
                "total": pace.total,
                "bytes_per_second": round(pace.rate),
                "seconds_left": None if left is None else round(left),
            }
        )


def clock(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
