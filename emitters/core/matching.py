"""Which tensors of a source the modules of a bundle were made of, and their rows side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
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
from policy_dsl.views import Values, View, stacked

# As many values as a build's unit: few pieces, and small ones where a matrix is small.
_PIECE_VALUES = 8 * 2**20


def match(bundle: Bundle, model: Model) -> dict[str, tuple[ModelTensor, ...]]:
    """The stack of every module that the bundle's format makes of a source, experts in order.

    Modules that the bundle lacks are named as its format names them. Whether a module that it
    has holds nothing but its stack, `fits` says.
    """
    spec, names = bundle.format.spec, {module.name for module in bundle.modules}
    layouts = [layout.path for layout in spec.layouts.values() if layout]
    stacks: dict[str, list[ModelTensor]] = defaultdict(list)
    for tensor in model.tensors:
        if bundle.format.review.left_out(tensor, model) is None:
            stacks[spec.module_path(tensor, model)].append(tensor)
    found: dict[str, tuple[ModelTensor, ...]] = {}
    for path, stack in stacks.items():
        stack.sort(key=lambda tensor: tensor.expert or 0)
        # In the bundle each expert may be a module.
        whole = stack[0].expert is None or path in names
        apart = [] if whole else [at for at in layouts if at(path, 0) in names]
        if apart:
            found |= {apart[0](path, one.expert or 0): (one,) for one in stack}
        else:
            found[path] = tuple(stack)
    return found


def other_experts(bundle: Bundle, model: Model, pruning: Pruning | None) -> str | None:
    """Why the bundle's experts cannot be those of the source; None if they may be.

    pruning: as the bundle's record says.
    """
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
    padding = bundle.format.spec.padding.get(model.architecture.family)
    known = (None, count, count + (padding.added(count) if padding else 0))
    # Anything may be written there, also what no set can hold.
    others = [count for count in written if count not in known]
    if not others:
        return None
    return (
        f"it has {others[0]!r:.60} experts a layer and {model.id} has {count}; "
        f"only a record says which of them it keeps, and it has none"
    )


def with_added(bundle: Bundle, model: Model) -> Bundle:
    """The bundle with those experts marked as added that its format adds to such a model.

    A record names them; of other bundles, the count of the model's own experts does.
    """
    spec, count = bundle.format.spec, model.n_experts
    padding = spec.padding.get(model.architecture.family)
    added = padding.added(count) if padding else 0
    if bundle.record is not None or not added:
        return bundle
    by_expert = [one for one in model.tensors if one.expert is not None or one.role in BY_EXPERT]
    padded = {spec.module_path(tensor, model) for tensor in by_expert}
    alone = {
        layout.path(spec.module_path(tensor, model), number)
        for tensor in by_expert
        # Once for each stack.
        for layout in filter(None, spec.layouts.values() if tensor.expert == 0 else ())
        for number in range(count, count + added)
    }

    def marked(module: BundleModule) -> BundleModule:
        if module.name in alone:
            return module._replace(added=module.shape[0])
        is_padded = module.name in padded and module.shape[0] == count + added
        return module._replace(added=added) if is_padded else module

    return replace(bundle, modules=tuple(map(marked, bundle.modules)))


def fits(module: BundleModule, stack: tuple[ModelTensor, ...]) -> bool:
    """Whether a module's rows are its stack's, one tensor after the other, then added ones."""
    # As many values are not as many rows; only in a bias, added experts make the row longer.
    is_padded_row = module.added > 0 and len(module.shape) == 1
    if not is_padded_row and columns(module.shape) != columns(stack[0].shape):
        return False
    elements = sum(prod(one.shape) for one in stack)
    first = module.shape[0] - module.added if module.shape else 1
    plain = all(one.is_rows_of_source for one in stack)
    return plain and elements == first * prod(module.shape[1:])


class Piece(NamedTuple):
    """Rows of a module that are compared together, from the row `at`.

    whole: the module as the bundle has it; module: the same, as its rows are compared: in
    stretches of values where they are too long. view: of the source, from its row `first`;
    None of experts that no source has. matrix: of `whole`.
    """

    whole: BundleModule
    module: BundleModule
    view: View | None
    matrix: int
    first: int
    n_rows: int
    at: int

    @property
    def name(self) -> str:
        """The module, and the number of the matrix if it has several."""
        shape = self.whole.shape
        stacked = len(shape) > 2 and shape[0] > 1
        return f"{self.whole.name}[{self.matrix}]" if stacked else self.whole.name

    def cut(self, start: int, count: int) -> Piece:
        """At most so many of its rows, from its row `start`."""
        n_rows = min(count, self.n_rows - start)
        return self._replace(first=self.first + start, at=self.at + start, n_rows=n_rows)

    def place(self, at: tuple[int, int]) -> tuple[int, int]:
        """Row and column, in the whole module, of the value at a row and column of `module`."""
        row, column = at
        return divmod(row * columns(self.module.shape) + column, columns(self.whole.shape))

    def source_place(self, at: tuple[int, int]) -> str:
        """Where in the source the value at a row and column of `module` is: `name[3, 17]`."""
        row, column = at[0] - self.at + self.first, at[1]
        # A row of the module is longer where experts were added.
        if self.view is None or column >= self.view.width:
            return ""
        return f"{self.view.tensor.name}{list(self.view.place(row, column))}"


def pieces_of(
    whole: BundleModule, stack: tuple[ModelTensor, ...], block_rows: Callable[[BundleModule], int]
) -> Iterator[Piece]:
    """All rows of a module that fits its stack.

    block_rows(module): how many of them are decoded together.
    """
    module, tensors = _in_stretches(whole, stack)
    width, step = columns(module.shape), block_rows(module)
    height = max(1, prod(whole.shape[-2:-1]) * columns(whole.shape) // width)
    several = max(1, _PIECE_VALUES // width // step) * step
    runs: list[tuple[View | None, int, int]] = [*stacked(tensor.view for tensor in tensors)]
    if module.added and len(module.shape) > 1:
        total = max(1, prod(module.shape[:-1]))
        added = total // module.shape[0] * module.added
        runs.append((None, total - added, added))
    for view, at, rows in runs:
        firsts = (
            first
            for start in range(0, rows, height)
            for first in range(start, min(rows, start + height), several)
        )
        for first in firsts:
            n_rows = min(several, rows - first, height - first % height)
            yield Piece(whole, module, view, (at + first) // height, first, n_rows, at + first)


def tensors_in_stretches(*tensors: ModelTensor) -> tuple[ModelTensor, ...]:
    """Tensors of a source as their rows are read side by side.

    In stretches of values where all rows are long ones; scales belong to blocks of a row.
    """
    if any(tensor.scale is not None or columns(tensor.shape) <= LONGEST_ROW for tensor in tensors):
        return tensors
    return tuple(
        replace(tensor, shape=(prod(tensor.shape), 1), operations=(*tensor.operations, Values()))
        for tensor in tensors
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
