"""The record `policyc.json` of a bundle: what it was made of and by, and every hash."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypedDict

from policy_dsl.documents.common import Experts, Layer, Limits, Name, Sha256, Size


class RecordedPolicy(TypedDict):
    """The policy: its author's text, and all rules in force, whose SHA-256 is `digest`."""

    name: str
    digest: Sha256
    text: str | None
    variables: dict[str, bool | float | str]
    resolved: str


class RecordedSource(TypedDict):
    """The checkpoint; `id` is a folder name or hub id, never a path."""

    id: str
    digest: Sha256
    nbytes: Size
    fp8_rule: str


class RecordedStatistics(TypedDict):
    """A file about the model's inputs that decided values; `file` is its name, never a path."""

    file: Name
    sha256: Sha256


class RecordedTransform(TypedDict):
    """Experts that were pruned; `kept` maps a layer to the old numbers of its experts."""

    prune: Literal["experts"]
    by: str | None
    before: Experts
    to: Experts
    kept: Annotated[
        dict[str, Annotated[list[Experts], Limits(least=1, most=65536)]],
        Limits(least=1, keys="^(0|[1-9][0-9]{0,6})$"),
    ]


class RecordedOmission(TypedDict):
    """A source tensor that the bundle leaves out; `equals` names another with its values."""

    name: str
    reason: Name
    equals: NotRequired[Name]


class RecordedTreatment(TypedDict):
    """What happened to the values of a module."""

    action: Literal["quantize", "keep", "cast", "raw"]
    bits: NotRequired[Annotated[int, Limits(minimum=1, maximum=64)]]
    group_size: NotRequired[Annotated[int, Limits(minimum=-1, maximum=2**31 - 1)]]
    scheme: NotRequired[str]
    method: NotRequired[str]
    symmetric: NotRequired[bool]
    dtype: NotRequired[str]


class RecordedModule(TypedDict):
    """A module by its logical shape; `added` experts at the end of its first axis only pad."""

    role: str
    layer: Layer | None
    shape: Annotated[list[Size], Limits(most=64)]
    added: NotRequired[Annotated[int, Limits(minimum=1, maximum=65536)]]
    dtype: str
    treatment: RecordedTreatment
    tensors: Annotated[list[str], Limits(least=1)]


class HashedFile(TypedDict):
    """A file's size and hash."""

    nbytes: Size
    sha256: Sha256


class RecordDocument(TypedDict):
    """`policyc.json`, the record of a bundle"""

    schema_version: Literal[1]
    kind: Literal["bundle"]
    policyc: Name
    policy: RecordedPolicy
    target: Name
    plan_digest: Sha256
    source: RecordedSource
    statistics: NotRequired[dict[str, RecordedStatistics]]
    transforms: Annotated[list[RecordedTransform], Limits(most=1)]
    omitted: list[RecordedOmission]
    modules: dict[str, RecordedModule]
    files: dict[str, HashedFile]
    tensors: Annotated[dict[str, Sha256], Limits(about="SHA-256 of every tensor's bytes")]
    digest: Annotated[
        str,
        Limits(
            pattern="^[0-9a-f]{64}$",
            about="SHA-256 of this document without `digest`, compact, keys sorted",
        ),
    ]
