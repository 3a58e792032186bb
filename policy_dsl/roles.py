"""Tensor name -> role, by the table of its architecture; a checkpoint as a model of roles.

Inventory ── architecture: what names mean ── scales ── completeness ──> Model
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from policy_dsl.architecture import (
    Architecture,
    Fusion,
    NameRule,
    architecture,
    families,
    model_types,
    outside,
)
from policy_dsl.completeness import review
from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, did_you_mean, fail
from policy_dsl.inventory import Inventory, TensorInfo
from policy_dsl.model import Model, ModelTensor
from policy_dsl.scales import Scales, find_scales, some

__all__ = ["Architecture", "Model", "ModelTensor", "architecture", "classify", "families"]

# A config that asks for more is no model, and would only cost memory.
_LARGEST_COUNT = 65536
_FLOATS = frozenset({"BF16", "F16", "F32"})
_QUANTIZED_ENDINGS = (".weight_packed", ".qweight", ".qzeros", ".scales", ".biases", ".g_idx")


def classify(inventory: Inventory) -> Model:
    """The checkpoint as a model: every tensor has exactly one role, or a reason to be ignored.

    Raises: PolicyError if no table knows the config's model_type, a tensor has no role or two
    have the same, FP8 scales are missing or of a wrong shape, or layers, experts or config keys
    are missing.
    """
    table = _table_of(inventory)
    counts = _counts(inventory, table)
    scales = find_scales(inventory)
    reading = _Reading(inventory, table, counts, scales)
    reading.read()
    findings = [*scales.findings, *reading.findings()]
    if findings:
        raise PolicyError(findings)
    model = reading.model()
    findings = list(review(model))
    if findings:
        raise PolicyError(findings)
    return model


@dataclass(frozen=True, slots=True)
class _Counts:
    layers: int
    experts: int
    mtp_layers: int


def config_value(config: Mapping[str, Any], key: str) -> Any:
    """A key of the config, or of its `text_config` as multimodal models nest it; else None."""
    text = config.get("text_config")
    found = config.get(key)
    return text.get(key) if found is None and isinstance(text, Mapping) else found


def _table_of(inventory: Inventory) -> Architecture:
    model_type = inventory.config.get("model_type")
    if not isinstance(model_type, str):
        raise fail("missing-config-key", model=inventory.id, key="model_type", why="")
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


def _counts(inventory: Inventory, table: Architecture) -> _Counts:
    found = {}
    for key in (table.layers, table.experts, table.mtp_layers):
        value = config_value(inventory.config, key) if key is not None else None
        if value is None and key == table.layers:
            why = ": it says how many layers there are"
            raise fail("missing-config-key", model=inventory.id, key=key, why=why)
        valid = type(value) is int and (key != table.layers) <= value <= _LARGEST_COUNT
        if value is not None and not valid:
            raise fail("bad-config-value", model=inventory.id, key=key, value=repr(value)[:60])
        found[key] = value or 0
    return _Counts(
        found[table.layers], found.get(table.experts, 0), found.get(table.mtp_layers, 0)
    )


@dataclass
class _Reading:
    """The pass over all names: what each means, and what is wrong on the way."""

    inventory: Inventory
    table: Architecture
    counts: _Counts
    scales: Scales
    tensors: list[ModelTensor] = field(default_factory=list)
    ignored: list[tuple[TensorInfo, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    beyond: list[str] = field(default_factory=list)
    wrong: list[Diagnostic] = field(default_factory=list)

    def read(self) -> None:
        """Give every tensor its role, in the order of the inventory."""
        consumed = self.scales.consumed
        self.ignored += [
            (orphan, "scales of a weight not there") for orphan in self.scales.orphans
        ]
        for tensor in self.inventory.tensors.values():
            if tensor.name not in consumed:
                self._read_one(tensor)

    def _read_one(self, tensor: TensorInfo) -> None:
        key, numbers = _key(tensor.name)
        rule = self.table.names.get(key)
        if rule is None or (
            rule.layer_at is not None and numbers[rule.layer_at] >= self.counts.layers
        ):
            rule = self._unusual(tensor, key, numbers, rule)
            if rule is None:
                return
        if not rule.roles:
            self.ignored.append((tensor, rule.reason))
            return
        layer = None if rule.layer_at is None else numbers[rule.layer_at]
        if rule.fusion is not None:
            self.tensors += self._defused(tensor, rule, rule.fusion, layer)
            return
        expert = None if rule.expert_at is None else numbers[rule.expert_at]
        role, component, projection, is_matrix = rule.roles[0]
        shape, scale = tensor.shape, self.scales.of_weight.get(tensor.name)
        if is_matrix is None:
            is_matrix = len(shape) == 2
        if is_matrix and (len(shape) != 2 or (scale is None and tensor.dtype not in _FLOATS)):
            self._refuse_matrix(tensor, role)
        self.tensors.append(
            ModelTensor(
                tensor,
                role,
                component,
                projection,
                layer,
                expert,
                shape,
                is_matrix=is_matrix,
                scale=scale,
            )
        )

    def _unusual(
        self, tensor: TensorInfo, key: str, numbers: list[int], rule: NameRule | None
    ) -> NameRule | None:
        """The rule of a name outside the language model's blocks; None if it is reported."""
        first, last = self.counts.layers, self.counts.layers + self.counts.mtp_layers
        beyond = bool(numbers) and first <= numbers[0] < last
        found = outside(self.table, key, beyond=beyond)
        if found is None:
            (self.unknown if rule is None else self.beyond).append(tensor.name)
        return found

    def _defused(
        self, tensor: TensorInfo, rule: NameRule, fusion: Fusion, layer: int | None
    ) -> Iterator[ModelTensor]:
        shape = tensor.shape
        parts, experts = len(rule.roles), self.counts.experts
        ndim = 4 if fusion.mxfp4 else 3
        rows, columns = (shape[1], shape[2]) if len(shape) == ndim else (0, 0)
        outs, ins = (columns, rows) if fusion.transposed else (rows, columns)
        if fusion.mxfp4:
            ins = columns * 32
        if len(shape) != ndim or shape[0] != experts or outs % parts:
            wanted = (
                f"[{experts} experts, …] of {ndim} axes, {parts} projections in equal parts"
            )
            self.wrong.append(
                diagnostic("wrong-shape", name=tensor.name, shape=list(shape), wanted=wanted)
            )
            return
        step = parts if fusion.interleaved else 1
        scale = self.scales.of_weight.get(tensor.name)
        for expert in range(experts):
            for part, (role, component, projection, _) in enumerate(rule.roles):
                first = part if fusion.interleaved else part * (outs // parts)
                yield ModelTensor(
                    tensor, role, component, projection, layer, expert, (outs // parts, ins),
                    first_row=expert * rows + (0 if fusion.transposed else first),
                    transposed=fusion.transposed, scale=scale, row_step=step,
                    first_column=first if fusion.transposed else 0, mxfp4=fusion.mxfp4,
                )  # fmt: skip

    def _refuse_matrix(self, tensor: TensorInfo, role: str) -> None:
        if len(tensor.shape) != 2:
            wanted = f"[out, in] of {role}"
            self.wrong.append(
                diagnostic(
                    "wrong-shape", name=tensor.name, shape=list(tensor.shape), wanted=wanted
                )
            )
        elif tensor.dtype != "F8_E4M3":
            self.wrong.append(
                diagnostic("unreadable-dtype", name=tensor.name, dtype=tensor.dtype)
            )

    def findings(self) -> Iterator[Diagnostic]:
        """What is wrong with the names and shapes."""
        yield from self.wrong
        if self.unknown:
            quantized = any(name.endswith(_QUANTIZED_ENDINGS) for name in self.unknown)
            yield diagnostic(
                "tensor-without-role",
                notes=["names like these belong to an already quantized checkpoint"]
                * quantized,
                family=self.table.family,
                count=len(self.unknown),
                names=some(self.unknown),
            )
        if self.beyond:
            yield diagnostic(
                "layer-beyond-config",
                count=len(self.beyond),
                names=some(self.beyond),
                n_layers=self.counts.layers,
            )
        if not self.counts.experts and any(
            each.component == "experts" for each in self.tensors
        ):
            key = self.table.experts or "experts"
            why = ": it says how many experts a layer has"
            yield diagnostic("missing-config-key", model=self.inventory.id, key=key, why=why)

    def model(self) -> Model:
        """The model of what was read."""
        tied = config_value(self.inventory.config, "tie_word_embeddings")
        if not isinstance(tied, bool):
            tied = all(tensor.role != "lm_head" for tensor in self.tensors)
        roles = tuple(sorted({*self.table.roles, *(tensor.role for tensor in self.tensors)}))
        return Model(
            id=self.inventory.id,
            architecture=replace(self.table, roles=roles),
            config=self.inventory.config,
            n_layers=self.counts.layers,
            n_experts=self.counts.experts,
            tied=tied,
            tensors=tuple(self.tensors),
            ignored=tuple(self.ignored),
        )


def _key(name: str) -> tuple[str, list[int]]:
    """The name with `#` for each whole number between dots, and the numbers."""
    parts = name.split(".")
    numbers = []
    for i, part in enumerate(parts):
        if part.isdecimal() and len(part) < 8 and (part[0] != "0" or part == "0"):
            numbers.append(int(part))
            parts[i] = "#"
    return ".".join(parts), numbers
