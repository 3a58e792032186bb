"""The files beside the weights: usable and complete, or said so before and after a build."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from emitters.core.build import build
from emitters.core.verify import verify_bundle
from policy_dsl.sources.recorded import write_recorded
from policyc.cli import main

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 7\n"
POLICIES = {
    "mlx_affine": "target mlx_affine\nall: 8bit\nnorm: keep\n",
    "gptq": "target gptq\nattention, mlp: 4bit g32\nembed, lm_head: keep\n",
    "hipfire_hfq": "target hipfire_hfq\nall: q8\nnorm: f16\n",
}
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """(command, target, source, code) -> what a command says on stdout and stderr."""

    def command(name: str, target: str, source: object, code: int, *more: object) -> str:
        policy = tmp_path / "policy.qpol"
        policy.write_text(POLICIES[target])
        arguments = [name, policy, "--model", source, *more]
        assert main([str(one) for one in arguments]) == code
        said = capsys.readouterr()
        return said.out + said.err

    return command


@pytest.mark.parametrize("target", POLICIES)
@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", POINTER, "tokenizer.json is a Git LFS pointer of 7 bytes"),
        ("tokenizer.json", b"", "tokenizer.json is empty"),
        ("tokenizer_config.json", b"<html></html>", "tokenizer_config.json is an HTML page"),
        ("generation_config.json", b"Entry not found", 'is the text "Entry not found"'),
        ("chat_template.jinja", POINTER, "chat_template.jinja is a Git LFS pointer"),
        ("chat_template.json", b"{", "chat_template.json: it is not JSON"),
        ("LICENSE", POINTER, "LICENSE is a Git LFS pointer"),
    ],
)
def test_what_is_not_the_file_is_refused_before_anything_is_written(
    write_llama, run: Run, tmp_path: Path, target: str, file: str, content: bytes, said: str
) -> None:
    source = write_llama()
    (source / file).write_bytes(content)
    assert said in run("build", target, source, 2, "-o", tmp_path / "out")
    assert said in run("plan", target, source, 2)
    assert said in run("check", target, source, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.qpol", "source"]


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_files_that_a_target_edits_are_looked_at_too(
    demo, capsys: pytest.CaptureFixture[str], tmp_path: Path, file: str
) -> None:
    source = Path(shutil.copytree(demo, tmp_path / "model"))
    (source / file).write_bytes(POINTER)
    arguments = ["build", "jangtq_k", "--model", str(source), "-o", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert f"{file} is a Git LFS pointer of 7 bytes" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_pointers_of_a_clone_are_one_finding(write_llama, run: Run) -> None:
    source = write_llama()
    for name in ("tokenizer.json", "tokenizer.model", "tekken.json"):
        (source / name).write_bytes(POINTER)
    said = run("plan", "mlx_affine", source, 2)
    assert said.count("error[") == 1
    assert "in all 3: " in said


@pytest.mark.parametrize("target", POLICIES)
def test_a_bundle_without_a_tokenizer_is_a_warning(write_llama, run: Run, target: str) -> None:
    source = write_llama()
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").write_text("{}")
    assert "warning[no-tokenizer]" in run("plan", target, source, 0)
    assert "warning[no-tokenizer]" in run("check", target, source, 0)
    (source / "tekken.json").write_text("{}")
    said = run("check", target, source, 0)
    # One that the target cannot hold is as good as none.
    assert ("tokenizer.json of tekken.json" in said) == (target == "hipfire_hfq")


def test_headers_alone_do_not_say_that_there_is_no_tokenizer(
    write_llama, planned, run: Run, tmp_path: Path
) -> None:
    source = write_llama()
    (source / "tokenizer.json").unlink()
    record = tmp_path / "headers.json"
    record.write_text(write_recorded(planned(source)[1]))
    assert "no-tokenizer" not in run("plan", "mlx_affine", record, 0)
    assert "no-tokenizer" not in run("plan", "mlx_affine", "minimax-m2.7", 0)


@pytest.mark.parametrize(
    ("file", "document", "said"),
    [
        ("added_tokens.json", {"<a>": 95, "<b>": 96, "<c>": 97}, "2 token ids"),
        ("vocab.json", {"a": 0, "b": 100}, "1 token id beyond the 96 rows of the embedding: b 100"),
        ("tokenizer.json", {"added_tokens": [{"id": 96, "content": "<pad>"}]}, "<pad> 96"),
        ("tokenizer.json", {"model": {"vocab": [["x", 0.0]] * 97}}, "x 96"),
        ("tokenizer.json", {"model": {"vocab": {"w": 200}}}, "w 200"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"96": {"content": "q"}}}, "q 96"),
        ("generation_config.json", {"eos_token_id": [2, 96]}, "eos_token_id 96"),
    ],
)
def test_tokens_beyond_the_embedding_are_a_warning(
    write_llama, run: Run, file: str, document: object, said: str
) -> None:
    source = write_llama()
    (source / file).write_text(json.dumps(document))
    told = run("check", "mlx_affine", source, 0)
    assert "warning[token-beyond-embedding]" in told
    assert said in told


def test_token_ids_of_other_kinds_are_passed_over(write_llama, run: Run) -> None:
    source = write_llama()
    odd = {
        "tokenizer.json": {"model": {"vocab": {"a": 95, "b": 95}}, "added_tokens": []},
        "added_tokens.json": {"a": -1, "b": None, "c": 95},
        "tokenizer_config.json": {"added_tokens_decoder": {"x": {}, "²": 3, "9" * 99: 3}},
        "generation_config.json": {"eos_token_id": None, "pad_token_id": -1, "bos_token_id": "a"},
    }
    for file, document in odd.items():
        (source / file).write_text(json.dumps(document))
    assert "token-beyond-embedding" not in run("check", "mlx_affine", source, 0)


NOT_IDS = (True, 1.5, 2.0, float("nan"), 10**60, 2**32, "a", "9" * 5000, [1.5], [[1]], {"a": 1})


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", NOT_IDS, ids=lambda value: str(value)[:20])
def test_what_is_not_the_number_of_a_token_is_a_warning(
    write_llama, run: Run, key: str, value: object
) -> None:
    source = write_llama()
    (source / "generation_config.json").write_text(json.dumps({key: value}))
    said = run("check", "mlx_affine", source, 0)
    assert "warning[odd-token-ids]: generation_config.json" in said
    assert key in said
    assert len(said) < 5000


@pytest.mark.parametrize(
    ("file", "document", "said"),
    [
        *(
            (file, {"a": one, "b": 3}, '1 token without a whole number from 0 as id: "a": ')
            for file in ("vocab.json", "added_tokens.json")
            for one in (True, -2, 1.5, "1", None, [1], 2**32, 10**60)
        ),
        *(
            ("tokenizer_config.json", {"added_tokens_decoder": one}, "added_tokens_decoder")
            for one in (1, "x", [1], {"x": {}}, {"-1": {}}, {"9" * 5000: {}}, {"1": 5})
        ),
    ],
)
def test_ids_of_other_kinds_are_a_warning_that_names_file_and_field(
    write_llama, run: Run, file: str, document: object, said: str
) -> None:
    source = write_llama()
    (source / file).write_text(json.dumps(document))
    told = run("check", "mlx_affine", source, 0)
    assert f"warning[odd-token-ids]: {file}" in told
    assert said in told


OWN = {
    "BPE": {"merges": []},
    "Unigram": {"unk_id": None},
    "WordPiece": {
        "unk_token": "a",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    },
}


def _vocabulary(type_: str | None, vocabulary: object) -> dict[str, object]:
    """A tokenizer.json with this vocabulary; types may be left out."""
    typed = {"type": type_} if type_ else {}
    return {"model": {**typed, **OWN.get(type_ or "", {"unk_token": "a"}), "vocab": vocabulary}}


MAPPED = ["BPE", "WordPiece", "WordLevel", None]
NO_IDS = [None, [0], "1", -1, 2.5, 1.0, True, 2**32, {}, float("nan")]
NO_PIECES = [["b"], ["b", None], ["b", "1"], ["b", True], ["b", 1, 2], [1, 1.0], "b", {"b": 1}]
TOKEN = {"content": "q", "special": True} | dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized"), False
)
NO_TOKENIZERS = [
    *(_vocabulary(type_, {"a": 0, "b": one}) for type_ in MAPPED for one in NO_IDS),
    *(_vocabulary(type_, one) for type_ in MAPPED for one in (None, 3, "x")),
    *(_vocabulary(type_, [["a", 0.0]]) for type_ in MAPPED[:3]),
    *(_vocabulary("Unigram", [["a", 0.0], one]) for one in NO_PIECES),
    *(_vocabulary("Unigram", one) for one in (None, 3, "x", {"a": 0})),
    *({"model": one} for one in (None, 3, "Entry not found", [])),
    *(
        _vocabulary("BPE", {"a": 0}) | {"added_tokens": one}
        for one in (None, {}, [3], [TOKEN], [{**TOKEN, "id": -1}], [{**TOKEN, "id": "1"}])
    ),
]
TOKENIZERS = [
    *(_vocabulary(type_, {"a": 0, "b": one}) for type_ in MAPPED for one in (0, 7)),
    *(_vocabulary(type_, {}) for type_ in MAPPED),
    *(_vocabulary("Unigram", [["a", 0.0], one]) for one in (["b", -1], ["a", 2.5])),
    _vocabulary("Unigram", []),
    _vocabulary("BPE", {"a": 0}) | {"added_tokens": [{**TOKEN, "id": 3}]},
    _vocabulary("BPE", {"a": 0}),
]


def test_what_is_not_a_tokenizer_is_refused(write_llama, planned, run: Run, tmp_path: Path) -> None:
    source, out = write_llama(), tmp_path / "out"
    build(*planned(source), out=out)
    (out / "policyc.json").unlink()
    for document in NO_TOKENIZERS:
        for folder in (source, out):
            (folder / "tokenizer.json").write_text(json.dumps(document))
        said = run("plan", "mlx_affine", source, 2)
        assert "error[bad-source-json]: tokenizer.json: its " in said, document
        codes = {found.code for found in verify_bundle(out, jobs=1).findings}
        assert "bad-source-json" in codes, document


def test_unusual_tokenizers_are_taken(write_llama, run: Run) -> None:
    source = write_llama()
    for document in TOKENIZERS:
        (source / "tokenizer.json").write_text(json.dumps(document))
        assert "bad-source-json" not in run("plan", "mlx_affine", source, 0), document


def test_tokens_without_ids_are_one_finding(write_llama, run: Run) -> None:
    source = write_llama()
    vocabulary = _vocabulary("BPE", dict.fromkeys("abcde"))
    (source / "tokenizer.json").write_text(json.dumps(vocabulary))
    said = run("plan", "mlx_affine", source, 2)
    told = 'its vocab has 5 tokens without a whole number from 0 as id: "a": null, "b": null, "c"'
    assert told in said


@pytest.mark.slow
def test_the_tokenizers_library_refuses_the_same() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    for document in TOKENIZERS:
        tokenizers.Tokenizer.from_str(json.dumps(document))
    for document in NO_TOKENIZERS:
        with pytest.raises(Exception, match=r"expected|untagged|missing"):
            tokenizers.Tokenizer.from_str(json.dumps(document))


@pytest.mark.parametrize("recorded", [True, False])
def test_verify_names_side_files_that_a_bundle_lost(
    write_llama, planned, tmp_path: Path, recorded: bool
) -> None:
    source, out = write_llama(), tmp_path / "out"
    (source / "tokenizer_config.json").write_text("{}")
    build(*planned(source), out=out)
    assert verify_bundle(out, jobs=1).findings == ()
    if not recorded:
        (out / "policyc.json").unlink()
    (out / "tokenizer_config.json").write_bytes(POINTER)
    report = verify_bundle(out, jobs=1)
    assert not report.ok
    assert "not-the-file" in {found.code for found in report.findings}
    (out / "tokenizer_config.json").write_text("{}")
    (out / "tokenizer.json").unlink()
    report = verify_bundle(out, jobs=1)
    codes = {found.code for found in report.findings}
    assert ("no-tokenizer" in codes) != recorded
    assert ("missing-bundle-file" in codes) == recorded
    assert report.ok != recorded
