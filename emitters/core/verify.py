"""A bundle on disk -> what was checked, what is wrong, and how far it is from its source."""

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from operator import attrgetter
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from emitters import FORMATS
from emitters.checkpoints import INDEX
from emitters.core.bundle_needs import needs_findings
from emitters.core.bundle_reading import Bundle, open_bundle, parts_text, parts_under
from emitters.core.decoding import Decoder
from emitters.core.record import BundleModule
from emitters.core.verify_source import ModuleError, compare
from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, errors, grouped
from policy_dsl.formats import Format
from policy_dsl.inventory import Inventory, TensorInfo
from policy_dsl.plan import PlannedTensor
from policy_dsl.planning.bundle_files import bundle_findings
from policy_dsl.planning.record import RECORD
from policy_dsl.regular_files import opened, why_not_regular
from policy_dsl.sources.checkpoint import MAX_INDEX_NBYTES, read_json
from policy_dsl.sources.local_files import local_files
from policy_dsl.treatments import Coded, Unread, describe

_EMBEDDING = ("embed_tokens", "embed_tokens.weight")
_NO_BUNDLE = ("not-a-bundle", "not-a-checkpoint", "pickled-weights")
_SOUND = ("structure", "widths")
_OTHER_HASH = "its SHA-256 does not match the record"
# Small enough for the caches: both digests read a chunk while it is there.
_CHUNK_NBYTES = 2**20


class Check(NamedTuple):
    """What was looked at, in words, and what is wrong with it. impossible: why it was not."""

    name: str
    findings: tuple[Diagnostic, ...]
    of: str
    impossible: str = ""

    @property
    def result(self) -> str:
        """Whether it `passed`, `failed`, or was `not possible`."""
        if errors(self.findings):
            return "failed"
        return "not possible" if self.impossible else "passed"

    @property
    def about(self) -> str:
        """What was looked at, or why that was not possible."""
        return self.impossible if self.result == "not possible" else self.of


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
    """What is right and wrong with the bundle in a folder; with a source, also with its values.

    links: whether its weights may be links out of the folder. formats: that it may be of.
    Raises: PolicyError if the folder is not a bundle at all, or cannot be read.
    """
    try:
        bundle = open_bundle(folder, links=links, formats=formats)
    except PolicyError as error:
        # Something else altogether is a usage error, not a failed verification.
        if any(found.code in _NO_BUNDLE for found in error.diagnostics):
            raise
        broken = Check("structure", error.diagnostics, "headers, index and record can be read")
        has_record = (folder / RECORD).exists()
        return VerifyReport(folder, has_record, 0, 0, 0, (broken,), error.diagnostics, None)
    checks = written_checks(bundle, values=True)
    record, inventory, found_errors = bundle.record, bundle.inventory, None
    unrecorded = "" if record else f"there is no {RECORD}"
    hashed = tuple(_hashes(bundle, jobs))
    checks.append(Check("hashes", hashed, "SHA-256 of every file and tensor", unrecorded))
    if source is not None and not _is_broken(checks):
        found_errors, wrong = compare(bundle, source, jobs=jobs)
        checks.append(Check("values", wrong, "every tensor decoded and compared with the source"))
    n_files = len(record.files if record else inventory.file_nbytes)
    counts = n_files, len(inventory.tensors), inventory.nbytes
    findings = tuple(grouped(found for check in checks for found in check.findings))
    return VerifyReport(folder, record is not None, *counts, tuple(checks), findings, found_errors)


def written_checks(bundle: Bundle, *, values: bool) -> list[Check]:
    """What is asked of every bundle, also of one just written. values: whether any are read."""
    cure, links = "copy it with its links followed, as `cp -RL` does", bundle.inventory.links
    linked = [
        diagnostic("linked-file", suggestion=cure, file=file, target=target)
        for file, target in links.items()
    ]
    structure = (*bundle.findings, *linked)
    checks = [
        Check("structure", structure, f"{len(bundle.modules)} modules, every header"),
        Check("index", tuple(_index(bundle)), "names, shards, total size"),
        Check("widths", tuple(_widths(bundle)), f"{len(bundle.claims)} quantized modules"),
        Check("side files", tuple(_side_files(bundle)), "tokenizer, templates, processors"),
    ]
    if _is_broken(checks):
        return checks
    defects, folder = bundle.format.files().defects, bundle.folder
    tensors, claims = bundle.inventory.tensors, bundle.claims
    missed = [*defects(folder, bundle.metadata, tensors, claims)] if defects else []
    if values and (value_defects := bundle.format.codec().value_defects):
        missed += value_defects(folder, tensors, claims)
    needed = f"files and counts that those of {bundle.format.name} need"
    checks.append(Check("readers", tuple(missed), needed))
    # What a format's own readers miss is said once, in their words.
    if not errors(missed):
        found, unknown = needs_findings(bundle)
        meant = "every module that its config means, in its shape"
        checks.append(Check("model", tuple(found), meant, unknown))
    return checks


def hash_files(
    folder: Path,
    names: Collection[str],
    tensors: Iterable[TensorInfo | PlannedTensor],
    advance: Callable[[int], None],
    *,
    jobs: int,
) -> tuple[dict[str, tuple[int, str]], dict[str, str]]:
    """Bytes and SHA-256 of files of a folder, and SHA-256 of these tensors in them, by name.

    `jobs` files are read at a time. Raises: PolicyError if one cannot be read.
    """
    lock, held, parts = Lock(), defaultdict(list), {}
    for tensor in tensors:
        held[tensor.file].append(tensor)

    def hashed(name: str) -> tuple[int, str]:
        whole, buffer = sha256(), memoryview(bytearray(_CHUNK_NBYTES))
        with opened(folder / name) as file:

            def read(nbytes: int) -> str:
                # Both digests from one reading: a second would cost the disk more than the CPU.
                part = sha256()
                while nbytes > 0 and (got := file.readinto(buffer[:nbytes])):
                    whole.update(buffer[:got])
                    part.update(buffer[:got])
                    nbytes -= got
                    with lock:
                        advance(got)
                return part.hexdigest()

            for tensor in sorted(held[name], key=attrgetter("start", "nbytes")):
                if gap := tensor.start - file.tell():
                    read(gap)
                parts[tensor.name] = read(tensor.nbytes)
            read(sys.maxsize)
            return file.tell(), whole.hexdigest()

    with ThreadPoolExecutor(jobs, "hash") as workers:
        return dict(zip(names, workers.map(hashed, names), strict=True)), parts


def _is_broken(checks: Iterable[Check]) -> bool:
    """Whether modules are not whole: they cannot be decoded, and readers cannot use them."""
    return any(errors(check.findings) for check in checks if check.name in _SOUND)


def _index(bundle: Bundle) -> Iterator[Diagnostic]:
    """What the index says wrongly; shards and names were compared when headers were read."""
    inventory = bundle.inventory
    # What is beside a container is not part of it.
    if inventory.container is not None:
        return
    files = local_files(bundle.folder)
    if INDEX not in files.sizes:
        if len(inventory.file_nbytes) > 1:
            yield diagnostic("missing-bundle-file", file=INDEX, where="list of shards")
        return
    metadata = read_json(files, INDEX, most=MAX_INDEX_NBYTES).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    # Writers count tensors, or whole files, or leave a 0; no reader does anything with it.
    if total and total not in (inventory.nbytes, sum(inventory.file_nbytes.values())):
        said = total if type(total) is int else f"not a whole number: {total!r:.60}"
        reason = f"total_size is {said}, the tensors have {inventory.nbytes} bytes"
        yield diagnostic("index-disagrees", reason=reason)


def _side_files(bundle: Bundle) -> Iterable[Diagnostic]:
    """Files beside the weights that are not what their names say, and what they lack."""
    embeddings = [
        module.shape[0]
        for module in bundle.modules
        # Without a record modules have no roles.
        if module.role == "embed" or (not module.role and module.name.endswith(_EMBEDDING))
    ]
    recorded = bundle.record.files if bundle.record else ()
    return bundle_findings(bundle.format.name, bundle.inventory, recorded, embeddings)


def _widths(bundle: Bundle) -> Iterator[Diagnostic]:
    """Modules whose tensors are not those of the width that the metadata tell readers."""
    decoder, names = Decoder(bundle), {module.name for module in bundle.modules}
    for name in sorted(bundle.claims.keys() - names):
        written = describe(bundle.claims[name].treatment)
        yield diagnostic("width-disagrees", module=name, found="it has no tensors", written=written)
    for module in bundle.modules:
        if differing := _differing(module, bundle):
            found, written = differing
            yield diagnostic("width-disagrees", module=module.name, found=found, written=written)
            continue
        claim = bundle.claims.get(module.name)
        is_coded = claim is not None and isinstance(claim.treatment, Coded)
        for part in decoder.wrong_constants(module) if is_coded else ():
            reason = f"its {part} does not hold what {describe(module.treatment)} has there"
            yield diagnostic("incomplete-module", module=module.name, reason=reason)


def _differing(module: BundleModule, bundle: Bundle) -> tuple[str, str] | None:
    """What a module's tensors say and what the metadata say of it, where they differ."""
    claim, parts = bundle.claims.get(module.name), module.parts
    if claim is None:
        # Codes that nothing explains load as garbage or not at all.
        packed = any(dtype == "U32" for dtype, _ in parts.values())
        is_explained = not packed and not isinstance(module.treatment, Coded)
        return None if is_explained else (f"the tensors say {parts_text(parts)}", "nothing")
    if isinstance(claim.treatment, Unread):
        return None
    expected = parts_under(module, claim.treatment, bundle.format.spec)
    if parts != expected:
        written = f"{describe(claim.treatment)}: {parts_text(expected)}"
        return f"the tensors say {parts_text(parts)}", written
    # Of rows that end inside a word, the parts do not tell the length.
    if claim.shape and claim.shape != module.shape:
        return f"the tensors say the shape {[*module.shape]}", f"the shape {[*claim.shape]}"
    return None


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
    shared, held = sorted(present & recorded.keys()), bundle.inventory.tensors.values()
    files, tensors = hash_files(bundle.folder, shared, held, lambda nbytes: None, jobs=jobs)
    for name, found in files.items():
        if found != recorded[name]:
            size = f"it has {found[0]} bytes, not {recorded[name][0]}"
            reason = _OTHER_HASH if found[0] == recorded[name][0] else size
            yield diagnostic("file-changed", file=name, reason=reason)
    known = bundle.record.tensors
    for name in sorted(known.keys() | tensors.keys()):
        if tensors.get(name, "") != known.get(name, ""):
            reason = _OTHER_HASH if known.get(name) else "the record lacks it"
            reason = reason if name in tensors else "it is not there"
            yield diagnostic("tensor-changed", tensor=name, reason=reason)


def _missing(folder: Path, name: str) -> Diagnostic:
    """The finding of a file that the record names, and that is not there, or not a file."""
    with suppress(OSError, ValueError):
        reason = None if "/" in name else why_not_regular((folder / name).stat().st_mode)
        if reason is not None:
            return diagnostic("file-changed", file=name, reason=reason)
    return diagnostic("missing-bundle-file", file=name, where="record")
