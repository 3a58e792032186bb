"""A format in one file: planned, built, verified and decoded without another file touched.

Int8 codes and a float32 scale for each row, in safetensors; experts are stacks.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from emitters.checkpoints import CONFIG, INDEX, document, index, written
from emitters.core.build import build
from emitters.core.bundle_reading import open_bundle
from emitters.core.decoding import Decoder
from emitters.core.verify import verify_bundle
from emitters.numerics import Array
from emitters.tensor_io.imatrix import open_imatrix
from policy_dsl.diagnostics import PolicyError
from policy_dsl.formats import (
    Claim,
    Codec,
    Context,
    FileContents,
    Files,
    Format,
    FormatSpec,
    Forms,
    Method,
    Parts,
    PartShape,
    Review,
    SchemeSpec,
    Shards,
    Slack,
    Solver,
    Statistics,
    in_order,
)
from policy_dsl.language.load import parse_policy
from policy_dsl.plan import Draft, Module, Plan, Refusal, coded_modules
from policy_dsl.planning.resolve import resolve
from policy_dsl.policy import Words
from policy_dsl.roles.classify import Model, ModelTensor, classify
from policy_dsl.roles.model import stacked_path
from policy_dsl.sources.checkpoint import shard_name
from policy_dsl.sources.side_files import SIDE_FILES
from policy_dsl.treatments import Coded, Plain, Stored
from tests.models import IMATRIX, tiny

ROOT = Path(__file__).parents[2]
NAME, TOP = "int8_rows", 127
WORDS = Words(targets=(NAME,), schemes=("int8",), methods=("rtn", "weighted"))
GATES = "model.layers.1.block_sparse_moe.experts.gate_proj"
POLICY = f"target {NAME}\nattention, lm_head: 8bit int8\nexperts: 8bit int8 by {{method}}\n"


def part_shapes(treatment: Stored, shape: tuple[int, ...], dtype: str) -> tuple[PartShape, ...]:
    if isinstance(treatment, Plain):
        return (PartShape("weight", dtype, shape),)
    return PartShape("weight", "I8", shape), PartShape("scale", "F32", shape[:-1])


def module_path(tensor: ModelTensor, model: Model) -> str:
    return stacked_path(tensor, model, "experts")


def plain_dtype(tensor: ModelTensor, model: Model) -> str:
    return "BF16"


def encode(values: Array, dtype: str, treatment: Coded, kept: object = None) -> dict[str, Array]:
    scale = np.maximum(np.abs(values).max(axis=1), np.float32(1e-30)) / np.float32(TOP)
    codes = np.rint(values / scale[:, None]).astype(np.int8)
    return {"weight": codes, "scale": scale.reshape(-1, 1)}


def decode(parts: Parts, dtype: str, treatment: Coded, columns: int) -> Array:
    codes = parts["weight"].view(np.int8).reshape(-1, columns).astype(np.float32)
    scale: Array = parts["scale"].reshape(-1, 1)
    return codes * scale


def beyond(values: Array, parts: Parts, dtype: str, treatment: Coded, slack: Slack) -> Array:
    decoded = decode(parts, dtype, treatment, values.shape[1])
    step = parts["scale"].reshape(-1, 1)
    rounded = slack.relative * np.abs(values) + slack.floor
    far: Array = np.abs(values - decoded) > step * np.float32(0.501) + rounded
    return far


def metadata(plan: Plan) -> dict[str, bytes]:
    coded = [module.name for module, _ in coded_modules(plan.modules)]
    about = {"quant_method": NAME, "modules": coded}
    config = {**plan.model.config, "quantization_config": about}
    return {CONFIG: written(config), INDEX: written(index(in_order(plan.modules)))}


def claims(files: FileContents, forms: Forms) -> dict[str, Claim]:
    about = document(files, CONFIG).get("quantization_config")
    if not isinstance(about, Mapping) or about.get("quant_method") != NAME:
        raise ValueError("another format's")
    coded = Coded("int8", 8, 0, True, "")
    return {name: Claim(coded, forms[name]["weight"][1], "F32") for name in about["modules"]}


def left_out(tensor: ModelTensor, model: Model) -> str | None:
    return None


def held(tensor: ModelTensor, model: Model, stored: Stored) -> str | None:
    coded = isinstance(stored, Coded)
    return "its reader looks routers up as they are" if coded and tensor.role == "router" else None


def bundle(draft: Draft) -> Iterator[Refusal]:
    if not any(module.role == "lm_head" for module, _ in coded_modules(draft.modules)):
        yield Refusal("lm_head", "int8-reader", "it has no plain head", "warning")


class Weights:
    """What a context computed. importance: float32 [in]. All that are alive are in `alive`."""

    alive: ClassVar[weakref.WeakSet[Weights]] = weakref.WeakSet()
    seen: ClassVar[dict[tuple[str, int], Array]] = {}
    most = 0

    def __init__(self, importance: Array) -> None:
        self.importance = importance
        Weights.alive.add(self)
        Weights.most = max(Weights.most, len(Weights.alive))


def context(plan: Plan, module: Module, source: int, statistics: Statistics) -> Context:
    importance = statistics.of_matrix(module, source)
    Weights.seen[module.name, source] = importance
    return Context(partial(encode, kept=Weights(importance)))


FORMAT = Format(
    spec=FormatSpec(
        name=NAME,
        about="a byte for each weight",
        schemes=(
            SchemeSpec("int8", (8,), (), ("rtn", "weighted"), symmetries=(True,), values="F32"),
        ),
        fill=(("any", 8, "int8"),),
        plain_dtypes=("BF16", "F32"),
        plain_dtype=plain_dtype,
        fp8_rules=("f32",),
        families={"minimax_m2": None},
        runtimes={"int8-reader": "this file"},
        module_path=module_path,
        part_shapes=part_shapes,
        tensor_files=Shards(2**20, shard_name),
        copied_files=SIDE_FILES,
        metadata_files=(CONFIG,),
        settings=("calibration.imatrix",),
    ),
    codec=lambda: Codec(encode, decode, beyond),
    files=lambda: Files(metadata=metadata, claims=claims),
    review=Review(left_out=left_out, held=held, bundle=bundle),
    methods={"rtn": Method(), "weighted": Method(uses="imatrix", solver=lambda: Solver(context))},
)
FORMATS = {NAME: FORMAT}


def planned(text: str, **statistics: str) -> Plan:
    policy, _ = parse_policy(text, "p.qpol", words=WORDS)
    return resolve(policy, tiny(), FORMATS, statistics=statistics)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the embedded model."""
    out = tmp_path_factory.mktemp("fifth") / "bundle"
    source = tiny()
    plan = planned(POLICY.format(method="rtn"))
    with pytest.raises(PolicyError, match="unavailable-target"):
        build(plan, source, out=out)
    build(plan, source, out=out, format=FORMAT)
    return out


def test_it_is_built_and_every_value_of_it_verified(folder: Path) -> None:
    report = verify_bundle(folder, tiny(), jobs=2, formats=FORMATS)
    assert report.ok
    assert report.errors
    assert {check.result for check in report.checks} <= {"passed", "not possible"}


@pytest.mark.parametrize("recorded", [True, False])
def test_it_is_decoded_with_and_without_its_record(folder: Path, recorded: bool) -> None:
    record = folder / "policyc.json"
    hidden = record.rename(folder.parent / "policyc.json") if not recorded else None
    try:
        opened = open_bundle(folder, formats=FORMATS)
        (gates,) = [module for module in opened.modules if module.name == GATES]
        values = Decoder(opened).rows(gates, 0, 4)
    finally:
        if hidden:
            hidden.rename(record)
    assert isinstance(gates.treatment, Coded)
    assert values.shape == (4, gates.shape[-1])
    assert np.abs(values).max() > 0


def test_a_wrong_scale_is_found(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    kept = dict(config["quantization_config"])
    config["quantization_config"] = {**kept, "modules": kept["modules"][1:]}
    (folder / CONFIG).write_text(json.dumps(config))
    report = verify_bundle(folder, jobs=1, formats=FORMATS)
    (folder / CONFIG).write_bytes(written({**config, "quantization_config": kept}))
    assert "width-disagrees" in {finding.code for finding in report.findings}


def test_readers_are_asked_of_a_plan_and_without_one() -> None:
    plan = planned(f"target {NAME}\nattention: 8bit int8\n")
    assert [(one.subject, one.severity) for one in plan.refusals] == [("lm_head", "warning")]
    with pytest.raises(PolicyError, match="looks routers up"):
        planned(f"target {NAME}\nrouter: 8bit int8\n")
    judge = FORMAT.review.judge(classify(tiny()))
    coded = Coded("int8", 8, 0, True, "rtn")
    assert judge("experts.up_proj", 1, coded) is None
    refusal = judge("router", 1, coded)
    assert refusal is not None
    assert refusal.severity == "error"


def test_experts_of_a_stack_have_their_own_statistics_and_few_are_alive(tmp_path: Path) -> None:
    plan = planned(POLICY.format(method="weighted"), imatrix=str(IMATRIX))
    assert plan.pending == ()
    Weights.seen.clear()
    build(plan, tiny(), out=tmp_path / "out", jobs=2, format=FORMAT)
    imatrix, experts = open_imatrix(IMATRIX), plan.model.n_experts
    (gates,) = [module for module in plan.modules if module.name == GATES]
    sums = imatrix.sums(
        gates.role, gates.layer, n_matrices=experts, columns=gates.shape[-1]
    ).importance()
    for expert in range(experts):
        assert (Weights.seen[GATES, expert] == sums[expert]).all()
    assert (Weights.seen[GATES, 0] != Weights.seen[GATES, 1]).any()
    # Two units a worker are in flight, and one matrix is being checked or taken up.
    assert len(Weights.seen) > 20
    assert 0 < Weights.most <= 2 * 2 + 2
