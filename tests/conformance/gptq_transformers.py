"""What transformers computes with packed or plain checkpoints; no package is named here.

Runs in an interpreter of its own (`gptq_peers`): which package reads a packed checkpoint, and
what it replaces, is decided by what else is imported there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

Array = NDArray[Any]


def logits(model: Path, prompt: Sequence[int], dtype: str, **options: Any) -> NDArray[np.float32]:
    """Logits [tokens, vocabulary] of a checkpoint whose arithmetic is in `dtype`.

    options: of `from_pretrained`.
    """
    return logits_of(_loaded(model, dtype, options)[0], prompt)


def missing(model: Path, dtype: str, **options: Any) -> list[str]:
    """Parameters that a checkpoint does not have for the model that is made for it."""
    return sorted(_loaded(model, dtype, options)[1]["missing_keys"])


def written(
    model: Path, prompt: Sequence[int], count: int, dtype: str, **options: Any
) -> list[int]:
    """The `count` likeliest tokens that continue the prompt, one by one."""
    return written_by(_loaded(model, dtype, options)[0], prompt, count)


def logits_of(model: Any, prompt: Sequence[int]) -> NDArray[np.float32]:
    """Logits [tokens, vocabulary] of a loaded model."""
    if type(model).__name__ == "Llama4ForConditionalGeneration":
        # The whole model raises where there are no images.
        model = model.language_model
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([prompt])).logits[0].float())


def written_by(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The `count` likeliest tokens that a loaded model continues the prompt with."""
    made = model.generate(
        input_ids=torch.tensor([prompt]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(token) for token in made[0, len(prompt) :]]


def _loaded(model: Path, dtype: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    options |= {"dtype": getattr(torch, dtype), "output_loading_info": True}
    (saved,) = json.loads((Path(model) / "config.json").read_text())["architectures"]
    auto = AutoModelForCausalLM
    # Some classes have the language model only below a vision model.
    if saved.endswith("ForConditionalGeneration") or saved == "Mistral4ForCausalLM":
        auto = AutoModelForImageTextToText
    found = auto.from_pretrained(model, **options)
    return found[0].eval(), found[1]
