"""Policies by path and by name, what they extend, and their variables."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from policy_dsl.diagnostics import PolicyError
from policy_dsl.language.load import bundled_names, load, parse_policy
from policy_dsl.language.print_policy import policy_digest, rule_text
from policy_dsl.policy import Policy


@pytest.fixture
def write(tmp_path: Path):
    def _write(name: str, text: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return _write


def rules(policy: Policy) -> list[str]:
    return [rule_text(rule) for rule in policy.rules]


def error_of(path: str | Path, **options) -> tuple[str, str]:
    with pytest.raises(PolicyError) as caught:
        load(path, **options)
    return caught.value.diagnostics[0].code, str(caught.value)


def test_a_bundled_policy_loads_by_its_name() -> None:
    assert "config_i" in bundled_names()
    assert load("config_i").name == "config_i"


@pytest.mark.parametrize("name", bundled_names())
def test_every_bundled_policy_loads_and_has_its_files_name(name: str) -> None:
    assert load(name).name == name


def test_the_name_is_the_files_unless_the_text_gives_one(write) -> None:
    assert load(write("mine.qpol", "all: 4bit")).name == "mine"
    assert load(write("mine.yml", "name: other\nrules: 'all: 4bit'")).name == "other"


def test_rules_of_the_base_come_first_and_other_keys_of_the_child_win(write) -> None:
    write(
        "base/base.yaml",
        "model: m\nruntimes: [a]\ndefaults: {bits: 4, group_size: 64}\n"
        "rules: 'all: 4bit'\ntests: [bpw <= 5]\nmetadata: {a: 1, b: 1}\n",
    )
    child = write(
        "child.qpol",
        "extends base/base.yaml\nruntime b\ndefault bits 8\nmetadata b 2\nlm_head: 8bit\n",
    )
    policy = load(child)
    assert rules(policy) == ["all: 4bit", "lm_head: 8bit"]
    assert (policy.model, policy.runtimes, policy.name) == ("m", ("b",), "child")
    assert (policy.defaults.bits, policy.defaults.group_size) == (8, 64)
    assert dict(policy.metadata) == {"a": 1, "b": 2}
    assert [test.text for test in policy.tests] == ["bpw <= 5"]
    assert policy.extends == ()
    assert [rule.span.source.name.rpartition("/")[2] for rule in policy.rules] == [
        "base.yaml",
        "child.qpol",
    ]


def test_rules_of_one_target_stay_behind_those_of_all_targets(write) -> None:
    write("base.qpol", "all: 4bit\non gptq {\n  lm_head: 8bit\n}\n")
    child = write("child.qpol", "extends base.qpol\ntarget mlx_affine\nembed: 8bit\n")
    policy = load(child)
    assert rules(policy) == ["all: 4bit", "embed: 8bit", "lm_head: 8bit"]
    assert policy.targets == ("mlx_affine", "gptq")


def test_several_bases_in_their_order_and_a_bundled_one(write) -> None:
    write("one.qpol", "all: 2bit")
    child = write("child.yaml", "extends: [one.qpol, mlx_4bit]\nrules: 'embed: 8bit'\n")
    assert rules(load(child)) == ["all: 2bit", *rules(load("mlx_4bit")), "embed: 8bit"]


def test_a_policy_that_extends_itself_is_refused_with_the_chain(write) -> None:
    write("a.qpol", "extends b.qpol\n")
    write("b.qpol", "extends c.qpol\n")
    path = write("c.qpol", "# first\nextends a.qpol\n")
    code, text = error_of(path)
    assert code == "cyclic-extends"
    assert "a policy extends itself: c.qpol -> a.qpol -> b.qpol -> c.qpol" in text
    assert "b.qpol:1:9" in text


def test_bases_that_multiply_without_end_are_refused(write) -> None:
    write("p0.qpol", "all: 4bit")
    for level in range(1, 12):
        write(f"q{level - 1}.qpol", f"extends p{level - 1}.qpol")
        write(f"p{level}.qpol", f"extends p{level - 1}.qpol, q{level - 1}.qpol")
    assert error_of(write("top.qpol", "extends p11.qpol"))[0] == "nested-too-deeply"


def test_variables_have_defaults_and_can_be_set(write) -> None:
    path = write("p.yaml", "vars: {down: 3, dtype: bf16}\nrules:\n  - down_proj: ${down}bit\n")
    assert load(path).rules[0].treatment.bits == 3
    changed = load(path, variables={"down": "4"})
    assert changed.rules[0].treatment.bits == 4
    assert dict(changed.vars) == {"down": 4, "dtype": "bf16"}
    assert load(path, variables={"down": 4}) == changed
    assert policy_digest(changed) != policy_digest(load(path))


@pytest.mark.parametrize(
    "text",
    [
        "var tools = true\nmetadata supports_tools ${tools}\noutput pad_experts ${tools}\n",
        "vars: {tools: true}\nmetadata: {supports_tools: '${tools}'}\n"
        "output: {pad_experts: '${tools}'}\n",
    ],
)
def test_truth_values_stay_truth_values(write, text: str) -> None:
    path = write("p.yaml" if text.startswith("vars:") else "p.qpol", text)
    for given, value in ((None, True), ("false", False), (False, False), ("true", True)):
        policy = load(path, variables={} if given is None else {"tools": given})
        assert dict(policy.vars)["tools"] is value
        assert dict(policy.metadata)["supports_tools"] is value
        assert policy.output.pad_experts is value
    for wrong in ("maybe", "1", "True", 1):
        with pytest.raises(PolicyError, match='"tools" takes true or false, not "'):
            load(path, variables={"tools": wrong})


def test_a_truth_value_is_not_a_number(write) -> None:
    path = write("p.qpol", "var down = 3\ndown_proj: ${down}bit\n")
    with pytest.raises(PolicyError, match='"down" takes a whole number, not "true"'):
        load(path, variables={"down": "true"})


def test_a_child_changes_its_bases_variables(write) -> None:
    write("base.qpol", "var down = 3\ndown_proj: ${down}bit\n")
    child = write("child.qpol", "extends base.qpol\nvar down = 4\n")
    assert load(child).rules[0].treatment.bits == 4
    assert load(child, variables={"down": "5"}).rules[0].treatment.bits == 5


def test_a_text_variable_keeps_what_looks_like_a_number(write) -> None:
    path = write("p.qpol", 'var tag = "a"\nmetadata tag "${tag}"\nall: 4bit\n')
    for value in ("007", "7", "1.5", "true"):
        assert load(path, variables={"tag": value}).metadata == (("tag", value),)


def test_wrong_overrides_are_refused_all_at_once(write) -> None:
    path = write("p.qpol", "var down = 3\nvar limit = 3.5\nall: ${down}bit\n")
    with pytest.raises(PolicyError) as caught:
        load(path, variables={"dwon": "4", "down": "four", "limit": "4"})
    assert str(caught.value) == (
        'error[unknown-variable]: there is no variable "dwon"\n  = did you mean "down"?\n\n'
        'error[wrong-variable-type]: variable "down" takes a whole number, not "four"'
    )


def test_a_child_gives_a_variable_another_type(write) -> None:
    write("base.qpol", "var down = 3\nall: ${down}bit\n")
    code, text = error_of(write("child.qpol", 'extends base.qpol\nvar down = "x"\n'))
    assert code == "wrong-variable-type"
    assert "child.qpol:2:" in text


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("p.yaml", b"name: \xff\xfe", "not-utf8"),
        ("p.txt", b"all: 4bit", "unknown-suffix"),
        ("p.yaml", b"", "empty-policy"),
        ("p.qpol", b"\n# c\n", "empty-policy"),
        ("p.qpol", b"# " + b"x" * (1 << 20), "too-large"),
        ("p.yaml", b"x" * 10_000_000, "too-large"),
        ("p.yaml", b"name: a\x00b", "control-character"),
        ("p.yaml", "name: a # b\ufeffc".encode(), "control-character"),
        ("p.qpol", "all: 4bit # b\ufeffc".encode(), "control-character"),
        ("p.qpol", b"all: 4bit\n" * 10_001, "too-many-parts"),
        ("p.qpol", b";" * 500_000, "too-many-parts"),
        ("p.qpol", b"on mlx_affine {all: 4bit}" * 10_001, "too-many-parts"),
        ("p.yaml", b"a:\n" * 300_000, "too-many-parts"),
        ("p.yaml", b"metadata: {a: [" + b"1," * 60_000 + b"1]}", "too-many-parts"),
    ],
)
def test_a_file_that_is_not_a_policy_is_refused(write, name, content, code) -> None:
    assert error_of(write(name, content))[0] == code


def test_a_link_leads_to_a_policy_or_is_refused(write, tmp_path: Path) -> None:
    write("other.qpol", "all: 4bit")
    (tmp_path / "same.qpol").symlink_to("other.qpol")
    assert load(tmp_path / "same.qpol").name == "same"
    secret = write("token", "user:secret:1")
    (tmp_path / "link.qpol").symlink_to(secret)
    for path in (tmp_path / "link.qpol", write("child.qpol", "extends link.qpol")):
        code, text = error_of(path)
        assert code == "unknown-suffix"
        assert "link.qpol is a link to it" in text
        assert "secret" not in text


@pytest.mark.parametrize("text", ["extends base.qpol\nall: 4bit", "extends: [base.qpol]"])
def test_what_the_shell_passes_is_a_policy_in_the_current_folder(
    write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    write("base.qpol", "var bits = 5")
    monkeypatch.chdir(tmp_path)
    receiver, sender = os.pipe()
    os.write(sender, text.encode())
    os.close(sender)
    policy = load(f"/dev/fd/{receiver}")
    os.close(receiver)
    assert (policy.name, dict(policy.vars)) == ("policy", {"bits": 5})


def test_policies_that_are_extended_count_too(write) -> None:
    write("base.qpol", "experts: 4bit\n" * 400)
    write("twice.qpol", "extends base.qpol\nall: 4bit\n")
    assert len(load(write("p.qpol", "extends twice.qpol, base.qpol")).rules) == 801
    write("base.qpol", "experts: 4bit\n" * 5_000)
    assert error_of(write("p.qpol", "extends twice.qpol, base.qpol"))[0] == "too-many-parts"
    write("base.qpol", "all: 4bit\n#" + "x" * 600_000)
    assert error_of(write("p.qpol", "extends twice.qpol, base.qpol"))[0] == "too-large"


@pytest.mark.parametrize(
    "statement", ['description "{}"', 'metadata a "{}"', '"{}": 4bit', "all: {}", "test bpw <= {}"]
)
def test_variables_do_not_make_a_short_policy_a_long_one(write, statement: str) -> None:
    text = f'var a = "{"x" * 18_000}"\n{statement.format("${a}" * 1_000)}\n'
    assert error_of(write("p.qpol", text))[0] == "filled-too-long"


def test_many_texts_with_variables_count_together(write) -> None:
    texts = ", ".join(['"${a}!"'] * 40)
    lines = [f"  k{number}: [{texts}]" for number in range(100)]
    text = f"vars:\n  a: {'x' * 18_000}\nmetadata:\n" + "\n".join(lines)
    assert error_of(write("p.yaml", text))[0] == "filled-too-long"
    few = text.replace("x" * 18_000, "x" * 200)
    assert load(write("p.yaml", f'{few}\nrules: ["all: 4bit"]\n')).vars


def test_a_size_that_is_too_large_is_given_in_bytes(write) -> None:
    path = write("p.yaml", b"x" * 10_000_000)
    assert str(path) in error_of(path)[1]
    assert "is too large: a policy has at most 1,048,576 bytes" in error_of(path)[1]


def test_what_is_not_there_or_no_file_is_refused(tmp_path: Path, write) -> None:
    assert error_of(tmp_path / "no.yaml")[0] == "unreadable-file"
    assert error_of(tmp_path)[0] == "unreadable-file"
    assert error_of(write("q.qpol", f"extends {'x/' * 3000}y.qpol"))[0] == "unreadable-file"
    assert error_of(write("q.qpol", f"extends {'x' * 3000}"))[0] == "unknown-policy"
    code, text = error_of("config_j")
    assert (code, 'did you mean "config_i"?' in text) == ("unknown-policy", True)
    assert "checkpoints go with --model" in error_of(tmp_path)[1]
    write("there.qpol", "all: 4bit")
    assert 'there.qpol"?' in error_of(tmp_path / "there.yaml")[1]
    assert 'did you mean "there.qpol"?' in error_of(write("q.qpol", "extends there"))[1]
    code, text = error_of(write("p.qpol", "all: 4bit\nextends no.qpol\n"))
    assert code == "unreadable-file"
    assert "p.qpol:2:9" in text


def test_byte_order_mark_and_windows_line_ends_are_fine(write) -> None:
    plain = load(write("p.yaml", "name: x\nrules: |\n  all: 4bit\n  embed: 8bit # e\n"))
    windows = "\ufeffname: x\r\nrules: |\r\n  all: 4bit\r\n  embed: 8bit # e\r\n"
    assert load(write("q.yaml", windows)) == plain
    assert load(write("r.qpol", "\ufeffname x\r\nall: 4bit\r\nembed: 8bit\r\n")) == plain


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("rules: 'all: 4bit'", "yaml"),
        ("down_proj: 4bit mxtq; boundary layers 0-1,60-61: 8bit", "dsl"),
        ("all: 4bit\nembed: 8bit", "dsl"),
    ],
)
def test_a_text_without_a_suffix_shows_its_notation(text: str, form: str) -> None:
    assert parse_policy(text, "-")[1] == form


def test_the_path_of_a_bundled_policy_that_is_not_here_offers_its_name() -> None:
    with pytest.raises(PolicyError) as caught:
        load("policies/somewhere/config_i.yaml")
    (found,) = caught.value.diagnostics
    assert found.code == "unreadable-file"
    assert (found.suggestion or "").startswith('"config_i" is a bundled policy')


BASE = """\
name: base
description: of the base
model: m
target: mlx_affine
fp8_dequant: f32
vars: {bits: 4}
defaults: {bits: 4, group_size: 64}
transforms: [prune experts to 8 by reap]
calibration: {imatrix: a.gguf}
rules: "all: ${bits}bit"
output: {shard_size: 5GiB}
metadata: {licence: mit}
runtimes: [mlx-lm]
tests: [bpw <= 5, "size <= 90GiB"]
"""


@pytest.mark.parametrize(
    ("yaml", "dsl", "key"),
    [
        ('description: ""', 'description ""', "description"),
        ('model: ""', 'model ""', "model"),
        ('fp8_dequant: ""', "clear fp8_dequant", "fp8_dequant"),
        ("transforms: []", "clear transforms", "transforms"),
        ("runtimes: []", "clear runtimes", "runtimes"),
        ("vars: {}", "clear vars", "vars"),
        ("metadata: {}", "clear metadata", "metadata"),
        ("defaults: {}", "clear defaults", "defaults"),
        ("calibration: {}", "clear calibration", "calibration"),
        ("output: {}", "clear output", "output"),
        ("tests: {replace: []}", "clear tests", "tests"),
    ],
)
def test_an_empty_value_clears_what_is_extended_and_nothing_else(write, yaml, dsl, key) -> None:
    write("base.yaml", BASE)
    base = load(write("same.qpol", "extends base.yaml"))
    texts = {"c.yaml": f"extends: base.yaml\n{yaml}\n", "c.qpol": f"extends base.yaml\n{dsl}\n"}
    for name, text in texts.items():
        policy = load(write(name, text))
        nothing = getattr(Policy(name="same"), key)
        assert getattr(base, key) != nothing
        assert replace(policy, name="same") == replace(base, **{key: nothing})
        spans = policy.key_spans.items()
        places = [span.source.name for path, span in spans if path.startswith(key)]
        assert [place for place in places if place.endswith("base.yaml")] == []


def test_tests_are_added_to_those_that_are_extended(write) -> None:
    write("base.yaml", BASE)
    child = load(write("child.qpol", "extends base.yaml\nvar most = 4\ntest bpw <= ${most}\n"))
    assert [test.text for test in child.tests] == ["bpw <= 5", "size <= 90GiB", "bpw <= 4"]
    spans = dict(child.key_spans)
    places = [spans[f"tests[{n}]"].location.rsplit("/", 1)[-1] for n in range(3)]
    assert places == ["base.yaml:14:9", "base.yaml:14:20", "child.qpol:3:6"]
    assert dict(child.templates)["tests[2]"] == "bpw <= ${most}"


@pytest.mark.parametrize("text", ["tests: []", ""])
def test_no_tests_keep_those_that_are_extended(write, text) -> None:
    write("base.yaml", BASE)
    child = load(write("child.yaml", f"extends: base.yaml\n{text}\n"))
    assert [test.text for test in child.tests] == ["bpw <= 5", "size <= 90GiB"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("child.yaml", "extends: base.yaml\ntests: {replace: [bpw <= 6]}\n"),
        ("child.qpol", "extends base.yaml\ntest bpw <= 6\nclear tests\n"),
    ],
)
def test_tests_can_be_replaced(write, name, text) -> None:
    write("base.yaml", BASE)
    child = load(write(name, text))
    assert [test.text for test in child.tests] == ["bpw <= 6"]
    grandchild = load(write("last.qpol", f"extends {name}\ntest bpw <= 7\n"))
    assert [test.text for test in grandchild.tests] == ["bpw <= 6", "bpw <= 7"]


def test_what_is_cleared_can_be_given_again_later(write) -> None:
    write("base.yaml", BASE)
    write("child.yaml", "extends: base.yaml\nmetadata: {}\nruntimes: []\n")
    policy = load(write("last.qpol", "extends child.yaml\nmetadata author me\nruntime jang\n"))
    assert (policy.metadata, policy.runtimes) == ((("author", "me"),), ("jang",))


def test_names_that_are_not_policies_get_a_cure(tmp_path: Path):
    assert "a bundled policy such as config_i" in error_of("quite_other")[1]
    text = tmp_path / "policy.txt"
    text.write_text("all: 4bit")
    assert "rename it to .yaml" in error_of(text)[1]
    # Nobody should remove a device of the system.
    assert "name a regular file instead" in error_of(Path(os.devnull))[1]
