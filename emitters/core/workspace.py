"""The folder in which a build works, its lock, and the renames that finish it.

<out>.partial/lock        held while a build runs, and deleted last; names what is in bundle/
<out>.partial/journal     which rows are on disk
<out>.partial/bundle/     becomes <out> by one rename
<out>.partial/replaced/   the bundle that was <out> before, for the moment between two renames
<out>.partial/deleted/    a bundle that was replaced, while its files are deleted
"""

import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from emitters.core import deleting
from emitters.core.deleting import BROWSED, ensure_kind, kind_of, refuse_others, unfinished_files
from emitters.tensor_io.files import flush, make_folder, write_failure, writing
from policy_dsl.diagnostics import Diagnostic, PermanentError, PolicyError, diagnostic, fail
from policy_dsl.planning.record import RECORD
from policy_dsl.regular_files import read_whole

# What a workspace holds besides folders.
_FILES = {"lock", "journal", BROWSED}
_IS_DELETED = re.compile(r"deleted(-[0-9]+)?")
# What NFS calls a file that is deleted while it is open.
_OPEN = ".nfs"
_LARGEST_LOCK = 16 * 2**20
# How often a build may end just where another one wants to begin.
_MOST_TRIES = 1000


class Workspace:
    """Where a build of `out` works. left: warnings about what could not be deleted."""

    def __init__(self, out: Path) -> None:
        self.out, self.root = out, out.with_name(out.name + ".partial")
        self.lock, self.journal = self.root / "lock", self.root / "journal"
        self.bundle, self.replaced = self.root / "bundle", self.root / "replaced"
        self.left: list[Diagnostic] = []

    def clear(self, names: Iterable[str]) -> None:
        """Delete what an earlier run left. names: of the files that this build makes.

        Raises: PolicyError, before anything is deleted, if no build made what is there.
        """
        before = self._names()
        unfinished_files(self.bundle, before)
        with writing(self.root):
            # It must not come back after a crash and speak of other files than its own.
            self.journal.unlink(missing_ok=True)
            flush(self.root)
            deleting.delete_unfinished(self.bundle, before)
            # Nor do the files: the lock names others before there is any of them.
            flush(self.root)
            self.lock.write_text("\n".join(names), encoding="utf-8")
            flush(self.lock)
            self.bundle.mkdir()

    def recover(self) -> None:
        """Undo or end a `finish` that a crash cut off. Raises: PolicyError if that fails."""
        with writing(self.out):
            named = kind_of(self.bundle) is None
            if named:
                # The bundle has its name, and the journal speaks of nothing that is here.
                self.journal.unlink(missing_ok=True)
            if kind_of(self.replaced) is not None and _is_free(self.out):
                self.replaced.rename(self.out)
            elif named and kind_of(self.out / RECORD) == "a file":
                self._set_aside()

    def finish(self, *, force: bool = True) -> None:
        """Give the bundle its name; with `force` it may take the place of another bundle.

        Raises: PolicyError if a rename fails or `check_contents` does; it is still whole then.
        """
        # Renames may reach the disk before contents do.
        for path in sorted(self.bundle.rglob("*")):
            flush(path)
        flush(self.bundle)
        # Hours may have passed since the last look.
        check_contents(self.out, force=force)
        with writing(self.out):
            if not _is_free(self.out):
                self._set_aside()
                self.out.rename(self.replaced)
            try:
                self.bundle.rename(self.out)
            except OSError:
                # Not only after a crash: the old bundle must not be missing until the next build.
                with suppress(OSError):
                    self.replaced.rename(self.out)
                raise
            flush(self.root)
            flush(self.out.parent)
        # From here on the new bundle has its name; what follows is only tidying.
        with self._tidying(self.root), writing(self.root):
            self._set_aside()
            self.journal.unlink(missing_ok=True)

    def ensure_own(self, *, held: bool = False) -> None:
        """Raises: PolicyError if what no build made is in the folder. held: whether the lock is."""
        ensure_kind(self.root, "a folder")
        listed = self._listed()
        ours = {*_FILES, "bundle", "replaced", *filter(_IS_DELETED.fullmatch, listed)}
        # All of it is deleted in the end.
        refuse_others(self.root, {*listed} - ours)
        for name in listed:
            ensure_kind(self.root / name, "a file" if name in _FILES else "a folder")
        unfinished_files(self.bundle, self._names() if held else None)

    def _listed(self) -> list[str]:
        return [name for name in deleting.names_in(self.root) if not name.startswith(_OPEN)]

    def _names(self) -> Collection[str] | None:
        """The names of the files of the unfinished bundle; None if they are not known."""
        try:
            names = read_whole(self.lock, most=_LARGEST_LOCK).decode().splitlines()
        except (PolicyError, UnicodeDecodeError):
            return None
        return {*names, BROWSED} if names else None

    def _set_aside(self) -> None:
        """Give a replaced bundle, if there is one, a name by which it never comes back."""
        if kind_of(self.replaced) is not None:
            names = (f"deleted-{number}" if number else "deleted" for number in count())
            free = next(name for name in names if kind_of(self.root / name) is None)
            self.replaced.rename(self.root / free)
            # Before anything in it is deleted.
            flush(self.root)

    def tidy(self) -> None:
        """Delete what nothing needs, the lock last; what cannot be deleted is in `left`."""
        with self._tidying(self.root):
            for name in filter(_IS_DELETED.fullmatch, self._listed()):
                with self._tidying(self.root / name):
                    deleting.delete_bundle(self.root / name)
        if os.path.lexists(self.journal) or os.path.lexists(self.replaced):
            return
        with self._tidying(self.bundle):
            deleting.delete_unfinished(self.bundle, self._names())
        with suppress(OSError, PolicyError):
            if set(os.listdir(self.root)) <= {BROWSED, "lock"}:
                (self.root / BROWSED).unlink(missing_ok=True)
            # What comes back after a crash without it would not be taken for a build's.
            flush(self.root)
            self.lock.unlink()
            # Another build may be in it by now: it is not empty then, and stays.
            self.root.rmdir()

    @contextmanager
    def _tidying(self, folder: Path) -> Iterator[None]:
        """A context in which an error is a warning: the folder is still there."""
        try:
            yield
        except PolicyError as error:
            reason, cure = error.diagnostics[0].message, "move away or delete what is in it"
            left = diagnostic("output-left-over", suggestion=cure, path=str(folder), reason=reason)
            self.left.append(left)


def output_place(out: Path) -> Path:
    """The absolute path of an output; links on the way to it are followed, not it itself."""
    if out.name in ("", ".."):
        return Path(os.path.realpath(out))
    return Path(os.path.realpath(out.parent), out.name)


def check_place(out: Path, source: Path | None, *, force: bool) -> None:
    """Raises: PolicyError if a build may not write to `out`, before a claim makes any folder."""
    # The root of a disk has no name, and nothing beside it.
    workspace = Workspace(out) if out.name else None
    if not workspace or (source and any(_overlap(source, at) for at in (out, workspace.root))):
        cure = "give a folder apart from the source with -o"
        raise fail("output-in-source", path=str(out), suggestion=cure)
    ensure_kind(out, "a folder")
    workspace.ensure_own()
    seen = os.path.lexists(workspace.root)
    try:
        check_contents(out, force=force)
    except PolicyError:
        # Renames of another build that is at work confuse what is seen: the claim decides.
        if not seen and not os.path.lexists(workspace.root):
            raise


def check_contents(out: Path, *, force: bool) -> None:
    """Raises: PolicyError if anything is in `out`; with `force`, anything but a bundle as built."""
    ensure_kind(out, "a folder")
    if _is_free(out):
        return
    if not force:
        cure = "--force replaces it once the new bundle is complete"
        if kind_of(out / RECORD) != "a file":
            cure = f"it has no {RECORD}, so nothing replaces it: give another folder with -o"
        raise fail("output-exists", path=str(out), suggestion=cure)
    deleting.ensure_made(out)


@contextmanager
def claimed(out: Path) -> Iterator[Workspace]:
    """The workspace of `out`, held against other builds; what can be resumed stays after an error.

    Raises: PolicyError if another build holds it, it cannot be made, or no build made it.
    """
    workspace = Workspace(out)
    lock = _locked(workspace)
    try:
        workspace.ensure_own(held=True)
        # The lock's name is on the disk before any other.
        flush(workspace.root)
        yield workspace
    except PermanentError:
        # It is not resumed; this error is reported, not that a folder is gone.
        with suppress(OSError, PolicyError):
            workspace.journal.unlink()
            flush(workspace.root)
        raise
    finally:
        # Somebody may have deleted the lock: what is there now is another build's.
        if _holds(workspace, lock):
            workspace.tidy()
        os.close(lock)
        # Over NFS a deleted file keeps its folder until it is closed.
        with suppress(OSError):
            workspace.root.rmdir()


def _locked(workspace: Workspace) -> int:
    # Not at the top: Windows has none, and plans there.
    import fcntl  # noqa: PLC0415

    # Neither through a link nor waiting for the other end of a pipe.
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    refusal: OSError = TimeoutError()
    for _ in range(_MOST_TRIES):
        workspace.ensure_own()
        with writing(workspace.root):
            try:
                make_folder(workspace.root)
                is_new = not os.path.lexists(workspace.lock)
                made = os.O_CREAT | os.O_EXCL if is_new else 0
                lock = os.open(workspace.lock, flags | made, 0o644)
            except (FileNotFoundError, FileExistsError) as error:
                # A build that ends deleted the folder in this moment.
                refusal = error
                continue
        try:
            # Held by the open file: it ends with the program, however that ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if not isinstance(error, BlockingIOError):
                raise write_failure(workspace.lock, error) from error
            cure = "wait for it, or stop it"
            raise fail("output-in-use", path=str(workspace.out), suggestion=cure) from None
        # A build that just finished has deleted the file that was locked here.
        if _holds(workspace, lock):
            if is_new:
                _ensure_begun_by_a_build(workspace, lock)
            return lock
        os.close(lock)
    raise write_failure(workspace.root, refusal)


def _ensure_begun_by_a_build(workspace: Workspace, lock: int) -> None:
    # The lock is made first and deleted last: without it and a journal, no build made a bundle.
    try:
        if not os.path.lexists(workspace.journal):
            refuse_others(workspace.bundle, unfinished_files(workspace.bundle))
    except PolicyError:
        with suppress(OSError):
            workspace.lock.unlink()
        os.close(lock)
        raise


def _holds(workspace: Workspace, lock: int) -> bool:
    with suppress(OSError):
        there = workspace.lock.lstat()
        return stat.S_ISREG(there.st_mode) and os.path.samestat(there, os.fstat(lock))
    return False


def _overlap(source: Path, place: Path) -> bool:
    folder = Path(os.path.realpath(source))
    pairs = [(folder, outer) for outer in (place, *place.parents)]
    pairs += [(outer, place) for outer in folder.parents]
    for pair in pairs:
        # By what the system says of folders that exist: names alone miss capitals and links.
        with suppress(OSError):
            if os.path.samefile(*pair):
                return True
    return False


def _is_free(out: Path) -> bool:
    """Whether a bundle can have this name without taking it from anything."""
    return kind_of(out) is None or not os.listdir(out)
