"""The YAML form of a policy as types: which keys there are and what they hold.

`read_yaml` takes the names of keys and fields from here, `schema` the whole.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from policy_dsl.policy import Calibration, Defaults, GroupSize, Output, Part, Scalar
from policy_dsl.treatments import MAX_BITS


class RuleFields(Part):
    """A rule as a mapping of fields; the treatment is in `treatment` or in the other fields."""

    match: str = Field(description="selector, such as experts.down_proj")
    layers: int | str | list[int | str] | None = Field(
        None, description="layers such as 2-59, -2..-1, where i < 4, boundary 2, middle"
    )
    treatment: str | None = Field(None, description="treatment words, such as 4bit affine g64")
    bits: int | None = Field(None, ge=1, le=MAX_BITS, description="width of the codes")
    scheme: str | None = Field(None, description="how numbers are stored")
    group_size: GroupSize = Field(None, description="elements of a group; -1 for whole rows")
    symmetric: bool | None = Field(None, description="symmetric groups")
    method: str | None = Field(None, description="how codes are chosen")
    dtype: str | None = Field(None, description="plain dtype: f16, bf16 or f32")
    optional: bool | None = Field(None, description="the rule may match nothing")


Rules = str | list[str | RuleFields | dict[str, str]]


class TargetRules(Part):
    """What a policy says for one target alone."""

    rules: Rules | None = Field(None, description="appended to the rules for this target")


class DefaultFields(Defaults):
    """`defaults`, its `otherwise` as treatment words."""

    otherwise: str | None = Field(  # type: ignore[assignment]
        None, description="treatment of tensors that no rule reaches, such as keep"
    )


class PruneFields(Part):
    """A transform as a mapping."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["to"], "properties": {"keep": False}},
                {"required": ["keep"], "properties": {"to": False, "by": False}},
            ]
        }
    )

    component: Literal["experts"] = Field(alias="prune", description="what")
    to: int | None = Field(None, ge=1, description="experts that stay in every layer")
    by: str | None = Field(None, description="saliency that ranks the experts; reap")
    keep: int | str | None = Field(None, description="the experts that stay, such as 0-5,7")


class ReplacedTests(Part):
    """`tests` that take the place of those of the policies that are extended."""

    replace: list[str] = Field(description="the only tests; an empty list for none")


class Document(Part):
    """A quantization policy."""

    name: str | None = Field(None, description="name of the policy; the file's if absent")
    description: str | None = Field(None, description="what the policy is for")
    model: str | None = Field(None, description="default source: path, hub id or catalog name")
    target: str | None = Field(None, description="the bundle format")
    targets: list[str] | dict[str, TargetRules | None] | None = Field(
        None, description="bundle formats, with the rules that each adds"
    )
    extends: str | list[str] | None = Field(
        None, description="policies whose rules come first: files or bundled names"
    )
    vars: dict[str, Scalar] | None = Field(None, description="values for ${name}")
    defaults: DefaultFields | None = Field(None, description="what fills gaps in treatments")
    transforms: list[str | PruneFields] | None = Field(
        None, description="changes of the model, such as: prune experts to 192 by reap"
    )
    calibration: Calibration | None = Field(None, description="where statistics come from")
    rules: Rules | None = Field(None, description="selector: treatment; the last match decides")
    output: Output | None = Field(None, description="how the bundle is laid out")
    fp8_dequant: str | None = Field(None, description="how FP8 is rounded when dequantized")
    metadata: dict[str, Any] | None = Field(None, description="what the bundle's card says")
    runtimes: str | list[str] | None = Field(None, description="readers the author cares about")
    tests: list[str] | ReplacedTests | None = Field(
        None, description="assertions, such as: bpw <= 3.3; added to those of extended policies"
    )
