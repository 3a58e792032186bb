"""What changed between two bundles: grouped by role and treatment, with bytes and bits."""

from __future__ import annotations

from dataclasses import replace

from policy_dsl.planning.outline import Outline, OutlineModule, diff
from policyc.reports import render_markdown, render_text
from policyc.reports.diff_report import diff_blocks, diff_document

WIDTHS = {"3bit affine g64": 3.5, "4bit affine g64": 4.5, "8bit affine g64": 8.5, "keep": 16}


def module(role: str, layer: int | None, stored: str, rule: str = "a.yaml:1") -> OutlineModule:
    parameters = 1 << 30
    nbytes = int(parameters * WIDTHS[stored] / 8)
    name = role if layer is None else f"layers.{layer}.{role}"
    return OutlineModule(name, role, layer, stored, stored, rule, 3, parameters, nbytes)


def bundle(middle: str, rule: str = "a.yaml:1", title: str = "a") -> Outline:
    modules = [module("embed", None, "8bit affine g64")]
    modules += [module("experts.down_proj", layer, middle, rule) for layer in range(6)]
    modules += [module("router", layer, "keep") for layer in range(6)]
    return Outline(title, "mlx_affine", "big", tuple(modules))


def test_modules_that_changed_alike_are_one_change() -> None:
    found = diff(bundle("3bit affine g64"), bundle("4bit affine g64", "b.yaml:9", "b"))
    (change,) = found.changed
    assert (change.role, change.layers) == ("experts.down_proj", tuple(range(6)))
    assert (change.before, change.after) == ("3bit affine g64", "4bit affine g64")
    assert (change.before_rule, change.after_rule) == ("a.yaml:1", "b.yaml:9")
    assert change.nbytes_delta == found.nbytes_delta == 6 << 27
    assert change.parameters == 6 << 30
    assert found.added == found.removed == ()


def test_text_says_role_layers_treatments_and_bytes() -> None:
    text = render_text(
        diff_blocks(diff(bundle("3bit affine g64"), bundle("4bit affine g64", title="b")))
    )
    line = next(line for line in text.splitlines() if "experts.down_proj" in line)
    change = "experts.down_proj 0-5 3bit affine g64 -> 4bit affine g64 6 +805.31 MB a.yaml:1"
    assert " ".join(line.split()) == change
    before, after = bundle("3bit affine g64").bpw, bundle("4bit affine g64").bpw
    assert before is not None
    assert after is not None
    assert f"{before:.4f} -> {after:.4f}, {after - before:+.4f}" in text


def apart(stacked: Outline, stored: str, count: int = 8) -> Outline:
    """The bundle with each expert in a module of its own, of odd bytes."""
    modules = []
    for one in stacked.modules:
        if one.role != "experts.down_proj":
            modules.append(one)
            continue
        each = replace(one, stored=stored, treatment=stored, parameters=one.parameters // 8)
        each = replace(each, nbytes=int(each.parameters * WIDTHS[stored] / 8) + 1)
        modules += [replace(each, name=f"{one.name}.{expert}") for expert in range(count)]
    return replace(stacked, modules=tuple(modules))


def test_stacked_experts_are_compared_with_those_that_lie_apart() -> None:
    stacked = bundle("3bit affine g64")
    other = apart(stacked, "4bit affine g64")
    for found, names in ((diff(stacked, other), 48), (diff(other, stacked), 6)):
        (change,) = found.changed
        assert found.added == found.removed == ()
        assert (change.layers, len(change.names)) == (tuple(range(6)), names)
        assert change.parameters == 6 << 30
        assert abs(change.nbytes_delta) == abs(found.nbytes_delta) == (6 << 27) + 48
    # Pruned experts are no treatment of others.
    fewer = diff(stacked, apart(stacked, "4bit affine g64", count=7))
    assert [len(each) for each in (fewer.changed, fewer.added, fewer.removed)] == [0, 1, 1]


def test_added_and_removed_modules() -> None:
    full = bundle("3bit affine g64")
    short = replace(full, modules=full.modules[1:])
    assert [change.role for change in diff(short, full).added] == ["embed"]
    (removed,) = diff(full, short).removed
    assert (removed.before, removed.after) == ("8bit affine g64", None)
    assert removed.nbytes_delta == -full.modules[0].nbytes
    assert not diff(short, full).is_empty
    assert not diff(full, short).is_empty


def test_equal_bundles_have_an_empty_diff() -> None:
    same = diff(bundle("3bit affine g64"), bundle("3bit affine g64", "other.yaml:3"))
    assert same.is_empty
    assert same.nbytes_delta == 0
    assert "no tensor is treated differently" in render_text(diff_blocks(same))


def test_another_size_of_the_same_width_is_a_difference() -> None:
    a = bundle("3bit affine g64")
    pruned = replace(a.modules[1], nbytes=a.modules[1].nbytes // 2)
    found = diff(a, replace(a, modules=(a.modules[0], pruned, *a.modules[2:])))
    assert [change.names for change in found.changed] == [(pruned.name,)]
    assert found.nbytes_delta == -pruned.nbytes
    assert not found.is_empty


def test_a_difference_read_backwards_has_the_opposite_sign() -> None:
    a, b = bundle("3bit affine g64"), bundle("4bit affine g64")
    assert diff(a, b).nbytes_delta == -diff(b, a).nbytes_delta
    assert diff(a, b).changed[0].before == diff(b, a).changed[0].after


def test_document_has_the_documented_keys() -> None:
    document = diff_document(diff(bundle("3bit affine g64"), bundle("4bit affine g64")))
    assert {"schema_version", "changed", "added", "removed", "nbytes_delta"} <= document.keys()
    assert document["changed"][0]["layers"] == list(range(6))
    assert document["bpw_delta"] > 0


def test_roles_come_from_the_side_that_knows_them() -> None:
    known = module("experts.down_proj", 2, "3bit affine g64")
    bare = replace(known, role="", stored="4bit affine g64", rule="")
    one, other = (Outline("x", "mlx_affine", "big", (each,)) for each in (known, bare))
    assert diff(one, other).changed[0].role == "experts.down_proj"
    assert diff(other, one).changed[0].role == "experts.down_proj"


def test_markdown_is_a_table() -> None:
    text = render_markdown(diff_blocks(diff(bundle("3bit affine g64"), bundle("4bit affine g64"))))
    assert "| role | layers | treatment | modules | bytes | decided by |" in text
