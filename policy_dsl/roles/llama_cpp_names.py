"""Role and layer -> the names under which llama.cpp knows a model's matrices.

Its importance matrices are keyed by them. One name stands for all experts of a layer.
"""

from __future__ import annotations

# More than one name where llama.cpp may also keep matrices with the same input as one.
_IN_BLOCKS: dict[str, tuple[str, ...]] = {
    "attention.q_proj": ("attn_q", "attn_qkv"),
    "attention.k_proj": ("attn_k", "attn_qkv"),
    "attention.v_proj": ("attn_v", "attn_qkv"),
    "attention.o_proj": ("attn_output",),
    "attention.q_a_proj": ("attn_q_a",),
    "attention.q_b_proj": ("attn_q_b",),
    "attention.kv_a_proj_with_mqa": ("attn_kv_a_mqa",),
    "attention.kv_b_proj": ("attn_kv_b",),
    "mlp.gate_proj": ("ffn_gate",),
    "mlp.up_proj": ("ffn_up",),
    "mlp.down_proj": ("ffn_down",),
    "router": ("ffn_gate_inp",),
    "experts.gate_proj": ("ffn_gate_exps", "ffn_gate_up_exps"),
    "experts.up_proj": ("ffn_up_exps", "ffn_gate_up_exps"),
    "experts.down_proj": ("ffn_down_exps",),
    "shared_expert_gate": ("ffn_gate_inp_shexp",),
    "shared_experts.gate_proj": ("ffn_gate_shexp",),
    "shared_experts.up_proj": ("ffn_up_shexp",),
    "shared_experts.down_proj": ("ffn_down_shexp",),
}
# linear_attention is left out: llama.cpp reorders its value heads, the inputs of out_proj.
_OUTSIDE = {"embed": ("token_embd",), "lm_head": ("output",)}


def llama_cpp_roles() -> tuple[str, ...]:
    """The roles that llama.cpp has names for."""
    return (*_OUTSIDE, *_IN_BLOCKS)


def llama_cpp_names(role: str, layer: int | None) -> tuple[str, ...]:
    """The names of a role's matrices in a layer, `blk.3.ffn_gate_exps.weight`, likeliest first.

    layer: the language model's block, or None outside of the blocks. Nothing comes back for
    roles that are no matrix of the language model, or whose input llama.cpp reorders.
    Source: gguf 0.19.0, `get_tensor_name_map` of the families that have a table here.
    """
    if layer is None:
        return tuple(f"{name}.weight" for name in _OUTSIDE.get(role, ()))
    return tuple(f"blk.{layer}.{name}.weight" for name in _IN_BLOCKS.get(role, ()))
