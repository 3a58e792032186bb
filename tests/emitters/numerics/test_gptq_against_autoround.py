"""GPTQ codes and scales against AutoRound itself, on many kinds of weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emitters.numerics.column_weights import search_weights, torch_sums
from emitters.numerics.gptq import gptq_rtn, pack_columns, pack_zeros
from emitters.numerics.gptq_search import gptq_search
from emitters.numerics.rounding import cast

pytestmark = pytest.mark.slow

Array = NDArray[Any]
SameGroups = Callable[[Array, Array, int], None]

ROWS, COLUMNS = 9, 1152


@pytest.fixture(scope="module")
def torch() -> Iterator[Any]:
    """torch on one thread."""
    module = pytest.importorskip("torch")
    before = module.get_num_threads()
    module.set_num_threads(1)
    yield module
    module.set_num_threads(before)


@pytest.fixture(scope="module")
def autoround(torch: Any) -> Any:
    """The module of AutoRound's integer types."""
    package = pytest.importorskip("auto_round")
    if package.__version__ != "0.16.1":
        pytest.skip(f"auto-round {package.__version__} is not 0.16.1")
    return import_module("auto_round.data_type.int")


def spreads(seed: int) -> dict[str, Array]:
    """Weights of many shapes."""
    random = np.random.default_rng(seed)
    normal = random.standard_normal((ROWS, COLUMNS))
    exponents = random.uniform(-12, 4, (ROWS, 1))
    return {
        "normal": normal * 0.02,
        "heavy tails": np.clip(random.standard_t(2, normal.shape), -1e4, 1e4) * 0.01,
        "few values": random.integers(-3, 4, normal.shape) * 0.25,
        "integers": random.integers(-130, 131, normal.shape).astype(float),
        "one sign": -abs(normal),
        "any magnitude": normal * 10.0**exponents,
        "sparse": normal * (random.random(normal.shape) < 0.1),
    }


def imatrices(seed: int) -> dict[str, Array | None]:
    """Importance of columns, without and with idle ones."""
    random = np.random.default_rng(seed)
    dense = random.standard_normal(COLUMNS) ** 2 * 10.0 ** random.uniform(-3, 1, COLUMNS)
    kinds = {"dense": dense, "few idle": dense.copy(), "many idle": dense.copy()}
    kinds["few idle"][random.random(COLUMNS) < 0.05] = 0
    kinds["many idle"][: COLUMNS // 2] = 0
    kinds["many idle"][COLUMNS // 2 :: 29] = 1e-31
    return {"none": None} | {kind: each.astype(np.float32) for kind, each in kinds.items()}


def tensor_of(torch: Any, weights: Array, dtype: str) -> Any:
    """A copy as a tensor."""
    tensor = torch.from_numpy(weights.copy())
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor


def packed(torch: Any, decoded: Any, scale: Any, zero: Any, bits: int) -> tuple[Array, Array]:
    """Levels as AutoRound's packer makes them, and the scales that it stores."""
    scale = scale.reshape(ROWS, -1)
    size = COLUMNS // scale.shape[1]
    if torch.is_tensor(zero):
        zero = zero.reshape(ROWS, -1).repeat_interleave(size, 1)
    levels = torch.round(decoded / scale.repeat_interleave(size, 1) + zero)
    levels = levels.clamp(0, 2**bits - 1).to(torch.uint8)
    return levels.numpy(), np.ascontiguousarray(scale.half().numpy().T)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("kind", spreads(0))
@pytest.mark.parametrize("rule", ["symmetric", "asymmetric", *imatrices(0)])
def test_codes_and_scales(
    rule: str, kind: str, dtype: str, torch: Any, autoround: Any, same_groups: SameGroups
) -> None:
    weights = cast(spreads(1)[kind].astype(np.float32), "F32", dtype)
    tensor = tensor_of(torch, weights, dtype)
    for bits, size in itertools.product((2, 3, 4, 8), (32, 128, -1)):
        options = {"bits": bits, "group_size": size}
        if rule in ("symmetric", "asymmetric"):
            quantize = (
                autoround.quant_tensor_rtn_sym
                if rule == "symmetric"
                else autoround.quant_tensor_asym
            )
            theirs = quantize(tensor.clone(), **options)
            symmetric = rule == "symmetric"
            ours = gptq_rtn(weights, dtype, symmetric=symmetric, arithmetic=dtype, **options)
        else:
            imatrix = imatrices(2)[rule]
            given = None if imatrix is None else torch.from_numpy(imatrix.copy())
            quantize = autoround.quant_tensor_opt_rtn_sym
            theirs = quantize(tensor.clone(), imatrix=given, **options)
            chosen = None if imatrix is None else search_weights(imatrix, **options)
            ours = gptq_search(weights, dtype, weights=chosen, **options)
        levels, scales = packed(torch, *theirs, bits)
        same_groups(levels, ours.codes, 32)
        same_groups(scales, ours.scales, 1)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_words_of_the_model_free_flow(
    symmetric: bool, dtype: str, torch: Any, autoround: Any, same_groups: SameGroups
) -> None:
    quantize = import_module("auto_round.utils.model_free_utils").quantize_weight_rtn
    rows = np.concatenate([each[:8] for each in spreads(3).values()] + [np.zeros((8, COLUMNS))])
    weights = cast(rows.astype(np.float32), "F32", dtype)
    packing, version = ("auto_round:auto_gptq", "gptq") if symmetric else ("auto_round", "gptq_v2")
    for bits, size in itertools.product((2, 4, 8), (32, 128)):
        theirs = quantize(
            tensor_of(torch, weights, dtype), bits, size, sym=symmetric, packing=packing
        )
        ours = gptq_rtn(weights, dtype, bits=bits, group_size=size, symmetric=symmetric)
        zeros = pack_zeros(ours.zeros, bits=bits, version=version)
        parts = pack_columns(ours.codes, bits=bits), zeros, ours.scales
        for part, expected in zip(parts, theirs, strict=True):
            same_groups(np.ascontiguousarray(expected.numpy()), part, part.shape[1])


@pytest.mark.parametrize("size", [32, 64, 96, 128, 512, 544, 3072, 8192, 16384])
def test_order_of_sums(size: int, torch: Any, same_groups: SameGroups) -> None:
    values = np.random.default_rng(size).random((7, size), np.float32)
    torch_sums(values, sums := np.empty(len(values), np.float32))
    same_groups(torch.from_numpy(values).sum(-1).numpy(), sums, 1)
