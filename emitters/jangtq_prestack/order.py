"""The order in which shards are filled, so that whole shards equal those of JANG's tools.

Their converter writes experts apart, in the order of the source; their rebundler then takes
all stacks first, and the rest as it lies in the converter's shards.
Source: jang 2.5.50, `convert_minimax_jangtq` and `rebundle_jangtq_stacked`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from emitters.jangtq_prestack.names import PROJECTIONS, projection_of
from policy_dsl.plan import Module, PlannedTensor

SHARD_NBYTES = 10**9


class _Piece(NamedTuple):
    """What the converter writes for one matrix: `key` sorts it, sizes are of its parts."""

    key: tuple[str, str, tuple[int, ...]]
    module: Module
    sizes: tuple[int, ...]


def file_order(modules: Sequence[Module]) -> list[PlannedTensor]:
    """All tensors of a bundle in the order in which its shards are filled."""
    pieces = sorted(_pieces(modules))
    if any(_is_apart(module) for module in modules):
        # Stacks beside experts that lie apart stand where their first expert would.
        placed = list({piece.module.name: piece.module for piece in pieces}.values())
        placed += sorted((m for m in modules if not m.sources), key=_absent_key)
        return [tensor for module in placed for tensor in module.tensors]
    stacks = sorted((m for m in modules if _is_stack(m)), key=lambda module: module.name)
    rest = [(shard, t.name, t) for shard, t in _sharded(pieces) if t is not None]
    return [
        *(tensor for module in stacks for tensor in module.tensors),
        *(tensor for _, _, tensor in sorted(rest, key=lambda entry: entry[:2])),
    ]


def _is_stack(module: Module) -> bool:
    return len(module.shape) == 3


def _is_apart(module: Module) -> bool:
    return projection_of(module.name) is not None and not _is_stack(module)


def _pieces(modules: Sequence[Module]) -> Iterator[_Piece]:
    for module in modules:
        count = module.shape[0] if _is_stack(module) else 1
        sizes = tuple(
            tensor.nbytes if tensor.is_constant else tensor.nbytes // count
            for tensor in module.tensors
        )
        for view in module.sources:
            key = view.tensor.file or "", view.tensor.name, view.place(0, 0)
            yield _Piece(key, module, sizes)


def _sharded(pieces: Sequence[_Piece]) -> Iterator[tuple[int, PlannedTensor | None]]:
    """The converter's shard of every tensor, which is None where it is a part of a stack."""
    shard = filled = 0
    for piece in pieces:
        stacked = _is_stack(piece.module)
        for tensor, size in zip(piece.module.tensors, piece.sizes, strict=True):
            yield shard, None if stacked else tensor
            filled += size
            if filled >= SHARD_NBYTES:
                shard, filled = shard + 1, 0


def _absent_key(module: Module) -> tuple[int, int, int]:
    """Added experts come last: by layer, expert, and projection."""
    expert = int(module.name.split(".")[-2])
    order = list(PROJECTIONS)
    return module.layer or 0, expert, order.index(projection_of(module.name) or order[0])
