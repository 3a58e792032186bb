"""Bundles of many shards: the order of JANG's tools, file by file."""

from __future__ import annotations

import pytest
from jang_bundles import assert_equal_files

from policyc.cli import main

pytestmark = pytest.mark.slow

SOURCES = ("embedded_fp8", "minimax_m2_32")
SHARD_NBYTES = 300_000
POLICY = "extends jangtq_2\noutput shard_size 300KB"


@pytest.fixture(scope="module")
def converted(jang, jang_source, tmp_path_factory):
    """jang's bundle with the experts apart, in shards of its own size or of ours."""
    made = {}

    def get(source, shard_nbytes=None):
        if (source, shard_nbytes) not in made:
            out = tmp_path_factory.mktemp("converted") / "out"
            jang("convert", jang_source(source), out, "JANGTQ2", shard_nbytes)
            made[source, shard_nbytes] = out
        return made[source, shard_nbytes]

    return get


def n_shards(bundle):
    """How many files the tensors are in."""
    return len(list(bundle.glob("model-*.safetensors")))


@pytest.mark.parametrize("source", SOURCES)
def test_experts_apart(source, jangtq, converted):
    ours = jangtq(source, f"{POLICY}\noutput layout per_expert")
    theirs = converted(source, SHARD_NBYTES)
    assert n_shards(theirs) > 5
    assert_equal_files(ours, theirs)


def test_stacks_from_one_large_shard(jangtq, converted, jang, tmp_path):
    source, theirs = "minimax_m2_32", tmp_path / "rebundled"
    jang("rebundle", converted(source), theirs, "--shard-bytes", str(SHARD_NBYTES))
    assert n_shards(theirs) > 5
    assert_equal_files(jangtq(source, POLICY), theirs)


@pytest.mark.parametrize("source", SOURCES)
def test_stacks_from_shards_of_the_same_size(
    source, jang_source, converted, jang, tmp_path, monkeypatch
):
    # Both tools fix 1 GB: a model of that size would take minutes.
    monkeypatch.setattr("emitters.jangtq_prestack.spec.SHARD_NBYTES", SHARD_NBYTES)
    policy, ours, theirs = (tmp_path / name for name in ("policy.qpol", "ours", "theirs"))
    policy.write_text(f"target jangtq_prestack\n{POLICY}\n")
    words = ["build", str(policy), "--model", str(jang_source(source)), "-o", str(ours)]
    assert main([*words, "-q"]) == 0
    words = ["--shard-bytes", str(SHARD_NBYTES)]
    jang("rebundle", converted(source, SHARD_NBYTES), theirs, *words)
    assert_equal_files(ours, theirs)
