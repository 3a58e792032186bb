"""Memory of a build whose tensors are rearranged, and the time to plan one of 400,000 tensors.

    python benchmarks/family_memory.py

Writes a checkpoint of 3 GB with latent attention and fused experts (mistral4, bfloat16), builds
it for mlx_affine at 4 bits with one worker, and prints the peak of resident memory: below 1 GiB.
Then plans a model with the names of DeepSeek-V3 and 2,200 experts in each of 61 layers, from
headers alone, and prints the CPU time: below 10 s. Linux only; needs 6 GB in the folder for
temporary files.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from generated_checkpoint import DEMO, Entry, write_shard

ROOT = Path(__file__).parents[1]
HIDDEN, INNER, EXPERTS, LAYERS, WORDS, HEADS = 4096, 2048, 16, 4, 16384, 32
RANK, QUERY_RANK, NOPE, ROPE, VALUE = 256, 1024, 64, 64, 128
FUSED = {
    "model_type": "mistral4",
    "vocab_size": WORDS,
    "hidden_size": HIDDEN,
    "intermediate_size": 3 * HIDDEN,
    "moe_intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "q_lora_rank": QUERY_RANK,
    "kv_lora_rank": RANK,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
MANY = {
    **FUSED,
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "n_routed_experts": 2200,
    "moe_intermediate_size": 64,
    "intermediate_size": 64,
    "vocab_size": 128,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}


def attention(block: str, config: dict[str, int]) -> Iterator[Entry]:
    """The tensors of a layer's latent attention, its norms and its shared expert."""
    hidden, heads, rank = (
        config[key] for key in ("hidden_size", "num_attention_heads", "kv_lora_rank")
    )
    queries, nope, rope, value = (
        config[key] for key in ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_a_proj": (queries, hidden),
        "self_attn.q_a_layernorm": (queries,),
        "self_attn.q_b_proj": (heads * (nope + rope), queries),
        "self_attn.kv_a_proj_with_mqa": (rank + rope, hidden),
        "self_attn.kv_a_layernorm": (rank,),
        "self_attn.kv_b_proj": (heads * (nope + value), rank),
        "self_attn.o_proj": (hidden, heads * value),
        "mlp.gate": (config["n_routed_experts"], hidden),
        "mlp.shared_experts.gate_proj": (config["moe_intermediate_size"], hidden),
        "mlp.shared_experts.up_proj": (config["moe_intermediate_size"], hidden),
        "mlp.shared_experts.down_proj": (hidden, config["moe_intermediate_size"]),
    }
    for name, shape in shapes.items():
        yield f"{block}.{name}.weight", "BF16", shape


def fused_model() -> Iterator[Entry]:
    """The model whose experts are fused."""
    for name in ("model.embed_tokens", "lm_head"):
        yield f"{name}.weight", "BF16", (WORDS, HIDDEN)
    yield "model.norm.weight", "BF16", (HIDDEN,)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        yield from attention(block, FUSED)
        yield f"{block}.mlp.experts.gate_up_proj", "BF16", (EXPERTS, 2 * INNER, HIDDEN)
        yield f"{block}.mlp.experts.down_proj", "BF16", (EXPERTS, HIDDEN, INNER)


def many_tensors() -> Iterator[Entry]:
    """The model of 400,000 tensors."""
    for name in ("model.embed_tokens", "lm_head"):
        yield f"{name}.weight", "BF16", (128, 64)
    yield "model.norm.weight", "BF16", (64,)
    for layer in range(MANY["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        yield from attention(block, MANY)
        yield f"{block}.mlp.gate.e_score_correction_bias", "F32", (2200,)
        for expert in range(2200):
            for word in ("gate_proj", "up_proj", "down_proj"):
                yield f"{block}.mlp.experts.{expert}.{word}.weight", "BF16", (64, 64)


def write(folder: Path, config: dict[str, object], entries: list[Entry], *, hole: bool) -> None:
    """A checkpoint of one shard. hole: its values take no room."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    with (folder / "model.safetensors").open("wb") as opened:
        write_shard(opened, entries, hole=hole)


def measured(*words: str) -> resource.struct_rusage:
    """What a command took in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "policyc", *words], cwd=ROOT, check=True, capture_output=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"policyc {words[0]}: {seconds:.1f} s of CPU, peak {after.ru_maxrss / 1024:,.0f} MiB")
    return after


def main() -> None:
    """Both measurements. The plan comes first: a peak is that of all processes so far."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        many = {**MANY, "first_k_dense_replace": 0}
        entries = list(many_tensors())
        write(folder / "many", many, entries, hole=True)
        print(f"{len(entries):,} tensors")
        policy = folder / "p.qpol"
        policy.write_text("target mlx_affine\nall: 4bit\nexperts in layers 0-2: 8bit\n")
        measured("plan", str(policy), "--model", str(folder / "many"))
        fused = list(fused_model())
        write(folder / "fused", dict(FUSED), fused, hole=False)
        nbytes = (folder / "fused" / "model.safetensors").stat().st_size
        print(f"{nbytes / 1e9:.2f} GB")
        words = ("--model", str(folder / "fused"), "-o", str(folder / "out"), "-j", "1", "-q")
        measured("build", str(policy), *words)


if __name__ == "__main__":
    main()
