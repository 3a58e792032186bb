"""A bundle on disk -> what was checked, what is wrong, and how far it is from its source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from emitters import FORMATS
from emitters.core.bundle_needs import needs_findings
from emitters.core.bundle_reading import Bundle, expected_parts, open_bundle, parts_text
from emitters.core.decoding import Decoder
from emitters.core.hashing import FileHashes, hash_files
from emitters.core.progress import Silent
from emitters.core.record import BundleModule
from emitters.core.verify_source import ModuleError, compare
from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, errors, grouped
from policy_dsl.formats import Format
from policy_dsl.inventory import Inventory
from policy_dsl.planning.bundle_files import bundle_findings
from policy_dsl.planning.record import RECORD
from policy_dsl.regular_files import why_not_regular
from policy_dsl.sources.checkpoint import MAX_INDEX_NBYTES, read_json
from policy_dsl.sources.local_files import local_files
from policy_dsl.treatments import Coded, Unread, describe

INDEX = "model.safetensors.index.json"
_EMBEDDING = ("embed_tokens", "embed_tokens.weight")
_NO_BUNDLE = ("not-a-bundle", "not-a-checkpoint", "pickled-weights")
_SOUND = ("structure", "widths")
_OTHER_HASH = "its SHA-256 does not match the record"


class Stage(NamedTuple):
    """One thing that is looked at, what is wrong with it, and what was looked at in words.

    impossible: why nothing could be looked at.
    """

    name: str
    findings: tuple[Diagnostic, ...]
    about: str
    impossible: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. result: passed, failed, or not possible."""

    name: str
    result: str
    about: str


@dataclass(frozen=True)
class VerifyReport:
    """All that verifying a bundle brought to light. errors: None without a source."""

    folder: Path
    has_record: bool
    n_files: int
    n_tensors: int
    nbytes: int
    checks: tuple[Check, ...]
    findings: tuple[Diagnostic, ...]
    errors: tuple[ModuleError, ...] | None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not errors(self.findings)


def verify_bundle(
    folder: Path,
    source: Inventory | None = None,
    *,
    jobs: int,
    links: bool = True,
    formats: Mapping[str, Format] = FORMATS,
) -> VerifyReport:
    """What is right and wrong with the bundle in a folder.

    Structure, index, every file's and tensor's hash against the record, widths derived from
    shapes against those in the metadata; with a source, the error of every decoded tensor.
    links: whether its weights may be links out of the folder. formats: that it may be of.
    Raises: PolicyError if the folder is not a bundle at all, or cannot be read.
    """
    try:
        bundle = open_bundle(folder, links=links, formats=formats)
    except PolicyError as error:
        # Something else altogether is a usage error, not a failed verification.
        if any(found.code in _NO_BUNDLE for found in error.diagnostics):
            raise
        return _unopened(folder, error.diagnostics)
    stages = written_stages(bundle, values=True)
    hashed = tuple(_hashes(bundle, jobs))
    unrecorded = "" if bundle.record is not None else f"there is no {RECORD}"
    stages.append(Stage("hashes", hashed, "SHA-256 of every file and tensor", unrecorded))
    found_errors = None
    if source is not None and not _is_broken(stages):
        found_errors, findings = compare(bundle, source, jobs=jobs)
        about = "every tensor decoded and compared with the source"
        stages.append(Stage("values", findings, about))
    inventory = bundle.inventory
    return VerifyReport(
        folder=folder,
        has_record=bundle.record is not None,
        n_files=len(bundle.record.files) if bundle.record else len(inventory.file_nbytes),
        n_tensors=len(inventory.tensors),
        nbytes=inventory.nbytes,
        checks=tuple(map(_check, stages)),
        findings=tuple(grouped(found for stage in stages for found in stage.findings)),
        errors=found_errors,
    )


def written_stages(bundle: Bundle, *, values: bool) -> list[Stage]:
    """What is asked of every bundle, also of one that a build has just written.

    Headers, metadata, and what the format's readers need besides; no hashes, no source. values:
    whether values that readers depend on are read.
    """
    structure = (*bundle.findings, *_links(bundle))
    stages = [
        Stage("structure", structure, f"{len(bundle.modules)} modules, every header"),
        Stage("index", tuple(_index(bundle)), "names, shards, total size"),
        Stage("widths", tuple(_widths(bundle)), f"{len(bundle.claims)} quantized modules"),
        Stage("side files", tuple(_side_files(bundle)), "tokenizer, templates, processors"),
    ]
    if not _is_broken(stages):
        needed = f"files and counts that those of {bundle.target} need"
        stages.append(Stage("readers", tuple(_readers(bundle, values=values)), needed))
        # What a format's own readers miss is said once, in their words.
        if not errors(stages[-1].findings):
            meant = "every module that its config means, in its shape"
            found, unknown = needs_findings(bundle)
            stages.append(Stage("model", tuple(found), meant, unknown))
    return stages


def _links(bundle: Bundle) -> Iterator[Diagnostic]:
    """Weights that are read, and are somewhere else."""
    cure = "copy it with its links followed, as `cp -RL` does"
    for file, target in bundle.inventory.links.items():
        yield diagnostic("linked-file", suggestion=cure, file=file, target=target)


def _is_broken(stages: Iterable[Stage]) -> bool:
    """Whether modules are not whole: they cannot be decoded, and readers cannot use them."""
    return any(errors(stage.findings) for stage in stages if stage.name in _SOUND)


def _unopened(folder: Path, findings: tuple[Diagnostic, ...]) -> VerifyReport:
    """The report of a bundle whose headers, index or record are broken."""
    has_record = (folder / RECORD).exists()
    check = Check("structure", "failed", "headers, index and record can be read")
    return VerifyReport(folder, has_record, 0, 0, 0, (check,), findings, None)


def _check(stage: Stage) -> Check:
    if errors(stage.findings):
        return Check(stage.name, "failed", stage.about)
    if stage.impossible:
        return Check(stage.name, "not possible", stage.impossible)
    return Check(stage.name, "passed", stage.about)


def _index(bundle: Bundle) -> Iterator[Diagnostic]:
    """What the index says wrongly; shards and names were compared when headers were read."""
    # What is beside a container is not part of it.
    if bundle.inventory.container is not None:
        return
    files = local_files(bundle.folder)
    if INDEX not in files.sizes:
        if len(bundle.inventory.file_nbytes) > 1:
            yield diagnostic("missing-bundle-file", file=INDEX, where="list of shards")
        return
    document = read_json(files, INDEX, most=MAX_INDEX_NBYTES)
    metadata = document.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    inventory = bundle.inventory
    # Writers count tensors, or whole files, or leave a 0; no reader does anything with it.
    if total and total not in (inventory.nbytes, sum(inventory.file_nbytes.values())):
        said = total if type(total) is int else f"not a whole number: {total!r:.60}"
        reason = f"total_size is {said}, the tensors have {inventory.nbytes} bytes"
        yield diagnostic("index-disagrees", reason=reason)


def _readers(bundle: Bundle, *, values: bool) -> Iterator[Diagnostic]:
    """What readers of the format miss although every module is as the metadata say."""
    folder, tensors, claims = bundle.folder, bundle.inventory.tensors, bundle.claims
    if (check := bundle.format.files().defects) is not None:
        yield from check(folder, bundle.metadata, tensors, claims)
    if values and bundle.format.value_defects is not None:
        yield from bundle.format.value_defects()(folder, tensors, claims)


def _side_files(bundle: Bundle) -> Iterable[Diagnostic]:
    """Files beside the weights that are not what their names say, and what they lack."""
    embeddings = [
        module.shape[0]
        for module in bundle.modules
        # Without a record modules have no roles.
        if module.role == "embed" or (not module.role and module.name.endswith(_EMBEDDING))
    ]
    recorded = bundle.record.files if bundle.record else ()
    return bundle_findings(bundle.target, bundle.inventory, recorded, embeddings)


def _widths(bundle: Bundle) -> Iterator[Diagnostic]:
    """Modules whose tensors are not those of the width that the metadata tell readers."""
    spec = bundle.format.spec
    modules = {module.name: module for module in bundle.modules}
    for name in sorted(bundle.claims.keys() - modules.keys()):
        written = describe(bundle.claims[name].treatment)
        yield diagnostic("width-disagrees", module=name, found="it has no tensors", written=written)
    decoder = Decoder(bundle)
    for name, module in modules.items():
        claim = bundle.claims.get(name)
        if claim is None:
            yield from _unclaimed(module)
            continue
        if isinstance(claim.treatment, Unread):
            continue
        expected = expected_parts(module, claim.treatment, spec) or {}
        if module.parts != expected:
            yield diagnostic(
                "width-disagrees",
                module=name,
                found=f"the tensors say {parts_text(module.parts)}",
                written=f"{describe(claim.treatment)}: {parts_text(expected)}",
            )
            continue
        # Of rows that end inside a word, the parts do not tell the length.
        if claim.shape and claim.shape != module.shape:
            yield diagnostic(
                "width-disagrees",
                module=name,
                found=f"the tensors say the shape {list(module.shape)}",
                written=f"the shape {list(claim.shape)}",
            )
            continue
        for part in decoder.wrong_constants(module):
            reason = f"its {part} does not hold what {describe(module.treatment)} has there"
            yield diagnostic("incomplete-module", module=name, reason=reason)


def _unclaimed(module: BundleModule) -> Iterator[Diagnostic]:
    """A finding if a module is quantized and the metadata say nothing of it."""
    # Codes that nothing explains load as garbage or not at all.
    packed = any(tensor.dtype == "U32" for tensor in module.tensors.values())
    if isinstance(module.treatment, Coded) or packed:
        found = f"the tensors say {parts_text(module.parts)}"
        yield diagnostic("width-disagrees", module=module.name, found=found, written="nothing")


def _hashes(bundle: Bundle, jobs: int) -> Iterator[Diagnostic]:
    """Files and tensors that are not what the record says."""
    if bundle.record is None:
        yield diagnostic("no-record", path=str(bundle.folder))
        return
    recorded = bundle.record.files
    present = local_files(bundle.folder).sizes.keys() - {RECORD}
    for name in sorted(recorded.keys() - present):
        yield _missing(bundle.folder, name)
    # Readers glob for weights; a note or licence added later harms nobody.
    for name in sorted(present - recorded.keys()):
        weights = name.endswith(".safetensors")
        yield diagnostic("stray-bundle-file" if weights else "unrecorded-file", file=name)
    shared = sorted(present & recorded.keys())
    tensors = bundle.inventory.tensors.values()
    hashed = hash_files(bundle.folder, shared, tensors, Silent(), jobs=jobs)
    for name, found in hashed.items():
        yield from _changed_file(name, found, recorded[name])
    # Over all files, as the record does not say which file holds a tensor.
    hashes = {name: sha for found in hashed.values() for name, sha in found.tensors.items()}
    yield from _changed_tensors(hashes, bundle.record.tensors)


def _missing(folder: Path, name: str) -> Diagnostic:
    """The finding of a file that the record names, and that is not there, or not a file."""
    try:
        reason = why_not_regular((folder / name).stat().st_mode) if "/" not in name else None
    except (OSError, ValueError):
        reason = None
    if reason is not None:
        return diagnostic("file-changed", file=name, reason=reason)
    return diagnostic("missing-bundle-file", file=name, where="record")


def _changed_file(name: str, found: FileHashes, recorded: tuple[int, str]) -> Iterable[Diagnostic]:
    nbytes, sha256 = recorded
    if found.nbytes != nbytes:
        reason = f"it has {found.nbytes} bytes, not {nbytes}"
        yield diagnostic("file-changed", file=name, reason=reason)
    elif found.sha256 != sha256:
        yield diagnostic("file-changed", file=name, reason=_OTHER_HASH)


def _changed_tensors(found: Mapping[str, str], recorded: Mapping[str, str]) -> Iterable[Diagnostic]:
    for name in sorted(recorded.keys() | found.keys()):
        if name not in found:
            yield diagnostic("tensor-changed", tensor=name, reason="it is not there")
        elif name not in recorded:
            yield diagnostic("tensor-changed", tensor=name, reason="the record lacks it")
        elif found[name] != recorded[name]:
            yield diagnostic("tensor-changed", tensor=name, reason=_OTHER_HASH)
