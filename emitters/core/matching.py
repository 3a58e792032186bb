"""Which tensors of a source the modules of a bundle stand for.

Bundle, Model ── match ──> module of the bundle ─> its stack: tensors of the source, in order
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from emitters.core.bundle_reading import Bundle
from emitters.core.record import BundleModule
from emitters.tensor_io.read import columns
from policy_dsl.formats import FormatSpec
from policy_dsl.plan import Pruning
from policy_dsl.planning.pruning import expert_layers
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.roles.config_facts import written_value
from policy_dsl.roles.model import BY_EXPERT


def match(bundle: Bundle, model: Model) -> dict[str, tuple[ModelTensor, ...]]:
    """The stack of every module that the bundle's format makes of a source, experts in order.

    Modules that the bundle lacks are named as its format names them. Whether a module that it
    has holds nothing else than its stack, `fits` tells.
    """
    spec = bundle.format.spec
    stacks: dict[str, list[ModelTensor]] = {}
    for tensor in model.tensors:
        if bundle.format.review.left_out(tensor, model) is None:
            stacks.setdefault(spec.module_path(tensor, model), []).append(tensor)
    ordered = {
        path: tuple(sorted(stack, key=lambda tensor: tensor.expert or 0))
        for path, stack in stacks.items()
    }
    return _named_as(bundle, ordered, spec)


def other_experts(bundle: Bundle, model: Model, pruning: Pruning | None) -> str | None:
    """Why the bundle's experts cannot be those of the source; None if they may be.

    pruning: as the bundle's record tells it.
    """
    count, layers = model.n_experts, expert_layers(model)
    if pruning is not None:
        same = pruning.before == count and tuple(sorted(pruning.kept)) == layers
        kept = f"{pruning.count} of {pruning.before} experts in {len(pruning.kept)} layers"
        has = f"it keeps {kept}; {model.id} has {count} in {len(layers)}"
        beyond = any(max(old) >= count for old in pruning.kept.values())
        return None if same and not beyond else has
    if bundle.record is not None:
        return None
    keys = model.architecture.experts
    told = [written_value(bundle.inventory.config, key) for key in keys]
    padding = bundle.format.spec.padding.get(model.architecture.family)
    known = (None, count, count + (padding.added(count) if padding else 0))
    # Anything may be written there, also what no set can hold.
    others = [one for one in told if one not in known]
    if not others:
        return None
    return (
        f"it has {others[0]!r:.60} experts a layer and {model.id} has {count}; "
        f"which of them it keeps only a record tells, and it has none"
    )


def with_added(bundle: Bundle, model: Model) -> Bundle:
    """The bundle with those experts marked as added that its format adds to such a model.

    A record tells them; of other bundles, the count of the model's own experts does.
    """
    spec = bundle.format.spec
    padding = spec.padding.get(model.architecture.family)
    count = model.n_experts
    added = padding.added(count) if padding else 0
    if bundle.record is not None or not added:
        return bundle
    by_expert = [one for one in model.tensors if one.expert is not None or one.role in BY_EXPERT]
    padded = {spec.module_path(tensor, model) for tensor in by_expert}
    alone = {
        layout.path(spec.module_path(tensor, model), number)
        for tensor in by_expert
        for layout in spec.layouts.values()
        for number in range(count, count + added)
        # Once for each stack.
        if layout is not None and tensor.expert == 0
    }

    def marked(module: BundleModule) -> BundleModule:
        if module.name in alone:
            return replace(module, added=module.shape[0])
        if module.name in padded and module.shape[0] == count + added:
            return replace(module, added=added)
        return module

    return replace(bundle, modules=tuple(marked(module) for module in bundle.modules))


def fits(module: BundleModule, stack: tuple[ModelTensor, ...]) -> bool:
    """Whether a module's rows are its stack's, one tensor after the other, then added ones."""
    plain = all(one.is_rows_of_source for one in stack)
    # As many values are not as many rows; only in a bias, added experts make the row longer.
    is_padded_row = module.added > 0 and len(module.shape) == 1
    if not is_padded_row and columns(module.shape) != columns(stack[0].shape):
        return False
    elements = sum(prod(one.shape) for one in stack)
    first = module.shape[0] - module.added if module.shape else 1
    return plain and elements == first * prod(module.shape[1:])


def _named_as(
    bundle: Bundle, stacks: Mapping[str, tuple[ModelTensor, ...]], spec: FormatSpec
) -> dict[str, tuple[ModelTensor, ...]]:
    """The stacks by the names of the bundle, in which experts may lie apart."""
    names = {module.name for module in bundle.modules}
    layouts = [layout.path for layout in spec.layouts.values() if layout]
    found: dict[str, tuple[ModelTensor, ...]] = {}
    for path, stack in stacks.items():
        whole = stack[0].expert is None or path in names
        apart = [] if whole else [at for at in layouts if at(path, 0) in names]
        if apart:
            found |= {apart[0](path, one.expert or 0): (one,) for one in stack}
        else:
            found[path] = stack
    return found
