"""Importance matrices: both kinds of files give the same statistics."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from imatrix_files import (
    GATE,
    QUERY,
    Statistics,
    gate_sums,
    gguf_tensors,
    legacy_file,
    query_sums,
    random_statistics,
    write_gguf,
)

from emitters.tensor_io.imatrix import open_imatrix
from policy_dsl.diagnostics import PolicyError
from tests.models import IMATRIX

ROOT = Path(__file__).parents[3]
RECORDED = ROOT / "tests" / "golden" / "hipfire" / "tiny-minimax-src" / "imatrix.gguf"
# role -> llama.cpp's word, experts, for the embedded model
DEMO_ROLES = {
    "attention.q_proj": ("attn_q", 1),
    "attention.k_proj": ("attn_k", 1),
    "attention.v_proj": ("attn_v", 1),
    "attention.o_proj": ("attn_output", 1),
    "router": ("ffn_gate_inp", 1),
    "experts.gate_proj": ("ffn_gate_exps", 8),
    "experts.up_proj": ("ffn_up_exps", 8),
    "experts.down_proj": ("ffn_down_exps", 8),
}


@pytest.mark.parametrize("role", DEMO_ROLES)
def test_the_demo_has_the_statistics_of_every_matrix(role: str) -> None:
    word, experts = DEMO_ROLES[role]
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(IMATRIX).tensors}
    imatrix = open_imatrix(IMATRIX)
    for layer in range(6):
        found = imatrix.sums(role, layer, n_matrices=experts, columns=256)
        name = f"blk.{layer}.{word}.weight"
        assert found.entry == name
        np.testing.assert_array_equal(found.sums, tensors[f"{name}.in_sum2"])
        np.testing.assert_array_equal(found.counts, tensors[f"{name}.counts"].reshape(-1))
        means = found.sums / found.counts[:, None]
        np.testing.assert_array_equal(found.importance(), means)
    assert imatrix.findings == ()


def test_a_recorded_file_is_read() -> None:
    imatrix = open_imatrix(RECORDED)
    assert sorted(imatrix.entries) == [
        f"blk.0.ffn_{word}_exps.weight" for word in ("down", "gate", "up")
    ]
    found = imatrix.sums("experts.up_proj", 0, n_matrices=12, columns=256)
    assert (found.sums.dtype, found.counts.dtype) == (np.float32, np.float32)
    assert found.counts.tolist()[:3] == [1150, 1305, 492]


def test_an_imatrix_is_a_value(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "i.gguf", gguf_tensors(random_statistics()))
    imatrix = open_imatrix(path)
    assert imatrix == open_imatrix(path)
    assert GATE in repr(imatrix)
    found = gate_sums(imatrix)
    with pytest.raises(ValueError, match="read-only"):
        found.sums[0] = 1


def test_experts_without_tokens_have_no_sums_and_uniform_importance(tmp_path: Path) -> None:
    statistics = random_statistics()
    path = write_gguf(tmp_path / "i.gguf", gguf_tensors(statistics))
    found = gate_sums(open_imatrix(path))
    np.testing.assert_array_equal(found.sums, statistics[GATE].sums)
    np.testing.assert_array_equal(found.counts, statistics[GATE].counts)
    assert (found.importance()[2] == 1).all()


@pytest.mark.parametrize("text", [b"calibration.txt", b"", None])
def test_a_legacy_file_has_the_same_means(tmp_path: Path, text: bytes | None) -> None:
    statistics = random_statistics()
    path = tmp_path / "i.dat"
    path.write_bytes(legacy_file(statistics, text))
    new = open_imatrix(write_gguf(tmp_path / "i.gguf", gguf_tensors(statistics)))
    old = open_imatrix(path)
    for read in (gate_sums, query_sums):
        found, wanted = read(old), read(new)
        assert found.entry == wanted.entry
        np.testing.assert_allclose(found.importance(), wanted.importance(), rtol=3e-7)
    # The third expert got no token; the others' counts are lost.
    calls = -(-int(statistics[GATE].counts.max()) // 512)
    assert gate_sums(old).counts.tolist() == [calls, calls, 0, calls]
    assert not gate_sums(old).sums[2].any()
    assert [found.code for found in old.findings] == ["imatrix-without-counts"]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    experts=st.integers(1, 9),
    columns=st.sampled_from([1, 31, 256]),
    tokens=st.integers(1, 100_000),
)
def test_with_equal_counts_both_files_say_the_same(
    tmp_path_factory: pytest.TempPathFactory, seed: int, experts: int, columns: int, tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("imatrix")
    sums = random_statistics(seed, experts, columns)[QUERY].sums * np.ones((experts, 1), "f4")
    statistics = {GATE: Statistics(sums, np.full(experts, tokens, np.float32))}
    (folder / "i.dat").write_bytes(legacy_file(statistics))
    write_gguf(folder / "i.gguf", gguf_tensors(statistics))
    new, old = (
        open_imatrix(folder / name).sums(
            "experts.gate_proj", 0, n_matrices=experts, columns=columns
        )
        for name in ("i.gguf", "i.dat")
    )
    np.testing.assert_allclose(old.importance(), new.importance(), rtol=3e-7)
    # Sums differ by one factor for all experts: what is made of them together is the same.
    factor = float(old.counts[0]) / tokens
    np.testing.assert_allclose(old.sums, new.sums * factor, rtol=1e-6)
    assert len(set(old.counts.tolist())) == 1


def test_a_gguf_file_made_of_a_legacy_one_is_read_like_it(tmp_path: Path) -> None:
    statistics = random_statistics()
    (tmp_path / "i.dat").write_bytes(legacy_file(statistics))
    old = gate_sums(open_imatrix(tmp_path / "i.dat"))
    # llama-imatrix multiplies by the tokens of a chunk, and keeps one count for all.
    values = np.where(old.counts[:, None] > 0, old.sums, old.counts[0]).reshape(-1) * 512
    tensors = {
        f"{GATE}.in_sum2": values.astype(np.float32)[None],
        f"{GATE}.counts": np.array([[old.counts[0] * 512]], np.float32),
    }
    imatrix = open_imatrix(write_gguf(tmp_path / "i.gguf", tensors))
    found = gate_sums(imatrix)
    np.testing.assert_array_equal(found.importance(), old.importance())
    assert (found.counts > 0).tolist() == [True, True, False, True]
    assert [one.code for one in imatrix.findings] == ["imatrix-without-counts"]


def test_one_matrix_may_have_one_axis(tmp_path: Path) -> None:
    # ggml leaves out trailing axes of length 1, its Python library does not.
    sums = np.arange(32, dtype=np.float32)
    tensors = {f"{QUERY}.in_sum2": sums, f"{QUERY}.counts": np.array([7], np.float32)}
    found = query_sums(open_imatrix(write_gguf(tmp_path / "i.gguf", tensors)))
    np.testing.assert_array_equal(found.sums, sums[None])
    assert found.counts.tolist() == [7]


def test_fused_gate_and_up_stand_for_both(tmp_path: Path) -> None:
    fused = {GATE.replace("gate", "gate_up"): random_statistics()[GATE]}
    imatrix = open_imatrix(write_gguf(tmp_path / "i.gguf", gguf_tensors(fused)))
    for role in ("experts.gate_proj", "experts.up_proj"):
        found = imatrix.sums(role, 0, n_matrices=4, columns=32)
        assert found.entry == "blk.0.ffn_gate_up_exps.weight"


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "i.gguf", gguf_tensors(random_statistics()))
    imatrix = open_imatrix(path)
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(PolicyError, match="source-changed"):
        query_sums(imatrix)


def test_a_legacy_file_needs_no_library(tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(legacy_file(random_statistics()))
    program = (
        "import sys; from pathlib import Path; "
        "from emitters.tensor_io.imatrix import open_imatrix; "
        "print(len(open_imatrix(Path(sys.argv[1])).entries), 'gguf' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "i.dat")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.stdout.strip(), run.stderr) == ("2 False", "")
