"""A matrix of which a build would leave nothing stops it; zeros that were zeros do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from policyc.cli import main
from tests.emitters.core.small_checkpoints import (
    Array,
    bf16,
    mixtral_config,
    mixtral_tensors,
    write_folder,
)

UP = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
NORM = "model.norm.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
KEPT = "all, router, norm: keep"
Change = Callable[[Array], Array]


def build(folder: Path, name: str, change: Change, rules: str, target: str) -> tuple[int, Path]:
    """Exit code and output of a build in float16 of a Mixtral, one of its tensors changed."""
    tensors = mixtral_tensors(fused=False, inner=64)
    bits = tensors[name][1]
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    tensors[name] = "BF16", bf16(np.ascontiguousarray(change(wide)))
    config = {**mixtral_config(inner=64), "torch_dtype": "float16"}
    write_folder(folder / "model", config, tensors)
    policy = folder / "p.qpol"
    policy.write_text(f"target {target}\n{rules}\n", encoding="utf-8")
    arguments = ["build", str(policy), "--model", str(folder / "model"), "-q", "-j", "1"]
    return main([*arguments, "-o", str(folder / "out")]), folder / "out"


def tiny(values: Array) -> Array:
    return np.sign(values + np.float32(1e-9)) * np.float32(1e-9)


@pytest.mark.parametrize(
    ("target", "name", "rules"),
    [
        ("mlx_affine", NORM, KEPT),
        ("mlx_affine", UP, KEPT),
        ("mlx_affine", UP, f"{KEPT}; experts: 4bit g32"),
        ("mlx_affine", Q_PROJ, f"{KEPT}; attention: 8bit g32"),
        ("gptq", UP, "experts: 4bit g32"),
        ("gptq", Q_PROJ, "attention: 8bit g32"),
    ],
)
def test_values_that_all_become_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, rules: str, target: str
) -> None:
    code, out = build(tmp_path, name, tiny, rules, target)
    error = capsys.readouterr().err
    assert code == 2
    assert f'error[value-underflow]: tensor "{name}": nothing is left of its ' in error
    assert "would hold them" in error
    assert not out.exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", [NORM, UP, Q_PROJ])
@pytest.mark.parametrize("rules", [KEPT, "all: 4bit g32"])
def test_zeros_stay_zeros(tmp_path: Path, name: str, rules: str) -> None:
    code, out = build(tmp_path, name, np.zeros_like, rules, "mlx_affine")
    assert code == 0
    assert main(["verify", str(out), "--source", str(tmp_path / "model")]) == 0


def test_one_value_that_stays_is_enough(tmp_path: Path) -> None:
    def change(values: Array) -> Array:
        small = tiny(values)
        small[-1, -1] = 1
        return small

    code, out = build(tmp_path, UP, change, "all: 4bit g32", "mlx_affine")
    assert code == 0
    assert main(["verify", str(out), "--source", str(tmp_path / "model")]) == 0


@pytest.mark.parametrize(("last", "expected"), [(1, 0), (1e-9, 2)])
def test_a_matrix_in_many_blocks_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: float, expected: int
) -> None:
    def change(values: Array) -> Array:
        small = tiny(values)
        small[-1] = last
        return small

    monkeypatch.setattr("emitters.core.work_units.BLOCK_VALUES", 64)
    code, _ = build(tmp_path, "model.embed_tokens.weight", change, KEPT, "mlx_affine")
    assert code == expected
