"""Commands of policyc in a child each, with what they cost and what they must never do."""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import stat
import sys
import time
import traceback
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from policyc.cli import main as policyc

MOST_SECONDS = 2.0
MOST_NBYTES = 2**30
# So long without work a command waits for something that never comes; so much work is too much.
PATIENCE, MOST_WORK = 4.0, 15.0
# What a child may ask for at all: the machine outlives a trial that asks for everything.
ADDRESSES = 3 * 2**30
# Which letters no text for a terminal holds: controls, formats such as right-to-left marks,
# other ends of lines.
CONTROLS = {"Cc", "Cf", "Zl", "Zp"}
_WARNING = re.compile(r"^\S+:\d+: \w*Warning: |Traceback \(most recent", re.MULTILINE)
# How errors begin: as text, in Markdown, as JSON, and those of a command line.
DIAGNOSED = ("error[", "error\\[", '"severity": "error"', '"severity":"error"', "Usage:")

Command = Sequence[str]


@dataclass(frozen=True)
class Answer:
    """What one command did. seconds: of the processor; fault: what it must not do, or ""."""

    command: Command
    code: int | None
    seconds: float
    text: str
    fault: str = ""


@dataclass
class Trial:
    """The answers about one input; nbytes: the child's peak memory."""

    answers: list[Answer] = field(default_factory=list)
    nbytes: int = 0
    faults: list[str] = field(default_factory=list)


def try_input(box: Path, commands: Sequence[Command], *, may_write: Sequence[str] = ()) -> Trial:
    """The answers of commands that a child runs in the folder `box`, one after the other.

    may_write: the paths below `box` that commands may write; nothing else may change there.
    """
    before = _state(box)
    reads, writes = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reads)
        _run_child(box, commands, writes)
    os.close(writes)
    text, in_time = _read_all(reads, child)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    trial = Trial(nbytes=used.ru_maxrss * 1024)
    for line in text.splitlines():
        trial.answers.append(_judged(box, **json.loads(line)))
    if len(trial.answers) < len(commands):
        stuck = " ".join(commands[len(trial.answers)])
        end = f"died ({status})" if in_time else "no end"
        trial.faults.append(f"hang: {stuck}: {end}")
    if trial.nbytes > MOST_NBYTES:
        trial.faults.append(f"memory: {trial.nbytes / 2**20:.0f} MiB")
    trial.faults += [f"files: {name} {what}" for name, what in _changed(box, before, may_write)]
    trial.faults += [one.fault for one in trial.answers if one.fault]
    return trial


def _read_all(reads: int, child: int) -> tuple[str, bool]:
    """What the child wrote, and whether it came to an end."""
    parts: list[bytes] = []
    worked, since = 0.0, time.monotonic()
    with os.fdopen(reads, "rb", buffering=0) as opened:
        while time.monotonic() - since < PATIENCE and worked < MOST_WORK:
            if select.select([opened], [], [], 0.5)[0]:
                part = opened.read(65536)
                if not part:
                    return b"".join(parts).decode(), True
                parts.append(part)
            now = _work(child)
            # A busy machine may keep a child waiting, but not for as long as this.
            if now > worked:
                worked, since = now, time.monotonic()
    return b"".join(parts).decode(), False


def _work(child: int) -> float:
    """Seconds of the processor that a process has had."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _run_child(box: Path, commands: Sequence[Command], writes: int) -> None:
    """Runs the commands and ends the process."""
    try:
        os.chdir(box)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for command in commands:
            os.write(writes, json.dumps(_run(command)).encode() + b"\n")
    finally:
        os._exit(0)


def _run(command: Command) -> dict[str, Any]:
    capture = os.memfd_create("output")
    os.dup2(capture, 1)
    os.dup2(capture, 2)
    began, raised, code = _seconds(), "", None
    try:
        code = policyc(list(command))
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is a traceback
        raised = _shown_error(error)
    spent = _seconds() - began
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    content = os.pread(capture, os.fstat(capture).st_size, 0)
    os.close(capture)
    text = content.decode("utf-8", "replace")
    return {
        "command": list(command),
        "code": code,
        "seconds": spent,
        "raised": raised,
        "text": text[:3000],
        "control": _control(text),
        "warning": bool(_WARNING.search(text)),
        "diagnosed": any(word in text for word in DIAGNOSED),
    }


def _shown_error(error: BaseException) -> str:
    """An exception in one line, with the innermost places that it went through."""
    frames = traceback.extract_tb(error.__traceback__)[-5:]
    places = [f"{Path(one.filename).name}:{one.lineno} {one.name}" for one in frames]
    return f"{type(error).__name__} {str(error)[:200]!r} at {' > '.join(places)}"


def _seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _control(text: str) -> str:
    """The first letter that a terminal would not show, in its line; "" if there is none."""
    # Most texts are plain, and a set is a quick look at all of them.
    odd = {one for one in set(text) - {"\n", "\t"} if unicodedata.category(one) in CONTROLS}
    at = min((text.index(one) for one in odd), default=None)
    return "" if at is None else ascii(text[max(0, at - 40) : at + 40])


def _judged(box: Path, **said: Any) -> Answer:
    command, code, seconds = said["command"], said["code"], said["seconds"]
    shown = " ".join(command)
    fault = ""
    if said["raised"]:
        fault = f"traceback: {shown}: {said['raised']}"
    elif said["warning"]:
        fault = f"traceback: {shown}: a library's own words: {said['text']}"
    elif code not in (0, 1, 2) or (code == 2 and not said["diagnosed"]):
        fault = f"traceback: {shown}: code {code} without a diagnostic: {said['text'][:500]}"
    elif seconds > MOST_SECONDS:
        fault = f"slow: {shown}: {seconds:.1f} s"
    elif said["control"]:
        fault = f"control: {shown}: {said['control']}"
    return Answer(command, code, seconds, said["text"], fault)


State = Mapping[str, tuple[int, ...]]


def _state(box: Path) -> dict[str, tuple[int, ...]]:
    """Every path around `box`, its parent's other folders included, and what would change."""
    return dict(_walk(box.parent))


def _walk(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for entry in os.scandir(folder):
        found = entry.stat(follow_symlinks=False)
        is_folder = stat.S_ISDIR(found.st_mode)
        sizes = () if is_folder else (found.st_ino, found.st_size, found.st_mtime_ns)
        yield entry.path, (found.st_mode, *sizes)
        if is_folder:
            yield from _walk(Path(entry.path))


def _changed(box: Path, before: State, may_write: Sequence[str]) -> Iterator[tuple[str, str]]:
    after = _state(box)
    allowed = tuple(str(box / name) for name in may_write)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name) and not name.startswith(allowed or ("\0",)):
            what = "was written" if name not in before else "changed"
            yield name, what if name in after else "was deleted"
