"""Verifying HFQ files without a record: what loaders trust without a look is looked at."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hfq_files import Held, Parts, rewrite
from small_checkpoints import stored, widened

from emitters import FORMATS
from emitters.core.build import build
from emitters.core.bundle_reading import bundle_outline
from emitters.core.verify import verify_bundle
from policy_dsl.diagnostics import PolicyError
from policy_dsl.sources.reference import open_source
from policy_dsl.treatments import Coded

GOLDEN = Path(__file__).parents[2] / "golden" / "hipfire"
MINIMAX, LLAMA = "tiny-minimax.mq2-lloyd", "tiny-llama.mq4"
BLOCK = "model.layers.0"
MOE = f"{BLOCK}.block_sparse_moe"
SCALE = f"{MOE}.awq_scale_gate_up.weight"
# What the loader of MiniMax-M2 looks up.
NEEDED = (
    *("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"),
    *(f"{BLOCK}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")),
    *(f"{BLOCK}.self_attn.{letter}_proj.weight" for letter in "qkvo"),
    *(f"{BLOCK}.self_attn.{letter}_norm.weight" for letter in "qk"),
    *(f"{MOE}.gate.weight", f"{MOE}.e_score_correction_bias"),
    *(f"{MOE}.experts.11.w{number}.weight" for number in (1, 2, 3)),
)
CONFIG_KEYS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "intermediate_size", "num_local_experts", "num_experts_per_tok"),
)
Change = Callable[[Parts], object]


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[str, Change], Path]:
    """A folder with a recorded file, changed."""

    def make(name: str, change: Change) -> Path:
        path = Path(shutil.copyfile(GOLDEN / name, tmp_path / "model.mq4"))
        rewrite(path, change)
        return tmp_path

    return make


def told(path: Path) -> list[str]:
    """Everything that verifying finds, but the missing record."""
    report = verify_bundle(path, jobs=1)
    assert report.ok == all(found.code == "no-record" for found in report.findings)
    return [found.message for found in report.findings if found.code != "no-record"]


def counts(path: Path) -> list[int]:
    """How many tensors each finding is about, but for the missing record."""
    found = verify_bundle(path, jobs=1).findings
    return [one.count for one in found if one.code != "no-record"]


def coded(parts: Parts, name: str, code: int, nbytes: int, group_size: int) -> None:
    """Gives a tensor another code, and as many zeros as it has bytes then."""
    shape = parts.tensors[name].shape
    parts.tensors[name] = Held(code, shape, group_size, bytes(nbytes))


@pytest.mark.parametrize("name", [MINIMAX, LLAMA])
def test_what_is_only_put_together_again_is_fine(changed, name: str) -> None:
    assert told(changed(name, lambda parts: None)) == []


@pytest.mark.parametrize("name", NEEDED)
def test_a_tensor_that_is_missing(changed, name: str) -> None:
    folder = changed(MINIMAX, lambda parts: parts.tensors.pop(name))
    assert told(folder) == [f'model.mq4: tensor "{name}": it is missing']


def test_scales_may_be_missing(changed) -> None:
    assert told(changed(MINIMAX, lambda parts: parts.tensors.pop(SCALE))) == []


@pytest.mark.parametrize("projection", ["w1", "w2", "w3"])
def test_an_expert_of_another_code(changed, projection: str) -> None:
    name = f"{MOE}.experts.7.{projection}.weight"

    def change(parts: Parts) -> None:
        parts.tensors[name] = parts.tensors[f"{MOE}.experts.7.{other}.weight"]

    other = "w1" if projection == "w2" else "w2"
    codes = {"w1": "MQ2G256Lloyd", "w2": "MQ4G256", "w3": "MQ2G256Lloyd"}
    taken = f"readers take it for {codes[projection]}, as expert 0 is"
    reason = f"it is {codes[other]}, and {taken}"
    assert told(changed(MINIMAX, change)) == [f'model.mq4: tensor "{name}": {reason}']


def test_gate_and_up_of_two_codes(changed) -> None:
    def change(parts: Parts) -> None:
        for expert in range(12):
            up = f"{MOE}.experts.{expert}.w3.weight"
            parts.tensors[up] = parts.tensors[up.replace("w3", "w2")]

    folder = changed(MINIMAX, change)
    (message,) = told(folder)
    assert "it is MQ4G256, and readers take it for MQ2G256Lloyd" in message
    assert counts(folder) == [12]


@pytest.mark.parametrize("code", [6, 17, 18])
def test_experts_that_no_kernel_runs(changed, code: int) -> None:
    nbytes = {6: 136, 17: 104, 18: 72}[code] * 256

    def change(parts: Parts) -> None:
        for expert in range(12):
            down = f"{MOE}.experts.{expert}.w2.weight"
            coded(parts, down, code, nbytes, 256)
            for block in range(256):
                parts.tensors[down].put(nbytes // 256 * block, "f", 1)

    folder = changed(MINIMAX, change)
    (message,) = told(folder)
    assert "readers take MQ4G256, MQ6G256, MQ2G256Lloyd, MQ3G256L" in message
    assert counts(folder) == [12]


@pytest.mark.parametrize(
    ("name", "code", "nbytes"),
    [
        ("model.embed_tokens.weight", 1, 256 * 512),
        (f"{MOE}.gate.weight", 1, 12 * 512),
        ("lm_head.weight", 2, 256 * 1024),
        ("lm_head.weight", 16, 256 * 512),
        (f"{BLOCK}.self_attn.o_proj.weight", 2, 256 * 1024),
        ("model.norm.weight", 16, 512),
    ],
)
def test_a_code_that_readers_do_not_take_there(changed, name: str, code: int, nbytes: int) -> None:
    (message,) = told(changed(MINIMAX, lambda parts: coded(parts, name, code, nbytes, 0)))
    assert message.startswith(f'model.mq4: tensor "{name}": it is ')
    assert ", and readers take " in message


def test_a_score_correction_in_float32_is_fine(changed) -> None:
    name = f"{MOE}.e_score_correction_bias"
    assert told(changed(MINIMAX, lambda parts: coded(parts, name, 2, 48, 0))) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("vocab_size", 128), ("num_key_value_heads", 2), ("head_dim", 64), ("hidden_size", 512)],
)
def test_a_config_of_another_size(changed, key: str, value: int) -> None:
    folder = changed(MINIMAX, lambda parts: parts.metadata["config"].update({key: value}))
    messages = told(folder)
    assert messages
    assert all("it has shape [" in m or "readers skip" in m for m in messages)


def test_a_config_of_a_billion_layers(changed) -> None:
    def change(parts: Parts) -> None:
        parts.metadata["config"]["num_hidden_layers"] = 10**9

    assert counts(changed(MINIMAX, change)) == [100]


@pytest.mark.parametrize("value", [None, 0, -1, 2.0, "8", True, [8]])
@pytest.mark.parametrize("key", CONFIG_KEYS)
def test_a_config_without_a_count(changed, key: str, value: object) -> None:
    folder = changed(MINIMAX, lambda parts: parts.metadata["config"].update({key: value}))
    assert told(folder) == [f"model.mq4: its config has no whole number from 1 as {key}"]


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        ({"model": {}}, "its tokenizer is not a text"),
        (None, "its tokenizer is not a text"),
        ("{", "its tokenizer is not JSON"),
    ],
)
def test_a_tokenizer_that_loaders_cannot_read(changed, tokenizer: object, reason: str) -> None:
    folder = changed(LLAMA, lambda parts: parts.metadata.update(tokenizer=tokenizer))
    (message,) = told(folder)
    assert message.startswith(f"model.mq4: {reason}")


@pytest.mark.parametrize("tokenizer", ["", "{}", " {}\n"])
def test_a_file_without_a_tokenizer_is_a_warning(changed, tokenizer: str) -> None:
    folder = changed(LLAMA, lambda parts: parts.metadata.update(tokenizer=tokenizer))
    found = verify_bundle(folder, jobs=1).findings
    about = [one for one in found if one.code == "no-tokenizer"]
    assert [one.severity for one in about] == ["warning"]


@pytest.mark.parametrize("key", ["tokenizer_config", "generation_config"])
def test_another_part_that_is_no_object(changed, key: str) -> None:
    folder = changed(MINIMAX, lambda parts: parts.metadata.update({key: "x"}))
    assert told(folder) == [f"model.mq4: its {key} is not an object"]


@pytest.mark.parametrize(("name", "number"), [(MINIMAX, 0), (LLAMA, 10), (LLAMA, 7)])
def test_a_number_of_another_family(changed, name: str, number: int) -> None:
    def change(parts: Parts) -> None:
        parts.arch_id = number

    messages = told(changed(name, change))
    assert any(f"its arch_id is {number} (" in message for message in messages)


def test_something_in_the_padding(tmp_path: Path) -> None:
    path = Path(shutil.copyfile(GOLDEN / LLAMA, tmp_path / "model.mq4"))
    content = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<Q", content, 24)
    assert content[start - 1] == 0
    content[start - 1] = 1
    path.write_bytes(content)
    (found,) = told(tmp_path)
    assert "between its index and its first tensor" in found


def test_groups_of_another_size(changed) -> None:
    def change(parts: Parts) -> None:
        parts.tensors["lm_head.weight"].group_size = 128

    (message,) = told(changed(LLAMA, change))
    assert message.endswith("its entry says groups of 128, and MQ4G256 has 256")


def test_rotated_rows_that_are_no_whole_blocks(changed) -> None:
    name = f"{BLOCK}.mlp.down_proj.weight"

    def change(parts: Parts) -> None:
        coded(parts, name, 13, 136 * 384, 256)
        for block in range(384):
            parts.tensors[name].put(136 * block, "f", 1)

    (message,) = told(changed(LLAMA, change))
    assert message.endswith("it is rotated, and its 384 columns are not a multiple of 256")


def test_scales_that_readers_would_skip(changed) -> None:
    def widen(parts: Parts) -> None:
        parts.tensors[SCALE] = Held(2, (256,), 0, b"\0\0\x80\x3f" * 256)

    (message,) = told(changed(MINIMAX, widen))
    reason = "it is F32 of 1024 bytes, and readers skip what is not F16 of 256 values"
    assert message.endswith(reason)


def test_scales_of_another_length(changed) -> None:
    def cut(parts: Parts) -> None:
        held = parts.tensors[SCALE]
        parts.tensors[SCALE] = Held(1, (255,), 0, held.content[2:])

    assert "it is F16 of 510 bytes" in told(changed(MINIMAX, cut))[0]


def test_a_scale_of_zero(changed) -> None:
    folder = changed(MINIMAX, lambda parts: parts.tensors[SCALE].put(2 * 17, "e", 0))
    assert told(folder) == [f'model.mq4: tensor "{SCALE}": value 17 is not above 0']
    # Dividing by it is no crash either.
    source = open_source(str(GOLDEN / "tiny-minimax-src"))
    assert not verify_bundle(folder, source, jobs=1).ok


def test_scales_of_down(changed) -> None:
    name = f"{MOE}.awq_scale_down.weight"

    def add(parts: Parts) -> None:
        parts.tensors[name] = parts.tensors[SCALE]

    (message,) = told(changed(MINIMAX, add))
    assert name in message


@pytest.mark.parametrize(
    ("name", "at", "form", "numbers"),
    [
        # A scale, then what a block of so many bytes begins with, in a block in the middle.
        ("lm_head.weight", 34 * 100, "e", (float("nan"),)),
        ("lm_head.weight", 34 * 100, "e", (-1.0,)),
        (f"{MOE}.experts.3.w2.weight", 136 * 100, "f", (0.0,)),
        (f"{MOE}.experts.3.w2.weight", 136 * 100, "f", (-0.5,)),
        (f"{MOE}.experts.3.w2.weight", 136 * 100, "f", (float("inf"),)),
        (f"{MOE}.experts.3.w2.weight", 136 * 100, "ff", (1.0, float("nan"))),
        (f"{MOE}.experts.3.w1.weight", 72 * 100, "eeee", (-1, 0, 2, 1)),
        (f"{MOE}.experts.3.w1.weight", 72 * 100, "eeee", (-1, 0, 2, float("inf"))),
        (f"{MOE}.experts.3.w1.weight", 72 * 100, "eeee", (float("nan"), 0, 1, 2)),
    ],
)
def test_a_block_that_nobody_can_compute_with(changed, name, at, form, numbers) -> None:
    folder = changed(MINIMAX, lambda parts: parts.tensors[name].put(at, form, *numbers))
    (message,) = told(folder)
    assert message.startswith(f'model.mq4: tensor "{name}": block 100 begins with ')


@pytest.mark.parametrize(
    ("name", "at", "form", "numbers"),
    [
        ("lm_head.weight", 34 * 100, "e", (0.0,)),
        (f"{MOE}.experts.3.w1.weight", 72 * 100, "eeee", (1, 1, 1, 1)),
        (f"{MOE}.experts.3.w1.weight", 72 * 100, "eeee", (-0.0, 0.0, -0.0, 2)),
    ],
)
def test_blocks_of_zeros_and_of_equal_levels_are_fine(changed, name, at, form, numbers) -> None:
    folder = changed(MINIMAX, lambda parts: parts.tensors[name].put(at, form, *numbers))
    assert told(folder) == []


def test_a_value_that_is_no_number(changed) -> None:
    name = "model.norm.weight"
    folder = changed(MINIMAX, lambda parts: parts.tensors[name].put(20, "e", float("inf")))
    assert told(folder) == [f'model.mq4: tensor "{name}": value 10 is not a finite number']


def test_codes_that_are_not_decoded_here_are_told(changed) -> None:
    def change(parts: Parts) -> None:
        coded(parts, "lm_head.weight", 14, 258 * 256, 256)

    folder = changed(LLAMA, change)
    assert told(folder) == []
    report = verify_bundle(folder, open_source(str(GOLDEN / "tiny-llama-src")), jobs=1)
    (message,) = [one.message for one in report.findings if one.code == "not-comparable"]
    assert message.endswith("lm_head (MQ8G256) cannot be decoded here")


def test_a_short_last_group_is_decoded(write_llama, planned, tmp_path: Path) -> None:
    """Policies do not plan it, hipfire's quantizer writes it: groups know no rows."""
    source = write_llama(hidden=96, vocabulary=97)
    plan, inventory = planned(source, "name: q\ntarget: hipfire_hfq\nrules: |\n  all: q8\n")
    build(plan, inventory, out=tmp_path / "out")
    (tmp_path / "out" / "policyc.json").unlink()
    head = widened(stored(source)["lm_head.weight"][2])
    four_bits = Coded("hfq4", 4, 256, False, "rtn")
    blocks = FORMATS["hipfire_hfq"].codec().encode(head.reshape(1, -1), "F32", four_bits)["weight"]

    def change(parts: Parts) -> None:
        parts.tensors["lm_head.weight"] = Held(6, (97, 96), 256, blocks.tobytes())

    rewrite(tmp_path / "out" / "model.hfq", change)
    report = verify_bundle(tmp_path / "out", open_source(str(source)), jobs=1)
    assert report.ok
    (found,) = [one.sums for one in report.errors or () if one.module == "lm_head"]
    assert found.values == 97 * 96
    assert 0.05 < (found.relative or 0) < 0.15


def test_a_file_among_others_is_verified_alone() -> None:
    assert told(GOLDEN / LLAMA) == []
    outline = bundle_outline(GOLDEN / MINIMAX)
    modules = {one.name: one for one in outline.modules}
    assert outline.target == "hipfire_hfq"
    assert modules[f"{MOE}.experts.3.w1"].treatment == "2bit mq2-lloyd g256"
    assert modules[f"{MOE}.awq_scale_gate_up"].parameters == 0
    with pytest.raises(PolicyError, match="not-a-bundle"):
        verify_bundle(GOLDEN / "README.md", jobs=1)


def test_a_file_of_a_bundle_has_the_bundles_record(upstream) -> None:
    folder = upstream("tiny-llama.mq4")
    assert verify_bundle(folder / "tiny-llama.mq4", jobs=1).findings == ()


def test_another_file_beside_a_bundle_has_none(upstream, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(upstream("tiny-llama.mq4"), tmp_path / "b"))
    shutil.copyfile(GOLDEN / "tiny-llama.hfq4", folder / "other")
    report = verify_bundle(folder / "other", jobs=1)
    assert {found.code for found in report.findings} == {"no-record"}


def test_another_source_is_noticed() -> None:
    other = open_source(str(GOLDEN / "tiny-llama-src"))
    report = verify_bundle(GOLDEN / MINIMAX, other, jobs=1)
    assert "not-comparable" in {found.code for found in report.findings}


def test_a_record_of_another_format_is_told(upstream, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(upstream("tiny-llama.mq4"), tmp_path / "b"))
    record = json.loads((folder / "policyc.json").read_bytes())
    record["target"] = "mlx_affine"
    (folder / "policyc.json").write_text(json.dumps(record))
    assert not verify_bundle(folder, jobs=1).ok
