"""The semantic model of a policy: its words and keys, and the frozen values that readers produce.

Or(Except(And(Name, Layers …), …), …)     a selector: which tensors a rule means
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from policy_dsl.diagnostics import SourceText, Span
from policy_dsl.treatments import Written

if TYPE_CHECKING:
    from policy_dsl.documents import RuleAt

# Components whose blocks never count as layers and that a bare projection does not reach.
OUTSIDE_LANGUAGE_MODEL = frozenset({"vision", "audio", "mtp"})
COMPONENTS = OUTSIDE_LANGUAGE_MODEL | frozenset(
    {"experts", "shared_experts", "mlp", "attention", "linear_attention", "per_layer"}
)
SINGLE_ROLES = frozenset(
    {"router", "router_bias", "shared_expert_gate", "norm", "embed", "embed_per_layer", "lm_head"}
    | {"bias", "sinks", "conv", "ssm"}
)
# Of every target: a policy may name a scheme of another than it is being resolved for.
SCHEMES: Mapping[str, tuple[str, ...]] = {
    "mlx_affine": ("affine", "mxfp4", "mxfp8", "nvfp4"),
    "jangtq_prestack": ("affine", "mxtq"),
    "hipfire_hfq": ("mq2", "mq3", "mq4", "mq6", "mq2-lloyd", "mq3-lloyd", "hfq4", "hfq6", "q8"),
    "gptq": ("int", "int-gidx", "int-v2", "int-v2-gidx"),
}


@dataclass(frozen=True, slots=True)
class Words:
    """What a policy may name beside roles: targets, schemes of their tensors, and methods."""

    targets: tuple[str, ...] = tuple(sorted(SCHEMES))
    schemes: tuple[str, ...] = tuple(dict.fromkeys(chain(*SCHEMES.values())))
    methods: tuple[str, ...] = ("rtn", "opt-rtn", "opt-rtn-0.12.2", "gptq", "lloyd", "awq")


WORDS = Words()


def namesake(role: str) -> str:
    """The role that an MTP block's role is like in the model: `router` of `mtp.router`.

    Any other role comes back as it is, and so do projections, which components share.
    """
    outside, _, word = role.partition(".")
    # Checkpoints call the head of an MTP block otherwise.
    word = "lm_head" if word == "head" else word
    return word if outside == "mtp" and word in SINGLE_ROLES else role


Scalar = bool | int | float | str
Values = Mapping[str, Scalar]


@dataclass(frozen=True, slots=True)
class LayerRange:
    """Layers `start` to `stop`, both included; negative numbers count from the end."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class All:
    """Every matrix of the language model, embeddings and head included."""


@dataclass(frozen=True, slots=True)
class Name:
    """A component, projection, `component.projection`, role, or an architecture's alias.

    `experts` narrows expert tensors to these expert numbers: `experts[0-15].down_proj`.
    """

    text: str
    experts: tuple[LayerRange, ...] = ()


@dataclass(frozen=True, slots=True)
class Layers:
    """`layers 0-1,-2..-1`; with `boundary`, `boundary layers …`: checked to be the boundary."""

    ranges: tuple[LayerRange, ...]
    boundary: bool = False


@dataclass(frozen=True, slots=True)
class LayersWhere:
    """`layers where EXPR`; the canonical text of an expression over `i` and `n`."""

    expression: str


@dataclass(frozen=True, slots=True)
class Boundary:
    """`boundary N`: the first N and the last N layers."""

    count: int


@dataclass(frozen=True, slots=True)
class Middle:
    """`middle`: the layers that the policy's `boundary` leaves."""


@dataclass(frozen=True, slots=True)
class Family:
    """`family NAME`: every tensor, if the model is of this family."""

    name: str


@dataclass(frozen=True, slots=True)
class Glob:
    """A quoted name pattern with `*`, `?` and `[…]`, matched against the whole source name."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Regex:
    """`/…/`: a regular expression, matched against the whole source name."""

    pattern: str


@dataclass(frozen=True, slots=True)
class And:
    """Tensors that every part means (`in` and `and`)."""

    parts: tuple[Selector, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """Tensors that at least one part means (comma)."""

    parts: tuple[Selector, ...]


@dataclass(frozen=True, slots=True)
class Except:
    """Tensors of `base` that `excluded` does not mean."""

    base: Selector
    excluded: Selector


LayerSet = Layers | LayersWhere | Boundary | Middle
Selector = All | Name | LayerSet | Family | Glob | Regex | And | Or | Except


def joined(kind: type[And | Or], *parts: Selector) -> Selector:
    """What every part means, or any of them; parts of the same kind become part of it."""
    flat: list[Selector] = []
    for part in parts:
        flat += part.parts if isinstance(part, kind) else (part,)
    return flat[0] if len(flat) == 1 else kind(tuple(flat))


all_of, any_of = partial(joined, And), partial(joined, Or)


def without(base: Selector, excluded: Selector) -> Selector:
    """`base` less `excluded`; leaving out twice is leaving out both."""
    if isinstance(base, Except):
        return Except(base.base, any_of(base.excluded, excluded))
    return Except(base, excluded)


@dataclass(frozen=True, slots=True)
class Rule:
    """A selector and its treatment; optional: it may match nothing.

    name_spans: places of selector nodes. template: its text with the variables in it, if any.
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


# The types that readers want of the fields of these are in the JSON Schema.
@dataclass(frozen=True)
class Defaults:
    """What fills in a treatment's gaps before the target's own table does."""

    scheme: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    method: str | None = None
    otherwise: Written | None = None


def given(section: Defaults | Calibration | Output) -> dict[str, Any]:
    """The fields that a section of the policy says something about."""
    return {name: value for name, value in vars(section).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Prune:
    """The experts of every layer that stay: the `to` that the saliency `by` ranks highest, or
    those of `keep`: ranges ascending, apart, and none of them negative."""

    to: int | None = None
    by: str = ""
    keep: tuple[LayerRange, ...] = ()

    @property
    def count(self) -> int:
        """How many experts stay in every layer."""
        return self.to or sum(each.stop - each.start + 1 for each in self.keep)


@dataclass(frozen=True)
class Calibration:
    """Where statistics come from: files that exist, or a text to run."""

    imatrix: str | None = None
    awq_alpha: float | None = None
    awq_scales: Literal["exact", "upstream"] | None = None
    saliency: str | None = None
    hessians: str | None = None
    text: str | None = None
    samples: int | None = None
    sequence_length: int | None = None


@dataclass(frozen=True)
class Output:
    """How the bundle is laid out."""

    shard_size: str | None = None
    file_name: str | None = None
    layout: str | None = None
    pad_experts: bool | None = None


@dataclass(frozen=True, slots=True)
class Assertion:
    """A line of `tests`: measure(selector) relation value, as text and as parts.

    measure: bpw, size (in bytes), bits, min_bits, max_bits, or treatment. relation: of a
    treatment `is`, and its value a Written; else <= < >= > ==.
    """

    text: str
    measure: str
    relation: str
    value: float | Written
    selector: Selector | None = None
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Comment:
    """A comment with its `#`, or `` for a blank line; trailing: on its statement's own line.

    anchor: a key path such as `rules[3]`; `rules[]` is the end of the rules, `^` and `` are the
    start and the end of the text.
    """

    anchor: str
    text: str
    trailing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A policy, whole. `load` resolves `extends`; the readers leave it as written.

    Rules of one target come after those of all targets. cleared: keys under which nothing stays
    of what it extends. By key path (`rules[3]`, `defaults.bits`), key_spans say where values
    are, templates how they were written with variables; that is not compared.
    """

    name: str
    description: str = ""
    model: str | None = None
    targets: tuple[str, ...] = ()
    extends: tuple[str, ...] = ()
    vars: tuple[tuple[str, Scalar], ...] = ()
    defaults: Defaults = Defaults()
    rules: tuple[Rule, ...] = ()
    transforms: tuple[Prune, ...] = ()
    calibration: Calibration = Calibration()
    output: Output = Output()
    fp8_dequant: str | None = None
    metadata: tuple[tuple[str, Any], ...] = ()
    runtimes: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    tests: tuple[Assertion, ...] = ()
    cleared: tuple[str, ...] = ()
    comments: tuple[Comment, ...] = field(default=(), compare=False, repr=False)
    source: SourceText | None = field(default=None, compare=False, repr=False)
    key_spans: Mapping[str, Span] = field(default_factory=dict, compare=False, repr=False)
    templates: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


class Key(NamedTuple):
    """A key of policies, with the word that begins its statements in DSL.

    kind: one text, a list of words, named values of any type (mapping) or of given ones
    (fields), statements, or rules. merge: what a policy and one that extends it give together:
    what the latter says alone, the last value, all of them, mappings joined, or rules in order.
    """

    name: str
    kind: Literal["text", "words", "mapping", "fields", "statements", "rules"]
    word: str
    merge: Literal["own", "last", "all", "join", "rules"]


# In the order in which they are printed; readers, printers and `load` all walk this table.
KEYS = (
    Key("name", "text", "name", "own"),
    Key("description", "text", "description", "last"),
    Key("model", "text", "model", "last"),
    Key("targets", "words", "target", "rules"),
    Key("extends", "words", "extends", "own"),
    Key("vars", "mapping", "var", "join"),
    Key("defaults", "fields", "default", "join"),
    Key("transforms", "statements", "", "last"),
    Key("calibration", "fields", "calibration", "join"),
    Key("rules", "rules", "", "rules"),
    Key("output", "fields", "output", "join"),
    Key("fp8_dequant", "text", "fp8_dequant", "last"),
    Key("metadata", "mapping", "metadata", "join"),
    Key("runtimes", "words", "runtime", "last"),
    Key("allow", "words", "allow", "all"),
    Key("tests", "statements", "test ", "all"),
)
SECTIONS: Mapping[str, type[Defaults | Calibration | Output]] = {
    "defaults": Defaults,
    "calibration": Calibration,
    "output": Output,
}
# What a policy can take away from what it extends. Tests may be given anew with it.
CLEARABLE = tuple(key.name for key in KEYS if key.merge in ("last", "all", "join"))


def rule_places(rules: Sequence[Rule]) -> list[tuple[str, RuleAt | None]]:
    """`file:line` of each rule, with its column where its line has several, and the same in parts.

    Of files with one name, such as those of an `extends` chain, as many folders are shown as
    tell them apart. Empty and None for a rule that no text holds.
    """
    places = [rule.span.place if rule.span else None for rule in rules]
    known = [place for place in places if place]
    n_rules = Counter((path, line) for path, line, _ in known)
    short = _short_names({path for path, *_ in known})
    found: list[tuple[str, RuleAt | None]] = []
    for place in places:
        if place is None:
            found.append(("", None))
            continue
        path, line, column = place
        more = f":{column}" if n_rules[path, line] > 1 else ""
        at: RuleAt = {"path": path, "line": line, "column": column}
        found.append((f"{short[path]}:{line}{more}", at))
    return found


def _short_names(paths: set[str]) -> dict[str, str]:
    """Path -> its last parts, as few as no other path ends with."""
    endings = {}
    for path in paths:
        parts = path.replace("\\", "/").split("/")
        endings[path] = ["/".join(parts[at:]) for at in reversed(range(len(parts)))]
    counts = Counter(chain.from_iterable(endings.values()))
    return {
        path: next((end for end in ends if counts[end] == 1), ends[-1])
        for path, ends in endings.items()
    }
