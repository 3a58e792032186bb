"""The readers' tables say what the installed readers' own code says."""

from __future__ import annotations

import dataclasses
from importlib import import_module

import pytest

from policy_dsl.reader_config import reader_kind, reader_kinds
from policy_dsl.roles.architecture import architecture
from policy_dsl.roles.table_entries import Derived
from tests.models import families_of

GPTQ_FAMILIES = families_of("gptq")
HFQ_FAMILIES = families_of("hipfire_hfq")
JANG_FAMILIES = families_of("jangtq_prestack")
MLX_FAMILIES = families_of("mlx_affine")

pytestmark = pytest.mark.slow

MLX = reader_kinds("mlx_lm")
TRANSFORMERS = reader_kinds("transformers")
TARGETS = {
    "mlx_lm": (MLX_FAMILIES, JANG_FAMILIES),
    "transformers": (GPTQ_FAMILIES,),
    "hipfire": (HFQ_FAMILIES,),
}
# What a reader takes for absence where other keys decide: the class fills it in.
BY_OTHERS = None


def assumed(level):
    """Key -> the default of a level's keys; null where other keys decide."""
    found = {}
    for key, entry in level.assumes.items():
        default = entry.defaults[0] if entry.defaults else None
        found[key] = BY_OTHERS if isinstance(default, Derived) else default
    return found


def declared(module, name="ModelArgs"):
    """The fields of a class: those without a default, and the others with theirs."""
    fields = dataclasses.fields(getattr(import_module(f"mlx_lm.models.{module}"), name))
    missing, made = dataclasses.MISSING, "default_factory"
    required = {one.name for one in fields if one.default is missing is getattr(one, made)}
    given = (one for one in fields if one.name not in required)
    defaults = {
        one.name: getattr(one, made)() if one.default is missing else one.default for one in given
    }
    # A comma too many makes a tuple of a text.
    return required, {key: [*one] if type(one) is tuple else one for key, one in defaults.items()}


@pytest.mark.parametrize("reader", TARGETS)
def test_every_type_of_a_family_that_a_target_takes_is_in_the_table(reader):
    for families in TARGETS[reader]:
        for family in [family for family, reason in families.items() if reason is None]:
            unread = architecture(family).facts("gptq").get("unread", {})
            if reader in unread.get("by", ()) and "with" not in unread:
                continue
            types = architecture(family).model_types
            about = {"architectures": [*architecture(family).architectures]}
            kinds = (reader_kind(reader, {"model_type": one, **about}) for one in types)
            assert any(kinds), family


# Kind -> the class of the model below, by its module and name.
INNER = {
    "gemma4": ("gemma4_text", "ModelArgs"),
    "kimi_k25": ("deepseek_v3", "ModelArgs"),
    "llama4": ("llama4", "TextArgs"),
    "minimax_m3_vl": ("minimax_m3_vl", "TextArgs"),
    "muse_glimmer": ("muse_glimmer", "ModelArgs"),
    "qwen3_5": ("qwen3_5", "TextModelArgs"),
    "qwen3_5_moe": ("qwen3_5", "TextModelArgs"),
    "qwen3_vl": ("qwen3", "ModelArgs"),
    "qwen3_vl_moe": ("qwen3_moe", "ModelArgs"),
}


@pytest.mark.parametrize("name", INNER)
def test_the_model_inside_is_where_mlx_lm_looks(name):
    pytest.importorskip("mlx_lm")
    kind, (required, _) = MLX[name], declared(name)
    # Classes that take a flat config make one of these of it.
    flat = {kind.inside} if kind.flat else set()
    assert {*kind.top.required} == required - {"model_type"} - flat


@pytest.mark.parametrize("name", [*INNER, *(name for name in MLX if MLX[name].inside is None)])
def test_fields_and_defaults_are_those_of_mlx_lm(name):
    pytest.importorskip("mlx_lm")
    kind, (module, cls) = MLX[name], INNER.get(name, (name, "ModelArgs"))
    level, (required, defaults) = kind.nested if kind.inside else kind.top, declared(module, cls)
    if kind.rope_parameters:
        # It makes the others of this one.
        made = {"rope_parameters", "rope_scaling", *kind.rope_parameters}
        required -= made
        defaults = {key: value for key, value in defaults.items() if key not in made}
    defaults.pop("model_type", None)
    for key in {*level.required} - required:
        # The class has a default, and does not start with it, or has no layer with it.
        default = defaults.pop(key)
        assert not default
        if default is None:
            given = dict.fromkeys(required, 1)
            with pytest.raises(ValueError, match=key):
                getattr(import_module(f"mlx_lm.models.{module}"), cls)(**given)
        required.add(key)
    assert {*level.required} == required - {"model_type"}
    elsewhere = {path.split(".")[0] for path in kind.also.values()}
    assert assumed(level) | dict(kind.unused) | dict.fromkeys(elsewhere) == defaults


def test_fields_and_defaults_below_a_vision_model_are_those_of_mlx_lm():
    pytest.importorskip("mlx_lm")
    kind, (required, defaults) = MLX["gemma3"], declared("gemma3")
    assert {*kind.top.required} == required - {"model_type"}
    assert assumed(kind.top) == defaults
    outer, inner = (import_module(f"mlx_lm.models.{name}") for name in ("gemma3", "gemma3_text"))
    filled = outer.ModelArgs("gemma3", {}).text_config
    args = vars(inner.ModelArgs.from_dict({"model_type": "gemma3_text", **filled}))
    assert assumed(kind.nested) == {
        key: args[key] for key in args.keys() - {"model_type", "vocab_size"}
    }


# Kind -> the module of the class that its own module builds.
BUILT_AS = {
    "solar_open": "glm4_moe",
    "mistral3_ministral3": "mistral3",
    "mistral3_mistral4": "mistral3",
}


@pytest.mark.parametrize("name", MLX)
def test_mlx_lm_builds_these_types_with_the_class(name):
    utils = pytest.importorskip("mlx_lm.utils")
    for model_type in MLX[name].model_types:
        called = MLX[name].called.get(model_type, model_type)
        about = {"model_type": called, "architectures": [*MLX[name].architectures]}
        built, _ = utils._get_classes(about)
        assert built.__module__ == f"mlx_lm.models.{BUILT_AS.get(name, name)}"


def test_mlx_lm_scales_positions_in_these_ways():
    rope_utils = pytest.importorskip("mlx_lm.models.rope_utils")
    # Phi-3.5-MoE makes its own.
    others = [kind for key, kind in MLX.items() if key != "phimoe"]
    known = {name for kind in others for name in kind.ropes or ()}
    for name in known:
        scaling = dict.fromkeys(MLX["llama"].rope(name).required, 4.0)
        rope_utils.initialize_rope(32, 1e4, False, {"type": name, **scaling}, 64)
    with pytest.raises(ValueError, match="Unsupported RoPE"):
        rope_utils.initialize_rope(32, 1e4, False, {"type": "unknown"}, 64)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_defaults_are_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    kind = TRANSFORMERS[name]
    for model_type in kind.model_types:
        config = transformers.CONFIG_MAPPING[model_type]()
        assert {key: getattr(config, key) for key in kind.top.assumes} == assumed(kind.top)
        assert not kind.top.required
