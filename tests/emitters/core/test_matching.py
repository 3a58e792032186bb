"""Modules of a bundle and the tensors of its source: stacks, experts apart, experts added."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from emitters.core.build import build
from emitters.core.bundle_reading import Bundle, open_bundle
from emitters.core.decoding import Decoder, source_reader
from emitters.core.matching import fits, match, with_added
from emitters.core.verify import verify_bundle
from emitters.numerics import Array
from emitters.tensor_io.view_rows import Cast
from policy_dsl.roles.classify import ModelTensor, classify
from policy_dsl.sources.reference import open_source
from policy_dsl.views import stacked

MLX = "target: mlx_affine\nrules: 'all: keep'\n"
JANG = "target: jangtq_prestack\nrules: 'all: f16; experts: 4bit'\n"
APART = JANG + "output: {layout: per_expert}\n"
BLOCK = "model.layers.3.block_sparse_moe"


@pytest.fixture
def made(
    demo: Path, tmp_path: Path, planned: Callable[..., tuple]
) -> Callable[[str], tuple[Bundle, SimpleNamespace]]:
    """Builds the embedded model by a policy; the bundle and its source, opened."""

    def make(policy: str) -> tuple[Bundle, SimpleNamespace]:
        plan, inventory = planned(demo, policy)
        build(plan, inventory, out=tmp_path / "bundle", jobs=1)
        model = classify(inventory)
        reader = source_reader(inventory, model)

        def rows(tensor: ModelTensor, first: int, count: int) -> Array:
            return reader.rows(tensor.view, first, count, Cast("F32"))

        return open_bundle(tmp_path / "bundle"), SimpleNamespace(model=model, rows=rows)

    return make


@pytest.mark.parametrize("policy", [MLX, JANG, APART], ids=["mlx", "stacks", "apart"])
def test_every_tensor_of_the_source_has_its_rows_in_one_module(made, policy):
    """Of other tensors they would be nowhere near: codes of 4 bits have a tenth of error."""
    bundle, source = made(policy)
    stacks, decoder, met = match(bundle, source.model), Decoder(bundle), []
    for module in bundle.modules:
        stack = stacks.get(module.name, ())
        placed = stacked(tensor.view for tensor in stack)
        for tensor, (_, first, count) in zip(stack, placed, strict=True):
            wanted = source.rows(tensor, 0, count)
            found = decoder.rows(module, first, count)[:, : wanted.shape[1]]
            apart = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
            assert apart < 0.12, f"{tensor.source.name} in {module.name}"
            met.append(tensor.source.name)
    assert sorted(met) == sorted(tensor.source.name for tensor in source.model.tensors)


def test_a_stack_is_the_experts_in_their_order(made):
    bundle, source = made(MLX)
    stack = match(bundle, source.model)[f"{BLOCK}.switch_mlp.down_proj"]
    names = [tensor.source.name for tensor in stack]
    assert names == [f"{BLOCK}.experts.{number}.w2.weight" for number in range(8)]
    placed = stacked(tensor.view for tensor in stack)
    assert [rows[1:] for rows in placed] == [(256 * at, 256) for at in range(8)]


def test_an_expert_apart_is_a_stack_of_one(made):
    bundle, source = made(APART)
    stacks = match(bundle, source.model)
    (tensor,) = stacks[f"{BLOCK}.experts.7.w2"]
    assert tensor.source.name == f"{BLOCK}.experts.7.w2.weight"
    added = {f"{BLOCK}.experts.{number}.w2" for number in range(8, 32)}
    assert added < {module.name for module in bundle.modules}
    assert not added & stacks.keys()


@pytest.mark.parametrize("policy", [JANG, APART], ids=["stacks", "apart"])
def test_added_experts_do_not_keep_modules_from_fitting(made, policy):
    bundle, source = made(policy)
    stacks = match(bundle, source.model)
    shared = [module for module in bundle.modules if module.name in stacks]
    assert any(module.added for module in shared)
    assert all(fits(module, stacks[module.name]) for module in shared)


def foreign(folder: Path) -> Bundle:
    """The bundle without what tells which experts were added."""
    (folder / "policyc.json").unlink()
    path = folder / "jang_config.json"
    config = json.loads(path.read_bytes())
    del config["expert_padding"]
    path.write_text(json.dumps(config))
    return open_bundle(folder)


@pytest.mark.parametrize("policy", [JANG, APART], ids=["stacks", "apart"])
def test_without_a_record_the_model_tells_which_experts_were_added(made, demo, policy):
    bundle, source = made(policy)
    unknown = foreign(bundle.folder)
    assert not any(module.added for module in unknown.modules)
    known = {module.name: module.added for module in bundle.modules}
    told = {module.name: module.added for module in with_added(unknown, source.model).modules}
    assert told == known
    report = verify_bundle(bundle.folder, open_source(str(demo)), jobs=1)
    assert [found.code for found in report.findings] == ["no-record"]


def test_experts_beyond_what_the_format_adds_are_not_taken_for_added(made):
    bundle, source = made(APART)
    fewer = replace(source.model, facts=replace(source.model.facts, n_experts=40))
    found = with_added(foreign(bundle.folder), fewer)
    assert not any(module.added for module in found.modules)


def test_a_stack_of_another_size_does_not_fit(made):
    bundle, source = made(MLX)
    stacks = match(bundle, source.model)
    (module,) = [one for one in bundle.modules if one.name == f"{BLOCK}.switch_mlp.down_proj"]
    assert fits(module, stacks[module.name])
    assert not fits(module, stacks[module.name][:-1])
    # As many values in rows of another length are others.
    experts, out, columns = module.shape
    longer = module._replace(shape=(experts, out // 2, columns * 2))
    assert not fits(longer, stacks[module.name])
