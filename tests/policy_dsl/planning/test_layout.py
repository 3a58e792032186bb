"""Which tensors share a shard, by the two rules that formats have for closing one."""

from __future__ import annotations

import pytest

from emitters import FORMATS
from policy_dsl.formats import Shards
from policy_dsl.plan import PlannedTensor
from policy_dsl.planning.bundle_files import lay_out


def shards(sizes: list[int], *, limit: int, like: str) -> list[list[int]]:
    """The sizes of the tensors of each shard, in the order in which they were given."""
    tensors = [
        PlannedTensor(f"{at:03}", "weight", "U8", (size,), size, "", 0)
        for at, size in enumerate(sizes)
    ]
    own = FORMATS[like].spec.tensor_files
    assert isinstance(own, Shards)
    files = Shards(limit, lambda number, count: f"{number}-of-{count}", fill=own.fill)
    laid = lay_out(tensors, files)
    assert list(laid) == [f"{at}-of-{len(laid)}" for at in range(1, len(laid) + 1)]
    return [[tensor.nbytes for tensor in shard] for _, shard in laid.values()]


@pytest.mark.parametrize(
    ("sizes", "closed_before", "closed_after"),
    [
        ([4, 4, 4], [[4, 4], [4]], [[4, 4, 4]]),
        ([5, 5, 5], [[5, 5], [5]], [[5, 5], [5]]),
        ([9, 2, 9], [[9], [2], [9]], [[9, 2], [9]]),
        ([30, 1, 30], [[30], [1], [30]], [[30], [1, 30]]),
        ([10], [[10]], [[10]]),
        ([3, 0, 10], [[3, 0], [10]], [[3, 0, 10]]),
    ],
)
def test_a_shard_is_closed_before_or_after_it_is_full(
    sizes: list[int], closed_before: list[list[int]], closed_after: list[list[int]]
) -> None:
    assert shards(sizes, limit=10, like="mlx_affine") == closed_before
    assert shards(sizes, limit=10, like="jangtq_prestack") == closed_after
