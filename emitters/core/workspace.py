"""The folder in which a build works, its lock, and the renames that finish it.

<out>.partial/lock        held while a build runs
<out>.partial/journal     which rows are on disk
<out>.partial/bundle/     becomes <out> by one rename
<out>.partial/replaced/   the bundle that was <out> before, for the moment between two renames
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from emitters.core.record import RECORD
from emitters.core.self_check import WrongBundleError
from emitters.tensor_io.shards import flush, writing
from policy_dsl.diagnostics import PolicyError, fail

# What file browsers leave where they were.
_BROWSED = ".DS_Store"
_WORK = frozenset({"lock", "journal", "bundle", "replaced", _BROWSED})
# What the same source and policy lead to again.
_FINAL = frozenset(
    {
        "non-finite-source",
        "unstorable-value",
        "value-overflow",
        "value-underflow",
        "wrong-result",
    }
)


@dataclass(frozen=True)
class Workspace:
    """Where a build of `out` works."""

    out: Path

    @property
    def root(self) -> Path:
        """The folder of the unfinished build."""
        return self.out.with_name(self.out.name + ".partial")

    @property
    def bundle(self) -> Path:
        """The bundle while it is written."""
        return self.root / "bundle"

    @property
    def journal(self) -> Path:
        """The journal's file."""
        return self.root / "journal"

    @property
    def replaced(self) -> Path:
        """Where the bundle waits that is being replaced."""
        return self.root / "replaced"

    def clear(self) -> None:
        """Delete what an earlier run left: the journal first, as it speaks of the rest."""
        with writing(self.root):
            self.journal.unlink(missing_ok=True)
            if self.bundle.exists():
                shutil.rmtree(self.bundle)
            self.bundle.mkdir()

    def forget(self) -> None:
        """Make the work one that nothing can go on with."""
        # The error that led here is the one to tell, not that a folder is gone.
        with suppress(OSError):
            self.journal.unlink()

    def recover(self) -> None:
        """Undo or end a `finish` that a crash cut off: its old bundle goes back, or goes."""
        with writing(self.out):
            if self.replaced.exists() and not self.out.exists():
                self.replaced.rename(self.out)
            elif self.replaced.exists() and (self.out / RECORD).is_file():
                # The new bundle has its name; no later one could be put in its place.
                shutil.rmtree(self.replaced)

    def finish(self) -> None:
        """Give the bundle its name, the one that it replaces is deleted after that.

        Raises: PolicyError if a rename fails; the bundle is then still whole here.
        """
        # Renames may reach the disk before contents do.
        for path in sorted(self.bundle.rglob("*")):
            flush(path)
        flush(self.bundle)
        with writing(self.out):
            if self.out.exists() and not _is_empty(self.out):
                self.out.rename(self.replaced)
            self.bundle.rename(self.out)
            flush(self.out.parent)
            # From here on the new bundle has its name; what follows is only tidying.
            shutil.rmtree(self.root)


def written_files(folder: Path) -> dict[str, int]:
    """Name -> bytes of every file in a folder, those of its subfolders as `folder/name`."""
    with writing(folder):
        return {
            path.relative_to(folder).as_posix(): path.lstat().st_size
            for path in sorted(folder.rglob("*"))
            if not path.is_dir() or path.is_symlink()
        }


def check_output(out: Path, source: Path | None, *, force: bool) -> None:
    """Raises: PolicyError if a build may not write to `out`.

    It lies in the source or around it, or it exists and is not empty; with `force` a bundle
    of policyc may be replaced, and nothing else: not even files that were put beside it.
    """
    folder = source.resolve() if source else None
    if folder and (out.is_relative_to(folder) or folder.is_relative_to(out)):
        cure = "give a folder apart from the source with -o"
        raise fail("output-in-source", path=str(out), suggestion=cure)
    if not os.path.lexists(out) or _is_empty(out):
        return
    is_bundle = (out / RECORD).is_file()
    if not force:
        cure = "--force replaces it once the new bundle is complete"
        if not is_bundle:
            cure = f"it has no {RECORD}, so nothing replaces it: give another folder with -o"
        raise fail("output-exists", path=str(out), suggestion=cure)
    if not is_bundle:
        cure = f"it has no {RECORD}: move it away, or give another folder with -o"
        raise fail("output-not-a-bundle", path=str(out), suggestion=cure)
    own = _own_files(out)
    folders = {name.rpartition("/")[0] for name in own} - {""}
    listed = {path.name for path in out.iterdir()}
    listed |= {f"{inner}/{name}" for inner in folders for name in _listed(out / inner)}
    _refuse(out, listed - own - folders)


def _refuse(folder: Path, strangers: Collection[str]) -> None:
    """Raises: PolicyError if there are any: what no build made, none deletes."""
    if strangers:
        names = ", ".join(sorted(strangers)[:5])
        cure = "move them away, or give another folder with -o"
        raise fail("output-has-other-files", path=str(folder), names=names, suggestion=cure)


def _own_files(out: Path) -> set[str]:
    """The files that a build made, by its record, and what file browsers leave."""
    try:
        files = json.loads((out / RECORD).read_bytes())["files"]
        return {RECORD, _BROWSED, *map(str, files)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        cure = f"its {RECORD} cannot be read: move it away, or give another folder with -o"
        raise fail("output-not-a-bundle", path=str(out), suggestion=cure) from error


@contextmanager
def claimed(out: Path) -> Iterator[Workspace]:
    """The workspace of `out`, held against other builds while the context lasts.

    What can be gone on with stays when the context ends by an error, and nothing else.
    Raises: PolicyError if another build holds it, it cannot be made, or is a folder of another
    kind that only happens to have its name.
    """
    workspace = Workspace(out)
    # All of it is deleted in the end.
    _refuse(workspace.root, _listed(workspace.root) - _WORK)
    lock = _locked(workspace)
    try:
        yield workspace
    except PolicyError as error:
        final = isinstance(error, WrongBundleError)
        if final or _FINAL.intersection(found.code for found in error.diagnostics):
            workspace.forget()
        raise
    finally:
        # Nothing was begun, or nothing came of it: nothing is left.
        if not workspace.journal.exists() and not workspace.replaced.exists():
            shutil.rmtree(workspace.root, ignore_errors=True)
        os.close(lock)


def _listed(folder: Path) -> set[str]:
    with writing(folder):
        try:
            return set(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            # A build that ends deletes it; a file of its name is told where it is in the way.
            return set()


def _locked(workspace: Workspace) -> int:
    """A descriptor of the lock file, locked."""
    path = workspace.root / "lock"
    while True:
        with writing(workspace.root):
            workspace.root.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                # Held by the open file: it ends with the program, however that ends.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                cure = "wait for it, or stop it"
                raise fail("output-in-use", path=str(workspace.out), suggestion=cure) from None
        # A build that just finished has deleted the file that was locked here.
        if path.exists() and path.stat().st_ino == os.fstat(lock).st_ino:
            return lock
        os.close(lock)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
