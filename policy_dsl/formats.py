"""The type of a format's capability record. The values live in `emitters/<name>/spec.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from policy_dsl.policy import Treatment
from policy_dsl.roles.classify import Model, ModelTensor


@dataclass(frozen=True, slots=True)
class SchemeSpec:
    """A scheme of a format: widths, group sizes, methods; the first of each is the default.

    One width means that the scheme's name fixes it. An empty group_sizes means no groups.
    """

    name: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    methods: tuple[str, ...] = ("rtn",)
    symmetric: bool | None = None
    about: str = ""


@dataclass(frozen=True, slots=True)
class PartShape:
    """One output tensor of a module: the suffix of its name, safetensors dtype, shape."""

    part: str
    dtype: str
    shape: tuple[int, ...]


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
    shard_nbytes: largest shard; shard_name(index from 1, count) -> file name.
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
    settings: tuple[str, ...] = ()
    runtimes: Mapping[str, str] = field(default_factory=dict)
    header_metadata: Mapping[str, str] = field(default_factory=dict)

    def scheme(self, name: str) -> SchemeSpec | None:
        """The scheme of that name, or None."""
        return next((scheme for scheme in self.schemes if scheme.name == name), None)
