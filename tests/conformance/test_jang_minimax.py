"""The published profiles of MiniMax-M2: what jang verifies, loads and writes itself."""

from __future__ import annotations

import pytest
from bundles import tensors
from jang_bundles import (
    INDEX,
    assert_equal_files,
    assert_held,
    coded,
    modules,
    parameters,
    ran,
    read,
    sidecar,
)

pytestmark = pytest.mark.slow

LAYERS = {"embedded_fp8": 6, "embedded_bf16": 6, "minimax_m2_32_fp8": 2, "minimax_m2_32": 2}
# 8 experts become 32 with them, as jang's converter wants it.
PADDED = ("embedded_fp8", "embedded_bf16")
PROFILES = {
    "jangtq_2": "JANGTQ2",
    "jangtq_3": "JANGTQ3",
    "jangtq_4": "JANGTQ4",
    "jangtq_k": "JANGTQ_K",
}
LAYOUTS = ("prestacked", "per_expert")
# What the converter of jang 2.5.50 cannot write, and how it fails.
NOT_CONVERTED = {
    **dict.fromkeys(((source, "jangtq_3") for source in LAYERS), "AssertionError"),
    # It adds experts of one width only.
    **dict.fromkeys(((source, "jangtq_k") for source in PADDED), "TypeError"),
}
BOTH = [(source, policy) for source in LAYERS for policy in PROFILES]
CONVERTED = [pair for pair in BOTH if pair not in NOT_CONVERTED]


def profile(policy: str, layout: str = "prestacked") -> str:
    """The text of a bundled policy in a layout."""
    return f"extends {policy}\noutput layout {layout}"


@pytest.fixture(scope="session")
def converted(jang, jang_source, tmp_path_factory):
    """jang's own bundles, by source, profile and layout, each made only once."""
    made = {}

    def get(source, name, layout):
        if (source, name) not in made:
            folder = tmp_path_factory.mktemp("converted")
            jang("convert", jang_source(source), folder / "per_expert", name)
            jang("rebundle", folder / "per_expert", folder / "prestacked")
            made[source, name] = folder
        return made[source, name] / layout

    return get


@pytest.mark.parametrize(("source", "policy"), BOTH)
def test_the_verifiers_pass(source, policy, jangtq):
    bundle = jangtq(source, profile(policy))
    structure = ran("verify_jangtq_prestacked", str(bundle))
    assert structure.returncode == 0, structure.stderr
    assert "PASSED" in structure.stdout
    assert f"prestack triplets:   {3 * LAYERS[source]}\n" in structure.stdout
    stamp = ran("verify_capabilities", str(bundle))
    assert stamp.returncode == 0, stamp.stdout
    assert "capabilities OK (family=minimax_m2)" in stamp.stdout


def test_the_stamp_of_experts_apart_passes_and_the_layout_is_called_old(jangtq):
    bundle = jangtq("minimax_m2_32", profile("jangtq_2", "per_expert"))
    assert ran("verify_capabilities", str(bundle)).returncode == 0
    structure = ran("verify_jangtq_prestacked", str(bundle))
    assert structure.returncode == 1
    assert "per-expert TQ keys present (576)" in structure.stderr


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("source", "policy"), BOTH)
def test_the_loader_holds_every_tensor(source, policy, layout, jangtq, jang):
    bundle = jangtq(source, profile(policy, layout))
    loaded = jang("load", bundle)
    assert len(coded(bundle)) == 3 * LAYERS[source]
    assert_held(loaded, bundle, parameters(bundle))
    assert loaded.modules == modules(bundle)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("source", "policy"), CONVERTED)
def test_all_files_are_those_of_the_converter(source, policy, layout, jangtq, converted):
    ours = jangtq(source, profile(policy, layout))
    assert_equal_files(ours, converted(source, PROFILES[policy], layout))


def test_the_converter_stacks_as_its_rebundler_does(converted, jang_source, tmp_path):
    # The other tests run both steps one by one, which saves half of the time.
    source, out = jang_source("minimax_m2_32"), tmp_path / "out"
    made = ran("convert_minimax_jangtq", str(source), str(out), "JANGTQ_K")
    assert made.returncode == 0
    assert_equal_files(out, converted("minimax_m2_32", "JANGTQ_K", "prestacked"))


@pytest.mark.parametrize(("source", "policy"), NOT_CONVERTED)
def test_what_the_converter_cannot_write(source, policy, jang, jang_source, tmp_path):
    said = jang("convert_error", jang_source(source), tmp_path / "out", PROFILES[policy])
    assert said.startswith(NOT_CONVERTED[source, policy])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", LAYERS)
def test_three_bits_but_for_the_experts_are_another_profile(source, layout, jangtq, converted):
    ours = jangtq(source, profile("jangtq_3", layout))
    theirs = converted(source, "JANGTQ2", layout)
    built, expected = tensors(ours), tensors(theirs)
    assert built.keys() == expected.keys()
    assert [name for name in built if ".tq_" not in name and built[name] != expected[name]] == []
    for name in ("config.json", "jang_config.json"):
        wanted = (theirs / name).read_text()
        for before, after in (
            ('"routed_expert": 2', '"routed_expert": 3'),
            ('"routed_expert_bits": 2', '"routed_expert_bits": 3'),
            ('"bits_default": 2', '"bits_default": 3'),
            ('"profile": "JANGTQ2"', '"profile": "JANGTQ3"'),
        ):
            wanted = wanted.replace(before, after)
        assert (ours / name).read_text() == wanted


@pytest.mark.parametrize("source", LAYERS)
def test_three_bits_of_experts_are_those_of_the_padded_rows(source, jangtq, jang, jang_source):
    folder = jang_source(source)
    weight_map = read(folder, INDEX)["weight_map"]
    names = [name for name in weight_map if ".experts." in name and name.endswith(".weight")]
    codes = jang("codes", {name: folder / weight_map[name] for name in names}, 3)
    built = tensors(jangtq(source, profile("jangtq_3", "per_expert")))
    for name in names:
        path, (packed, norms) = name.removesuffix(".weight"), codes[name]
        assert built[f"{path}.tq_packed"] == ("U32", packed.shape, packed.tobytes())
        assert built[f"{path}.tq_norms"] == ("F16", norms.shape, norms.tobytes())
        assert built[f"{path}.tq_bits"] == ("U8", (1,), b"\x03")


@pytest.mark.parametrize("source", LAYERS)
def test_three_bits_in_the_tables_for_runtimes(source, jangtq, jang):
    # jang's own builder takes the padding of the words for values: 256 becomes 277.
    bundle = jangtq(source, profile("jangtq_3"))
    config = read(bundle, "config.json")
    expected = {}
    for columns in {config["hidden_size"], config["intermediate_size"]}:
        expected |= jang("tables", columns, 3)
    found = sidecar(bundle)
    assert found.keys() == expected.keys()
    for name, table in expected.items():
        assert found[name] == ("F32", table.shape, table.tobytes())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", PADDED)
def test_the_mixed_profile_with_added_experts(source, layout, jangtq, converted):
    ours = tensors(jangtq(source, profile("jangtq_k", layout)))
    two, four = (tensors(converted(source, name, layout)) for name in ("JANGTQ2", "JANGTQ4"))
    assert ours.keys() == two.keys()
    down = (".w2.", ".down_proj.")
    expected = {name: (four if any(d in name for d in down) else two)[name] for name in two}
    assert [name for name in ours if ours[name] != expected[name]] == []
