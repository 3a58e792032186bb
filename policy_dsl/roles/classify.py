"""Tensor name -> role, by the table of its architecture; a checkpoint as a model of roles."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic
from policy_dsl.inventory import DTYPE_BITS, Inventory, TensorInfo
from policy_dsl.quantities import counted, first_few
from policy_dsl.roles.architecture import Architecture, Fusion, NameRule, architecture_of, role_of
from policy_dsl.roles.completeness import Presence, config_findings, review
from policy_dsl.roles.config_facts import TIED, ConfigFacts, is_whole, read_config
from policy_dsl.roles.model import Model, ModelTensor, numbered_key
from policy_dsl.roles.quantization import FP8, Scales, find_scales
from policy_dsl.views import Alternate, Expert, Operation, Slice, Transposed

__all__ = ["Architecture", "Model", "ModelTensor", "architecture_of", "classify"]

_PLAIN = ("BF16", "F16", "F32")
_READABLE = ("a plain tensor is BF16, F16 or F32", "a matrix is BF16, F16, F32, or FP8 with scales")
_TOWERS = ("vision", "audio")
_QUANTIZED_ENDINGS = (".weight_packed", ".qweight", ".qzeros", ".scales", ".biases", ".g_idx")
# The last part of names. Readers that compute in 16 bits do not need them.
_ACTIVATION_SCALES = (
    *("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale", "kv_scale"),
)
# What hipfire's quantizer adds to a model, and what it is.
_ADDED = {
    r"\.awq_scale\w*\.weight$": "AWQ scales that activations are divided by",
    r"\.lr_[uv]\.weight$": "low-rank correction of a matrix",
}
# An MXFP4 block is 16 bytes of two 4-bit codes each.
_MXFP4_BLOCK = 32


def classify(inventory: Inventory) -> Model:
    """The checkpoint as a model: every tensor has exactly one role, or a reason to be ignored.

    Raises: PolicyError with all that is wrong, or with what the config means and is missing.
    """
    facts = read_config(inventory.config, architecture_of(inventory), inventory.id)
    reading = _Reading(facts, find_scales(inventory))
    reading.ways = set(_ways_by_shape(facts, inventory))
    for tensor in inventory.tensors.values():
        # Scales are read with their weight and are not tensors of the model.
        if tensor.name not in reading.scales.consumed:
            reading.read(tensor)
    if findings := list(reading.findings()):
        raise PolicyError(findings)
    model = reading.model()
    if findings := list(review(model, reading.presence)):
        raise PolicyError(findings)
    return model


def classify_hfq(inventory: Inventory) -> Model:
    """The model of an HFQ file, for people to see: roles by names and logical shapes.

    Raises: PolicyError as `classify` does, but never for a dtype.
    """
    tensors = inventory.tensors
    kinds = _ADDED.items()
    added = {name: what for name in tensors for end, what in kinds if re.search(end, name)}
    # Names and shapes are the original checkpoint's; only its dtypes are gone.
    values = {key: one._replace(dtype="F16") for key, one in tensors.items() if key not in added}
    model = classify(replace(inventory, tensors=values))
    ignored = ((tensor.name, reason) for tensor, reason in model.ignored)
    return replace(
        model,
        tensors=tuple(known._replace(source=tensors[known.source.name]) for known in model.tensors),
        ignored=tuple((tensors[name], reason) for name, reason in (*ignored, *added.items())),
    )


def _ways_by_shape(facts: ConfigFacts, inventory: Inventory) -> Iterator[bool]:
    """Whether tensors of experts are transposed, of those whose shapes show it.

    Where two sides are equal, the other projections' are not.
    """
    names = facts.table.names.items()
    by_shape = {
        key: rule for key, rule in names if isinstance((rule.fusion or Fusion()).transposed, str)
    }
    for tensor in inventory.tensors.values() if by_shape else ():
        rule = by_shape.get(numbered_key(tensor.name)[0])
        if rule and (need := rule.needs[0]):
            out, into = facts.shape(need.shape) or (0, 0)
            usual = out * len(rule.roles), into
            if len(set(usual)) == 2 and tensor.shape[1:] in (usual, usual[::-1]):
                yield tensor.shape[1:] != usual


def outside(table: Architecture, key: str, *, beyond: bool) -> NameRule | None:
    """The rule of a name that the table does not spell: vision towers and MTP blocks.

    key: the name with `#` for numbers. beyond: whether the first is of an MTP block.
    """
    components = (part for prefix, part in table.elsewhere.items() if key.startswith(prefix))
    elsewhere, blocks = next(components, None), tuple(map("{}.layers.#.".format, table.models))
    component = elsewhere or ("mtp" if beyond and key.startswith(blocks) else None)
    if component is None:
        return None
    # MTP blocks are built like the model's own. Releases differ in what they are called: behind
    # the block's number they are alike.
    rest = key.partition(".#.")[2]
    alike = table.names.get(f"{table.models[0]}.layers.#.{rest}")
    if component != "mtp" or alike is None:
        return _by_last_word(table, key, component)
    roles = tuple(role_of(f"mtp.{role.name.rpartition('.')[2]}") for role in alike.roles)
    rule = replace(alike, roles=roles, layer_at=None)
    # Which kind of block is elsewhere, no config says.
    return replace(rule, needs=(None,) * len(roles)) if elsewhere else rule


def _by_last_word(table: Architecture, key: str, component: str) -> NameRule | None:
    """The role that the name's last word gives it: no table spells all vision towers."""
    named = key.replace(".#", "")
    path = named.removesuffix(".weight")
    word = path.rpartition(".")[2]
    if "norm" in word or word.startswith("ln"):
        word = "norm"
    elif component == "mtp":
        word = table.aliases.get(word, (word,))[0]
    if not word:
        return None
    role = role_of(f"{component}.{word}")
    # Embeddings of positions have two axes too, but are not linear layers.
    is_table = component != "mtp" and "embed" in (role.projection or "")
    may_be_linear = role.is_matrix and path != named and not is_table
    return NameRule((role._replace(is_matrix=None if may_be_linear else False),))


def _of_names(names: list[str], code: str, **facts: Any) -> Diagnostic:
    tensors, shown = counted(len(names), "tensor"), first_few(sorted(names))
    return diagnostic(code, tensors=tensors, names=shown, **facts)


class _Reading:
    """The pass over all names: what each means, and what is wrong on the way."""

    def __init__(self, facts: ConfigFacts, scales: Scales) -> None:
        self.facts, self.scales, self.presence = facts, scales, Presence(facts)
        self.tensors: list[ModelTensor] = []
        self.ignored: list[tuple[TensorInfo, str]] = []
        self.unknown: list[str] = []
        self.beyond: list[str] = []
        self.wrong: list[Diagnostic] = []
        self.unreadable: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.has_experts = False
        self.ways: set[bool] = set()

    def read(self, tensor: TensorInfo) -> None:
        """Give a tensor its role."""
        key, numbers = numbered_key(tensor.name)
        rule = self.facts.table.names.get(key)
        at = None if rule is None else rule.layer_at
        if rule is None or (at is not None and numbers[at] >= self.facts.n_layers):
            rule = self._unusual(tensor, key, numbers, rule)
        if rule is None:
            return
        self.has_experts |= rule.expert_at is not None or rule.fusion is not None
        if reason := rule.reason or self._unused(rule, numbers):
            self.ignored.append((tensor, reason))
        elif rule.fusion is not None:
            self._add_fused(tensor, rule, numbers)
        else:
            self._add_whole(tensor, rule, numbers)

    def _unused(self, rule: NameRule, numbers: tuple[int, ...]) -> str:
        """Why nobody reads a matrix of an expert, which transformers saves; empty if it is read."""
        key, first = self.facts.table.identity_experts, self.facts.n_experts
        if key is None or rule.expert_at is None:
            return ""
        count, expert = self.facts.value(key), numbers[rule.expert_at]
        is_identity = is_whole(count) and first <= expert < first + count
        return "its expert is the identity, and computes nothing" if is_identity else ""

    def _unusual(
        self, tensor: TensorInfo, key: str, numbers: tuple[int, ...], rule: NameRule | None
    ) -> NameRule | None:
        """The rule of a name outside the language model's blocks; None if it is reported."""
        first = self.facts.n_layers
        beyond = bool(numbers) and first <= numbers[0] < first + self.facts.n_mtp_blocks
        other = outside(self.facts.table, key, beyond=beyond)
        if other is None and tensor.name.rpartition(".")[2] in _ACTIVATION_SCALES:
            self.ignored.append((tensor, "scales of activations, which weights do not need"))
        elif other is None:
            (self.unknown if rule is None else self.beyond).append(tensor.name)
        return other

    def _add_whole(self, tensor: TensorInfo, rule: NameRule, numbers: tuple[int, ...]) -> None:
        role, need = rule.roles[0], rule.needs[0]
        layer = None if rule.layer_at is None else numbers[rule.layer_at]
        expert = None if rule.expert_at is None else numbers[rule.expert_at]
        shape, scale = tensor.shape, self.scales.of_weight.get(tensor.name)
        is_matrix = len(shape) == 2 if role.is_matrix is None else role.is_matrix
        # Towers keep counters and positions beside their weights.
        is_counter = not is_matrix and role.component in _TOWERS and tensor.dtype in DTYPE_BITS
        is_read = is_counter or self._is_readable(tensor, scale is not None, is_matrix=is_matrix)
        if need is not None:
            # An MTP block needs what one like it does. Codes have shapes of their own.
            block = numbers[0] if role.component == "mtp" else layer
            self.presence.add(need, block, tensor.name, shape if is_read else None)
        elif 0 in shape or (len(shape) != 2 if is_matrix else not shape):
            self._wrong_shape(tensor, f"{'[out, in] of' if is_matrix else 'that of a'} {role.name}")
        place = (role.component, role.projection, layer, expert)
        self.tensors.append(ModelTensor(tensor, role.name, *place, shape, is_matrix, scale))

    def _add_fused(self, tensor: TensorInfo, rule: NameRule, numbers: tuple[int, ...]) -> None:
        """Every expert's matrices, expert by expert, of a tensor that holds all of them."""
        fusion = rule.fusion or Fusion()
        if isinstance(fusion.transposed, str):
            if len(self.ways) != 1:
                wanted = "[experts, out, in] or [experts, in, out] alone, in all layers"
                self._wrong_shape(tensor, wanted)
                return
            fusion = fusion._replace(transposed=self.ways == {True})
        axes = ["experts", *(("in", "out") if fusion.transposed else ("out", "in"))]
        if fusion.mxfp4:
            axes = ["experts", "out", "blocks of in", "bytes"]
        sizes, n_parts = dict(zip(axes, tensor.shape, strict=False)), len(rule.roles)
        same_axes = len(tensor.shape) == len(axes) and all(tensor.shape)
        n_experts = self.facts.n_experts
        if not same_axes or sizes["experts"] != n_experts or sizes["out"] % n_parts:
            has = f"{n_experts} experts, {n_parts} projections in `out`"
            self._wrong_shape(tensor, f"[{', '.join(axes)}] with {has}")
            return
        scale = self.scales.of_weight.get(tensor.name)
        # Blocks without their scales are reported where scales are looked up.
        self._is_readable(tensor, scale is not None or fusion.mxfp4, is_matrix=True)
        size = sizes["out"] // n_parts
        shape = (size, sizes["blocks of in"] * _MXFP4_BLOCK if fusion.mxfp4 else sizes["in"])
        parts: list[Operation] = [Slice(part * size, size) for part in range(n_parts)]
        if fusion.interleaved:
            parts = [Alternate(part, n_parts) for part in range(n_parts)]
        layer = None if rule.layer_at is None else numbers[rule.layer_at]
        for need, role in zip(rule.needs, rule.roles, strict=True):
            if need is not None:
                block = numbers[0] if role.component == "mtp" else layer
                name = f"{tensor.name} ({need.slot} of each expert)"
                self.presence.add(need, block, name, shape)
        turned = (Transposed(),) if fusion.transposed else ()
        self.tensors += (
            ModelTensor(
                tensor,
                *(role.name, role.component, role.projection, layer, expert, shape),
                scale=scale,
                operations=(Expert(expert), *turned, *((part,) if n_parts > 1 else ())),
                mxfp4=fusion.mxfp4,
            )
            for expert in range(n_experts)
            for role, part in zip(rule.roles, parts, strict=True)
        )

    def _wrong_shape(self, tensor: TensorInfo, wanted: str) -> None:
        shape = list(tensor.shape)
        self.wrong.append(diagnostic("wrong-shape", name=tensor.name, shape=shape, wanted=wanted))

    def _is_readable(self, tensor: TensorInfo, scaled: bool, *, is_matrix: bool) -> bool:
        if (scaled and is_matrix) or tensor.dtype in _PLAIN:
            return True
        # Without scales it is reported where those are looked up.
        if scaled or tensor.dtype != FP8:
            self.unreadable[tensor.dtype, _READABLE[is_matrix]].append(tensor.name)
        return False

    def findings(self) -> Iterator[Diagnostic]:
        """What is wrong with names, shapes, scales and the config."""
        facts = self.facts
        # Names are reported together: one missing table row explains a thousand of them.
        if self.unknown:
            quantized = any(name.endswith(_QUANTIZED_ENDINGS) for name in self.unknown)
            notes = ["some of these names belong to an already quantized checkpoint"] * quantized
            yield _of_names(
                self.unknown, "tensor-without-role", notes=notes, family=facts.table.family
            )
        if self.beyond:
            yield _of_names(self.beyond, "layer-beyond-config", n_layers=facts.n_layers)
        yield from self.scales.findings
        if self.has_experts and not facts.n_experts:
            key = " or ".join(facts.table.experts)
            why = ", which says how many experts there are"
            yield diagnostic("missing-config-key", model=facts.model_id, key=key, why=why)
            return
        wrong = [*self.wrong, *config_findings(facts)]
        yield from wrong
        # Shapes are compared with a config that is right by itself.
        if not any(finding.code == "bad-config-value" for finding in wrong):
            yield from self.presence.shape_findings()
        # A checkpoint of another quantizer has hundreds of them, all for the same reason.
        for (dtype, readable), names_alike in self.unreadable.items():
            name = first_few(names_alike, 1)
            yield diagnostic("unreadable-dtype", name=name, dtype=dtype, readable=readable)

    def model(self) -> Model:
        """What was read, as a value."""
        facts, tensors = self.facts, tuple(self.tensors)
        tied = facts.given(TIED)
        # Configs may leave it to the default of their library; else the tensors themselves show.
        if not isinstance(tied, bool):
            tied = facts.value(TIED) is True or all(one.role != "lm_head" for one in tensors)
        orphans = ((scale, "scales of a weight not there") for scale in self.scales.orphans)
        roles = {*facts.table.roles, *(tensor.role for tensor in tensors)}
        facts = replace(facts, table=replace(facts.table, roles=tuple(sorted(roles))))
        return Model(facts.model_id, facts, tied, tensors, (*self.ignored, *orphans))
