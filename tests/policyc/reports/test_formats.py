"""What `policyc formats` tells is what policies are held to."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from emitters import FORMATS
from policy_dsl.diagnostics import SourceText
from policy_dsl.language.draft import FIELDS
from policy_dsl.language.read_dsl import read_dsl
from policy_dsl.planning.fill import fill
from policy_dsl.planning.lint import setting_findings
from policy_dsl.policy import SCHEMES, WORDS, Defaults
from policy_dsl.treatments import Coded, Written
from policyc.cli import main

SETTINGS = {
    **{f"output.{name}": "x" for name in FIELDS["output"]},
    **{f"calibration.{name}": "x" for name in FIELDS["calibration"]},
    "output.pad_experts": "true",
    "output.shard_size": "1GiB",
    "calibration.awq_alpha": "0.5",
    "calibration.awq_scales": "exact",
    "calibration.samples": "1",
    "calibration.sequence_length": "1",
}


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON of each target, by its name."""
    assert main(["formats", "--format", "json"]) == 0
    return {one["name"]: one for one in json.loads(capsys.readouterr().out)["formats"]}


def unused(target: str, statement: str) -> bool:
    """Whether a statement changes nothing for a target, by the findings about it."""
    policy = read_dsl(SourceText("p.qpol", f"target {target}\n{statement}\n"), "p")
    found = setting_findings(policy, FORMATS[target].spec, FORMATS)
    return "unused-setting" in {each.code for each in found}


def test_the_words_of_policies_are_those_of_the_formats() -> None:
    schemes = {name: {one.name for one in FORMATS[name].spec.schemes} for name in FORMATS}
    assert set(WORDS.targets) == set(FORMATS)
    assert set(WORDS.schemes) == set.union(*schemes.values())
    assert {name: set(SCHEMES[name]) for name in SCHEMES} == schemes


@pytest.mark.parametrize("target", [*FORMATS])
def test_settings_that_are_told_are_those_that_count(target: str, told: dict[str, Any]) -> None:
    used = set(told[target]["settings"])
    for setting, value in SETTINGS.items():
        assert unused(target, f"{setting.replace('.', ' ')} {value}") == (setting not in used)


@pytest.mark.parametrize("target", [*FORMATS])
def test_metadata_values_are_told_as_they_are_checked(target: str, told: dict[str, Any]) -> None:
    values = [True, "gptq", "qwen3", "kv", "text", 3, None, {"name": "x"}, {"nome": "x"}]
    for key, schema in told[target]["metadata"].items():
        for value in values:
            statement = f"metadata {key} {json.dumps(value)}"
            policy = read_dsl(SourceText("p.qpol", statement), "p")
            refused = setting_findings(policy, FORMATS[target].spec, FORMATS)
            assert not unused(target, statement)
            fits = jsonschema.Draft202012Validator(schema).is_valid(value)
            assert fits == (refused == []), (key, value)


@pytest.mark.parametrize("target", [*FORMATS])
def test_symmetries_that_are_told_can_be_written(target: str, told: dict[str, Any]) -> None:
    for scheme in told[target]["schemes"]:
        for word, symmetric in (("sym", True), ("asym", False)):
            written = Written("quantize", scheme["bits"][0], scheme["name"], symmetric=symmetric)
            taken = isinstance(fill(written, "any", Defaults(), FORMATS[target].spec), Coded)
            assert taken == (word in scheme["symmetric_choices"])


def test_methods_say_what_they_need(told: dict[str, Any]) -> None:
    def needs(target: str) -> dict[str, tuple[str | None, bool]]:
        return {one["name"]: (one["statistics"], one["needed"]) for one in told[target]["methods"]}

    assert needs("hipfire_hfq") == {"rtn": (None, False), "awq": ("imatrix", True)}
    assert needs("gptq")["opt-rtn"] == ("imatrix", False)


def test_text_tells_them_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats", "jangtq_prestack"]) == 0
    shown = capsys.readouterr().out
    assert "prestacked, per_expert (`output layout`; the first is the default)" in shown
    assert "experts of minimax_m2, up to a multiple of 32" in shown
    assert "cache_type: hybrid, kv, mamba, mla" in shown
    assert main(["formats", "hipfire_hfq"]) == 0
    assert "awq: needs imatrix" in capsys.readouterr().out
    assert main(["formats", "gptq"]) == 0
    assert "sym, asym" in capsys.readouterr().out
