"""What a build may delete: files that a build made, checked and then deleted one by one.

No folder is deleted with what is in it, and no link is followed: what else appears meanwhile stays.
"""

import os
import stat
from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from hashlib import file_digest
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from emitters.core.record import LARGEST_RECORD
from emitters.tensor_io.files import flush, writing
from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import PolicyError, fail
from policy_dsl.documents import Limits, first_defect
from policy_dsl.documents.saved import HashedFile
from policy_dsl.escaping import is_plain_name
from policy_dsl.planning.record import RECORD, record_digest
from policy_dsl.regular_files import kind_in_words, opened, read_whole
from policy_dsl.sources.side_files import SUBFOLDERS

# What file browsers leave where they were.
BROWSED = ".DS_Store"
# Of the smallest files so much is hashed before they are replaced; of weights, sizes must do.
_HASHED_NBYTES = 256 * 2**20
_FOLDER = sum(getattr(os, name, 0) for name in ("O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC"))


class _Record(TypedDict):
    kind: Literal["bundle"]
    schema_version: Literal[1, 2]
    files: Annotated[dict[str, HashedFile], Limits(least=1)]
    digest: str


def kind_of(path: Path) -> str | None:
    """What is at a path, as `a folder` or `a link`; None if nothing is. Raises: PolicyError."""
    with writing(path):
        try:
            return kind_in_words(path.lstat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return None


def ensure_kind(path: Path, wanted: str) -> None:
    """Raises: PolicyError if at a path there is something else than `a folder` or `a file`."""
    kind = kind_of(path)
    if kind not in (None, wanted):
        cure = "remove it, or give another folder with -o"
        if kind == "a link" and wanted == "a folder" and path.suffix != ".partial":
            cure = "give the folder that it leads to with -o, or remove the link"
        raise fail("output-not-plain", path=str(path), kind=kind, wanted=wanted, suggestion=cure)


def names_in(folder: Path) -> list[str]:
    """What is in a folder, sorted; nothing if it is gone or not a folder. Raises: PolicyError."""
    with writing(folder):
        try:
            return sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            # A build that ends deletes it; what else has its name is reported where it matters.
            return []


def ensure_made(folder: Path) -> None:
    """Raises: PolicyError unless a bundle's files are as a build made them, and alone."""
    kind, left = kind_of(folder / RECORD), _HASHED_NBYTES
    if kind != "a file":
        what = f"its {RECORD} is {kind}, not a file" if kind else f"it has no {RECORD}"
        raise _not_made(folder, what)
    files = _recorded_files(folder)
    for name, file in sorted(files.items(), key=lambda item: item[1]["nbytes"]):
        left -= file["nbytes"]
        reason = _misfit(folder / name, file, is_hashed=left >= 0)
        if reason is not None:
            raise _not_made(folder, f"{name} {reason}")
    folders = {name.rpartition("/")[0] for name in files} - {""}
    for inner in folders:
        ensure_kind(folder / inner, "a folder")
    listed = set(names_in(folder))
    listed |= {f"{inner}/{name}" for inner in folders for name in names_in(folder / inner)}
    refuse_others(folder, listed - files.keys() - folders - {RECORD, BROWSED})


def delete_bundle(folder: Path) -> None:
    """Delete what is left of a bundle, and nothing else. Raises: PolicyError if something stays."""
    if kind_of(folder / RECORD) == "a file":
        files = _recorded_files(folder)
        with writing(folder):
            _delete(folder, {name: file["nbytes"] for name, file in files.items()})
            if set(os.listdir(folder)) <= {RECORD, BROWSED}:
                # Last, after a crash too: until then it says what may be deleted.
                flush(folder)
                _delete(folder, {RECORD: None})
    _end(folder)


def delete_unfinished(folder: Path, names: Collection[str] | None) -> None:
    """Delete the bundle of a build that is not resumed. names: of its files, if they are known.

    Raises: PolicyError, before anything is deleted, if no build made what is in it.
    """
    files = unfinished_files(folder, names)
    with writing(folder), suppress(FileNotFoundError):
        _delete(folder, dict.fromkeys(files))
    _end(folder)


def unfinished_files(folder: Path, names: Collection[str] | None = None) -> list[str]:
    """The files in the folder of an unfinished bundle. names: that are made there, if known.

    Raises: PolicyError if something else is there: other folders, links, special files.
    """
    listed: list[str] = []
    for name in names_in(folder):
        if name in SUBFOLDERS and kind_of(folder / name) == "a folder":
            listed += (f"{name}/{file}" for file in names_in(folder / name))
        else:
            listed.append(name)
    made = [
        name
        for name in listed
        if kind_of(folder / name) in ("a file", None) and (names is None or name in names)
    ]
    refuse_others(folder, {*listed} - {*made})
    return made


def refuse_others(folder: Path, strangers: Collection[str]) -> None:
    """Raises: PolicyError if there are any: what no build made, none deletes."""
    if strangers:
        names = ", ".join(sorted(strangers)[:5])
        cure = "move them away, or give another folder with -o"
        raise fail("output-has-other-files", path=str(folder), names=names, suggestion=cure)


def _not_made(folder: Path, reason: str) -> PolicyError:
    cure = "move it away, or give another folder with -o"
    return fail("output-not-a-bundle", path=str(folder), reason=reason, suggestion=cure)


def _recorded_files(folder: Path) -> dict[str, HashedFile]:
    """The files by name. Raises: PolicyError unless the record is one of a policyc."""
    try:
        document = parse_json(read_whole(folder / RECORD, most=LARGEST_RECORD, follow=False))
        # Not the whole schema: records of earlier versions lack what later ones say.
        defect = first_defect(document, _Record, "ignore")
        if defect is None and document["digest"] != record_digest(document):
            defect = "it was edited: its own digest does not fit"
    except PolicyError as error:
        raise _not_made(folder, error.diagnostics[0].message) from error
    except ValueError as error:
        raise _not_made(folder, f"its {RECORD} cannot be read: {error}") from error
    if defect is not None:
        raise _not_made(folder, f"its {RECORD} is not the record of a bundle: {defect}")
    files: dict[str, HashedFile] = document["files"]
    for name in files:
        inner, _, file = name.rpartition("/")
        if inner not in ("", *SUBFOLDERS) or not is_plain_name(file) or name == RECORD:
            raise _not_made(folder, f"its {RECORD} names {name!r:.80}, which no build writes")
    return files


def _misfit(path: Path, made: HashedFile, *, is_hashed: bool) -> str | None:
    """Why a file is not as it was made, as `is …`; None if nothing speaks against it."""
    kind = kind_of(path)
    if kind != "a file":
        return f"is {kind}, not a file" if kind else "is missing"
    with opened(path, follow=False) as file:
        found = os.fstat(file.fileno()).st_size
        if found != made["nbytes"]:
            return f"has {found} bytes, not {made['nbytes']} as its record says"
        if is_hashed and file_digest(file, "sha256").hexdigest() != made["sha256"]:
            return "was changed: its SHA-256 does not match the record"
    return None


def _delete(folder: Path | str, files: Mapping[str, int | None], within: int | None = None) -> None:
    """Delete regular files, by name, of these sizes or any, and the subfolders of their names.

    within: a descriptor of the folder that this one is in, whatever is renamed meanwhile.
    """
    held: dict[str, dict[str, int | None]] = defaultdict(dict)
    for name, nbytes in files.items():
        inner, _, file = name.rpartition("/")
        held[inner][file] = nbytes
    at = os.open(folder, _FOLDER, dir_fd=within)
    try:
        for name, nbytes in held.pop("", {}).items():
            with suppress(FileNotFoundError):
                facts = os.lstat(name, dir_fd=at)
                if stat.S_ISREG(facts.st_mode) and nbytes in (None, facts.st_size):
                    os.unlink(name, dir_fd=at)
        for inner, inside in held.items():
            # A subfolder may be gone already, or be a link by now, which is not followed.
            with suppress(FileNotFoundError, NotADirectoryError):
                _delete(inner, inside, at)
            with suppress(OSError):
                os.rmdir(inner, dir_fd=at)
    finally:
        os.close(at)


def _end(folder: Path) -> None:
    left = names_in(folder)
    refuse_others(folder, left if left != [BROWSED] else [])
    with writing(folder), suppress(FileNotFoundError):
        _delete(folder, {BROWSED: None})
        os.rmdir(folder)
