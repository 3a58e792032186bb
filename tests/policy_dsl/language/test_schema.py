"""The JSON Schema accepts what the YAML reader accepts, and refuses what it can tell."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from policy_dsl import room
from policy_dsl.diagnostics import PolicyError, SourceText
from policy_dsl.language.draft import FIELDS, SCHEMA
from policy_dsl.language.load import read_source
from policy_dsl.language.print_policy import print_yaml
from policy_dsl.language.read_yaml import YAML_KEYS, read_yaml
from policy_dsl.policy import SECTIONS

BUNDLED = sorted(room("policies").glob("*.yaml"))
EVERY_KEY = """\
name: x
description: d
model: m
target: mlx_affine
targets: {gptq: {rules: ["embed: 8bit"]}, mlx_affine: }
extends: [mlx_4bit]
vars: {a: 1, b: 1.5, c: text, d: true}
defaults: {scheme: affine, bits: 4, group_size: 64, symmetric: false, otherwise: keep}
transforms: [prune experts to 8 by reap]
calibration: {imatrix: a.gguf, samples: 8, sequence_length: 512}
rules:
  - "all: 4bit"
  - lm_head: 8bit
  - {match: experts.down_proj, layers: [0-3, 7], bits: 3, symmetric: true, optional: true}
output: {shard_size: 5GiB, file_name: model.hfq, layout: flat}
fp8_dequant: f32
metadata: {licence: mit, card: {a: [1, null, true]}}
runtimes: mlx-lm
allow: [router-quantized]
tests: [bpw <= 3.3]
"""


def defects(text: str) -> list[str]:
    validator = Draft202012Validator(SCHEMA)
    return [error.message for error in validator.iter_errors(yaml.safe_load(text))]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_has_the_fields_of_its_type(section: str) -> None:
    assert list(FIELDS[section]) == [field.name for field in fields(SECTIONS[section])]


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_every_bundled_policy_fits_as_written_and_as_printed(path: Path) -> None:
    text = read_source(path).text
    assert defects(text) == []
    assert defects(print_yaml(read_yaml(SourceText(path.name, text), path.stem))) == []


def test_every_key_fits_and_is_read() -> None:
    assert defects(EVERY_KEY) == []
    policy = read_yaml(SourceText("p", EVERY_KEY), "p")
    assert policy.targets == ("mlx_affine", "gptq")
    assert defects(print_yaml(policy)) == []
    assert set(yaml.safe_load(EVERY_KEY)) == set(YAML_KEYS)


@pytest.mark.parametrize(
    "fields", ["to: 8", "to: 8, by: reap", "keep: 3", "keep: 0-5", 'keep: "0-5,7"']
)
def test_a_transform_may_be_a_mapping(fields: str) -> None:
    text = f"transforms: [{{prune: experts, {fields}}}]"
    assert defects(text) == []
    assert len(read_yaml(SourceText("p", text), "p").transforms) == 1


@pytest.mark.parametrize(
    "text",
    [
        'description: ""',
        "runtimes: []",
        "metadata: {}",
        "defaults: {}",
        "tests: {replace: []}",
        "tests: {replace: [bpw <= 3.3]}",
    ],
)
def test_what_is_extended_can_be_cleared(text: str) -> None:
    assert defects(text) == []
    policy = read_yaml(SourceText("p", text), "p")
    assert policy.cleared
    assert defects(print_yaml(policy)) == []


@pytest.mark.parametrize(
    "text",
    [
        "nmae: x",
        "name: [x]",
        "defaults: {groupsize: 64}",
        "defaults: {bits: 40}",
        "rules: {down_proj: 4bit}",
        "rules: [[a]]",
        "transforms: [{prune: experts}]",
        "transforms: [{to: 8}]",
        "transforms: [{prune: experts, to: 8, keep: 3}]",
        "transforms: [{prune: experts, keep: 0-5, by: reap}]",
        "vars: {a: [1]}",
        "targets: {gptq: {rule: x}}",
        "tests: bpw",
        "tests: {}",
        "tests: {replaced: []}",
        "tests: {replace: bpw}",
    ],
)
def test_what_the_schema_refuses_the_reader_refuses_too(text: str) -> None:
    assert defects(text) != []
    with pytest.raises(PolicyError):
        read_yaml(SourceText("p", text), "p")
