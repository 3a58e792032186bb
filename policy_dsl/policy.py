"""The semantic model of a policy: frozen values that both readers produce.

Policy ─ rules: (Rule, …) ─ selector, Written
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from policy_dsl.diagnostics import SourceText, Span
from policy_dsl.selectors import LayerRange, Selector
from policy_dsl.treatments import MAX_BITS, WHOLE_ROW, Written

# What a variable holds.
Scalar = bool | int | float | str


def _group_size(written: int | None) -> int | None:
    if written is not None and written < 1 and written != WHOLE_ROW:
        raise ValueError("1 or more, or -1 for whole rows")
    return written


GroupSize = Annotated[int | None, AfterValidator(_group_size)]


@dataclass(frozen=True, slots=True)
class Rule:
    """A selector, its treatment, and where it stands.

    `optional` allows it to match nothing; `target` limits it to one target. `name_spans`
    gives selector nodes their places, for exact carets. `template` is its text with the
    variables that the author wrote, None if there are none.
    """

    selector: Selector
    treatment: Written
    optional: bool = False
    target: str | None = None
    span: Span | None = field(default=None, compare=False, repr=False)
    selector_span: Span | None = field(default=None, compare=False, repr=False)
    treatment_span: Span | None = field(default=None, compare=False, repr=False)
    name_spans: tuple[tuple[Selector, Span], ...] = field(default=(), compare=False, repr=False)
    template: str | None = field(default=None, compare=False, repr=False)


class Part(BaseModel):
    """Base of the policy's mappings: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Defaults(Part):
    """What fills in a treatment's gaps before the target's own table does."""

    scheme: str | None = Field(None, description="scheme of quantized tensors")
    bits: int | None = Field(None, ge=1, le=MAX_BITS, description="bits of a bare scheme")
    group_size: GroupSize = Field(None, description="elements of a group; -1 for whole rows")
    symmetric: bool | None = Field(None, description="symmetric groups, if there is a choice")
    method: str | None = Field(None, description="how codes are chosen")
    otherwise: Written | None = Field(None, description="tensors that no rule reaches; keep")


@dataclass(frozen=True, slots=True)
class Prune:
    """`prune experts to N by NAME`, or `prune experts keep 0-5,7`.

    Either `to` and `by`: the N experts of every layer that the saliency NAME ranks highest. Or
    `keep`: these experts of every layer, ranges ascending, apart, and none of them negative.
    """

    to: int | None = None
    by: str = ""
    keep: tuple[LayerRange, ...] = ()
    component: Literal["experts"] = "experts"

    @property
    def count(self) -> int:
        """How many experts stay in every layer."""
        return self.to or sum(each.stop - each.start + 1 for each in self.keep)


class Calibration(Part):
    """Where statistics come from: files that exist, or a text to run."""

    imatrix: str | None = Field(None, description="importance matrix file")
    awq_alpha: float | None = Field(None, ge=0, le=1, description="exponent of AWQ scales")
    awq_scales: Literal["exact", "upstream"] | None = Field(
        None, description="weights scaled by the stored value, or by what it rounds"
    )
    saliency: str | None = Field(None, description="expert saliency file")
    hessians: str | None = Field(None, description="folder of Hessians")
    text: str | None = Field(None, description="text or token file to run through the model")
    samples: int | None = Field(None, ge=1, description="sequences")
    sequence_length: int | None = Field(None, ge=1, description="tokens of a sequence")


class Output(Part):
    """How the bundle is laid out."""

    shard_size: str | None = Field(None, description="largest shard, such as 5GiB")
    file_name: str | None = Field(None, description="name of a one-file container")
    layout: str | None = Field(None, description="a layout that the target names")
    pad_experts: bool | None = Field(None, description="fill up to the target's multiple")


@dataclass(frozen=True, slots=True)
class Assertion:
    """A line of `tests`: measure(selector) relation value, as text and as parts.

    measure: bpw, size, bits, min_bits, max_bits, treatment; relation: <= < >= > == is.
    value: a number (bytes for size), or a Written for `is`.
    """

    text: str
    measure: str
    relation: str
    value: float | Written
    selector: Selector | None = None
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Comment:
    """A comment of the source text and the statement it belongs to.

    `anchor` is a key path such as `rules[3]` or `defaults`; `rules[]` is the end of the rules,
    `^` and `` are the start and the end of the text. `trailing` tells whether it stood on the
    statement's own line. The text begins with `#`; an empty one is a blank line.
    """

    anchor: str
    text: str
    trailing: bool = False


# What a policy can take away from what it extends. Tests may be given anew with it.
CLEARABLE = (
    *("description", "model", "fp8_dequant"),
    *("transforms", "runtimes", "tests"),
    *("vars", "metadata", "defaults", "calibration", "output"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A policy, whole. `extends` is already resolved into `rules` by `load`; the readers
    leave it as written. Rules of one target come after those of all targets.

    cleared: keys that the text empties, see CLEARABLE; of what it extends nothing stays there.
    By key path (`rules[3]`, `defaults.bits`), `key_spans` says where each value stands and
    `templates` how it was written with variables. These, `source` and comments take no part
    in equality.
    """

    name: str
    description: str = ""
    model: str | None = None
    targets: tuple[str, ...] = ()
    extends: tuple[str, ...] = ()
    vars: tuple[tuple[str, Scalar], ...] = ()
    defaults: Defaults = Defaults()  # noqa: RUF009
    rules: tuple[Rule, ...] = ()
    transforms: tuple[Prune, ...] = ()
    calibration: Calibration = Calibration()  # noqa: RUF009
    output: Output = Output()  # noqa: RUF009
    fp8_dequant: str | None = None
    metadata: tuple[tuple[str, Any], ...] = ()
    runtimes: tuple[str, ...] = ()
    tests: tuple[Assertion, ...] = ()
    cleared: tuple[str, ...] = ()
    comments: tuple[Comment, ...] = field(default=(), compare=False, repr=False)
    source: SourceText | None = field(default=None, compare=False, repr=False)
    key_spans: tuple[tuple[str, Span], ...] = field(default=(), compare=False, repr=False)
    templates: tuple[tuple[str, Any], ...] = field(default=(), compare=False, repr=False)
