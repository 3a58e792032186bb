"""The bundled catalog: MiniMax-M2.7 with the published totals, by any of its names."""

from __future__ import annotations

from math import prod

import pytest

from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import source_digest
from policy_dsl.sources.reference import catalog_names, open_catalog, open_source

NAMES = [
    "MiniMax-M2.7",
    "minimax-m2.7",
    "minimax_m2.7",
    "MINIMAX_M2.7",
    "MiniMaxAI/MiniMax-M2.7",
    "minimaxai/minimax_m2.7",
]


@pytest.fixture(autouse=True)
def _no_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(empty))


@pytest.mark.parametrize("name", NAMES)
def test_names_are_taken_loosely(name: str) -> None:
    found = open_source(name)
    assert found.id == "MiniMaxAI/MiniMax-M2.7"
    assert "catalog" in found.notes[0]


def test_published_totals_of_minimax_m2_7() -> None:
    found = open_source("minimax-m2.7")
    weights = [t for t in found.tensors.values() if not t.name.endswith("_scale_inv")]
    assert len(found.tensors) == 96_103
    assert sum(prod(tensor.shape) for tensor in weights) == 228_689_764_864
    assert found.nbytes == 230_121_630_720
    assert found.config["num_hidden_layers"] == 62
    assert found.root is None
    assert found.side_files is None
    assert found.file_nbytes == {}
    assert {tensor.file for tensor in found.tensors.values()} == {None}


def test_every_entry_can_be_opened_and_its_digest_is_stable() -> None:
    assert "minimax_m2.7" in catalog_names()
    for name in catalog_names():
        assert source_digest(open_source(name)) == source_digest(open_source(name))


def test_another_publisher_is_another_model() -> None:
    assert open_catalog("someone/MiniMax-M2.7") is None


def test_a_near_name_is_offered() -> None:
    with pytest.raises(PolicyError, match=r'did you mean "minimax-m2\.7"'):
        open_source("minimax-m27")
