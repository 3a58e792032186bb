"""Without source and record, a bundle is held to what its own config means."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emitters.core.verify import verify_bundle
from policyc.cli import main
from tests.models import TINY

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden"
# Targets whose bundles are recorded, with experts stacked and apart.
RECORDED = {
    "mlx_affine": GOLDEN / "mlx" / "tiny_minimax_fp8" / "expected",
    "jangtq_prestack": GOLDEN / "jangtq" / "micro_JANGTQ_K",
    "jangtq_prestack, apart": GOLDEN / "jangtq" / "micro_JANGTQ2_perexpert",
    "gptq": GOLDEN / "gptq_e2e" / "autoround_w4g32_mixed",
}
Header = dict[str, Any]


@pytest.fixture(params=RECORDED)
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a bundle without a record, which a test may damage."""
    return Path(shutil.copytree(RECORDED[request.param], tmp_path / "bundle"))


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def _header(path: Path) -> tuple[Header, bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _modules(folder: Path) -> list[str]:
    names = {name for path in _shards(folder) for name in _header(path)[0]} - {"__metadata__"}
    return sorted({name.rpartition(".")[0] or name for name in names})


def _without(folder: Path, module: str) -> None:
    """Take a module's tensors out of the files and the index."""
    for path in _shards(folder):
        header, content = _header(path)
        kept: Header = {}
        rest = b""
        for name, entry in header.items():
            if name == "__metadata__" or name.rpartition(".")[0] == module or name == module:
                continue
            start, stop = entry["data_offsets"]
            kept[name] = {**entry, "data_offsets": [len(rest), len(rest) + stop - start]}
            rest += content[start:stop]
        text = json.dumps(kept).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _said(folder: Path) -> str:
    report = verify_bundle(folder, jobs=1)
    errors = (found for found in report.findings if found.severity == "error")
    return "\n".join(f"{found.code}: {found.message}" for found in errors)


@pytest.mark.parametrize(
    "part", ["model.norm", "input_layernorm", "q_norm", "v_proj", "gate", "e_score_correction_bias"]
)
def test_a_bundle_that_lacks_a_module_is_refused(bundle: Path, part: str) -> None:
    assert _said(bundle) == ""
    module = next(
        name
        for name in [*_modules(bundle), *_full(bundle)]
        if name == part or name.endswith(f".{part}")
    )
    _without(bundle, module)
    assert _said(bundle) != ""


def test_a_bundle_that_lacks_a_layer_lacks_one_thing(bundle: Path) -> None:
    for module in [*_modules(bundle), *_full(bundle)]:
        if "layers.0." in module:
            _without(bundle, module)
    codes = [line.partition(":")[0] for line in _said(bundle).splitlines()]
    # mlx-lm's config lists every quantized module, which is looked at before.
    assert codes in (["missing-layers"], ["width-disagrees"])


def _full(folder: Path) -> list[str]:
    return [name for path in _shards(folder) for name in _header(path)[0]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 9}, "missing-layers"),
        ({"num_hidden_layers": 65536}, "-65535; its config says 65536 layers"),
        ({"model_type": None}, "missing-config-key"),
        ({"model_type": 3}, "missing-config-key"),
        ({"tie_word_embeddings": True}, "config-disagrees: tie_word_embeddings is true, but "),
        ({"num_key_value_heads": [1, 2]}, "bad-config-value"),
        ({"vocab_size": 7}, "wrong-shape"),
        ({"num_attention_heads": "x"}, "bad-config-value"),
        ({"num_experts_per_tok": 999}, "bad-config-value"),
        ({"rms_norm_eps": 0}, "bad-config-value"),
        ({"architectures": 3}, "bad-config-value"),
        ({"rope_scaling": {"rope_type": ["a"]}}, "bad-config-value"),
        ({"rope_parameters": {"factor": "8"}}, "bad-config-value"),
        ({"use_qk_norm": False}, "config-disagrees: use_qk_norm is false, but "),
    ],
)
def test_a_bundle_that_its_config_contradicts_is_refused(
    bundle: Path, changes: dict[str, Any], said: str
) -> None:
    _config(bundle, **changes)
    assert said in _said(bundle)


def test_a_bundle_of_an_unknown_family_is_not_said_to_be_whole(bundle: Path) -> None:
    _config(bundle, model_type="nonsense")
    (check,) = [one for one in verify_bundle(bundle, jobs=1).checks if one.name == "model"]
    assert check.result == "not possible"
    assert "no table for 'nonsense'" in check.about


@pytest.mark.parametrize("value", [1, "x", [1]])
def test_a_bundle_whose_language_model_is_not_an_object_is_refused(
    bundle: Path, value: object
) -> None:
    _config(bundle, text_config=value)
    assert "text_config" in _said(bundle)
    # Readers then look for it in the language model.
    config = json.loads((bundle / "config.json").read_bytes())
    config.pop("quantization_config", None)
    (bundle / "config.json").write_text(json.dumps(config))
    assert "text_config" in _said(bundle)


@pytest.mark.parametrize("target", ["mlx_affine", "gptq"])
def test_layers_after_the_last_one_are_refused(tmp_path: Path, target: str) -> None:
    out = Path(shutil.copytree(RECORDED[target], tmp_path / "bundle"))
    _config(out, num_hidden_layers=1)
    assert "layer-beyond-config" in _said(out)


@pytest.mark.parametrize("value", [False, None])
def test_a_head_that_readers_look_for_is_missed(bundle: Path, value: object) -> None:
    _config(bundle, tie_word_embeddings=value)
    assert _said(bundle) == ""
    _without(bundle, "lm_head")
    assert "lm_head" in _said(bundle)


def _built(tmp_path: Path, rule: str, target: str = "mlx_affine") -> Path:
    (tmp_path / "p.qpol").write_text(f"target {target}\nall: 8bit\n{rule}\n")
    out = tmp_path / "out"
    arguments = ["build", str(tmp_path / "p.qpol"), "--model", str(TINY), "-o", str(out), "-q"]
    assert main(arguments) == 0
    return out


@pytest.mark.parametrize(
    ("rule", "missed"),
    [
        ("lm_head: drop", ["no lm_head:"]),
        ("embed: drop", ["no embed:"]),
        ("norm: drop", ["no model.norm:", "self_attn.q_norm in layers 0-5:"]),
        ("layers 1: drop", ["and 2 more in layer 1:"]),
        ("router: drop", ["no router in layers 0-5:"]),
        ("", []),
    ],
)
def test_what_the_policy_left_out_is_a_warning(
    tmp_path: Path, rule: str, missed: list[str]
) -> None:
    report = verify_bundle(_built(tmp_path, rule), jobs=1)
    found = [one.message for one in report.findings if one.code == "left-out-by-policy"]
    assert report.ok
    assert len(found) == len(missed)
    for message, words in zip(found, missed, strict=True):
        assert words in message


def test_without_its_record_nobody_knows_that_it_was_dropped(tmp_path: Path) -> None:
    out = _built(tmp_path, "norm: drop")
    (out / "policyc.json").unlink()
    assert "missing-tensor" in _said(out)


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize("place", ["policy", "modules", "surplus"])
def test_a_record_that_is_not_unicode_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, place: str
) -> None:
    out = _built(tmp_path, "")
    path = out / "policyc.json"
    document = json.loads(path.read_text())
    if place == "policy":
        document["policy"]["text"] = "\ud800"
    else:
        document.setdefault(place, {})["\udfff"] = {}
    path.write_text(json.dumps(document))
    assert main([command, str(out)]) in (1, 2)
    said = capsys.readouterr()
    assert "bad-record" in said.out + said.err


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """The embedded model with other entries in its config."""

    def make(**changes: Any) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(TINY, folder)
        _config(folder, **changes)
        return folder

    return make


@pytest.mark.parametrize("policy", ["config_i", "jangtq_2", "w4a16"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts_per_tok", "x"),
        ("num_key_value_heads", [1, 2]),
        ("intermediate_size", 65535),
        ("head_dim", True),
        ("num_attention_heads", -4),
        ("vocab_size", 10**12),
    ],
)
def test_no_build_begins_that_its_own_verify_would_refuse(
    edited: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    policy: str,
    key: str,
    value: Any,
) -> None:
    source, out = edited(**{key: value}), tmp_path / "out"
    assert main(["build", policy, "--model", str(source), "-o", str(out), "-q"]) == 2
    assert f"gives {key} as " in capsys.readouterr().err
    assert not out.exists()
