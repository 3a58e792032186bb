"""Bundles from configs in every form load in their readers, and answer as transformers does."""

from __future__ import annotations

import numpy as np
import pytest

from emitters.gptq.names import FAMILIES as GPTQ_FAMILIES
from emitters.jangtq_prestack.names import FAMILIES as JANG_FAMILIES
from emitters.mlx_affine.names import FAMILIES as MLX_FAMILIES

pytestmark = pytest.mark.slow
config_forms = pytest.importorskip("config_forms")
FORMS, MODELS = config_forms.FORMS, config_forms.MODELS

EIGHT_BITS = "target mlx_affine\nall: 8bit g32\n"
PACKED = "all: 8bit g32\nembed, lm_head, norm, bias, router, router_bias: keep optional"
# A source's experts at 4 bits, the rest at 8.
CODED = """
experts: 4bit
attention, shared_experts, mlp: 8bit optional
attention.v_proj: 8bit g32 optional
embed, lm_head: 8bit
"""


def taken(families):
    """Models of families that a target takes."""
    return [name for name, kind in MODELS.items() if families.get(kind.family, "") is None]


@pytest.mark.parametrize("families", [MLX_FAMILIES, GPTQ_FAMILIES, JANG_FAMILIES])
def test_every_family_is_here(families):
    known = {kind.family for kind in MODELS.values()}
    assert {family for family, reason in families.items() if reason is None} <= known


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", taken(MLX_FAMILIES))
def test_mlx_lm_answers_as_transformers(name, form, forms, build, stock):
    made = forms(name)
    bundle = build(EIGHT_BITS, made.folders[form])
    found = stock.logits(bundle, config_forms.PROMPT)
    assert config_forms.cosine(found, made.logits) > 0.999
