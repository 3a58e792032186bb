"""Files that somebody else may have written: opened and read here and nowhere else.

A pipe, a device, a folder or a socket is an error in words. Opening one never waits: what was
opened is looked at, not what was listed before.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from policy_dsl.diagnostics import UnreadableError, diagnostic, fail

# Without O_NONBLOCK, opening a pipe waits for a writer. O_NOCTTY: a terminal never becomes ours.
# O_BINARY is for Windows, which has none of the others.
_OPENED_AS = ("O_RDONLY", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")
_FLAGS = sum(getattr(os, name, 0) for name in _OPENED_AS)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
# What is asked for beyond the size that a file says it has.
_CHUNK_NBYTES = 1 << 16
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# Where the shell puts what it passes: `<(command)`, `< file`.
_GIVEN = re.compile(r"/dev/stdin|/dev/fd/[0-9]{1,9}|/proc/self/fd/[0-9]{1,9}")

# All that is looked at of a file to see whether it is what its name says.
LOOKED_AT_NBYTES = 512
_POINTER = re.compile(rb"version https?://[^\n]*(?:git-lfs|hawser)[^\n]*\n(?s:.*)\nsize (\d{1,19})")
_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head|\?xml)\b", re.IGNORECASE)
# What web servers answer instead of a file, as its only line.
_ANSWER = re.compile(
    rb"(?i)\s*((?:404:? ?)?(?:entry|repository|page|revision|file)? ?not found"
    rb"|forbidden|access denied|unauthorized|bad gateway|internal server error"
    rb"|invalid username or password"
    rb"|(?:invalid credentials|invalid rev id|access to model )[^\n]*)\.?\s*"
)
_PAGES = (".html", ".htm", ".xml")
# Anything else may well be empty.
_NEVER_EMPTY = (".json", ".safetensors", ".model", ".spm", ".tiktoken")


def kind_in_words(mode: int) -> str:
    """What a thing of this `st_mode` is, as `a folder`."""
    return _KINDS.get(stat.S_IFMT(mode), "a special file")


def why_not_regular(mode: int) -> str | None:
    """What a thing of this `st_mode` is, in words; None if it is a regular file."""
    kind = kind_in_words(mode)
    why = "it is a folder" if kind == "a folder" else f"it is {kind}, not a file"
    return None if kind == "a file" else why


def file_stat(path: Path) -> os.stat_result:
    """The facts of a regular file, links followed. Raises: UnreadableError of anything else."""
    try:
        facts = path.stat()
    # A ValueError is a name with a null in it.
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    refuse_special(path, facts)
    return facts


@contextmanager
def opened(path: Path, *, follow: bool = True) -> Iterator[FileIO]:
    """A regular file, opened to be read without a buffer. follow: whether it may be a link.

    Raises: UnreadableError if it cannot be opened or read, or is not a regular file.
    """
    # Before opening too: some devices do something when they are opened.
    file_stat(path)
    try:
        with FileIO(os.open(path, _FLAGS | (0 if follow else _NO_LINK))) as file:
            refuse_special(path, os.fstat(file.fileno()))
            yield file
    except OSError as error:
        raise unreadable(path, error) from error


def read_whole(path: Path, *, most: int, follow: bool = True) -> bytes:
    """All bytes of a regular file. Raises: UnreadableError as `opened`, or of more than `most`."""
    with opened(path, follow=follow) as file:
        # By its size first: a huge one is never in memory, not even in part.
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most else _read(file, most + 1)
    nbytes = max(size, len(content))
    if nbytes > most:
        raise unreadable(path, f"it has {nbytes:,} bytes, over the limit of {most:,}")
    return content


def read_range(path: Path, start: int, stop: int, *, follow: bool = True) -> bytes:
    """Bytes of a regular file. Raises: UnreadableError as `opened`, or if it ends before `stop`."""
    with opened(path, follow=follow) as file:
        file.seek(start)
        content = _read(file, stop - start)
    if len(content) != stop - start:
        raise unreadable(path, "it became shorter")
    return content


def is_passed(path: Path) -> bool:
    """Whether this is what the shell makes of `<(command)` and `< file`."""
    return _GIVEN.fullmatch(str(path)) is not None


def read_first(path: Path, count: int, *, given: bool = False) -> bytes:
    """The first `count` bytes of a regular file, or all. Raises: UnreadableError.

    given: on the command line; what the shell passes may then be a pipe.
    """
    if not (given and is_passed(path)):
        with opened(path) as file:
            return _read(file, count)
    try:
        with path.open("rb") as stream:
            return stream.read(count)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, why: Exception | str, cure: str | None = None) -> UnreadableError:
    """The error of a file that cannot be read. why: in words, or what the system raised."""
    reason = getattr(why, "strerror", None) or str(why)
    defect = diagnostic("unreadable-file", suggestion=cure, path=str(path), reason=reason)
    return UnreadableError([defect])


def refuse_special(path: Path, facts: os.stat_result) -> None:
    """Raises: UnreadableError unless these are the facts of a regular file."""
    reason = why_not_regular(facts.st_mode)
    if reason is not None:
        # Nobody should remove a device such as /dev/null.
        is_device = kind_in_words(facts.st_mode) == "a device"
        cure = "remove it, or put a regular file in its place"
        raise unreadable(path, reason, "name a regular file instead" if is_device else cure)


def refuse_placeholder(file: str, first: bytes, nbytes: int) -> None:
    """Raises: PolicyError if a file is certainly not what its name says.

    Clones and downloads leave a pointer, a page, an error or nothing in place of a file.
    first: its first bytes, 512 or more, or all; nbytes: of the whole file.
    """
    first, what, cure = first[:LOOKED_AT_NBYTES], None, "download it again"
    if not nbytes:
        what = "empty" if file.endswith(_NEVER_EMPTY) else None
    elif pointer := _POINTER.match(first):
        what = f"a Git LFS pointer of {int(pointer[1]):,} bytes"
        cure = "run `git lfs pull` in its folder"
    elif _PAGE.match(first) and not file.endswith(_PAGES):
        what = "an XML page" if b"<?xml" in first.lower() else "an HTML page"
    elif nbytes <= LOOKED_AT_NBYTES and (answer := _ANSWER.fullmatch(first)):
        what = f'the text "{answer[1].decode("ascii", "replace")}"'
    if what is not None:
        raise fail("not-the-file", file=file, what=what, suggestion=cure)


def _read(file: FileIO, most: int) -> bytes:
    """At most so many bytes from where a file is read."""
    parts = []
    expected = max(os.fstat(file.fileno()).st_size - file.tell(), _CHUNK_NBYTES)
    # One read gives 2 GiB at most, and less on some file systems.
    while most and (part := file.read(min(most, expected))):
        parts.append(part)
        most -= len(part)
    return b"".join(parts)
