"""A log of what a program asks of the file system, in order: writes, syncs, renames, …

    log = EventLog(folder)
    with log.recording():
        build(...)
    [str(event) for event in log.events]

Every call is recorded and then really made; one at a time, so that the log has the order of the
disk. It has all that happens: `lost_writes` can make the folder again from it.
"""

from __future__ import annotations

import builtins
import fcntl
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple
from unittest.mock import patch

# The command of macOS that empties the disk's cache.
FULL_SYNC = getattr(fcntl, "F_FULLFSYNC", 51)


class Event(NamedTuple):
    """One thing that was asked: at the byte `start` of a file, or a rename to `target`.

    what: create, write, truncate, sync, rename, unlink, mkdir or rmdir. start: of a truncate,
    the new length.
    """

    what: str
    path: Path
    start: int = 0
    content: bytes = b""
    target: Path = Path()

    def __str__(self) -> str:
        place = f" {self.start}+{len(self.content)}" if self.what == "write" else ""
        onto = f" -> {self.target.name}" if self.what == "rename" else ""
        return f"{self.what} {self.path.name}{place}{onto}"


class EventLog:
    """What is asked for files and folders within `root`.

    before: called with each event just before it is made; it may end the program.
    """

    def __init__(self, root: Path, before: Callable[[Event], None] | None = None) -> None:
        self.root = root.resolve()
        self.events: list[Event] = []
        self._before = before
        self._lock = RLock()
        # Open files by number: their path, and whether writes go to the end.
        self._opened: dict[int, tuple[Path, bool]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """A context in which calls are recorded."""
        real = {name: getattr(os, name) for name in _CALLS if hasattr(os, name)}
        calls = {name: _CALLS[name](self, real[name]) for name in real}
        opens = self._file_open(io.open)
        with (
            patch.multiple(os, **calls),
            patch.object(io, "open", opens),
            patch.object(builtins, "open", opens),
            patch.object(fcntl, "fcntl", self._full_sync(fcntl.fcntl)),
        ):
            yield

    def made(self, event: Event, call: Callable[[], Any]) -> Any:
        """Record an event, make the call, return what comes back; a failed one is not kept."""
        if not event.path.is_relative_to(self.root):
            return call()
        with self._lock:
            if self._before is not None:
                self._before(event)
            answer = call()
            if event.what == "write":
                event = event._replace(content=event.content[:answer])
            self.events.append(event)
            return answer

    def place(self, path: Any, folder: int | None = None) -> Path:
        """The absolute path of what a call names, by a path or an open file's number."""
        if hasattr(path, "fileno"):
            path = path.fileno()
        if isinstance(path, int):
            return self._opened.get(path, (Path("/unknown"), False))[0]
        start = Path.cwd() if folder is None else self.place(folder)
        return Path(os.path.normpath(start / os.fsdecode(path)))

    def follow(self, number: int, path: Path, *, appends: bool = False) -> None:
        """From now on the number is that of an open file of this path."""
        self._opened[number] = (path, appends)

    def open(self, path: Path, call: Callable[[], Any], *, empties: bool) -> Any:
        """Open a file for writing: it may be made or emptied."""
        if not path.is_relative_to(self.root):
            return call()
        with self._lock:
            if not os.path.lexists(path):
                return self.made(Event("create", path), call)
            return self.made(Event("truncate", path), call) if empties else call()

    def write_start(self, number: int) -> int:
        """Where the next write of an open file goes."""
        if self._opened.get(number, (Path(), False))[1]:
            return os.fstat(number).st_size
        return os.lseek(number, 0, os.SEEK_CUR)

    def _file_open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return real(file, mode, *rest, **named)
            path = self.place(file)
            if not path.is_relative_to(self.root):
                return real(file, mode, *rest, **named)
            letters = "".join(letter for letter in mode if letter not in "bt")

            def raw() -> _File:
                return _File(self, path, letters)

            plain = self.open(path, raw, empties="w" in mode)
            buffering = rest[0] if rest else named.get("buffering", -1)
            if buffering == 0:
                return plain
            buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(plain)
            if "b" in mode:
                return buffered
            names = ("encoding", "errors", "newline")
            text = dict(zip(names, rest[1:4], strict=False))
            text |= {name: named[name] for name in names if name in named}
            return io.TextIOWrapper(buffered, **text)

        return opened

    def _full_sync(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def asked(opened: Any, command: int, *rest: Any) -> Any:
            number = opened if isinstance(opened, int) else opened.fileno()
            if command != FULL_SYNC:
                return real(opened, command, *rest)
            event = Event("sync", self.place(number))
            return self.made(event, lambda: real(opened, command, *rest))

        return asked


class _File(io.FileIO):
    """A file whose writes are recorded; buffers above it call it as they would any other."""

    def __init__(self, log: EventLog, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        self._log, self._path = log, path
        log.follow(self.fileno(), path, appends="a" in mode)

    def write(self, content: Any, /) -> int:
        event = Event("write", self._path, self._log.write_start(self.fileno()), bytes(content))
        return self._log.made(event, lambda: super(_File, self).write(content))

    def truncate(self, size: int | None = None, /) -> int:
        length = self.tell() if size is None else size
        event = Event("truncate", self._path, length)
        return self._log.made(event, lambda: super(_File, self).truncate(length))


def _open(log: EventLog, real: Callable[..., int]) -> Callable[..., int]:
    def called(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        found = log.place(path, dir_fd)

        def call() -> int:
            return real(path, flags, mode, dir_fd=dir_fd)

        if flags & (os.O_CREAT | os.O_TRUNC):
            number = log.open(found, call, empties=bool(flags & os.O_TRUNC))
        else:
            number = call()
        log.follow(number, found, appends=bool(flags & os.O_APPEND))
        return number

    return called


def _pwrite(log: EventLog, real: Callable[..., int]) -> Callable[..., int]:
    def called(number: int, content: Any, start: int) -> int:
        event = Event("write", log.place(number), start, bytes(content))
        return log.made(event, lambda: real(number, content, start))

    return called


def _write(log: EventLog, real: Callable[..., int]) -> Callable[..., int]:
    def called(number: int, content: Any) -> int:
        path = log.place(number)
        if not path.is_relative_to(log.root):
            return real(number, content)
        event = Event("write", path, log.write_start(number), bytes(content))
        return log.made(event, lambda: real(number, content))

    return called


def _truncate(log: EventLog, real: Callable[..., None]) -> Callable[..., None]:
    def called(path: Any, length: int) -> None:
        log.made(Event("truncate", log.place(path), length), lambda: real(path, length))

    return called


def _rename(log: EventLog, real: Callable[..., None]) -> Callable[..., None]:
    def called(source: Any, target: Any) -> None:
        event = Event("rename", log.place(source), target=log.place(target))
        log.made(event, lambda: real(source, target))

    return called


def _of_one(what: str) -> Callable[..., Any]:
    """Calls about one path, or one open file, and a folder that it is in."""

    def recorded(log: EventLog, real: Callable[..., None]) -> Callable[..., None]:
        def called(path: Any, *rest: Any, dir_fd: int | None = None) -> None:
            named = {} if dir_fd is None else {"dir_fd": dir_fd}
            event = Event(what, log.place(path, dir_fd))
            log.made(event, lambda: real(path, *rest, **named))

        return called

    return recorded


_CALLS: dict[str, Callable[..., Any]] = {
    "open": _open,
    "pwrite": _pwrite,
    "write": _write,
    "truncate": _truncate,
    "ftruncate": _truncate,
    "rename": _rename,
    "replace": _rename,
    "unlink": _of_one("unlink"),
    "remove": _of_one("unlink"),
    "mkdir": _of_one("mkdir"),
    "rmdir": _of_one("rmdir"),
    "fsync": _of_one("sync"),
    "fdatasync": _of_one("sync"),
}
