"""A bundle on disk as values: its tensors by module, its record, and what its metadata claim."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from emitters import FORMATS, format_of
from emitters.checkpoints import forms_of
from emitters.core.record import BundleModule, Record, planned_record, read_record
from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, errors, fail
from policy_dsl.escaping import shown
from policy_dsl.formats import Claim, Format, FormatSpec, PartShape, TensorForm, UnreadError
from policy_dsl.inventory import Inventory, TensorInfo
from policy_dsl.plan import Plan
from policy_dsl.planning.outline import Outline, OutlineModule, stored_as
from policy_dsl.quantities import counted, first_few
from policy_dsl.regular_files import read_whole
from policy_dsl.roles.quantization import quantization_of
from policy_dsl.sources.checkpoint import CONFIG, MAX_CONFIG_NBYTES, Header
from policy_dsl.sources.local_files import open_folder
from policy_dsl.sources.reference import is_whole_model, open_source, refuse_other_file
from policy_dsl.treatments import Coded, Plain, Stored, Unread

_UNREAD, _BROKEN = "unknown-pattern", "its shape is broken"
# A number of more digits is a name: no model has as many layers.
_LAYER_NUMBER = re.compile(r"\blayers\.([0-9]{1,7})\.")


@dataclass(frozen=True)
class Bundle:
    """A bundle as it is on disk. record is None if policyc did not build it.

    metadata: the files that describe it to readers, by name. claims: what they say of quantized
    modules. modules: by name. findings: modules that are not what metadata or record say.
    """

    folder: Path
    inventory: Inventory
    record: Record | None
    format: Format
    metadata: Mapping[str, bytes]
    claims: Mapping[str, Claim]
    modules: tuple[BundleModule, ...]
    findings: tuple[Diagnostic, ...]

    @cached_property
    def scales(self) -> Mapping[str, BundleModule]:
        """Module -> the one that holds what its columns were multiplied by; no weights."""
        held = {module.name: module for module in self.modules}
        found = {name: self.format.column_scale(name) for name in held}
        return {name: held[scale] for name, scale in found.items() if scale in held}


def open_bundle(
    path: Path, *, links: bool = True, formats: Mapping[str, Format] = FORMATS
) -> Bundle:
    """The bundle in a folder, or the one that is a single file, from headers and metadata.

    No weight is read. Of a file, the record beside it counts if it is about this file. links:
    whether its weights may be links out of its folder. formats: that it may be of.
    Raises: PolicyError if headers, index, or the record cannot be what they must be.
    """
    if not path.is_dir() and not (path.exists() and is_whole_model(path)):
        if path.exists():
            refuse_other_file(path)
        raise fail("not-a-bundle", path=str(path), reason="it is not a folder")
    inventory = open_source(str(path), links=links)
    folder = path if path.is_dir() else path.parent
    record = read_record(folder)
    if record is not None and path != folder and path.name not in record.files:
        record = None
    if record is not None and record.target in formats:
        # The others are not even imported.
        formats = {record.target: formats[record.target]}
    metadata = _metadata(inventory, formats)
    target = record.target if record else None
    format, claims = _format(str(path), inventory, target, metadata, formats)
    modules = tuple(_modules(inventory, claims, format.spec, record))
    if record is None and (find := format.files().added):
        added = find(metadata, {module.name: module.shape for module in modules})
        modules = tuple(one._replace(added=added.get(one.name, one.added)) for one in modules)
    findings = _unread(path, claims)
    for module in modules:
        if reason := _misfit(module, format.spec):
            findings.append(diagnostic("incomplete-module", module=module.name, reason=reason))
    about = inventory, record, format, metadata, claims, modules
    return Bundle(folder, *about, tuple(findings))


def written_bundle(
    plan: Plan, folder: Path, format: Format, headers: Mapping[str, Header]
) -> Bundle:
    """The bundle of a plan as a build has written it, all but its record.

    headers: of its tensor files, known to be those of the plan. Config, index and metadata are
    read. Raises: PolicyError if they cannot be what they must be.
    """
    inventory = open_folder(folder, headers=headers)
    formats, modules = {plan.target: format}, []
    metadata = _metadata(inventory, formats)
    _, claims = _format(str(folder), inventory, plan.target, metadata, formats)
    for one in plan.modules:
        values = one.treatment, one.shape, one.dtype
        held = {t.name.rpartition(".")[2]: inventory.tensors[t.name] for t in one.tensors}
        row = one.name, one.role, one.layer, *values, held, one.added, one.written
        modules.append(BundleModule(*row))
    about = inventory, planned_record(plan), format, metadata, claims, tuple(sorted(modules))
    return Bundle(folder, *about, tuple(_unread(folder, claims)))


def _metadata(inventory: Inventory, formats: Mapping[str, Format]) -> dict[str, bytes]:
    """The files that describe it to readers of these formats, by name."""
    # What is beside a container is not part of it.
    if inventory.container is not None or inventory.root is None:
        return {}
    known = {name for one in formats.values() for name in one.spec.metadata_files}
    held, root = sorted(known & {CONFIG, *(inventory.side_files or {})}), inventory.root
    return {name: read_whole(root / name, most=MAX_CONFIG_NBYTES) for name in held}


def _format(
    path: str,
    inventory: Inventory,
    target: str | None,
    metadata: Mapping[str, bytes],
    formats: Mapping[str, Format],
) -> tuple[Format, Mapping[str, Claim]]:
    """The format that wrote the bundle, and what its metadata claim. target: as recorded."""
    tensors = inventory.tensors.values()
    forms = forms_of({tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors})
    if target is not None:
        format = format_of(target, formats)
        try:
            return format, format.files().claims(metadata, forms)
        except ValueError as error:
            reason = f"its metadata are not what {target} has: {error}"
            raise fail("bad-bundle-metadata", path=path, reason=reason) from None
    contained, unread = inventory.container is not None, []
    alike = (one for one in formats.values() if (one.spec.container is not None) == contained)
    for format in alike:
        try:
            claims = format.files().claims(metadata, forms)
        except UnreadError as error:
            unread.append(f"{format.name} does not read it: {error}")
            continue
        except ValueError:
            continue
        # A container says what it is, also if nothing in it is quantized.
        if claims or contained:
            return format, claims
    found = quantization_of(inventory)
    reason = "it has no policyc.json, and nothing in it is quantized: it is a checkpoint"
    if found is not None:
        reason = f"it is quantized ({found.form}) in a way that no target of policyc reads"
    raise fail("not-a-bundle", path=path, reason=reason, notes=unread if found else ())


def _modules(
    inventory: Inventory, claims: Mapping[str, Claim], spec: FormatSpec, record: Record | None
) -> Iterator[BundleModule]:
    """The modules by name, as the record lists them. Raises: PolicyError (bad-record)."""
    owners = record.owners if record else {}
    stored = _as_stored(record, spec, str(inventory.root)) if record else {}
    tensors: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for tensor in inventory.tensors.values():
        path, _, part = tensor.name.rpartition(".")
        # The record knows; names are only guessed where there is none.
        owner = owners.get(tensor.name)
        if owner is None:
            said = claims[path].treatment if path in claims else Plain("BF16")
            is_own = isinstance(said, Unread) or part in _part_names(said, spec)
            owner = path if is_own else tensor.name
        tensors[owner][part] = tensor
    for name in sorted(tensors):
        held, known, claim = tensors[name], record and record.modules.get(name), claims.get(name)
        if known:
            treatment = stored.get(known.treatment, known.treatment)
            yield known._replace(tensors=held, treatment=treatment)
        elif claim:
            yield BundleModule(name, "", None, *claim, held)
        else:
            (tensor,) = held.values()
            form = Plain(tensor.dtype), tensor.shape, tensor.dtype
            yield BundleModule(name, "", None, *form, held, written="keep")


def _as_stored(record: Record, spec: FormatSpec, folder: str) -> dict[Stored | Unread, Coded]:
    """The treatments of a record, with what it leaves out because it is a fact of the scheme."""
    found: dict[Stored | Unread, Coded] = {}
    for name, module in record.modules.items():
        said = module.treatment
        if said in found or not isinstance(said, Coded):
            continue
        scheme = spec.scheme(said.scheme)
        if (
            scheme is None
            or said.bits not in scheme.bits
            or said.group_size not in (scheme.group_sizes or (0,))
            or said.method not in scheme.methods
        ):
            reason = f"{shown(name)} is quantized in a way that {spec.name} does not have"
            raise fail("bad-record", path=folder, reason=reason)
        fixed = len(scheme.symmetries) == 1
        found[said] = replace(said, symmetric=scheme.symmetries[0]) if fixed else said
    return found


def _unread(path: Path, claims: Mapping[str, Claim]) -> list[Diagnostic]:
    """The finding that it is not known what readers make of some modules, if so."""
    treatments = ((name, claim.treatment) for name, claim in claims.items())
    reasons = {name: one.reason for name, one in treatments if isinstance(one, Unread)}
    if not reasons:
        return []
    cure, named = "a rule before it decides without it", first_few(sorted(reasons))
    reason, modules = next(iter(reasons.values())), counted(len(reasons), "module")
    facts: dict[str, Any] = {"path": str(path), "reason": reason, "modules": modules}
    return [diagnostic(_UNREAD, suggestion=cure, notes=[f"not known: {named}"], **facts)]


def _misfit(module: BundleModule, spec: FormatSpec) -> str | None:
    """Why a module's tensors are not those that its treatment needs; None if they are."""
    treatment, found = module.treatment, module.parts
    if isinstance(treatment, Unread):
        # `_unread` says so.
        return None
    if isinstance(treatment, Plain):
        fits = [shape for _, shape in found.values()] == [module.shape]
        wanted = f"one tensor {list(module.shape)}"
        return None if fits else f"it has {parts_text(found)}; it should have {wanted}"
    expected = parts_under(module, treatment, spec)
    if found == expected:
        return None
    try:
        names = _part_names(treatment, spec)
    except ValueError as error:
        return str(error)
    # First: without all parts there may be no shape.
    if found.keys() != names:
        return f"it has {', '.join(sorted(found))}; it should have {', '.join(sorted(names))}"
    wanted = parts_text(expected)
    return f"it has {parts_text(found)}; it should have {wanted}" if expected else _BROKEN


def parts_under(module: BundleModule, treatment: Stored, spec: FormatSpec) -> dict[str, TensorForm]:
    """What a module's tensors would be under a treatment; empty if its shape allows none."""
    with suppress(ValueError):
        return _parts(spec.part_shapes, treatment, module.shape, module.dtype)
    return {}


@lru_cache(4096)
def _parts(part_shapes: Callable[..., Sequence[PartShape]], *form: Any) -> dict[str, TensorForm]:
    # Thousands of modules have the same form: treatment, shape, dtype.
    return {part.part: (part.dtype, part.shape) for part in part_shapes(*form)}


def parts_text(parts: Mapping[str, TensorForm]) -> str:
    """The parts of a module as text: `scales BF16 [64, 2], weight U32 [64, 16]`."""
    return ", ".join(f"{part} {dtype} {[*shape]}" for part, (dtype, shape) in sorted(parts.items()))


def _part_names(treatment: Stored, spec: FormatSpec) -> Set[str]:
    """The parts of a module. Raises: ValueError if the format has no such treatment."""
    # Any shape will do, only the names of the parts count.
    columns = max(32, treatment.group_size) if isinstance(treatment, Coded) else 32
    return _parts(spec.part_shapes, treatment, (1, columns), "BF16").keys()


def bundle_outline(folder: Path, *, links: bool = True, with_unread: bool = False) -> Outline:
    """The outline of a bundle, from its record, or from headers and metadata alone.

    links: whether its weights may be links out of its folder. with_unread: also if it is not
    known how some modules are stored. Raises: PolicyError if the folder is not a bundle, or its
    metadata and tensors disagree.
    """
    bundle = open_bundle(folder, links=links)
    unread = tuple(found for found in bundle.findings if found.code == _UNREAD)
    # A diff of a broken bundle would compare noise.
    if len(errors(bundle.findings)) > len(unread):
        raise PolicyError(bundle.findings)
    # What is not known would be equal to itself.
    if unread and not with_unread:
        raise PolicyError(unread)
    record, experts, added = bundle.record, None, 0
    for one in bundle.modules:
        # Where each expert is a module, so is an added one.
        if one.shape and (one.role == "router" or 0 < one.added < one.shape[0]):
            experts, added = one.shape[0] - one.added, one.added
            break
    scales = {module.name for module in bundle.scales.values()}
    return Outline(
        title=f"{record.policy} ({folder})" if record else str(folder),
        target=bundle.format.name,
        model=record.source if record else bundle.inventory.id,
        modules=tuple(_outline_module(module, scales) for module in bundle.modules),
        experts=experts,
        pruning=record.pruning if record else None,
        added=added,
        unread=unread,
    )


def _outline_module(module: BundleModule, scales: Set[str]) -> OutlineModule:
    # A plain module has one tensor; a quantized one does not use this.
    dtype = next(iter(module.tensors.values())).dtype
    stored, layer = stored_as(module.treatment, dtype), module.layer
    if not module.role and (found := _LAYER_NUMBER.search(module.name)):
        layer = int(found[1])
    is_plain = isinstance(module.treatment, Plain)
    treatment = f"{module.written} ({stored})" if is_plain else stored
    about = module.name, module.role, layer, treatment, stored, ""
    parameters = 0 if module.name in scales else module.parameters
    nbytes = sum(tensor.nbytes for tensor in module.tensors.values())
    return OutlineModule(*about, len(module.tensors), parameters, nbytes)
