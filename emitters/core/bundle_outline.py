"""A bundle on disk as an Outline, so that it can be compared with plans and other bundles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from emitters import FORMATS
from emitters.core.bundle_reading import Bundle, open_bundle
from emitters.core.record import BundleModule
from policy_dsl.diagnostics import PolicyError, errors
from policy_dsl.formats import Format
from policy_dsl.inventory import LAYER_NUMBER
from policy_dsl.planning.outline import Outline, OutlineModule, stored_as
from policy_dsl.treatments import Plain

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
    """The experts of a layer that a source has, as far as that is told, and the added ones."""
    for one in bundle.modules:
        # Where experts lie apart, an added one is a module of its own.
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
