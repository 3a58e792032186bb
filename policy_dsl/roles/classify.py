"""Tensor name -> role, by the table of its architecture; a checkpoint as a model of roles.

Inventory ── architecture: what names mean ── scales, fused ── completeness ──> Model
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, did_you_mean, fail
from policy_dsl.inventory import DTYPE_BITS, Inventory, TensorInfo
from policy_dsl.quantities import counted, first_few
from policy_dsl.roles.architecture import Architecture, architecture, families, model_types, outside
from policy_dsl.roles.completeness import Expectation, Presence, review
from policy_dsl.roles.config_facts import TIED, ConfigFacts, config_findings, read_config
from policy_dsl.roles.fused import defuse, fused_defect
from policy_dsl.roles.model import Model, ModelTensor
from policy_dsl.roles.name_rules import Fusion, NameRule, Need, Role, numbered_key
from policy_dsl.roles.scales import Scales, find_scales, is_activation_scale

__all__ = ["Architecture", "Model", "ModelTensor", "architecture", "classify", "families"]

_PLAIN = frozenset({"BF16", "F16", "F32"})
_FP8 = "F8_E4M3"
_READABLE = ("a plain tensor is BF16, F16 or F32", "a matrix is BF16, F16, F32, or FP8 with scales")
_TOWERS = frozenset({"vision", "audio"})
_QUANTIZED_ENDINGS = (".weight_packed", ".qweight", ".qzeros", ".scales", ".biases", ".g_idx")
_ALREADY_QUANTIZED = "some of these names belong to an already quantized checkpoint"


def classify(inventory: Inventory) -> Model:
    """The checkpoint as a model: every tensor has exactly one role, or a reason to be ignored.

    Raises: PolicyError if no table knows the config's model_type, a value of the config cannot
    be one, a tensor has no role or two have the same, has another shape than the config means
    or a dtype that no weight has, scales are missing or wrong, or tensors, layers or experts
    that the config means are missing.
    """
    facts = read_config(inventory.config, architecture_of(inventory), inventory.id)
    presence = Presence(Expectation(facts))
    reading = _Reading(inventory.id, facts, find_scales(inventory), presence)
    for tensor in inventory.tensors.values():
        reading.read(tensor)
    reading.wrong += config_findings(facts, inventory.id)
    _raise_if_any(reading.findings())
    model = _model(inventory, reading)
    _raise_if_any(review(model, reading.presence))
    return model


def _raise_if_any(findings: Iterator[Diagnostic]) -> None:
    found = tuple(findings)
    if found:
        raise PolicyError(found)


def architecture_of(inventory: Inventory) -> Architecture:
    """The table of the family that the config names.

    Raises: PolicyError if it names none that is known.
    """
    model_type = inventory.config.get("model_type")
    if not isinstance(model_type, str):
        why = ", which tells the architecture"
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

    model_id: str
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
        # Scales are read with their weight and are no tensors of the model.
        if tensor.name in self.scales.consumed:
            return
        key, numbers = numbered_key(tensor.name)
        rule = self.facts.table.names.get(key)
        if rule is None or (
            rule.layer_at is not None and numbers[rule.layer_at] >= self.facts.n_layers
        ):
            rule = self._unusual(tensor, key, numbers, rule)
        if rule is not None:
            self._add(tensor, rule, numbers)

    def _unusual(
        self, tensor: TensorInfo, key: str, numbers: list[int], rule: NameRule | None
    ) -> NameRule | None:
        """The rule of a name outside the language model's blocks; None if it is reported."""
        first = self.facts.n_layers
        beyond = bool(numbers) and first <= numbers[0] < first + self.facts.n_mtp_blocks
        found = outside(self.facts.table, key, beyond=beyond)
        if found is None and is_activation_scale(tensor.name):
            self.ignored.append((tensor, "scales of activations, which weights do not need"))
        elif found is None:
            (self.unknown if rule is None else self.beyond).append(tensor.name)
        return found

    def _add(self, tensor: TensorInfo, rule: NameRule, numbers: list[int]) -> None:
        layer = None if rule.layer_at is None else numbers[rule.layer_at]
        if rule.reason:
            self.ignored.append((tensor, rule.reason))
        elif rule.fusion is not None:
            self._add_fused(tensor, rule, rule.fusion, layer)
        else:
            expert = None if rule.expert_at is None else numbers[rule.expert_at]
            self.has_experts = self.has_experts or expert is not None
            self._add_whole(tensor, rule.roles[0], rule.needs[0], layer, expert)

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
        self.tensors.append(
            ModelTensor(
                tensor,
                name,
                component,
                projection,
                layer,
                expert,
                shape,
                is_matrix=is_matrix,
                scale=scale,
            )
        )

    def _add_fused(
        self, tensor: TensorInfo, rule: NameRule, fusion: Fusion, layer: int | None
    ) -> None:
        self.has_experts = True
        scale = self.scales.of_weight.get(tensor.name)
        found = fused_defect(tensor, fusion, len(rule.roles), self.facts.n_experts)
        if found is not None:
            self.wrong.append(found)
            return
        # Blocks without their scales are reported where scales are looked up.
        scaled = scale is not None or fusion.mxfp4
        self._is_readable(tensor, is_matrix=True, scaled=scaled)
        parts = list(defuse(tensor, rule, layer=layer, scale=scale))
        for need, part in zip(rule.needs, parts, strict=False):
            if need is not None:
                name = f"{tensor.name} ({need.slot} of each expert)"
                block = _block_of(tensor, part.component, layer)
                self.presence.add(need, block, name, part.shape)
        self.tensors += parts

    def _wrong_shape(self, tensor: TensorInfo, wanted: str) -> None:
        shape = list(tensor.shape)
        self.wrong.append(diagnostic("wrong-shape", name=tensor.name, shape=shape, wanted=wanted))

    def _is_readable(self, tensor: TensorInfo, *, is_matrix: bool, scaled: bool) -> bool:
        if (scaled and is_matrix) or tensor.dtype in _PLAIN:
            return True
        # Without scales it is reported where those are looked up.
        if scaled or tensor.dtype != _FP8:
            readable = _READABLE[is_matrix]
            self.unreadable.setdefault((tensor.dtype, readable), []).append(tensor.name)
        return False

    def findings(self) -> Iterator[Diagnostic]:
        """What is wrong with names, shapes and scales."""
        yield from self._findings_of_names()
        yield from self.scales.findings
        if not self.has_experts or self.facts.n_experts:
            yield from self.wrong
            # Shapes are held against a config that is right by itself.
            if not any(found.code == "bad-config-value" for found in self.wrong):
                yield from self.presence.shape_findings(self.model_id)
            yield from self._findings_of_dtypes()
            return
        keys = " or ".join(self.facts.table.experts)
        why = ", which tells the number of experts"
        yield diagnostic("missing-config-key", model=self.model_id, key=keys, why=why)

    def _findings_of_dtypes(self) -> Iterator[Diagnostic]:
        # A checkpoint of another quantizer has hundreds of them, all for the same reason.
        for (dtype, readable), names in self.unreadable.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield diagnostic(
                "unreadable-dtype", name=names[0] + more, dtype=dtype, readable=readable
            )

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


def _block_of(tensor: TensorInfo, component: str | None, layer: int | None) -> int | None:
    """The layer in which a tensor is needed; an MTP block needs what one like it does."""
    return numbered_key(tensor.name)[1][0] if component == "mtp" else layer


def _model(inventory: Inventory, reading: _Reading) -> Model:
    tensors, facts = tuple(reading.tensors), reading.facts
    tied = facts.given(TIED)
    # Configs may leave it to the default of their library; else the tensors themselves tell.
    if not isinstance(tied, bool):
        tied = facts.value(TIED) is True or all(tensor.role != "lm_head" for tensor in tensors)
    orphans = tuple((scale, "scales of a weight not there") for scale in reading.scales.orphans)
    roles = {*facts.table.roles, *(tensor.role for tensor in tensors)}
    facts = replace(facts, table=replace(facts.table, roles=tuple(sorted(roles))))
    return Model(inventory.id, facts, tied, tensors, (*reading.ignored, *orphans))
