"""Which tensors of a source the modules of a bundle were made of, and their rows side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from math import prod
from operator import attrgetter
from typing import NamedTuple

from emitters.core.bundle_reading import Bundle
from emitters.core.record import BundleModule
from emitters.tensor_io.files import columns
from emitters.tensor_io.view_rows import LONGEST_ROW
from policy_dsl.plan import Pruning
from policy_dsl.planning.pruning import expert_layers
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.roles.config_facts import written_value
from policy_dsl.roles.model import BY_EXPERT
from policy_dsl.treatments import Coded
from policy_dsl.views import Reshaped, View, stacked

# As many values as a build's unit: few pieces, and small ones where a matrix is small.
_PIECE_VALUES = 8 * 2**20


def match(bundle: Bundle, model: Model) -> dict[str, tuple[ModelTensor, ...]]:
    """The stack of each module that the bundle's format makes of a source, experts in order."""
    spec, names = bundle.format.spec, {module.name for module in bundle.modules}
    layouts = [layout.path for layout in spec.layouts.values() if layout]
    stacks: dict[str, list[ModelTensor]] = defaultdict(list)
    for tensor in spec.arranged(model).tensors:
        if bundle.format.review.left_out(tensor, model) is None:
            stacks[spec.module_path(tensor, model)].append(tensor)
    found: dict[str, tuple[ModelTensor, ...]] = {}
    for path, stack in stacks.items():
        stack.sort(key=attrgetter("order"))
        # In the bundle each expert may be a module.
        whole = stack[0].expert is None or path in names
        apart = None if whole else next((at for at in layouts if at(path, 0) in names), None)
        if apart:
            found |= {apart(path, one.expert or 0): (one,) for one in stack}
        else:
            found[path] = tuple(stack)
    return found


def other_experts(bundle: Bundle, model: Model, pruning: Pruning | None) -> str | None:
    """Why the bundle's experts cannot be the source's, else None. pruning: as its record says."""
    count, layers = model.n_experts, expert_layers(model)
    if pruning is not None:
        same = pruning.before == count and tuple(sorted(pruning.kept)) == layers
        if same and all(max(old) < count for old in pruning.kept.values()):
            return None
        kept = f"{pruning.count} of {pruning.before} experts in {len(pruning.kept)} layers"
        return f"it keeps {kept}; {model.id} has {count} in {len(layers)}"
    if bundle.record is not None:
        return None
    written = [written_value(bundle.inventory.config, key) for key in model.architecture.experts]
    known = (None, count, count + _n_added(bundle, model))
    # Anything may be written there, also what no set can hold.
    others = [count for count in written if count not in known]
    if not others:
        return None
    held = f"it has {others[0]!r:.60} experts a layer and {model.id} has {count}"
    return f"{held}; only a record says which of them it keeps, and it has none"


def with_added(bundle: Bundle, model: Model) -> Bundle:
    """The bundle with those experts marked as added that its format adds to such a model."""
    spec, count, added = bundle.format.spec, model.n_experts, _n_added(bundle, model)
    # A record names them; of other bundles, the count of the model's own experts does.
    if bundle.record is not None or not added:
        return bundle
    padded, alone = set(), set()
    for tensor in model.tensors:
        if tensor.expert is not None or tensor.role in BY_EXPERT:
            padded.add(path := spec.module_path(tensor, model))
            # Once for each stack.
            layouts = filter(None, spec.layouts.values() if tensor.expert == 0 else ())
            numbers = range(count, count + added)
            alone |= {layout.path(path, number) for layout in layouts for number in numbers}
    modules = []
    for module in bundle.modules:
        is_padded = module.name in padded and module.shape[0] == count + added
        of_stack = added if is_padded else module.added
        own = module.shape[0] if module.name in alone else of_stack
        modules.append(module._replace(added=own))
    return replace(bundle, modules=tuple(modules))


def _n_added(bundle: Bundle, model: Model) -> int:
    padding = bundle.format.spec.padding.get(model.architecture.family)
    return padding.added(model.n_experts) if padding else 0


def fits(module: BundleModule, stack: tuple[ModelTensor, ...]) -> bool:
    """Whether a module's rows are its stack's, one tensor after the other, then added ones."""
    # As many values are not as many rows; only in a bias, added experts make the row longer.
    is_padded_row = module.added > 0 and len(module.shape) == 1
    if not is_padded_row and columns(module.shape) != columns(stack[0].shape):
        return False
    elements = sum(prod(one.shape) for one in stack)
    first = module.shape[0] - module.added if module.shape else 1
    packed = any(one.mxfp4 for one in stack)
    return not packed and elements == first * prod(module.shape[1:])


class Piece(NamedTuple):
    """Rows of a module that are compared together, from the row `at`.

    name: with the number of the matrix if there are several. whole: as the bundle has it; module:
    in stretches of values if its rows are too long. view: of the source, from its row `first`;
    None of experts that no source has.
    """

    name: str
    whole: BundleModule
    module: BundleModule
    view: View | None
    first: int
    n_rows: int
    at: int

    def cut(self, start: int, count: int) -> Piece:
        """At most so many of its rows, from its row `start`."""
        n_rows = min(count, self.n_rows - start)
        return self._replace(first=self.first + start, at=self.at + start, n_rows=n_rows)

    def places(self, row: int, column: int) -> tuple[tuple[int, int], str]:
        """Row and column of its value in the whole module; in the source, `name[3, 17]`."""
        value = (self.at + row) * columns(self.module.shape) + column
        at, view = divmod(value, columns(self.whole.shape)), self.view
        # A row of the module is longer where experts were added.
        if view is None or column >= view.width:
            return at, ""
        return at, f"{view.tensor.name}{list(view.place(self.first + row, column))}"


def pieces_of(
    whole: BundleModule, stack: tuple[ModelTensor, ...], block_rows: Callable[[BundleModule], int]
) -> Iterator[Piece]:
    """All rows of a module that fits its stack. block_rows(module): those decoded together."""
    module, tensors = _in_stretches(whole, stack)
    width, step = columns(module.shape), block_rows(module)
    height = max(1, prod(whole.shape[-2:-1]) * columns(whole.shape) // width)
    several = max(1, _PIECE_VALUES // width // step) * step
    is_stack = len(whole.shape) > 2 and whole.shape[0] > 1
    views = chain.from_iterable(one.views for one in tensors)
    runs: list[tuple[View | None, int, int]] = [*stacked(views)]
    if module.added and len(module.shape) > 1:
        total = max(1, prod(module.shape[:-1]))
        added = total // module.shape[0] * module.added
        runs.append((None, total - added, added))
    for view, at, rows in runs:
        matrices = (range(start, min(rows, start + height)) for start in range(0, rows, height))
        for first, stop in ((first, some.stop) for some in matrices for first in some[::several]):
            name = f"{whole.name}[{(at + first) // height}]" if is_stack else whole.name
            n_rows = min(several, stop - first)
            yield Piece(name, whole, module, view, first, n_rows, at + first)


def tensors_in_stretches(*tensors: ModelTensor) -> tuple[ModelTensor, ...]:
    """Tensors whose rows are read side by side: in stretches of values if all are long ones."""
    # Scales belong to blocks of a row.
    if any(one.scale or one.cut or columns(one.shape) <= LONGEST_ROW for one in tensors):
        return tensors
    sizes = [(prod(one.shape), 1) for one in tensors]
    return tuple(
        one._replace(shape=shape, operations=(*one.operations, Reshaped(shape)))
        for one, shape in zip(tensors, sizes, strict=True)
    )


def _in_stretches(
    module: BundleModule, stack: tuple[ModelTensor, ...]
) -> tuple[BundleModule, tuple[ModelTensor, ...]]:
    """The module of a bundle and the stack that it holds, as their rows are compared."""
    # In a bias the experts that were added make the row longer than the source's.
    is_padded_row = module.added > 0 and len(module.shape) == 1
    is_short = columns(module.shape) <= LONGEST_ROW or is_padded_row
    split = tensors_in_stretches(*stack)
    if isinstance(module.treatment, Coded) or is_short or (stack and split == stack):
        return module, stack
    shape, added = (prod(module.shape), 1), module.added * prod(module.shape[1:])
    tensors = {part: held._replace(shape=shape) for part, held in module.tensors.items()}
    return module._replace(shape=shape, tensors=tensors, added=added), split
