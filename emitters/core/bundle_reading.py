"""A bundle on disk as values: its tensors by module, its record, and what its metadata claim.

folder ── open_bundle ──> Bundle ── verify, bundle_outline
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path

from emitters import FORMATS
from emitters.checkpoints import forms_of
from emitters.core.record import BundleModule, Record, read_record
from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, errors, fail
from policy_dsl.escaping import shown
from policy_dsl.formats import Claim, Format, FormatSpec, PartShape, TensorForm, UnreadError
from policy_dsl.inventory import LAYER_NUMBER, Inventory, TensorInfo
from policy_dsl.planning.outline import Outline, OutlineModule, stored_as
from policy_dsl.quantities import counted, first_few
from policy_dsl.regular_files import read_whole
from policy_dsl.roles.quantization import quantization_of
from policy_dsl.sources.checkpoint import CONFIG, MAX_CONFIG_NBYTES
from policy_dsl.sources.reference import is_hfq_file, open_source, refuse_other_file
from policy_dsl.treatments import Coded, Plain, Stored, Unread


@dataclass(frozen=True)
class Bundle:
    """A bundle as it is on disk. record is None if policyc did not build it.

    metadata: the files that describe it to readers, by name, those that formats have.
    claims: what the metadata tell readers about quantized modules. findings: modules that are
    not what metadata or record say.
    """

    folder: Path
    inventory: Inventory
    record: Record | None
    format: Format
    metadata: Mapping[str, bytes]
    claims: Mapping[str, Claim]
    modules: tuple[BundleModule, ...]
    findings: tuple[Diagnostic, ...]

    @property
    def target(self) -> str:
        """The name of its format."""
        return self.format.name

    @cached_property
    def scales(self) -> Mapping[str, BundleModule]:
        """Module -> the one that holds what its columns were multiplied by; no weights."""
        find = self.format.column_scale
        held = {module.name: module for module in self.modules}
        found = {name: find(name) for name in held}
        return {name: held[scale] for name, scale in found.items() if scale in held}


def open_bundle(
    path: Path,
    record: Record | None = None,
    *,
    links: bool = True,
    formats: Mapping[str, Format] = FORMATS,
) -> Bundle:
    """The bundle in a folder, or the one that is a single file, from headers and metadata.

    No weight is read. Of a file, the record beside it counts if it is about this file. record:
    of a bundle that has none yet, what it will say. links: whether its weights may be links out
    of its folder. formats: that it may be of.
    Raises: PolicyError if headers, index, or the record cannot be what they must be.
    """
    if not path.is_dir() and not (path.exists() and is_hfq_file(path)):
        if path.exists():
            refuse_other_file(path)
        raise fail("not-a-bundle", path=str(path), reason="it is not a folder")
    inventory = open_source(str(path), links=links)
    folder = path if path.is_dir() else path.parent
    record = record or read_record(folder)
    if record is not None and path != folder and path.name not in record.files:
        record = None
    if record is not None and record.target in formats:
        # The others are not even imported.
        formats = {record.target: formats[record.target]}
    # What is beside a container is not part of it.
    metadata = {} if inventory.container else _metadata_files(path, inventory, formats)
    format, claims = _format(inventory, record, path, (metadata, formats))
    spec = format.spec
    if record is not None:
        record = _whole(record, spec, folder)
    modules = tuple(_modules(inventory, claims, spec, record))
    if record is None:
        modules = _with_added(modules, format, metadata)
    findings = (_unread(path, claims), *(_incomplete(module, spec) for module in modules))
    return Bundle(
        folder=folder,
        inventory=inventory,
        record=record,
        format=format,
        metadata=metadata,
        claims=claims,
        modules=modules,
        findings=tuple(found for found in findings if found is not None),
    )


def _whole(record: Record, spec: FormatSpec, folder: Path) -> Record:
    """The record, with what it leaves out because it is a fact of the scheme.

    Raises: PolicyError (bad-record) if the format has no such way to code a module.
    """
    treatments = {module.treatment for module in record.modules.values()}
    whole: dict[Stored | Unread, Stored | Unread | None] = {one: one for one in treatments}
    whole |= {one: _as_stored(one, spec) for one in treatments if isinstance(one, Coded)}
    for name, module in record.modules.items():
        if whole[module.treatment] is None:
            reason = f"{shown(name)} is quantized in a way that {spec.name} does not have"
            raise fail("bad-record", path=str(folder), reason=reason)
    if all(stored == said for said, stored in whole.items()):
        return record
    modules = {
        name: replace(module, treatment=whole[module.treatment] or module.treatment)
        for name, module in record.modules.items()
    }
    return replace(record, modules=modules)


def _as_stored(coded: Coded, spec: FormatSpec) -> Coded | None:
    """How modules are coded of which a record says so; None if the format has no such way."""
    scheme = spec.scheme(coded.scheme)
    if (
        scheme is None
        or coded.bits not in scheme.bits
        or coded.group_size not in (scheme.group_sizes or (0,))
        or coded.method not in scheme.methods
    ):
        return None
    return coded if len(scheme.symmetries) > 1 else replace(coded, symmetric=scheme.symmetries[0])


def _format(
    inventory: Inventory,
    record: Record | None,
    path: Path,
    among: tuple[Mapping[str, bytes], Mapping[str, Format]],
) -> tuple[Format, Mapping[str, Claim]]:
    """The format that wrote the bundle, and what its metadata claim.

    among: the metadata, and the formats that may have written them.
    """
    metadata, formats = among
    tensors = inventory.tensors.values()
    forms = forms_of({tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors})
    if record is not None:
        target = record.target
        if target not in formats:
            known = ", ".join(formats)
            raise fail("unavailable-target", target=target, known=known)
        try:
            return formats[target], formats[target].files().claims(metadata, forms)
        except ValueError as error:
            reason = f"its metadata are not what {target} has: {error}"
            raise fail("bad-bundle-metadata", path=str(path), reason=reason) from None
    contained, unread = inventory.container is not None, []
    for name, format in formats.items():
        if (format.spec.container is not None) != contained:
            continue
        try:
            claims = format.files().claims(metadata, forms)
        except UnreadError as error:
            unread.append(f"{name} does not read it: {error}")
            continue
        except ValueError:
            continue
        # A container says what it is, also if nothing in it is quantized.
        if claims or contained:
            return format, claims
    found = quantization_of(inventory)
    if found is None:
        reason = "it has no policyc.json, and nothing in it is quantized: it is a checkpoint"
        raise fail("not-a-bundle", path=str(path), reason=reason)
    reason = f"it is quantized ({found.form}) in a way that no target of policyc reads"
    raise fail("not-a-bundle", path=str(path), reason=reason, notes=unread)


def _modules(
    inventory: Inventory, claims: Mapping[str, Claim], spec: FormatSpec, record: Record | None
) -> Iterator[BundleModule]:
    """The modules in the order of the files: as the record lists them, else by name."""
    recorded = record.modules if record else {}
    # The record knows; names are only guessed where there is none.
    owner = record.owners if record else {}
    parts = {
        path: _part_names(claim.treatment, spec)
        for path, claim in claims.items()
        if not isinstance(claim.treatment, Unread)
    }
    plain = _part_names(Plain("BF16"), spec)

    def module_of(tensor: TensorInfo) -> str:
        path, _, part = tensor.name.rpartition(".")
        own = part in parts.get(path, plain) or (path in claims and path not in parts)
        return owner.get(tensor.name) or (path if own else tensor.name)

    tensors = sorted(inventory.tensors.values(), key=module_of)
    for name, members in groupby(tensors, key=module_of):
        held = {_part(tensor.name): tensor for tensor in members}
        yield _module(name, held, claims.get(name), recorded.get(name))


def _with_added(
    modules: tuple[BundleModule, ...], format: Format, metadata: Mapping[str, bytes]
) -> tuple[BundleModule, ...]:
    """The modules with the experts that only pad, as far as metadata tell them."""
    shapes = {module.name: module.shape for module in modules}
    find = format.files().added
    added = find(metadata, shapes) if find else {}
    return tuple(
        replace(module, added=added[module.name]) if module.name in added else module
        for module in modules
    )


def _module(
    name: str, tensors: Mapping[str, TensorInfo], claim: Claim | None, known: BundleModule | None
) -> BundleModule:
    if known is not None:
        return replace(known, tensors=tensors)
    if claim is None:
        (tensor,) = tensors.values()
        form = Plain(tensor.dtype), tensor.shape, tensor.dtype
        return BundleModule(name, "", None, *form, tensors, written="keep")
    return BundleModule(name, "", None, claim.treatment, claim.shape, claim.dtype, tensors)


def _unread(path: Path, claims: Mapping[str, Claim]) -> Diagnostic | None:
    """The finding that it is not known what readers make of some modules, if so."""
    treatments = ((name, claim.treatment) for name, claim in claims.items())
    reasons = {name: one.reason for name, one in treatments if isinstance(one, Unread)}
    if not reasons:
        return None
    return diagnostic(
        "unknown-pattern",
        path=str(path),
        reason=next(iter(reasons.values())),
        modules=counted(len(reasons), "module"),
        suggestion="a rule before it decides without it",
        notes=[f"not known: {first_few(sorted(reasons))}"],
    )


def _incomplete(module: BundleModule, spec: FormatSpec) -> Diagnostic | None:
    """The finding that a module's tensors are not those that its treatment needs, if so."""
    if isinstance(module.treatment, Unread):
        # `_unread` says so.
        return None
    if isinstance(module.treatment, Plain):
        return _misplaced(module)
    reason = None
    expected, found = expected_parts(module, module.treatment, spec), module.parts
    try:
        names = _part_names(module.treatment, spec)
    except ValueError as error:
        return diagnostic("incomplete-module", module=module.name, reason=str(error))
    # First: without all parts there may be no shape.
    if found.keys() != names:
        reason = f"it has {', '.join(sorted(found))}; it should have {', '.join(sorted(names))}"
    elif expected is None:
        reason = "its shape is broken"
    elif found != expected:
        reason = f"it has {parts_text(found)}; it should have {parts_text(expected)}"
    return diagnostic("incomplete-module", module=module.name, reason=reason) if reason else None


def _misplaced(module: BundleModule) -> Diagnostic | None:
    """The finding that a plain module is not one tensor of its shape, if so."""
    shapes = [tensor.shape for tensor in module.tensors.values()]
    if shapes == [module.shape]:
        return None
    wanted = f"one tensor {list(module.shape)}"
    reason = f"it has {parts_text(module.parts)}; it should have {wanted}"
    return diagnostic("incomplete-module", module=module.name, reason=reason)


def expected_parts(
    module: BundleModule, treatment: Stored, spec: FormatSpec
) -> dict[str, TensorForm] | None:
    """What a module's tensors would be under a treatment; None if its shape allows none."""
    try:
        return _parts(spec.part_shapes, treatment, module.shape, module.dtype)
    except ValueError:
        return None


@lru_cache(4096)
def _parts(
    part_shapes: Callable[[Stored, tuple[int, ...], str], Sequence[PartShape]],
    treatment: Stored,
    shape: tuple[int, ...],
    dtype: str,
) -> dict[str, TensorForm]:
    # Thousands of modules have the same form.
    parts = part_shapes(treatment, shape, dtype)
    return {part.part: (part.dtype, part.shape) for part in parts}


def parts_text(parts: Mapping[str, TensorForm]) -> str:
    """The parts of a module as text: `scales BF16 [64, 2], weight U32 [64, 16]`."""
    shown = (f"{part} {dtype} {list(shape)}" for part, (dtype, shape) in sorted(parts.items()))
    return ", ".join(shown)


def _part_names(treatment: Stored, spec: FormatSpec) -> Set[str]:
    """The parts of a module. Raises: ValueError if the format has no such treatment."""
    # Any shape will do, only the names of the parts count.
    columns = max(32, treatment.group_size) if isinstance(treatment, Coded) else 32
    return _parts(spec.part_shapes, treatment, (1, columns), "BF16").keys()


def _part(name: str) -> str:
    return name.rpartition(".")[2]


def _metadata_files(
    folder: Path, inventory: Inventory, formats: Mapping[str, Format]
) -> dict[str, bytes]:
    """The files by which formats describe their bundles, as far as they are there."""
    known = {name for one in formats.values() for name in one.spec.metadata_files}
    held = {CONFIG, *(inventory.side_files or {})}
    return {
        name: read_whole(folder / name, most=MAX_CONFIG_NBYTES) for name in sorted(known & held)
    }


_UNREAD = "unknown-pattern"
# A number of more digits is a name: no model has as many layers.


def bundle_outline(
    folder: Path, *, links: bool = True, formats: Mapping[str, Format] = FORMATS
) -> Outline:
    """The outline of a bundle, from its record, or from headers and metadata alone.

    links: whether its weights may be links out of its folder. formats: that it may be of.
    Raises: PolicyError if the folder is not a bundle, its metadata and tensors disagree, or
    it is not known what they say.
    """
    found = readable_outline(folder, links=links, formats=formats)
    # What is not known would be equal to itself.
    if found.unread:
        raise PolicyError(found.unread)
    return found


def readable_outline(
    folder: Path, *, links: bool = True, formats: Mapping[str, Format] = FORMATS
) -> Outline:
    """The outline of a bundle, with modules of which it is not known how they are stored.

    links, formats: as of `bundle_outline`.
    Raises: PolicyError if the folder is not a bundle, or its metadata and tensors disagree.
    """
    bundle = open_bundle(folder, links=links, formats=formats)
    unread = tuple(found for found in bundle.findings if found.code == _UNREAD)
    # A diff of a broken bundle would compare noise.
    if len(errors(bundle.findings)) > len(unread):
        raise PolicyError(bundle.findings)
    record = bundle.record
    title = f"{record.policy} ({folder})" if record else str(folder)
    model = record.source if record else bundle.inventory.id
    modules = outline_modules(bundle)
    experts, added = _experts(bundle)
    pruning = record.pruning if record else None
    return Outline(title, bundle.target, model, modules, experts, pruning, added, unread)


def _experts(bundle: Bundle) -> tuple[int | None, int]:
    """The experts of a layer that a source has, as far as that is known, and the added ones."""
    for one in bundle.modules:
        # Where each expert is a module, so is an added one.
        if one.shape and (one.role == "router" or 0 < one.added < one.shape[0]):
            return one.shape[0] - one.added, one.added
    return None, 0


def outline_modules(bundle: Bundle) -> tuple[OutlineModule, ...]:
    """The bundle's modules as an outline has them."""
    scales = {module.name for module in bundle.scales.values()}
    return tuple(
        _outline_module(module, 0 if module.name in scales else module.parameters)
        for module in bundle.modules
    )


def _outline_module(module: BundleModule, parameters: int) -> OutlineModule:
    # A plain module has one tensor; a quantized one does not use this.
    dtype = next(iter(module.tensors.values())).dtype
    stored = stored_as(module.treatment, dtype)
    layer = module.layer
    if not module.role and (found := LAYER_NUMBER.search(module.name)):
        layer = int(found[1])
    plain = f"{module.written} ({stored})"
    return OutlineModule(
        name=module.name,
        role=module.role,
        layer=layer,
        treatment=plain if isinstance(module.treatment, Plain) else stored,
        stored=stored,
        rule="",
        tensors=len(module.tensors),
        parameters=parameters,
        nbytes=module.nbytes,
    )
