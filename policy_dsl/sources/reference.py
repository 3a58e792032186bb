"""A reference, as a user writes it, to the Inventory of what it names.

A reference is a checkpoint folder, one safetensors file, or one HFQ file; a recorded headers
file; a name of the catalog; or a hub id, `org/name` or `org/name@revision`.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from policy_dsl.diagnostics import UnreadableError, did_you_mean, fail
from policy_dsl.inventory import Inventory
from policy_dsl.regular_files import read_first, unreadable
from policy_dsl.sources import checkpoint
from policy_dsl.sources.local_files import open_file, open_folder, open_hfq_file
from policy_dsl.sources.recorded import read_recorded

_CATALOG = Path(__file__).parent.parent / "catalog"
# As the hub has them: no part starts or ends with a dot or dash or has "--" or "..".
_HUB_ID = re.compile(
    r"(?!.*(--|\.\.))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?(@[\w.][\w./-]*)?", re.ASCII
)


def open_source(reference: str | Path, *, links: bool = True, online: bool = True) -> Inventory:
    """The inventory of a source, from headers alone.

    What exists on disk comes first; for a hub id the hub's cache, then the catalog unless it pins
    a revision, then the hub. links: whether weights may be links that lead out of their folder.
    online: whether the hub may be asked.
    Raises: PolicyError with every defect of the source.
    """
    reference = str(reference)
    try:
        path = Path(reference).expanduser()
        exists = bool(reference) and path.exists()
    except (OSError, RuntimeError) as error:
        raise unreadable(Path(reference), str(error)) from error
    # What can be nothing but a path is one, even if nothing is there.
    is_path = reference.startswith(("/", ".", "~"))
    if exists or is_path or reference.endswith((checkpoint.SUFFIX, ".json", ".json.gz")):
        return _open_path(path, links=links)
    if _HUB_ID.fullmatch(reference):
        return _open_hub_id(reference, links=links, online=online)
    if model := open_catalog(reference):
        return model
    cure = did_you_mean(_loose(reference), map(_loose, catalog_names()))
    raise fail("unknown-source", reference=reference, suggestion=cure)


def catalog_names() -> tuple[str, ...]:
    """The catalog's models, sorted, by names that `open_source` takes."""
    return tuple(sorted(path.name.removesuffix(".json") for path in _CATALOG.glob("*.json")))


def open_catalog(name: str) -> Inventory | None:
    """The catalog's model of this name, whatever its case, `-` or `_`; None if it has none."""
    for entry in catalog_names():
        if _loose(entry) == _loose(name.rpartition("/")[2]):
            model = read_recorded(_CATALOG / f"{entry}.json")
            # Another publisher's model of the same name is another model.
            if "/" not in name or _loose(model.id) == _loose(name):
                note = "from the bundled catalog, which has no weights"
                return replace(model, notes=(note, *model.notes))
    return None


def is_whole_model(path: Path) -> bool:
    """Whether a regular file is or is called an HFQ file. Raises: UnreadableError."""
    magic, is_called_so = checkpoint.HFQ_MAGIC, bool(checkpoint.HFQ_EXTENSION.search(path.name))
    # A damaged file is best judged as what it is called.
    return read_first(path, len(magic)) == magic or is_called_so


def refuse_other_file(path: Path) -> None:
    """Raises: PolicyError if a file that was given alone is known to be something else."""
    name, folder = path.name, path.parent
    if path.suffix.lower() in checkpoint.PICKLES:
        raise checkpoint.pickled_weights(str(folder), [name])
    is_gguf = read_first(path, 4) == b"GGUF"
    if kind := checkpoint.kind_of("model.gguf" if is_gguf else name):
        cure = checkpoint.ORIGINAL
        raise fail("not-a-checkpoint", place=str(path), what=kind, suggestion=cure)
    is_index, what = name.endswith(f"{checkpoint.SUFFIX}.index.json"), "one file of a checkpoint"
    if is_index or name in (checkpoint.CONFIG, checkpoint.ADAPTER):
        cure = f"give the folder, {folder}"
        raise fail("not-a-checkpoint", place=str(path), what=what, suggestion=cure)


def _open_path(path: Path, *, links: bool) -> Inventory:
    if path.is_dir():
        return open_folder(path, links=links)
    if not path.exists():
        raise unreadable(path, "it is not there")
    if is_whole_model(path):
        return open_hfq_file(path, links=links)
    if path.name.endswith(checkpoint.SUFFIX):
        return open_file(path, links=links)
    refuse_other_file(path)
    return read_recorded(path)


def _open_hub_id(reference: str, *, links: bool, online: bool) -> Inventory:
    repository, _, revision = reference.partition("@")
    model = _open_cached(repository, revision or None, links=links)
    model = model or (None if revision else open_catalog(repository))
    if model is not None:
        return model
    if not online:
        raise fail("needs-the-hub", what=reference)
    # Not at the top: its HTTP takes a quarter of a second to import.
    with _settings_of_the_hub():
        from policy_dsl.sources.hub import open_hub  # noqa: PLC0415
    return open_hub(repository, revision or None)


def _open_cached(repository: str, revision: str | None, *, links: bool) -> Inventory | None:
    """The model as it is in the hub's cache; None if it is not there or not whole."""
    with _settings_of_the_hub():
        from huggingface_hub import constants  # noqa: PLC0415
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    place = cache / f"models--{repository.replace('/', '--')}"
    if not place.is_dir():
        return None
    # Not at the top: this takes a fifth of a second, and mostly the cache lacks the model.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    wanted = revision or _only_commit(place, repository, is_offline=constants.HF_HUB_OFFLINE)
    try:
        folder = Path(snapshot_download(repository, revision=wanted, local_files_only=True))
        # A snapshot that was fetched in part has the same form, and no mark of it.
        model = open_folder(folder, name=repository, links=links)
    except (LocalEntryNotFoundError, UnreadableError):
        return None
    except OSError as error:
        raise unreadable(cache, error) from error
    commit = folder.name
    return replace(model, notes=(f"from the hub's cache, commit {commit}",), commit=commit)


def _only_commit(place: Path, repository: str, *, is_offline: bool) -> str | None:
    """The commit that was fetched by its own name, if no branch or tag was; None if several."""
    if any(path.is_file() for path in (place / "refs").rglob("*")):
        return None
    commits = sorted(path.name for path in (place / "snapshots").glob("*") if path.is_dir())
    if len(commits) > 1 and is_offline:
        cure = f"say which: {', '.join(f'{repository}@{commit}' for commit in commits)}"
        raise fail("hub-offline", what=repository, suggestion=cure)
    return commits[0] if len(commits) == 1 else None


@contextmanager
def _settings_of_the_hub() -> Iterator[None]:
    """Raises: PolicyError if the environment's settings of the hub cannot be read."""
    try:
        yield
    except ValueError as error:
        # huggingface_hub reads them when it is imported, and does not say which one failed.
        names = sorted(name for name in os.environ if name.startswith("HF_"))
        what, cure = ", ".join(names) or "the environment", "correct it or unset it"
        raise fail("hub-failed", what=what, reason=str(error), suggestion=cure) from error


def _loose(name: str) -> str:
    return name.lower().replace("_", "-")
