"""What is read of a saved plan, as types: the fields that a comparison needs, within bounds.

The whole document is in document_schemas/plan.json.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, RootModel

from policy_dsl.roles.config_facts import LARGEST_COUNT
from policy_dsl.sources.recorded_form import Listed, Size

Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
SomeCount = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
Layer = Annotated[int, Field(ge=0, lt=LARGEST_COUNT)]
LayerKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,4})$")]


def _refuse_many_layers(value: Any) -> Any:
    """A mapping by layer as it is. Raises: ValueError if it has more than models have."""
    # Each wrong key becomes a defect of its own.
    if isinstance(value, dict) and len(value) > LARGEST_COUNT:
        raise ValueError(f"it has {len(value):,} layers")
    return value


class _Part(BaseModel):
    # Later versions may add fields, and people who edit a plan notes.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class SavedTensor(_Part):
    """A row of `tensors`; only the first of a module carries its parameters."""

    name: str
    nbytes: Size
    module: str
    role: str
    layer: Layer | None
    treatment: str
    stored: str
    parameters: Size
    rule: str


class SavedModel(_Part):
    """What a plan is for. Those of old versions say nothing of experts that are added."""

    id: str
    experts: Count
    experts_added: Count = 0


class SavedPolicy(_Part):
    """The policy that was planned."""

    name: str


class Kept(RootModel[Annotated[list[Count], Field(min_length=1), FailFast()]]):
    """The experts of a layer that stay, by their numbers before."""

    model_config = ConfigDict(strict=True, frozen=True)


class SavedTransform(_Part):
    """Experts that were pruned; kept is null where they were not ranked yet."""

    by: str | None
    before: SomeCount
    to: SomeCount
    layers: SomeCount
    kept: (
        Annotated[dict[LayerKey, Kept], Field(min_length=1), BeforeValidator(_refuse_many_layers)]
        | None
    )


class SavedPlan(_Part):
    """The document; those of old versions say nothing of transforms."""

    kind: Literal["plan"]
    schema_version: Literal[1]
    policy: SavedPolicy
    target: str
    model: SavedModel
    transforms: Listed[SavedTransform] = []
    tensors: Listed[SavedTensor]
