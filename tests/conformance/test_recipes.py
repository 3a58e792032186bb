"""The bundled mixed policies are mlx-lm's own recipes, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-minimax-m2"
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
# Models with and without a head, experts, a router that is a layer, a prefix before the layers.
KINDS = ("llama", "qwen2_tied", "mixtral", "qwen3_moe", "minimax_m2", "glm4_moe", "gemma3")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe(name, recipe, checkpoint, build, stock, tmp_path):
    source = checkpoint(name)
    ours = build(f"mlx_{recipe}", source.published)
    theirs = stock.convert(source.readable, tmp_path / "stock", quant_predicate=recipe)
    stock.assert_equal_bundles(ours, theirs)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_on_the_embedded_model(recipe, build, stock, tmp_path):
    ours = build(f"mlx_{recipe}", EXAMPLE)
    theirs = stock.convert(EXAMPLE, tmp_path / "stock", quant_predicate=recipe)
    stock.assert_equal_bundles(ours, theirs)
