"""Every reader of documents gives a value or a PolicyError, whatever a stranger wrote.

`benchmarks/fuzz_trials.py` asks the commands the same, of many more documents at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import fuzz_mutations as change
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoints import llama_config, llama_tensors, write_folder

from emitters.core.bundle_reading import bundle_outline
from emitters.core.verify import verify_bundle
from emitters.tensor_io.imatrix import open_imatrix
from policy_dsl.diagnostics import PolicyError
from policy_dsl.language.load import load, parse_policy
from policy_dsl.language.print_policy import print_yaml
from policy_dsl.planning.record import record_digest
from policy_dsl.sources.reference import open_source
from policy_dsl.sources.saliency import ModelShape, read_saliency
from policyc.cli import main as policyc
from policyc.reports import render_text
from policyc.reports.bundle_report import verify_blocks
from policyc.reports.inspect_report import outline_blocks, survey, survey_blocks
from policyc.reports.plan_json import read_saved_plan
from policyc.workflow import plan_for
from tests.models import DATA

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
POLICIES = sorted((ROOT / "policies").glob("*.yaml"))
SIZES = {"layers": 2, "hidden": 64, "inner": 128, "vocabulary": 96}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 2, "content": "</s>", "special": True}],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 3}, "merges": ["a b"]},
}
# Of the embedded model, which the statistics are of.
SHAPE = ModelShape(tuple(range(6)), 6, 8)
Change = Callable[[Random, bytes], bytes]


@dataclass(frozen=True)
class Document:
    """A file of a whole folder, how it is broken, and who reads it. ask: gets the folder."""

    folder: Path
    file: str
    change: Change
    ask: Callable[[Path], object]


def broken(whole: bytes, how: Change) -> st.SearchStrategy[bytes]:
    """The document with a few of its fields replaced, gone, renamed, doubled or altered."""
    return st.randoms(use_true_random=False).map(lambda random: how(random, whole))


def ask_source(folder: Path) -> str:
    """Everything that is read of a checkpoint: its headers, roles, plans and side files."""
    inventory = open_source(str(folder))
    shown = render_text(survey_blocks(survey(inventory)))
    for target in ("mlx_affine", "gptq", "hipfire_hfq", "jangtq_prestack"):
        policy = load(folder.parent / f"{target}.qpol")
        with contextlib.suppress(PolicyError):
            plan_for(policy, inventory, None, allow_requantize=True)
    return shown


def ask_bundle(folder: Path) -> str:
    """What is read of a bundle by verify, inspect and diff."""
    shown = render_text(verify_blocks(verify_bundle(folder, jobs=1)))
    return shown + render_text(outline_blocks(bundle_outline(folder)))


def rebuilt_record(random: Random, whole: bytes) -> bytes:
    """Another record with the digest that it has, if it can have one."""
    text = change.changed_json(random, whole)
    try:
        document = json.loads(text)
        return json.dumps({**document, "digest": record_digest(document)}).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return text


def changed_policy(random: Random, whole: bytes) -> bytes:
    others = [path.read_text() for path in POLICIES]
    text = change.changed_policy(random, whole.decode(), others)
    return text.encode("utf-8", "surrogatepass")


def ask_policy(folder: Path) -> str:
    """The policy, as it was read and printed again."""
    text = (folder / "policy.yaml").read_text("utf-8", "replace")
    return print_yaml(parse_policy(text, "policy.yaml")[0])


def ask_saliency(folder: Path, file: str) -> object:
    """What ranks experts, or which are kept, by an entry."""
    found = read_saliency(folder / file, "reap")
    with contextlib.suppress(PolicyError):
        found.kept(SHAPE, 2)
    return found.ranks(SHAPE)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a bundle, a saved plan, recorded headers, a container, statistics."""
    work = tmp_path_factory.mktemp("whole")
    source = work / "source"
    write_folder(source, llama_config(**SIZES), llama_tensors(**SIZES))
    names = json.loads(_header((source / "model.safetensors").read_bytes()))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (source / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    _write_policies(work)
    model = ["--model", str(source)]
    plan = str(work / "mlx_affine.qpol")
    assert policyc(["build", plan, *model, "-o", str(work / "bundle"), "-q"]) == 0
    (work / "plans").mkdir()
    assert policyc(["plan", plan, *model, "--save", str(work / "plans" / "plan.json")]) == 0
    (work / "recorded").mkdir()
    place = str(work / "recorded" / "headers.json")
    assert policyc(["inspect", str(source), "--save-headers", place]) == 0
    (work / "saliencies").mkdir()
    rows = {"reap": [[0.5 * number for number in range(8)]] * 6, "model": "org/name"}
    (work / "saliencies" / "saliency.json").write_text(json.dumps(rows))
    shutil.copy(DATA / "reap.safetensors", work / "saliencies")
    (work / "policies").mkdir()
    shutil.copy(ROOT / "policies" / "jangtq_k.yaml", work / "policies" / "policy.yaml")
    (work / "container").mkdir()
    shutil.copy(GOLDEN / "hipfire" / "tiny-llama.mq4", work / "container" / "model.hfq")
    return work


def _header(content: bytes) -> bytes:
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def _write_policies(work: Path) -> None:
    for target, rules in {
        "mlx_affine": "all: 4bit; norm: keep",
        "gptq": "attention, mlp: 4bit g32; embed, lm_head, norm: keep",
        "hipfire_hfq": "all: hfq4; norm: f16",
        "jangtq_prestack": "all: 8bit affine; norm: f16",
    }.items():
        (work / f"{target}.qpol").write_text(f"target {target}\n{rules}\n")


def documents(work: Path) -> dict[str, Document]:
    """Every document that some reader takes."""
    source, bundle = work / "source", work / "bundle"
    jang, auto = (
        GOLDEN / "jangtq" / "micro_JANGTQ_K",
        GOLDEN / "gptq_e2e" / "autoround_w4g32_mixed",
    )
    in_json, tensors = change.changed_json, change.changed_safetensors
    kept = work / "saliencies"
    return {
        "config": Document(source, "config.json", in_json, ask_source),
        "index": Document(source, "model.safetensors.index.json", in_json, ask_source),
        "header": Document(source, "model.safetensors", tensors, ask_source),
        "tokenizer": Document(source, "tokenizer.json", in_json, ask_source),
        "tokenizer_config": Document(source, "tokenizer_config.json", in_json, ask_source),
        "generation_config": Document(source, "generation_config.json", in_json, ask_source),
        "container": Document(work / "container", "model.hfq", change.changed_hfq, ask_bundle),
        "container_source": Document(
            work / "container", "model.hfq", change.changed_hfq, ask_source
        ),
        "record": Document(bundle, "policyc.json", rebuilt_record, ask_bundle),
        "bundle_config": Document(bundle, "config.json", in_json, ask_bundle),
        "bundle_index": Document(bundle, "model.safetensors.index.json", in_json, ask_bundle),
        "jang_config": Document(jang, "jang_config.json", in_json, ask_bundle),
        "jang_runtime": Document(jang, "jangtq_runtime.safetensors", tensors, ask_bundle),
        "gptq_config": Document(auto, "config.json", in_json, ask_bundle),
        "gptq_shard": Document(auto, "model.safetensors", tensors, ask_bundle),
        "saved_plan": Document(
            work / "plans",
            "plan.json",
            in_json,
            lambda folder: render_text(outline_blocks(read_saved_plan(folder / "plan.json"))),
        ),
        "recorded": Document(
            work / "recorded",
            "headers.json",
            in_json,
            lambda folder: render_text(
                survey_blocks(survey(open_source(str(folder / "headers.json"))))
            ),
        ),
        "imatrix": Document(
            DATA, "imatrix.gguf", change.changed_bytes, lambda f: open_imatrix(f / "imatrix.gguf")
        ),
        "saliency": Document(
            kept, "saliency.json", in_json, lambda f: ask_saliency(f, "saliency.json")
        ),
        "saliency_tensors": Document(
            kept, "reap.safetensors", tensors, lambda f: ask_saliency(f, "reap.safetensors")
        ),
        "policy": Document(work / "policies", "policy.yaml", changed_policy, ask_policy),
    }


NAMES = tuple(documents(Path()))


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=40, derandomize=True)
def test_a_broken_document_is_read_or_refused(work: Path, name: str, data: st.DataObject) -> None:
    document = documents(work)[name]
    whole = (document.folder / document.file).read_bytes()
    content = data.draw(broken(whole, document.change))
    folder = work / "broken"
    # Links but for the one file: to copy weights would take most of the time.
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(document.folder, folder, copy_function=os.link)
    (folder / document.file).unlink()
    (folder / document.file).write_bytes(content)
    with contextlib.suppress(PolicyError):
        document.ask(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_document_is_read(work: Path, name: str) -> None:
    document = documents(work)[name]
    assert document.ask(document.folder) is not None


@pytest.mark.parametrize(
    ("whole", "old", "new"),
    [
        ("bundle", "layers.1.", "layers.{}."),
        ("micro_JANGTQ2_perexpert", ".experts.1.", ".experts.{}."),
        ("autoround_w4g32_mixed", ".experts.1.", ".experts.{}."),
    ],
)
@pytest.mark.parametrize("digits", ["9" * 5000, "1\u00b21", "\u0661", "99999999"])
def test_a_number_in_a_name_may_be_anything(
    work: Path, tmp_path: Path, whole: str, old: str, new: str, digits: str
) -> None:
    place = next(path for path in (work, *GOLDEN.iterdir()) if (path / whole).is_dir()) / whole
    folder = Path(shutil.copytree(place, tmp_path / "bundle"))
    for path in folder.glob("model*.safetensors"):
        content = path.read_bytes()
        entries = json.loads(_header(content))
        renamed = {name.replace(old, new.format(digits)): one for name, one in entries.items()}
        assert renamed.keys() != entries.keys()
        text = json.dumps(renamed).encode()
        data = content[8 + len(_header(content)) :]
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"num_local_experts": 4, **config}))
    for name in ("policyc.json", "model.safetensors.index.json"):
        (folder / name).unlink(missing_ok=True)
    assert not verify_bundle(folder, jobs=1).ok
    assert render_text(outline_blocks(bundle_outline(folder)))


TREATMENTS = [
    {"scheme": None},
    {"scheme": "no-such"},
    {"bits": None},
    {"bits": 64},
    {"group_size": None},
    {"group_size": 7},
    {"method": None},
    {"method": "no-such"},
]


def _record_with(folder: Path, change: Callable[[dict], object]) -> None:
    """A bundle's record, changed, with the digest that it has then."""
    record = json.loads((folder / "policyc.json").read_text())
    change(record)
    record["digest"] = record_digest(record)
    (folder / "policyc.json").write_text(json.dumps(record))


@pytest.mark.parametrize("target", ["mlx_affine", "gptq", "hipfire_hfq"])
def test_a_record_names_only_treatments_that_its_format_has(
    work: Path, tmp_path: Path, target: str
) -> None:
    folder, policy = tmp_path / "bundle", str(work / f"{target}.qpol")
    source = str(work / "source")
    assert policyc(["build", policy, "--model", source, "-o", str(folder), "-q"]) == 0
    whole = (folder / "policyc.json").read_bytes()

    def change(record: dict, other: dict) -> None:
        for form in record["forms"]:
            if form["treatment"]["action"] == "quantize":
                known = form["treatment"] | other
                form["treatment"] = {k: v for k, v in known.items() if v is not None}

    for other in TREATMENTS:
        (folder / "policyc.json").write_bytes(whole)
        _record_with(folder, lambda record, other=other: change(record, other))
        assert [one.code for one in verify_bundle(folder, jobs=1).findings] == ["bad-record"]
        with pytest.raises(PolicyError, match="bad-record"):
            bundle_outline(folder)


@pytest.mark.parametrize("target", ["mlx_affine", "gptq", "hipfire_hfq"])
def test_a_module_that_the_record_leaves_out_is_compared_without_it(
    work: Path, tmp_path: Path, target: str
) -> None:
    folder, policy = tmp_path / "bundle", str(work / f"{target}.qpol")
    source = str(work / "source")
    assert policyc(["build", policy, "--model", source, "-o", str(folder), "-q"]) == 0
    name = "model.layers.1.self_attn.q_proj"

    def drop(record: dict) -> None:
        kept = [row for row in record["modules"]["rows"] if row[0] != name]
        assert len(kept) < len(record["modules"]["rows"])
        record["modules"]["rows"] = kept

    _record_with(folder, drop)
    report = verify_bundle(folder, open_source(source), jobs=1)
    assert render_text(verify_blocks(report))


@pytest.mark.parametrize("count", [[], [2, 2], {}, {"a": 1}, "2", 2.5, -1, 10**40, True])
def test_a_count_of_experts_may_be_anything(work: Path, tmp_path: Path, count: object) -> None:
    place = GOLDEN / "jangtq" / "micro_JANGTQ2_perexpert"
    folder = Path(shutil.copytree(place, tmp_path / "bundle"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_local_experts": count}))
    report = verify_bundle(folder, open_source(str(ROOT / "examples/tiny-minimax-m2")), jobs=1)
    assert not report.ok
    assert render_text(verify_blocks(report))
