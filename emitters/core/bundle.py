"""Everything of a bundle but its tensors: metadata, the source's side files, the record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from emitters.core.side_files import copied_names, source_findings
from emitters.tensor_io.read import Source, file_facts
from policy_dsl.diagnostics import PolicyError, errors, fail
from policy_dsl.formats import Format, FormatSpec
from policy_dsl.inventory import Inventory
from policy_dsl.plan import OmittedFile, Plan, PlannedFile
from policy_dsl.planning.record import RECORD, record_nbytes
from policy_dsl.sources.side_files import is_one_of, why_left_out

_UNKNOWN_SIDE_FILES = "tokenizer, template and licence files"


def complete(plan: Plan, inventory: Inventory, format: Format) -> Plan:
    """The plan with every file of the bundle; sizes are exact where they can be known.

    plan: as `resolve` gives it; a complete one stays as it is. What depends on side files
    that are not known has `nbytes` None and the reason.
    Raises: PolicyError if the policy names a container as another file of the bundle is called,
    or a side file that the bundle takes is not what its name says.
    """
    if any(file.kind == "record" for file in plan.files):
        return plan
    _check_container(plan, format.spec)
    found = source_findings(plan, inventory, format.spec)
    if errors(found):
        raise PolicyError(errors(found))
    plan = replace(plan, findings=(*plan.findings, *found))
    plan = _with_preface(plan, inventory, format)
    files = tensor_files(plan)
    files += [
        PlannedFile(name, "metadata", len(content))
        for name, content in format.files().metadata(plan).items()
    ]
    files += _edited(plan, inventory, format)
    files += _copied(inventory, format.spec, {RECORD, *(file.name for file in files)})
    omitted = tuple(_omitted(plan, inventory, format.spec, {file.name for file in files}))
    return replace(plan, files=(*files, _record_file(plan, files)), omitted_files=omitted)


def tensor_files(plan: Plan) -> list[PlannedFile]:
    """The plan's files that hold tensors."""
    return [file for file in plan.files if file.kind == "tensors"]


def edited_files(plan: Plan, source: Source, format: Format) -> dict[str, bytes]:
    """The side files that the format writes in another form, from those of the source."""
    found, edited = _held(format.spec.edited_files, source), format.files().edited
    return edited(plan, found) if found and edited else {}


def preface(plan: Plan, source: Source, format: Format) -> bytes:
    """What stands before the tensors of the plan's one container, from the source's files."""
    return _made_preface(plan, format, _held(format.spec.embedded_files, source))


def _made_preface(plan: Plan, format: Format, files: Mapping[str, bytes] | None) -> bytes:
    container = format.spec.container
    return container.preface(plan, files) if container else b""


def _held(names: Iterable[str], source: Source) -> dict[str, bytes]:
    """The source's files of these names that it has."""
    return {
        name: source.read(name, 0, source.facts[name].nbytes).tobytes()
        for name in names
        if name in source.facts
    }


def _check_container(plan: Plan, spec: FormatSpec) -> None:
    name = plan.policy.output.file_name
    if spec.container is None or name is None:
        return
    if is_one_of(name, (*copied_names(spec), *spec.edited_files)):
        span = dict(plan.policy.key_spans).get("output.file_name")
        reason = "the bundle takes files of such names from the source"
        raise fail("bad-file-name", span, name=name, reason=reason)


def _with_preface(plan: Plan, inventory: Inventory, format: Format) -> Plan:
    """The plan with the places of a container's tensors, if its preface can be made here."""
    containers = [file for file in plan.files if file.kind == "tensors" and file.nbytes is None]
    if not containers:
        return plan
    (container,) = containers
    if inventory.root is None:
        # Its size without what it tells of the model is a fact all the same.
        least = len(_made_preface(plan, format, None)) + sum(one.nbytes for one in plan.modules)
        return replace(plan, files=(replace(container, least=least),))
    names = [one for one in format.spec.embedded_files if one in (inventory.side_files or {})]
    source = Source(inventory.root, file_facts(inventory.root, names))
    size = len(preface(plan, source, format))
    modules = tuple(
        replace(module, tensors=tuple(t._replace(start=t.start + size) for t in module.tensors))
        for module in plan.modules
    )
    placed = replace(container, nbytes=size + container.least, reason="", least=0)
    return replace(plan, modules=modules, files=(placed,))


def _edited(plan: Plan, inventory: Inventory, format: Format) -> Iterator[PlannedFile]:
    names = [name for name in format.spec.edited_files if name in (inventory.side_files or {})]
    if inventory.root is None:
        # Side files that are known by their sizes only, or not at all, which is said elsewhere.
        for name in names:
            reason = f"the text of the source's {name} is not known"
            yield PlannedFile(name, "edited", None, reason)
        return
    source = Source(inventory.root, file_facts(inventory.root, names))
    for name, content in edited_files(plan, source, format).items():
        yield PlannedFile(name, "edited", len(content))


def _copied(inventory: Inventory, spec: FormatSpec, taken: set[str]) -> Iterator[PlannedFile]:
    """The source's side files that the bundle takes over; `taken` are names of its own."""
    # Recorded headers of a model may not say what lay beside its weights.
    if inventory.side_files is None:
        reason = f"the side files of {inventory.id} are not known"
        yield PlannedFile(_UNKNOWN_SIDE_FILES, "copied", None, reason)
        return
    patterns = copied_names(spec)
    for name, nbytes in sorted(inventory.side_files.items()):
        if name not in taken and is_one_of(name, patterns):
            yield PlannedFile(name, "copied", nbytes)


def _omitted(
    plan: Plan, inventory: Inventory, spec: FormatSpec, held: set[str]
) -> Iterator[OmittedFile]:
    """What lies beside the source's weights and has no part in the bundle."""
    held = held | {*spec.embedded_files}
    beside: dict[str, int | None] = {**(inventory.side_files or {})}
    beside |= dict.fromkeys(inventory.unread)
    for name in sorted(beside.keys() - held):
        yield OmittedFile(name, beside[name], why_left_out(name, plan.target))


def _record_file(plan: Plan, files: list[PlannedFile]) -> PlannedFile:
    sizes = {file.name: file.nbytes for file in files if file.nbytes is not None}
    if len(sizes) < len(files):
        return PlannedFile(RECORD, "record", None, "it lists the side files, which are not known")
    if plan.pending:
        reason = "it names the statistics, and what they decide, that are not there yet"
        return PlannedFile(RECORD, "record", None, reason)
    return PlannedFile(RECORD, "record", record_nbytes(plan, sizes))
