"""Which tensors of a source the modules of a bundle were made of.

Bundle, Model ── match ──> module of the bundle ─> its stack: tensors of the source, in order
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from typing import TypeVar

from emitters.core.bundle_reading import Bundle
from emitters.core.record import BundleModule
from emitters.tensor_io.read import columns
from emitters.tensor_io.view_rows import LONGEST_ROW
from policy_dsl.formats import FormatSpec
from policy_dsl.plan import Pruning
from policy_dsl.planning.pruning import expert_layers
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.roles.config_facts import written_value
from policy_dsl.roles.model import BY_EXPERT
from policy_dsl.treatments import Coded
from policy_dsl.views import Values, stacked


def match(bundle: Bundle, model: Model) -> dict[str, tuple[ModelTensor, ...]]:
    """The stack of every module that the bundle's format makes of a source, experts in order.

    Modules that the bundle lacks are named as its format names them. Whether a module that it
    has holds nothing but its stack, `fits` says.
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

    pruning: as the bundle's record says.
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
    written = [written_value(bundle.inventory.config, key) for key in keys]
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
            return module._replace(added=module.shape[0])
        if module.name in padded and module.shape[0] == count + added:
            return module._replace(added=added)
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
    """The stacks by the names of the bundle, in which each expert may be a module."""
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


# As many values as a build's unit: few pieces, and small ones where a matrix is small.
_PIECE_VALUES = 8 * 2**20
_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class Piece:
    """`count` rows of a source's tensor from `first`, and of a module from `at`.

    whole: the module as the bundle has it; module, tensor: as their rows are compared, None of
    rows that no source has, those of experts that were added. matrix: the number of the
    module's matrix in which they are.
    """

    whole: BundleModule
    module: BundleModule
    tensor: ModelTensor | None
    matrix: int
    first: int
    count: int
    at: int

    @property
    def name(self) -> str:
        """The module's name, with the number of the matrix if it has several."""
        shape = self.whole.shape
        stacked = len(shape) > 2 and shape[0] > 1
        return f"{self.whole.name}[{self.matrix}]" if stacked else self.whole.name

    def place(self, at: tuple[int, int]) -> tuple[int, int]:
        """Row and column, in the whole module, of the value at a row and column of `module`."""
        row, column = at
        return divmod(row * columns(self.module.shape) + column, columns(self.whole.shape))

    def source_place(self, at: tuple[int, int]) -> str:
        """Where in the source the value at a row and column of `module` is: `name[3, 17]`."""
        row, column = at[0] - self.at + self.first, at[1]
        # A row of the module is longer where experts were added.
        if self.tensor is None or column >= self.tensor.view.width:
            return ""
        place = self.tensor.view.place(row, column)
        return f"{self.tensor.source.name}{list(place)}"


def pieces_of(
    whole: BundleModule, stack: tuple[ModelTensor, ...], block_rows: Callable[[BundleModule], int]
) -> Iterator[Piece]:
    """All rows of a module that fits its stack.

    block_rows(module): how many of them are decoded together.
    """
    module, tensors = _in_stretches(whole, stack)
    step = block_rows(module)
    height = max(1, prod(whole.shape[-2:-1]) * columns(whole.shape) // columns(module.shape))
    several = max(1, _PIECE_VALUES // columns(module.shape) // step) * step
    placed = zip(tensors, stacked(tensor.view for tensor in tensors), strict=True)
    for tensor, (_, at, rows) in placed:
        for start in range(0, rows, height):
            stop = min(rows, start + height)
            for first in range(start, stop, several):
                row, count = at + first, min(several, stop - first)
                yield Piece(whole, module, tensor, row // height, first, count, row)
    total = max(1, prod(module.shape[:-1]))
    if module.added and len(module.shape) > 1:
        first = total // module.shape[0] * (module.shape[0] - module.added)
        for start in range(first, total, height):
            stop = min(total, start + height)
            for at in range(start, stop, several):
                count = min(several, stop - at)
                yield Piece(whole, module, None, at // height, 0, count, at)


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
    if isinstance(module.treatment, Coded) or is_short:
        return module, stack
    split = tensors_in_stretches(*stack)
    if stack and split == stack:
        return module, stack
    tensors = {
        part: held._replace(shape=(prod(held.shape), 1)) for part, held in module.tensors.items()
    }
    added = module.added * prod(module.shape[1:])
    return module._replace(shape=(prod(module.shape), 1), tensors=tensors, added=added), split


def in_order(
    make: Callable[[_Given], _Made], given: Iterable[_Given], *, jobs: int
) -> Iterator[_Made]:
    """What `make` makes of everything, in order; by `jobs` threads, few results ahead."""
    rest = iter(given)
    with ThreadPoolExecutor(jobs, "compare") as workers:
        running: deque[Future[_Made]] = deque()
        while True:
            for one in islice(rest, 4 * jobs - len(running)):
                running.append(workers.submit(make, one))
            if not running:
                return
            yield running.popleft().result()
