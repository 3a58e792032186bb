"""A checkpoint as a model of roles; its tensors as publishers, readers, llama.cpp call them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from math import prod
from typing import Any, NamedTuple

from policy_dsl import packaged_table
from policy_dsl.diagnostics import fail
from policy_dsl.inventory import EXPERT_NAME, TensorInfo
from policy_dsl.policy import OUTSIDE_LANGUAGE_MODEL, namesake
from policy_dsl.roles.architecture import TABLES, Architecture
from policy_dsl.roles.config_facts import ConfigFacts
from policy_dsl.roles.name_index import NameIndex
from policy_dsl.roles.table_entries import Arrangement, Part
from policy_dsl.views import Alternate, Columns, Cut, Operation, Reshaped, Slice, View

# Roles with an entry for every expert along their first axis.
BY_EXPERT = frozenset({"router", "router_bias"})
# Projection -> its name where experts' matrices are called by number.
SHORT_NAMES: Mapping[str, str] = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_LLAMA_CPP = TABLES / "_llama_cpp.yaml"
_EXPERT = re.compile(r"\.experts\.(?:\d+\.)?\w+(?:\.weight)?$")


class ModelTensor(NamedTuple):
    """One logical tensor of a model: a whole source tensor, or one matrix of a fused one.

    role: `component.projection` or a single role, with projection None. layer: the language
    model's block, else None. shape: [out, in] of a matrix, else that of the source. scale: the
    FP8 block scales. mxfp4: the source is [experts, out, blocks, 16] packed, `scale` a byte for
    each block; operations are those of [experts, out, in].

    Where a reader wants it otherwise: called: its name there. whole: the role of the tensor that
    it is a part of. cut: how its rows are apart in the source. left_out: why the reader has no
    place for it. added: to every value. place: among the tensors that are one there.
    """

    # The first fields are what every tensor has; a fused source needs the others too.
    source: TensorInfo
    role: str
    component: str | None
    projection: str | None
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]
    is_matrix: bool = True
    scale: TensorInfo | None = None
    operations: tuple[Operation, ...] = ()
    mxfp4: bool = False
    called: str = ""
    whole: str = ""
    cut: Cut | None = None
    left_out: str = ""
    added: float = 0.0
    place: int | None = None

    @property
    def view(self) -> View:
        """The stored tensor and what makes this one of it, but for cuts."""
        return View(self.source, self.scale, self.operations, self.added)

    @property
    def views(self) -> tuple[View, ...]:
        """What it is made of: its rows are those of these views, one below the other."""
        return tuple(self.cut.views(self.view)) if self.cut else (self.view,)

    @property
    def order(self) -> int:
        """Its place in a module of several: its expert, or its number among those joined."""
        return self.expert or self.place or 0

    @property
    def roles(self) -> tuple[str, ...]:
        """Its role, and that of the tensor that it is a part of."""
        return (self.role, self.whole) if self.whole else (self.role,)

    @property
    def namesake(self) -> str:
        """Its role; of an MTP block's router, norm or head the role of the model's own."""
        return namesake(self.role) if self.component == "mtp" else self.role


@dataclass(frozen=True)
class Model:
    """A checkpoint read through its architecture: every tensor with its role.

    facts: by the table of its family, completed by roles that only this model shows (vision).
    tied: lm_head is embed. ignored: source tensors that are not weights, with the reason.
    """

    id: str
    facts: ConfigFacts
    tied: bool
    tensors: tuple[ModelTensor, ...]
    ignored: tuple[tuple[TensorInfo, str], ...] = ()

    @property
    def config(self) -> Mapping[str, Any]:
        """The config.json of the source, with what a policy changed of it."""
        return self.facts.config

    @property
    def architecture(self) -> Architecture:
        """The table of its family."""
        return self.facts.table

    @property
    def n_layers(self) -> int:
        """Blocks of the language model."""
        return self.facts.n_layers

    @property
    def n_experts(self) -> int:
        """Routed experts of a block, 0 if it is dense."""
        return self.facts.n_experts

    @property
    def embedding(self) -> ModelTensor | None:
        """The matrix with a row for each token."""
        return next((tensor for tensor in self.tensors if tensor.role == "embed"), None)

    @cached_property
    def names(self) -> NameIndex:
        """The names of its tensors in the source."""
        return NameIndex(tensor.source.name for tensor in self.tensors)


def published_name(tensor: ModelTensor, model: Model) -> str:
    """A tensor's name, also of a source that transformers saved."""
    name, (block, _) = tensor.source.name, model.architecture.published_experts
    for saved, published in model.architecture.renamed.items():
        name = published + name.removeprefix(saved) if name.startswith(saved) else name
    # transformers 5 calls the blocks of all families so. Dense ones keep their name.
    return name if tensor.component == "mlp" else name.replace(".mlp.", f".{block}.", 1)


def stacked_path(tensor: ModelTensor, model: Model, block: str = "switch_mlp") -> str:
    """The module of a tensor: its published name; that of a layer's experts is in `block`."""
    name = published_name(tensor, model)
    if tensor.expert is None:
        return name.removesuffix(".weight")
    return _EXPERT.sub(f".{block}.{tensor.projection}", name)


def apart_path(tensor: ModelTensor, model: Model) -> str:
    """The module of a tensor: its published name; that of a layer's experts has a `*`."""
    name = published_name(tensor, model)
    if tensor.expert is None:
        return name.removesuffix(".weight")
    (_, words), projection = model.architecture.published_experts, tensor.projection or ""
    apart = f".experts.*.{words.get(projection, projection)}"
    found, is_apart = _EXPERT.subn(apart, name)
    # Stacks that are not called so have their experts below them.
    return found if is_apart else name.removesuffix(".weight").rpartition(".")[0] + apart


def expert_path(path: str, expert: int) -> str:
    """The module of one expert, of such a path."""
    return path.replace("*", str(expert), 1)


def expert_of(path: str) -> int | None:
    """The expert's number in the name of its module; None for other modules."""
    matched = EXPERT_NAME.fullmatch(path)
    return int(matched[2]) if matched else None


def llama_cpp_roles() -> tuple[str, ...]:
    """The roles that llama.cpp has names for."""
    names = packaged_table(_LLAMA_CPP)
    return (*names["outside"], *names["block"])


def llama_cpp_names(role: str, layer: int | None) -> tuple[str, ...]:
    """The names of a role's matrices in a layer, `blk.3.ffn_gate_exps.weight`, likeliest first.

    One name is that of all experts of a layer. Nothing comes back for roles that are not a matrix
    of the language model, or whose input llama.cpp reorders.
    """
    place, before = ("outside", "") if layer is None else ("block", f"blk.{layer}.")
    names = packaged_table(_LLAMA_CPP)[place].get(role, ())
    return tuple(f"{before}{name}.weight" for name in names)


def rearranged(tensor: ModelTensor, model: Model) -> tuple[ModelTensor, ...]:
    """What mlx-lm's classes hold of a tensor: itself by another name, or its parts.

    Raises: PolicyError (wrong-shape) if the tensor cannot be taken apart so.
    """
    key, numbers = numbered_key(tensor.source.name)
    named = model.architecture.names.get(key)
    rule = named.arranged if named else None
    # Towers and blocks of other models keep their names.
    if rule is None or tensor.component in OUTSIDE_LANGUAGE_MODEL:
        return (tensor,)
    layer = tensor.layer
    if rule.when and not model.facts.satisfies(rule.when, layer):
        rule = rule.as_published
    number = None if rule.number_at is None else numbers[rule.number_at]
    if reason := rule.drop or rule.misses:
        tensor = tensor._replace(left_out=reason)
    prefix, facts, found = _prefix(rule, model), model.facts, []
    # Of a tensor without a shape, only what it is called is asked.
    is_known = bool(tensor.shape)
    if is_known and (rule.shape or rule.axes or rule.take):
        tensor = _reshaped(tensor, rule, facts)
    for at, part in enumerate(rule.parts):
        # Of a fused tensor, each matrix is a tensor already.
        if not rule.split and len(rule.parts) > 1 and part.role != tensor.role:
            continue
        one = _split(tensor, rule, at, facts) if rule.split and is_known else tensor
        name = _filled(part.name, prefix, layer, number)
        found.append(_as_part(one, part, name, rule))
    return tuple(found)


def module_name(tensor: ModelTensor, model: Model) -> str:
    """What mlx-lm calls the module of a tensor, of the first of its parts."""
    called = tensor.called or rearranged(tensor, model)[0].called or tensor.source.name
    return called.removesuffix(".weight")


def is_one_of(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module's name is like one of these globs."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _prefix(rule: Arrangement, model: Model) -> str:
    given = model.architecture.mlx.model
    if isinstance(given, Mapping):
        given = given.get(str(model.config.get("model_type")), "")
    return given or rule.model


@lru_cache(65536)
def _filled(name: str, prefix: str, layer: int | None, number: int | None) -> str:
    name = name.replace("{model}", prefix).replace("{layer}", str(layer))
    return name.replace("{n}", str(number))


def _as_part(one: ModelTensor, part: Part, name: str, rule: Arrangement) -> ModelTensor:
    if one.cut is not None and part.transposed:
        count, rows, columns = one.shape
        cut = one.cut._replace(transposed=True)
        one = one._replace(cut=cut, shape=(count, columns, rows))
    role, whole = (one.role, one.component, one.projection), ""
    if part.role and part.role != one.role:
        (component, _, projection), whole = part.role.rpartition("."), one.role
        role = part.role, component, projection
    place = (*role, one.layer, one.expert, one.shape)
    stored = one.is_matrix, one.scale, one.operations, one.mxfp4
    # Not by `_replace`: a hundred thousand tensors would take twice as long.
    apart = one.cut, one.left_out
    return ModelTensor(one.source, *place, *stored, name, whole, *apart, rule.add, rule.place)


def _split(tensor: ModelTensor, rule: Arrangement, at: int, facts: ConfigFacts) -> ModelTensor:
    """Part `at` of a tensor that holds several: rows, or entries of the last axis."""
    axis, n_parts = 0 if rule.along == "first" else -1, len(rule.parts)
    length, step = tensor.shape[axis], n_parts if rule.split == "alternate" else 1
    equal = [length // n_parts] * n_parts
    sizes = equal if isinstance(rule.split, str) else [_size(word, facts) for word in rule.split]
    period = sum(sizes)
    if not period or length % period or min(sizes) < 1 or (axis == -1 and length != period):
        raise _wrong(tensor, f"rows in {n_parts} parts of {sizes}")
    first, size, count = sum(sizes[:at]), sizes[at], length // period
    if axis == -1:
        ends = (at, length, step) if step > 1 else (first, first + size)
        return _then(tensor, Columns(*ends), (*tensor.shape[:-1], size))
    rest = tensor.shape[1:]
    if step > 1:
        return _then(tensor, Alternate(at, step), (size, *rest))
    if count == 1 and not rule.stack:
        return _then(tensor, Slice(first, size), (size, *rest))
    shape = (count, size, *rest) if rule.stack else (count * size, *rest)
    return tensor._replace(shape=shape, cut=Cut(first, size, period, count))


def _then(tensor: ModelTensor, operation: Operation, shape: tuple[int, ...]) -> ModelTensor:
    return tensor._replace(shape=shape, operations=(*tensor.operations, operation))


def _size(word: str, facts: ConfigFacts) -> int:
    """A size as an expression; 0 if it is not known."""
    size = facts.computed(word)
    return size if isinstance(size, int) else 0


def _reshaped(tensor: ModelTensor, rule: Arrangement, facts: ConfigFacts) -> ModelTensor:
    """The same values in another shape: axes of one entry elsewhere, other rows, the first few."""
    shape, total = tensor.shape, prod(tensor.shape)
    if rule.axes:
        if len(rule.axes) != len(shape) or not _keeps_order(shape, rule.axes):
            raise _wrong(tensor, f"{len(rule.axes)} axes, of which those that move have one entry")
        shape = tuple(shape[at] for at in rule.axes)
    if rule.shape:
        sizes = [-1 if one == "-1" else _size(one, facts) for one in rule.shape]
        known = prod(size for size in sizes if size > 0)
        shape = tuple(total // known if size == -1 else size for size in sizes)
        if prod(shape) != total:
            raise _wrong(tensor, f"{list(rule.shape)}")
    if rule.take:
        count = facts.computed(rule.take)
        if not isinstance(count, int) or not shape or not 0 < count <= shape[0]:
            raise _wrong(tensor, f"at least {rule.take} entries")
        shape = (count, *shape[1:])
    return _then(tensor, Reshaped(shape), shape)


def _keeps_order(shape: tuple[int, ...], axes: tuple[int, ...]) -> bool:
    """Whether values stay in their order: axes of more than one entry follow each other."""
    long = [at for at in axes if at < len(shape) and shape[at] > 1]
    return sorted(axes) == [*range(len(shape))] and long == sorted(long)


def _wrong(tensor: ModelTensor, wanted: str) -> Exception:
    shape = list(tensor.shape)
    return fail("wrong-shape", name=tensor.source.name, shape=shape, wanted=wanted)


def numbered_key(name: str) -> tuple[str, tuple[int, ...]]:
    """The name with `#` for each whole number between dots, and the numbers."""
    # The names of a hundred thousand experts have few halves.
    head, experts, tail = name.partition(".experts.")
    (key, numbers), (rest, more) = _numbered(head), _numbered(tail)
    return key + experts + rest, numbers + more


@lru_cache(8192)
def _numbered(name: str) -> tuple[str, tuple[int, ...]]:
    parts = name.split(".")
    numbers = []
    for i, part in enumerate(parts):
        # 01 is another name than 1, and a number of many digits is not a layer.
        if part.isdecimal() and len(part) < 8 and (part[0] != "0" or part == "0"):
            numbers.append(int(part))
            parts[i] = "#"
    return ".".join(parts), tuple(numbers)
