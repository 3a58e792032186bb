"""A config may ask for any number of layers and experts: what it takes is what is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[3]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
N_LAYERS = 500


@pytest.mark.parametrize("experts", ["65536", "65537", "1000000000", "1" * 4000])
def test_experts_that_only_the_config_has_take_no_time(experts: str, tmp_path: Path):
    tensors: dict[str, np.ndarray] = {}
    for layer in range(N_LAYERS):
        name = f"model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.qweight"] = np.zeros((4, 32), np.int32)
        tensors[f"{name}.qzeros"] = np.full((1, 4), 0x77777777, np.int32)
        tensors[f"{name}.scales"] = np.ones((1, 32), np.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    sizes = {"hidden_size": 32, "num_hidden_layers": N_LAYERS, "num_attention_heads": 1}
    config = {"model_type": "mixtral", **sizes, "quantization_config": GPTQ}
    text = json.dumps({**config, "num_local_experts": "COUNT"})
    (tmp_path / "config.json").write_text(text.replace('"COUNT"', experts))
    command = [sys.executable, "-m", "policyc", "verify", tmp_path]
    run = subprocess.run(command, cwd=ROOT, timeout=60, check=False, capture_output=True, text=True)
    assert run.returncode in (1, 2)
    assert "Traceback" not in run.stderr
