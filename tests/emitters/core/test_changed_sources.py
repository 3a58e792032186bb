"""A source that changes between the plan and the first look of the build is noticed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from small_checkpoints import digests, write_shard

import policyc
from emitters.core.build import build
from policy_dsl.diagnostics import PolicyError


def rewritten(path: Path, change: Callable[[bytes], bytes], *, keep_time: bool) -> None:
    """A new file in the place of another one, as downloads end; maybe as old as that."""
    before, new = path.stat(), path.with_name("new")
    new.write_bytes(change(path.read_bytes()))
    if keep_time:
        os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(path)


def swapped(content: bytes) -> bytes:
    """A shard of the same size in which two tensors of one shape have each other's name."""
    one, other = b'"model.layers.0.mlp.up_proj.weight"', b'"model.layers.1.mlp.up_proj.weight"'
    return content.replace(one, b"$").replace(other, one).replace(b"$", other)


def more_heads(content: bytes) -> bytes:
    return content.replace(b'"num_attention_heads": 4', b'"num_attention_heads": 2')


def spaced(content: bytes) -> bytes:
    return content.replace(b" ", b"\n")


CHANGES: dict[str, tuple[str, Callable[[bytes], bytes], bool]] = {
    "a shard with another header, as old": ("model.safetensors", swapped, True),
    "a shard that is the same again": ("model.safetensors", bytes, False),
    "a shard that grew, as old": ("model.safetensors", lambda old: old + b"\0", True),
    "a shard that was cut, as old": ("model.safetensors", lambda old: old[:-1], True),
    "another config, as old": ("config.json", more_heads, True),
    "a config that is the same again": ("config.json", bytes, False),
    "a tokenizer of the same size": ("tokenizer.json", spaced, False),
    "a longer tokenizer, as old": ("tokenizer.json", lambda old: old + b" ", True),
    "another licence of the same size": ("LICENSE", lambda old: old[::-1], False),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_changes_after_the_plan_is_noticed(write_llama, planned, tmp_path, kind):
    source, (name, change, keep_time) = write_llama(), CHANGES[kind]
    made = planned(source)
    rewritten(source / name, change, keep_time=keep_time)
    with pytest.raises(PolicyError) as caught:
        build(*made, out=tmp_path / "out")
    (found,) = caught.value.diagnostics
    assert found.code == "source-changed"
    assert found.message.startswith(f"{name} changed after it was first read: ")
    assert found.suggestion
    assert {path.name for path in tmp_path.iterdir()} == {"source", "policy.yaml"}


def test_an_index_that_changes_after_the_plan_is_noticed(write_llama, planned, tmp_path):
    source = write_llama()
    index = source / "model.safetensors.index.json"
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    names = planned(source)[1].tensors
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    index.write_text(json.dumps({"weight_map": weight_map}))
    made = planned(source)
    rewritten(index, lambda old: old + b"\n", keep_time=False)
    with pytest.raises(PolicyError, match=r"index\.json changed after it was first read"):
        build(*made, out=tmp_path / "out")
    rewritten(index, lambda old: old.replace(b"up_proj", b"dn_proj"), keep_time=False)
    with pytest.raises(PolicyError):
        build(*made, out=tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_shard_that_nothing_is_read_of_counts_too(write_llama, planned, tmp_path):
    """What it holds decides what the plan says of the model."""

    def without_extra(tensors):
        extra["extra.weight"] = tensors.pop("lm_head.weight")

    extra: dict = {}
    source = write_llama(without_extra)
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    second = source / "model-00002-of-00002.safetensors"
    write_shard(second, {"lm_head.weight": extra["extra.weight"]})
    dropped = "target: mlx_affine\nrules: |\n  all: 4bit\n  lm_head: drop\n"
    made = planned(source, dropped)
    rewritten(second, lambda old: old + b"\0", keep_time=True)
    with pytest.raises(PolicyError, match=r"00002-of-00002\.safetensors changed"):
        build(*made, out=tmp_path / "out")


def test_files_that_no_build_reads_may_change(write_llama, planned, tmp_path):
    source = write_llama()
    made = planned(source)
    (source / "notes.md").write_text("later")
    (source / "new.txt").write_text("new")
    build(*made, out=tmp_path / "out")
    assert "LICENSE" in digests(tmp_path / "out")


@pytest.mark.parametrize("policy", ["hipfire_mq4", "reap_w4a16"])
@pytest.mark.parametrize("change", [lambda old: old + b"\0", bytes])
def test_statistics_that_change_after_the_plan_are_noticed(
    demo, imatrix, saliency, tmp_path, policy, change
):
    """A ranking is known by its digest: the same contents are the same."""
    given = {"hipfire_mq4": imatrix, "reap_w4a16": saliency}[policy]
    file = tmp_path / given.name
    file.write_bytes(given.read_bytes())
    named = {"imatrix" if given == imatrix else "saliency": str(file)}
    variables = {"experts": 6} if given == saliency else {}
    plan = policyc.plan(policy, model=demo, variables=variables, statistics=named)
    rewritten(file, change, keep_time=False)
    if given == saliency and change is bytes:
        policyc.build(plan, out=tmp_path / "out")
        return
    with pytest.raises(PolicyError, match="source-changed"):
        policyc.build(plan, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
