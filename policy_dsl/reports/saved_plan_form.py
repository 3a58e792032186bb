"""What is read of a saved plan, as types: the fields that a comparison needs, within bounds.

The whole document is in document_schemas/plan.json.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# More layers or experts than any model has.
LARGEST_COUNT = 65536

Size = Annotated[int, Field(ge=0, lt=1 << 63)]
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
SomeCount = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
Layer = Annotated[int, Field(ge=0, lt=LARGEST_COUNT)]
LayerKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,4})$")]


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


class SavedTransform(_Part):
    """Experts that were pruned; kept is null where they were not ranked yet."""

    by: str | None
    before: SomeCount
    to: SomeCount
    layers: SomeCount
    kept: (
        Annotated[
            dict[LayerKey, Annotated[list[Count], Field(min_length=1)]], Field(min_length=1)
        ]
        | None
    )


class SavedPlan(_Part):
    """The document; those of old versions say nothing of transforms."""

    kind: Literal["plan"]
    schema_version: Literal[1]
    policy: SavedPolicy
    target: str
    model: SavedModel
    transforms: list[SavedTransform] = []
    tensors: list[SavedTensor]
