"""Tensor name -> role, by the table of its architecture; a checkpoint as a model of roles.

Inventory ── architecture: what names mean ── scales ── completeness ──> Model
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, did_you_mean, fail
from policy_dsl.inventory import DTYPE_BITS, Inventory, TensorInfo
from policy_dsl.quantities import counted, first_few
from policy_dsl.roles.architecture import Architecture, architecture, families, model_types, outside
from policy_dsl.roles.completeness import Presence, review
from policy_dsl.roles.config_facts import TIED, ConfigFacts, config_findings, read_config
from policy_dsl.roles.model import Model, ModelTensor
from policy_dsl.roles.name_rules import Fusion, NameRule, Need, Role, numbered_key
from policy_dsl.roles.quantization import FP8, Scales, find_scales
from policy_dsl.views import Alternate, Expert, Operation, Slice, Transposed

__all__ = ["Architecture", "Model", "ModelTensor", "architecture", "classify", "families"]

_PLAIN = frozenset({"BF16", "F16", "F32"})
_READABLE = ("a plain tensor is BF16, F16 or F32", "a matrix is BF16, F16, F32, or FP8 with scales")
_TOWERS = frozenset({"vision", "audio"})
_QUANTIZED_ENDINGS = (".weight_packed", ".qweight", ".qzeros", ".scales", ".biases", ".g_idx")
_ALREADY_QUANTIZED = "some of these names belong to an already quantized checkpoint"
# The last part of names. Readers that compute in 16 bits do not need them.
_ACTIVATION_SCALES = frozenset(
    ("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale", "kv_scale")
)
# What hipfire's quantizer adds to a model, and what it is.
_ADDED = (
    (re.compile(r"\.awq_scale\w*\.weight$"), "AWQ scales that activations are divided by"),
    (re.compile(r"\.lr_[uv]\.weight$"), "low-rank correction of a matrix"),
)
# An MXFP4 block is 16 bytes of two 4-bit codes each.
_MXFP4_BLOCK = 32


def classify(inventory: Inventory) -> Model:
    """The checkpoint as a model: every tensor has exactly one role, or a reason to be ignored.

    Raises: PolicyError with all that is wrong with its config, names, shapes, dtypes and scales,
    or with what the config means and it lacks.
    """
    facts = read_config(inventory.config, architecture_of(inventory), inventory.id)
    presence = Presence(facts)
    reading = _Reading(facts, find_scales(inventory), presence)
    for tensor in inventory.tensors.values():
        reading.read(tensor)
    reading.wrong += config_findings(facts)
    _raise_if_any(reading.findings())
    model = reading.model()
    _raise_if_any(review(model, presence))
    return model


def classify_hfq(inventory: Inventory) -> Model:
    """The model of an HFQ file, for people to see: roles by names and logical shapes.

    Raises: PolicyError as `classify` does, but never for a dtype.
    """
    tensors = inventory.tensors
    added = {name: reason for name in tensors for pattern, reason in _ADDED if pattern.search(name)}
    # Names and shapes are the original checkpoint's; only its dtypes are gone.
    values = {key: one._replace(dtype="F16") for key, one in tensors.items() if key not in added}
    model = classify(replace(inventory, tensors=values))
    ignored = ((tensor.name, reason) for tensor, reason in model.ignored)
    return replace(
        model,
        tensors=tuple(replace(known, source=tensors[known.source.name]) for known in model.tensors),
        ignored=tuple((tensors[name], reason) for name, reason in (*ignored, *added.items())),
    )


def _raise_if_any(findings: Iterator[Diagnostic]) -> None:
    if listed := tuple(findings):
        raise PolicyError(listed)


def architecture_of(inventory: Inventory) -> Architecture:
    """The table of the family that the config names.

    Raises: PolicyError if it names none that is known.
    """
    model_type = inventory.config.get("model_type")
    if not isinstance(model_type, str):
        why = ", which names the architecture"
        raise fail("missing-config-key", model=inventory.id, key="model_type", why=why)
    family = model_types().get(model_type)
    if family is None:
        raise fail(
            "unknown-architecture",
            suggestion=did_you_mean(model_type, model_types()),
            notes=[f"known families: {', '.join(families())}"],
            model=inventory.id,
            model_type=model_type,
        )
    return architecture(family)


@dataclass
class _Reading:
    """The pass over all names: what each means, and what is wrong on the way."""

    facts: ConfigFacts
    scales: Scales
    presence: Presence
    tensors: list[ModelTensor] = field(default_factory=list)
    ignored: list[tuple[TensorInfo, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    beyond: list[str] = field(default_factory=list)
    wrong: list[Diagnostic] = field(default_factory=list)
    unreadable: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    has_experts: bool = False

    def read(self, tensor: TensorInfo) -> None:
        """Give a tensor its role."""
        # Scales are read with their weight and are not tensors of the model.
        if tensor.name in self.scales.consumed:
            return
        key, numbers = numbered_key(tensor.name)
        rule = self.facts.table.names.get(key)
        at = None if rule is None else rule.layer_at
        if rule is None or (at is not None and numbers[at] >= self.facts.n_layers):
            rule = self._unusual(tensor, key, numbers, rule)
        if rule is None:
            return
        layer = None if rule.layer_at is None else numbers[rule.layer_at]
        expert = None if rule.expert_at is None else numbers[rule.expert_at]
        self.has_experts |= expert is not None or rule.fusion is not None
        if rule.reason:
            self.ignored.append((tensor, rule.reason))
        elif rule.fusion is not None:
            self._add_fused(tensor, rule, rule.fusion, layer)
        else:
            self._add_whole(tensor, rule.roles[0], rule.needs[0], layer, expert)

    def _unusual(
        self, tensor: TensorInfo, key: str, numbers: list[int], rule: NameRule | None
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

    def _add_whole(
        self,
        tensor: TensorInfo,
        role: Role,
        need: Need | None,
        layer: int | None,
        expert: int | None,
    ) -> None:
        name, component, projection, is_matrix = role
        shape, scale = tensor.shape, self.scales.of_weight.get(tensor.name)
        if is_matrix is None:
            is_matrix = len(shape) == 2
        # Towers keep counters and positions beside their weights.
        is_weight = is_matrix or component not in _TOWERS or tensor.dtype not in DTYPE_BITS
        scaled = scale is not None
        is_read = not is_weight or self._is_readable(tensor, is_matrix=is_matrix, scaled=scaled)
        if need is not None:
            # Codes have shapes of their own.
            block = _block_of(tensor, component, layer)
            self.presence.add(need, block, tensor.name, shape if is_read else None)
        elif 0 in shape or (len(shape) != 2 if is_matrix else not shape):
            self._wrong_shape(tensor, f"{'[out, in] of' if is_matrix else 'that of a'} {name}")
        place = (component, projection, layer, expert)
        self.tensors.append(ModelTensor(tensor, name, *place, shape, is_matrix, scale))

    def _add_fused(
        self, tensor: TensorInfo, rule: NameRule, fusion: Fusion, layer: int | None
    ) -> None:
        """Every expert's matrices, expert by expert, of a tensor that holds all of them."""
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
        self._is_readable(tensor, is_matrix=True, scaled=scale is not None or fusion.mxfp4)
        size = sizes["out"] // n_parts
        shape = (size, sizes["blocks of in"] * _MXFP4_BLOCK if fusion.mxfp4 else sizes["in"])
        parts: list[Operation] = [Slice(part * size, size) for part in range(n_parts)]
        if fusion.interleaved:
            parts = [Alternate(part, n_parts) for part in range(n_parts)]
        for need, role in zip(rule.needs, rule.roles, strict=True):
            if need is not None:
                name = f"{tensor.name} ({need.slot} of each expert)"
                self.presence.add(need, _block_of(tensor, role.component, layer), name, shape)
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

    def _is_readable(self, tensor: TensorInfo, *, is_matrix: bool, scaled: bool) -> bool:
        if (scaled and is_matrix) or tensor.dtype in _PLAIN:
            return True
        # Without scales it is reported where those are looked up.
        if scaled or tensor.dtype != FP8:
            readable = _READABLE[is_matrix]
            self.unreadable.setdefault((tensor.dtype, readable), []).append(tensor.name)
        return False

    def findings(self) -> Iterator[Diagnostic]:
        """What is wrong with names, shapes and scales."""
        yield from self._findings_of_names()
        yield from self.scales.findings
        if self.has_experts and not self.facts.n_experts:
            keys = " or ".join(self.facts.table.experts)
            why = ", which says how many experts there are"
            yield diagnostic("missing-config-key", model=self.facts.model_id, key=keys, why=why)
            return
        yield from self.wrong
        # Shapes are compared with a config that is right by itself.
        if not any(finding.code == "bad-config-value" for finding in self.wrong):
            yield from self.presence.shape_findings()
        # A checkpoint of another quantizer has hundreds of them, all for the same reason.
        for (dtype, readable), names in self.unreadable.items():
            shown = first_few(names, 1)
            yield diagnostic("unreadable-dtype", name=shown, dtype=dtype, readable=readable)

    def _findings_of_names(self) -> Iterator[Diagnostic]:
        # Names are reported together: one missing table row explains a thousand of them.
        if self.unknown:
            quantized = any(name.endswith(_QUANTIZED_ENDINGS) for name in self.unknown)
            yield diagnostic(
                "tensor-without-role",
                notes=[_ALREADY_QUANTIZED] if quantized else [],
                family=self.facts.table.family,
                tensors=counted(len(self.unknown), "tensor"),
                names=first_few(sorted(self.unknown)),
            )
        if self.beyond:
            yield diagnostic(
                "layer-beyond-config",
                tensors=counted(len(self.beyond), "tensor"),
                names=first_few(sorted(self.beyond)),
                n_layers=self.facts.n_layers,
            )

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


def _block_of(tensor: TensorInfo, component: str | None, layer: int | None) -> int | None:
    """The layer in which a tensor is needed; an MTP block needs what one like it does."""
    return numbered_key(tensor.name)[1][0] if component == "mtp" else layer
