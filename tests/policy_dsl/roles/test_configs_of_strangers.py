"""Values of a config.json that are not what they must be: each error names the key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import Inventory
from policy_dsl.roles.architecture import architecture, family_of
from policy_dsl.roles.classify import classify
from policyc.cli import main

GOLDEN = Path(__file__).parents[2] / "golden" / "architectures"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
NAN, INFINITE, HUGE = float("nan"), float("inf"), 10**60
# kind of a key -> what it cannot be
WRONG: dict[str, tuple[Any, ...]] = {
    "size": (True, -1, 0, 1.5, 64.0, NAN, INFINITE, HUGE, 2**31, "64", [], [64], {}),
    "count": (True, -1, 1.5, 2.0, NAN, INFINITE, HUGE, 2**31, "2", [], [2], {}),
    "number": (True, NAN, INFINITE, HUGE, "2", [], [2], {}),
    "positive": (True, 0, -1, NAN, INFINITE, -INFINITE, HUGE, "2", [], [2], {}),
    "flag": (0, 1, 1.5, "true", [], {}),
    "list": (True, 1, 1.5, "0", {}),
    "numbers": (1, "0", {}, ["0"], [NAN], [HUGE], [True]),
    "limits": (1, "0", {}, ["0"], [NAN], [HUGE], [True]),
    "texts": (1, "x", {}, [1], [None], [[]]),
    "mapping": (True, 1, 1.5, NAN, "x", [], [{}]),
    "text": (True, 1, 1.5, HUGE, [], {}),
    "pattern": (1.5, [], {}),
}
TOKENS = (True, -2, 1.5, 2.0, NAN, HUGE, 2**31, "</s>", {}, [1.5], ["2"], [[2]])
MAPPINGS = (True, 1, 1.5, "x", [1])
# Keys of all families, at the top or in `text_config`.
EVERYWHERE: dict[str, tuple[Any, ...]] = {
    "architectures": (True, 1, "x", {}, [1], [[]]),
    "torch_dtype": (True, 1, 1.5, [], ["bfloat16"]),
    "dtype": (True, 1, 1.5, [], ["bfloat16"]),
    "transformers_version": (True, 4, 4.5, [], {}),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), TOKENS),
    **dict.fromkeys(("vision_config", "audio_config", "auto_map"), MAPPINGS),
    **dict.fromkeys(("quantization_config", "quantization", "compression_config"), MAPPINGS),
}
PAIRS = [(key, value) for key, values in EVERYWHERE.items() for value in values]


def refusal(model: Inventory, **config: object) -> str:
    """What is said of a model whose config has other values."""
    with pytest.raises(PolicyError) as caught:
        classify(Inventory(model.id, {**model.config, **config}, model.tensors))
    return str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_every_key_that_a_family_reads_is_held_to_its_kind(case: str, recorded: Any) -> None:
    model, _ = recorded(case)
    table = architecture(family_of(model.config) or "")
    # Of the same key at the top and in `text_config` the inner one counts.
    inner = model.config.get("text_config", {})
    unnamed = [
        (key, value)
        for entry in table.config.values()
        for key in entry.names
        for value in WRONG[entry.kind]
        if key not in inner and key not in refusal(model, **{key: value})
    ]
    assert not unnamed


@pytest.mark.parametrize(
    ("key", "value"), PAIRS, ids=[f"{key}-{str(value)[:20]}" for key, value in PAIRS]
)
def test_keys_of_all_families_are_held_to_their_kind(
    key: str, value: object, recorded: Any
) -> None:
    model, _ = recorded("llama")
    assert f"gives {key} as" in refusal(model, **{key: value})
    inner = {**model.config, key: value}
    assert f"gives text_config.{key} as" in refusal(model, text_config=inner)


@pytest.mark.parametrize("value", [True, 1, 1.5, NAN, "x", [], [{}]])
def test_a_text_config_is_an_object(value: object, recorded: Any) -> None:
    assert "gives text_config as" in refusal(recorded("llama")[0], text_config=value)


@pytest.mark.parametrize("digits", ["9" * 65, "9" * 5000, "-" + "9" * 100_000])
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "unread", "eos_token_id"])
def test_a_number_of_very_many_digits_is_refused_wherever_it_is(
    key: str, digits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = Path(__file__).parents[3] / "examples" / "tiny-minimax-m2"
    shutil.copytree(demo, tmp_path, dirs_exist_ok=True)
    config = json.dumps({**json.loads((demo / "config.json").read_text()), key: "DIGITS"})
    (tmp_path / "config.json").write_text(config.replace('"DIGITS"', digits))
    assert main(["plan", "mlx_4bit", "--model", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "config.json" in said
    assert "digits" in said
    assert len(said) < 1000
