"""The peer: what stock mlx-lm makes of a checkpoint, and what it computes with a bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from bundles import Width, tensors, widths
from mlx_lm.generate import generate_step
from mlx_lm.utils import MODEL_REMAPPING, load_model
from numpy.typing import NDArray

PROMPT = (1, 5, 17, 200, 33, 3, 83, 255, 93, 23)


def knows(model_type: str) -> bool:
    """Whether it has a class for models of this type."""
    name = MODEL_REMAPPING.get(model_type, model_type)
    return find_spec(f"mlx_lm.models.{name}") is not None


def convert(source: Path, out: Path, **options: Any) -> Path:
    """mlx-lm's own conversion, `mlx_lm.convert -q` with these options."""
    mlx_lm.convert(str(source), str(out), quantize=True, **options)
    return out


def convert_by(
    source: Path, out: Path, choose: Callable[[str], Width | None], **options: Any
) -> Path:
    """mlx-lm's conversion with the widths that `choose` gives module paths; None for plain."""

    def predicate(path: str, module: Any) -> bool | dict[str, Any]:
        width = choose(path)
        if width is None:
            return False
        return dict(zip(("bits", "group_size", "mode"), width, strict=True))

    # mlx-lm skips a module that its default group size does not divide, whatever `choose` says.
    return convert(source, out, quant_predicate=predicate, q_group_size=32, **options)


def logits(
    bundle: Path, prompt: Sequence[int] = PROMPT, *, dtype: str | None = None
) -> NDArray[np.float32]:
    """Logits [tokens, vocabulary] of stock mlx-lm, which loads the bundle strictly.

    dtype: what all its floating-point parameters are cast to, if not None.
    """
    model, _ = load_model(bundle, strict=True)
    if dtype is not None:
        model.set_dtype(getattr(mx, dtype))
    return np.array(model(mx.array([prompt]))[0].astype(mx.float32))


def greedy_tokens(bundle: Path, prompt: Sequence[int], count: int) -> list[int]:
    """The `count` tokens that stock mlx-lm continues the prompt with."""
    model, _ = load_model(bundle, strict=True)
    steps = generate_step(mx.array(prompt), model, max_tokens=count)
    return [int(token) for token, _ in steps]


def written(bundle: Path, prompt: str, count: int) -> list[int]:
    """At most `count` tokens of `mlx_lm.generate`, with the bundle's own tokenizer."""
    model, tokenizer = mlx_lm.load(str(bundle))
    steps = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=count)
    return [step.token for step in steps]


def assert_equal_bundles(ours: Path, theirs: Path, prompt: Sequence[int] = PROMPT) -> None:
    """Same tensors bit for bit, same widths in the config, same logits."""
    built, stock = tensors(ours), tensors(theirs)
    assert built.keys() == stock.keys()
    assert [name for name in built if built[name][:2] != stock[name][:2]] == []
    assert [name for name in built if built[name][2] != stock[name][2]] == []
    assert widths(ours) == widths(theirs)
    got, expected = logits(ours, prompt), logits(theirs, prompt)
    assert np.isfinite(expected).all()
    assert np.abs(got - expected).max() == 0.0
