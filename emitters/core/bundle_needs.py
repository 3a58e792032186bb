"""Whether a bundle holds what its own config means: every module, in the right shape.

Bundle ── its config, the family's table ──> findings; no source, no weights
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from emitters.core.bundle_reading import Bundle
from emitters.core.record import BundleModule
from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic
from policy_dsl.formats import FormatSpec
from policy_dsl.inventory import TensorInfo
from policy_dsl.quantities import counted, first_few
from policy_dsl.reader_config import reader_kind
from policy_dsl.roles.architecture import Architecture, architecture, model_types, outside
from policy_dsl.roles.completeness import Presence, shown_first, wrong_experts
from policy_dsl.roles.config_facts import TIED, config_findings, read_config
from policy_dsl.roles.model import Model, ModelTensor
from policy_dsl.roles.name_rules import NameRule, Need, numbered_key
from policy_dsl.treatments import Coded
from policy_dsl.vocabulary import SINGLE_ROLES

# Modules by a number in their names, and these by all other numbers there.
_Numbered = Mapping[tuple[int, ...], dict[int, BundleModule]]
_PLAIN = frozenset({"BF16", "F16", "F32"})


def needs_findings(bundle: Bundle) -> Iterator[Diagnostic]:
    """What a bundle lacks, or has though its config denies it, or has in another shape.

    Nothing is known of families that have no table or that the format does not take. What the
    record says was left out is a warning.
    """
    spec, inventory = bundle.format.spec, bundle.inventory
    family, model_type = _family(bundle), inventory.config.get("model_type")
    # Readers build the model by it.
    if not isinstance(model_type, str):
        why = ", which names the architecture"
        yield diagnostic("missing-config-key", model=inventory.id, key="model_type", why=why)
    if family is None or not_compared(bundle):
        return
    try:
        facts = read_config(inventory.config, architecture(family), inventory.id)
    except PolicyError as error:
        yield from error.diagnostics
        return
    wrong = list(config_findings(facts))
    if wrong:
        yield from wrong
        return
    model = Model(inventory.id, facts, tied=facts.given(TIED) is True, tensors=())
    search = _Search(bundle, spec, Presence(facts), model)
    search.look()
    yield from search.findings()


def not_compared(bundle: Bundle) -> str:
    """Why the modules of a bundle are not compared with its config; empty if they are."""
    family = _family(bundle)
    if family is None:
        return f"policyc has no table for {bundle.inventory.config.get('model_type')!a}"
    refused = bundle.format.spec.refusal(architecture(family))
    return "" if refused is None else f"{bundle.target} does not take {family}"


def _family(bundle: Bundle) -> str | None:
    return model_types().get(str(bundle.inventory.config.get("model_type")))


@dataclass
class _Search:
    """The modules of a bundle, looked up by what the format calls each tensor of its model."""

    bundle: Bundle
    spec: FormatSpec
    presence: Presence
    model: Model
    modules: Mapping[str, BundleModule] = field(init=False)
    layers: list[int] = field(default_factory=list)
    dropped: dict[Need, list[int | None]] = field(default_factory=dict)
    wrong: list[Diagnostic] = field(default_factory=list)
    _by_number: dict[tuple[str, int], _Numbered] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.modules = {module.name: module for module in self.bundle.modules}

    def look(self) -> None:
        """Look up what every need of the family may be, in every layer that the bundle has."""
        named = _named(self.model.architecture)
        omitted = self._omitted()
        self._count_layers(self._blocks(named), {layer for _, layer in omitted})
        for need, names in named.items():
            places: Iterable[int | None] = self.layers if need.in_layers else (None,)
            for layer in places:
                found = self._look_up(need, layer, names)
                if not found and (need, layer) in omitted:
                    self._miss_dropped(need, layer)

    def _blocks(self, named: Mapping[Need, list[tuple[str, NameRule]]]) -> set[str]:
        """What precedes the number of a layer in the names of the format's modules."""
        tensors = (
            _tensor(need, 0, *name)
            for need, names in named.items()
            if need.in_layers
            for name in names
        )
        paths = (self.spec.module_path(tensor, self.model) for tensor in tensors)
        return {numbered_key(path)[0].partition("#")[0] for path in paths}

    def _count_layers(self, blocks: set[str], omitted: set[int | None]) -> None:
        """Compare the layers that the bundle has with those of its config."""
        # Counted before they are walked: a config may ask for any number of them.
        count, model = self.model.n_layers, self.model.id
        keys = {name: numbered_key(name) for name in self.modules}
        layers = {
            name: numbers[0]
            for name, (key, numbers) in keys.items()
            if numbers and key.partition("#")[0] in blocks
        }
        there = omitted.union(layers.values())
        self.layers = [layer for layer in range(count) if layer in there]
        if missing := _ranges(layer for layer in range(count) if layer not in there):
            self.wrong.append(
                diagnostic("missing-layers", model=model, missing=missing, n_layers=count)
            )
        after = [name for name, layer in layers.items() if layer >= count]
        beyond = [name for name in after if not self._is_mtp(name, keys[name][0], layers[name])]
        if beyond:
            tensors, names = counted(len(beyond), "tensor"), first_few(sorted(beyond))
            self.wrong.append(
                diagnostic("layer-beyond-config", tensors=tensors, n_layers=count, names=names)
            )

    def _is_mtp(self, name: str, key: str, layer: int) -> bool:
        """Whether a module after the last layer belongs to a block that predicts tokens."""
        table = self.model.architecture
        if table.mtp_layers is None:
            return False
        announced = self.model.n_layers + self.model.facts.n_mtp_blocks
        if layer < announced or self.modules[name].role.startswith("mtp."):
            return True
        # Norms and routers stay where a policy drops the block's matrices.
        rule = outside(table, f"{key}.weight", beyond=True) or outside(table, key, beyond=True)
        return rule is not None and rule.roles[0].name.rpartition(".")[2] in SINGLE_ROLES

    def _miss_dropped(self, need: Need, layer: int | None) -> None:
        """Take a need that the policy dropped as seen, and note it if readers look for it."""
        self.presence.seen.setdefault(need, {})[layer] = ""
        if need.slot == "lm_head":
            is_missed = self.model.facts.value(TIED) is False
        else:
            is_missed = not need.optional and self.presence.facts.holds(need, layer)
        if is_missed:
            self.dropped.setdefault(need, []).append(layer)

    def _dropped_findings(self) -> Iterator[Diagnostic]:
        """What readers look for and the policy left out, by the layers that lack it."""
        found: dict[tuple[int | None, ...], list[str]] = {}
        for need, places in self.dropped.items():
            found.setdefault(tuple(places), []).append(need.shown)
        for layers, shown in found.items():
            numbers = _ranges(layer for layer in layers if layer is not None)
            word = "layers" if len(layers) > 1 else "layer"
            where = f" in {word} {numbers}" if numbers else ""
            model, what = self.model.id, first_few(sorted(shown))
            yield diagnostic("left-out-by-policy", model=model, what=what, where=where)

    def _omitted(self) -> set[tuple[Need, int | None]]:
        """What the record says was left out, so that nobody misses it."""
        record = self.bundle.record
        found = set()
        for name in record.omitted if record else ():
            key, numbers = numbered_key(name)
            rule = self.model.architecture.names.get(key)
            if rule is not None:
                layer = None if rule.layer_at is None else numbers[rule.layer_at]
                found |= {(need, layer) for need in rule.needs if need is not None}
        return found

    def _look_up(self, need: Need, layer: int | None, names: list[tuple[str, NameRule]]) -> bool:
        """Take the modules of the first of these names that the bundle has, if it has one."""
        for key, rule in names:
            tensor = _tensor(need, layer, key, rule)
            if self.bundle.format.review.left_out(tensor, self.model) is not None:
                continue
            path = self.spec.module_path(tensor, self.model)
            if path in self.modules:
                self._add(need, layer, self.modules[path], is_stack=tensor.expert is not None)
                return True
            if tensor.expert is not None and self._add_apart(need, layer, path):
                return True
        return False

    def _add(
        self, need: Need, layer: int | None, module: BundleModule, *, is_stack: bool = False
    ) -> None:
        shape, added = module.shape, module.added
        if is_stack and shape:
            if shape[0] - added not in (self.model.n_experts, self.model.n_experts - added):
                self._miscounted(need, layer, range(shape[0]))
            shape = shape[1:]
        elif added and len(shape) > 0 and shape != self.presence.facts.shapes[need]:
            shape = (shape[0] - added, *shape[1:])
        known = shape if module.shape or not isinstance(module.treatment, Coded) else None
        self.presence.add(need, layer, module.name, known)
        dtypes = {tensor.dtype for tensor in module.tensors.values()} - _PLAIN
        if not isinstance(module.treatment, Coded) and dtypes and not self._is_container:
            self._unreadable(module, dtypes.pop())

    @property
    def _is_container(self) -> bool:
        return self.bundle.inventory.container is not None

    def _unreadable(self, module: BundleModule, dtype: str) -> None:
        readable = "a plain tensor is BF16, F16 or F32"
        self.wrong.append(
            diagnostic("unreadable-dtype", name=module.name, dtype=dtype, readable=readable)
        )

    def _add_apart(self, need: Need, layer: int | None, path: str) -> bool:
        """Take the modules of single experts; False if the bundle has none of them."""
        for layout in filter(None, self.spec.layouts.values()):
            held = self._numbered_like(layout.path(path, 0), layout.path(path, 1))
            there = sorted(number for number in held if number <= self.model.n_experts)
            for number in there:
                if number < self.model.n_experts:
                    self._add(need, layer, held[number])
            if there and there[0] < self.model.n_experts:
                self._miscounted(need, layer, there)
                return True
        return False

    def _numbered_like(self, first: str, second: str) -> Mapping[int, BundleModule]:
        """The modules with names as these of expert 0 and 1, by the expert's number."""
        key, numbers = numbered_key(first)
        changed = [a != b for a, b in zip(numbers, numbered_key(second)[1], strict=True)]
        place = changed.index(True)
        # A config may ask for any number of experts: looked up is what there is.
        if (key, place) not in self._by_number:
            self._by_number[key, place] = self._grouped(key, place)
        return self._by_number[key, place].get((*numbers[:place], *numbers[place + 1 :]), {})

    def _grouped(self, key: str, place: int) -> _Numbered:
        """The modules of a key by their numbers but for that in a place, then by that."""
        grouped: dict[tuple[int, ...], dict[int, BundleModule]] = defaultdict(dict)
        for name, numbers in self._by_key[key]:
            others = (*numbers[:place], *numbers[place + 1 :])
            grouped[others][numbers[place]] = self.modules[name]
        return grouped

    @cached_property
    def _by_key(self) -> Mapping[str, list[tuple[str, list[int]]]]:
        """The names of modules with their numbers, by what they are without them."""
        found: dict[str, list[tuple[str, list[int]]]] = defaultdict(list)
        for name in self.modules:
            key, numbers = numbered_key(name)
            found[key].append((name, numbers))
        return found

    def _miscounted(self, need: Need, layer: int | None, numbers: range | list[int]) -> None:
        self.wrong += wrong_experts(need.slot, layer, numbers, self.model.n_experts)

    def findings(self) -> Iterator[Diagnostic]:
        """What is wrong with the modules that were found, and which were not."""
        yield from self.wrong
        yield from self.presence.shape_findings()
        yield from self.presence.absences(self.layers)
        yield from self._dropped_findings()
        yield from self._head_findings()

    def _head_findings(self) -> Iterator[Diagnostic]:
        """A head that readers do not look for, or look for in vain."""
        facts, model = self.model.facts, self.model.id
        need = facts.table.needs.get("lm_head")
        has_head = bool({"lm_head", "language_model.lm_head"} & self.modules.keys())
        given, because = facts.given(TIED), ""
        if given is None:
            given, because = self._assumed_tie()
        if given is True and has_head:
            reason = because or f"{TIED} is true"
            yield diagnostic(
                "config-disagrees", reason=reason, model=model, what="lm_head", where=""
            )
        elif given is False and not has_head and need not in self.presence.seen:
            why = f"; {because}" if because else ""
            yield diagnostic("missing-tensor", model=model, what="lm_head", why=why)

    def _assumed_tie(self) -> tuple[bool | None, str]:
        """What the first reader that assumes something of the head takes, and in words."""
        model_type = self.model.config.get("model_type")
        kinds = (reader_kind(reader, model_type) for reader in self.spec.config_readers)
        for kind in filter(None, kinds):
            if kind.only.get(TIED) == [False]:
                return False, "its readers take no embedding as the head"
            assumed = kind.top.assumes.get(TIED)
            if assumed is not None:
                return self._taken(assumed.defaults[0])
        return None, ""

    def _taken(self, default: object) -> tuple[bool, str]:
        # Of a null, Python makes false.
        tied = bool(default) and TIED not in self.model.config
        word = "null" if TIED in self.model.config else "absent"
        return tied, f"{TIED} is {word}, which its readers take as {str(tied).lower()}"


def _named(table: Architecture) -> dict[Need, list[tuple[str, NameRule]]]:
    """The names that each need of a family may have."""
    named: dict[Need, list[tuple[str, NameRule]]] = {need: [] for need in table.needs.values()}
    for key, rule in table.names.items():
        for need in filter(None, rule.needs):
            named[need].append((key, rule))
    return named


def _tensor(need: Need, layer: int | None, key: str, rule: NameRule) -> ModelTensor:
    """A tensor as a source may call it, of expert 0 if there are several."""
    role = rule.roles[rule.needs.index(need)]
    name = key
    for at in range(key.count("#")):
        name = name.replace("#", str(layer if at == rule.layer_at else 0), 1)
    is_expert = rule.expert_at is not None or rule.fusion is not None
    return ModelTensor(
        source=TensorInfo(name, "BF16", (), 0),
        role=role.name,
        component=role.component,
        projection=role.projection,
        layer=layer,
        expert=0 if is_expert else None,
        shape=(),
        is_matrix=bool(role.is_matrix),
    )


def _ranges(numbers: Iterable[int]) -> str:
    """`0, 3-65535`: whole numbers in order, with those that follow each other as one."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return shown_first(first if first == last else f"{first}-{last}" for first, last in runs)
