"""Names of matrices as llama.cpp has them, against its own map of Hugging Face names."""

from __future__ import annotations

import gguf
import pytest

from policy_dsl.roles.architecture import architecture
from policy_dsl.roles.model import llama_cpp_names

# family -> what its converter calls the architecture
ARCHITECTURES = {
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "glm4_moe": gguf.MODEL_ARCH.GLM4_MOE,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "kimi_k2": gguf.MODEL_ARCH.DEEPSEEK2,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "minimax_m2": gguf.MODEL_ARCH.MINIMAXM2,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_5": gguf.MODEL_ARCH.QWEN35MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "qwen3_next": gguf.MODEL_ARCH.QWEN3NEXT,
}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_names_are_those_of_the_converter(family: str) -> None:
    known = gguf.get_tensor_name_map(ARCHITECTURES[family], 3)
    compared, wrong = set(), []
    for name, rule in architecture(family).names.items():
        # The map knows experts as one stack, and one number: the layer's.
        stem = name.removesuffix(".weight").replace("experts.#", "experts").replace("#", "2")
        theirs = known.get_name(stem) if name.endswith(".weight") else None
        for role in rule.roles if theirs else ():
            ours = llama_cpp_names(role.name, None if rule.layer_at is None else 2)
            compared.update({role.name} if ours else ())
            if ours and f"{theirs}.weight" not in ours:
                wrong.append(f"{name}: {theirs}, not {ours}")
    assert wrong == []
    assert {"attention.o_proj", "lm_head", "embed"} <= compared
    if any(".experts.#." in name for name in architecture(family).names):
        assert {"experts.gate_proj", "experts.down_proj", "router"} <= compared


def test_every_projection_of_a_dense_block_and_of_experts_has_a_name() -> None:
    for family in ("llama", "mistral", "mixtral", "minimax_m2", "qwen2", "qwen3", "qwen3_moe"):
        for role in architecture(family).roles:
            if role.startswith(("attention.", "mlp.", "experts.")):
                assert llama_cpp_names(role, 0), role


def test_the_first_name_is_that_of_the_matrix_alone() -> None:
    assert llama_cpp_names("experts.up_proj", 61) == (
        "blk.61.ffn_up_exps.weight",
        "blk.61.ffn_gate_up_exps.weight",
    )
    assert llama_cpp_names("lm_head", None) == ("output.weight",)


@pytest.mark.parametrize(
    ("role", "layer"),
    [("linear_attention.out_proj", 0), ("norm", 0), ("vision.fc1", None), ("mtp.q_proj", None)],
)
def test_other_roles_have_no_name(role: str, layer: int | None) -> None:
    assert llama_cpp_names(role, layer) == ()
