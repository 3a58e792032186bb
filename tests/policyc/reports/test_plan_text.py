"""A plan as text, markdown and JSON, from a hand-made plan of a small mixture of experts."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from policy_dsl.diagnostics import PolicyError, SourceText, Span, diagnostic
from policy_dsl.inventory import TensorInfo
from policy_dsl.plan import Module, Omission, OmittedFile, Plan, PlannedFile, PlannedTensor, Refusal
from policy_dsl.planning.assertions import TestResult
from policy_dsl.planning.outline import Outline, outline
from policy_dsl.policy import All, Policy, Rule
from policy_dsl.quantities import both_units, layer_list, signed_bytes
from policy_dsl.roles.architecture import architecture
from policy_dsl.roles.config_facts import ConfigFacts
from policy_dsl.roles.model import Model, ModelTensor
from policy_dsl.treatments import KEEP, Coded, Plain
from policy_dsl.views import View
from policyc.reports import render_markdown, render_text
from policyc.reports.plan_json import document_text, plan_document, read_saved_plan, saved_document
from policyc.reports.plan_report import plan_blocks

SNAPSHOTS = Path(__file__).parent / "snapshots"
ROLES = {"router": "block_sparse_moe.gate", "attention.q_proj": "self_attn.q_proj"}


def source(name: str, dtype: str, *shape: int) -> TensorInfo:
    width = {"F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]
    nbytes = width
    for size in shape:
        nbytes *= size
    return TensorInfo(name, dtype, shape, nbytes, "model.safetensors")


def module(role: str, layer: int, bits: int | None, rule: int | None) -> Module:
    """q_proj [128, 256] from FP8, or a kept router [8, 256] from F32."""
    name = f"model.layers.{layer}.{ROLES[role]}"
    scale = None
    if bits is None:
        given = source(f"{name}.weight", "F32", 8, 256)
        treatment = Plain("BF16")
        parts = [("weight", "BF16", (8, 256), 4096)]
    else:
        given = source(f"{name}.weight", "F8_E4M3", 128, 256)
        scale = source(f"{name}.weight_scale_inv", "F32", 1, 2)
        treatment = Coded("affine", bits, 64, False, "rtn")
        parts = [
            ("weight", "U32", (128, 256 * bits // 32), 128 * 32 * bits),
            ("scales", "BF16", (128, 4), 1024),
            ("biases", "BF16", (128, 4), 1024),
        ]
    tensors = tuple(
        PlannedTensor(f"{name}.{part}", part, dtype, shape, nbytes, "model.safetensors", 0)
        for part, dtype, shape, nbytes in parts
    )
    rows = View(given, scale)
    parameters = given.shape[0] * given.shape[1]
    return Module(
        *(name, role, layer, treatment, given.shape, "BF16", (rows,), tensors, parameters),
        decided_by=rule,
        written="keep" if bits is None else "quantize",
    )


def small_plan() -> Plan:
    text = SourceText("a.yaml", "name: a\ntarget: mlx_affine\nrules: |\n  a: 3bit\n  b: 8bit\n")
    starts = [text.text.index(rule) for rule in ("a: 3bit", "b: 8bit")]
    rules = tuple(Rule(All(), KEEP, span=Span(text, start, start + 7)) for start in starts)
    modules = []
    for layer in range(4):
        edge = layer in (0, 3)
        modules.append(module("attention.q_proj", layer, 8 if edge else 3, int(edge)))
        modules.append(module("router", layer, None, None))
    tensors = tuple(
        ModelTensor(one.sources[0].tensor, one.role, None, None, one.layer, None, one.shape)
        for one in modules
    )
    facts = ConfigFacts({}, architecture("minimax_m2"), n_layers=4, n_experts=8)
    mtp = source("model.layers.4.self_attn.q_proj.weight", "BF16", 128, 256)
    return Plan(
        policy=Policy(name="a", description="a small policy", rules=rules),
        policy_digest="0123456789abcdef" * 4,
        target="mlx_affine",
        model=Model("tiny", facts, False, tensors),
        source_digest="fedcba9876543210" * 4,
        source_nbytes=4 * (32768 + 8 + 8192) + 65536,
        modules=tuple(modules),
        omitted=(Omission(mtp, "mtp.attention.q_proj", None, "mlx_affine has no MTP blocks"),),
        files=(
            PlannedFile("model.safetensors", "tensors", 122_000),
            PlannedFile("config.json", "metadata", 1_200),
            PlannedFile("tokenizer.json", "copied", None, "the source's side files are not known"),
        ),
        omitted_files=(
            OmittedFile("README.md", 2_000, "readers of the model do not need it"),
            OmittedFile("model.gguf", 90_000, "it holds weights in another form"),
            OmittedFile("onnx/", None, "folders are not copied"),
            OmittedFile("photo.png", 1_000, "readers of the model do not need it"),
        ),
        fp8_rule="bf16",
        pending=("imatrix: run `policyc calibrate`",),
        findings=(diagnostic("router-quantized", routers="4 routers"),),
    )


TESTS = (TestResult("bpw <= 9", "6.1234", True), TestResult("router is drop", "keep", False))


def matches_snapshot(name: str, text: str) -> bool:
    path = SNAPSHOTS / name
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.write_text(text, encoding="utf-8")
    return text == path.read_text(encoding="utf-8")


def test_text() -> None:
    assert matches_snapshot("plan.txt", render_text(plan_blocks(small_plan(), TESTS, tensors=True)))


def test_markdown() -> None:
    assert matches_snapshot("plan.md", render_markdown(plan_blocks(small_plan(), TESTS)))


def test_document() -> None:
    text = document_text(plan_document(small_plan(), TESTS))
    assert matches_snapshot("plan.json", text)
    assert json.loads(text) == plan_document(small_plan(), TESTS)


def test_tables_lose_columns_to_fit_the_width() -> None:
    blocks = plan_blocks(small_plan())
    wide, narrow = render_text(blocks), render_text(blocks, width=60)
    table = narrow[narrow.index("Quantized") : narrow.index("Totals")]
    assert max(map(len, table.splitlines())) <= 60 < max(map(len, wide.splitlines()))
    assert "treatment" in table
    assert "parameters" not in table


def test_readers_that_refuse_for_one_reason_share_a_line() -> None:
    found = (("mlx-lm", "too old"), ("mlx-swift-lm", "too old"), ("vllm", "too new"))
    plan = replace(small_plan(), refusals=tuple(Refusal("", *each) for each in found))
    assert "  mlx-lm, mlx-swift-lm: too old\n  vllm: too new\n" in render_text(plan_blocks(plan))


def test_parameters_count_weights_once_and_no_scales() -> None:
    document = plan_document(small_plan())
    assert document["model"]["parameters"] == 4 * (128 * 256 + 8 * 256)
    assert sum(row["parameters"] for row in document["tensors"]) == 4 * (128 * 256 + 8 * 256)
    totals = document["totals"]
    assert totals["bpw"] == 8 * totals["tensor_nbytes"] / document["model"]["parameters"]


def test_file_bytes_are_exact_or_null_with_the_reason() -> None:
    plan = small_plan()
    unknown = plan_document(plan)["totals"]
    assert unknown["file_nbytes"] is None
    assert unknown["file_nbytes_unknown_because"] == "the source's side files are not known"
    known = plan_document(replace(plan, files=plan.files[:2]))["totals"]
    assert known["file_nbytes"] == 123_200


def read_back(text: str, folder: Path) -> Outline:
    path = folder / "plan.json"
    path.write_text(text, encoding="utf-8")
    return read_saved_plan(path)


def test_a_saved_plan_reads_back_as_the_same_outline(tmp_path: Path) -> None:
    plan = small_plan()
    for document in (plan_document(plan), saved_document(plan)):
        saved = read_back(document_text(document), tmp_path)
        assert saved.modules == outline(plan).modules


def test_a_saved_plan_says_once_what_modules_share() -> None:
    text = document_text(saved_document(small_plan(), TESTS))
    assert matches_snapshot("saved.json", text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "not a plan"),
        ('{"kind": "diff"}', "not a plan"),
        ('{"kind": "plan", "schema_version": 9}', "schema_version is 9"),
        ('{"kind": "plan", "schema_version": 1}', "without --tensors"),
        ('{"kind": "plan", "schema_version": 1, "tensors": [{}]}', "missing"),
        ('{"kind": "plan", "schema_version": 1, "tensors": 7}', "wrong type"),
    ],
)
def test_what_is_no_saved_plan_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(PolicyError, match="bad-saved-plan") as caught:
        read_back(text, tmp_path)
    assert reason in str(caught.value)


PRUNED = {"prune": "experts", "by": "reap", "before": 8, "to": 6, "layers": 6, "kept": None}


def test_a_plan_that_was_saved_by_an_older_version_reads_back(tmp_path: Path) -> None:
    document = plan_document(small_plan())
    del document["transforms"], document["model"]["experts_added"]
    found = read_back(document_text(document), tmp_path)
    assert (found.pruning, found.experts) == (None, document["model"]["experts"])


@pytest.mark.parametrize(
    "changed",
    [
        *({"layers": count} for count in (0, -1, 10**30, "6", None)),
        *({"to": count} for count in (10**30, "6", None)),
        *({"before": count} for count in (float("inf"), float("nan"), None)),
        *({"kept": kept} for kept in ({}, [], {"x": [1]}, {"0": 1}, {"0": [float("inf")]})),
    ],
)
def test_what_no_plan_says_of_pruning_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    document = plan_document(small_plan())
    document["transforms"] = [{**PRUNED, **changed}]
    with pytest.raises(PolicyError, match="bad-saved-plan"):
        read_back(document_text(document), tmp_path)
    document["transforms"] = [PRUNED]
    assert read_back(document_text(document), tmp_path).pruning is not None


def test_sizes_are_printed_in_both_units() -> None:
    assert both_units(92_870_000_000) == "92.87 GB = 86.49 GiB"
    assert both_units(999) == "999 bytes"
    assert signed_bytes(-12_310_000_000) == "-12.31 GB"


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([], "-"),
        ([3], "3"),
        (range(2, 60), "2-59"),
        ([0, 1, 60, 61], "0-1,60-61"),
        ([0, 2, 4], "0,2,4"),
        ([*range(8), *range(10, 53, 3), *range(54, 62)], "0-7,10,13,…,52,54-61"),
        ([i for i in range(7, 54) if i % 3 != 0], "7-8,10-11,…,52-53"),
        ([*range(7), *(i for i in range(8, 30) if i % 3), 40], "0-6,8,10-11,13-14,…,28-29,40"),
    ],
)
def test_layers_are_compressed(layers: list[int], text: str) -> None:
    assert layer_list(layers) == text
