"""The type of a format's capability record. The values live in `emitters/<name>/spec.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from policy_dsl.plan import Module, Plan, PlannedTensor, Refusal
from policy_dsl.policy import Treatment
from policy_dsl.roles.classify import Model, ModelTensor


@dataclass(frozen=True, slots=True)
class SchemeSpec:
    """A scheme of a format: widths, group sizes, methods; the first of each is the default.

    One width means that the scheme's name fixes it. An empty group_sizes means no groups.
    values: the dtype in which its encoder takes the values, None for the format's plain dtype.
    """

    name: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    methods: tuple[str, ...] = ("rtn",)
    symmetric: bool | None = None
    values: str | None = None
    about: str = ""


@dataclass(frozen=True, slots=True)
class PartShape:
    """One output tensor of a module: the suffix of its name, safetensors dtype, shape.

    constant: all its bytes where the treatment alone decides them; else it has equal bytes for
    every logical row of the module.
    """

    part: str
    dtype: str
    shape: tuple[int, ...]
    constant: bytes = b""


@dataclass(frozen=True, slots=True)
class ExpertsApart:
    """A layout with a module for each expert, where its scheme is one of `schemes`.

    path(path of the stack, expert) -> the expert's module.
    """

    path: Callable[[str, int], str]
    schemes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ExpertPadding:
    """Experts that readers want added: up to a `multiple`, of zeros, never to be chosen.

    router_bias: what the added experts get as their score correction.
    """

    multiple: int
    router_bias: float


@dataclass(frozen=True)
class FormatSpec:
    """What a format can hold and how its bundle is named and laid out. Functions are pure.

    families: family -> None if supported, else the reason why it is refused.
    fill: rows (role class, bits or None for any, scheme), first match wins; role classes are
      `experts`, `embed` (embed and lm_head), `matrix` (any other matrix), `any`.
    omission(tensor, model): why the format does not carry this tensor, else None.
    module_path(tensor, model): the output module of a tensor; tensors with equal paths are
      stacked along a leading expert axis. A path that ends as the source's name does
      (`.bias`) means a bare tensor.
    part_shapes(treatment, shape, dtype): the output tensors of a module of a logical
      shape [..., in] whose values are of `dtype`; one part unless it is quantized.
    plain_dtype(tensor, model): the dtype of a kept tensor, and of a quantized one's values.
    unquantizable(tensor, model): why the format cannot quantize this tensor, else None.
    fp8_rules: how FP8 sources may be dequantized; the first is the format's own.
    copied_files: name patterns of the source's side files that the bundle copies.
    settings: the policy's keys beside rules that the format uses, such as `output.shard_size`.
    runtimes: reader -> what it is.
    shard_nbytes: largest shard; shard_name(index from 1, count) -> file name. overfull: whether
      a shard is closed by the tensor that reaches that size, and not by the one that would
      pass it. file_order(modules): the order in which shards are filled, None as modules are.
    layouts: ways to store experts, the first is the default; None is stacks of all. Empty:
      stacks, no choice.
    padding: family -> experts that are added, unless the policy says no.
    refusals(plan): the readers of `runtimes` that cannot load a bundle, and why.
    metadata_keys: keys of the policy's `metadata` -> the values allowed there, or their type.
    edited_files: side files of the source that the bundle holds in another form.
    """

    name: str
    about: str
    schemes: tuple[SchemeSpec, ...]
    fill: tuple[tuple[str, int | None, str], ...]
    plain_dtypes: tuple[str, ...]
    fp8_rules: tuple[str, ...]
    families: Mapping[str, str | None]
    omission: Callable[[ModelTensor, Model], str | None]
    module_path: Callable[[ModelTensor, Model], str]
    part_shapes: Callable[[Treatment, tuple[int, ...], str], tuple[PartShape, ...]]
    plain_dtype: Callable[[ModelTensor, Model], str]
    unquantizable: Callable[[ModelTensor, Model], str | None]
    shard_nbytes: int
    shard_name: Callable[[int, int], str]
    copied_files: tuple[str, ...]
    overfull: bool = False
    file_order: Callable[[Sequence[Module]], Sequence[PlannedTensor]] | None = None
    layouts: Mapping[str, ExpertsApart | None] = field(default_factory=dict)
    padding: Mapping[str, ExpertPadding] = field(default_factory=dict)
    refusals: Callable[[Plan], tuple[Refusal, ...]] | None = None
    metadata_keys: Mapping[str, type | tuple[str, ...]] = field(default_factory=dict)
    edited_files: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    runtimes: Mapping[str, str] = field(default_factory=dict)
    header_metadata: Mapping[str, str] = field(default_factory=dict)

    def scheme(self, name: str) -> SchemeSpec | None:
        """The scheme of that name, or None."""
        return next((scheme for scheme in self.schemes if scheme.name == name), None)
