"""Whether a bundle holds what its own config means: every module, in the right shape."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from emitters.core.bundle_reading import Bundle
from emitters.core.record import BundleModule
from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic
from policy_dsl.inventory import TensorInfo
from policy_dsl.policy import SINGLE_ROLES
from policy_dsl.quantities import counted, first_few, runs_of
from policy_dsl.reader_config import reader_kind
from policy_dsl.roles.architecture import NameRule, Need, architecture, family_of
from policy_dsl.roles.classify import outside
from policy_dsl.roles.completeness import Presence, config_findings, shown_first, wrong_experts
from policy_dsl.roles.config_facts import TIED, ConfigFacts, read_config
from policy_dsl.roles.model import Model, ModelTensor, numbered_key
from policy_dsl.treatments import Coded

# Names that a need may have, as a family's table spells them.
_Names = list[tuple[str, NameRule]]
# A layer, and the other number of a name.
_Place = tuple[int | None, int]
_PLAIN = frozenset({"BF16", "F16", "F32"})


def needs_findings(bundle: Bundle) -> tuple[list[Diagnostic], str]:
    """What a bundle lacks, or has though its config denies it, or has in another shape.

    Also why its modules are not compared with its config, empty if they are.
    """
    config, model = bundle.inventory.config, bundle.inventory.id
    model_type, found = config.get("model_type"), []
    # Readers build the model by it.
    if not isinstance(model_type, str):
        why = ", which names the architecture"
        found.append(diagnostic("missing-config-key", model=model, key="model_type", why=why))
    family = family_of(config)
    if family is None:
        return found, f"policyc has no table for {model_type!a}"
    table = architecture(family)
    if bundle.format.spec.refusal(table) is not None:
        return found, f"{bundle.format.name} does not take {family}"
    try:
        facts = read_config(config, table, model)
    except PolicyError as error:
        return [*found, *error.diagnostics], ""
    wrong = list(config_findings(facts))
    return [*found, *(wrong or _Search(bundle, facts).findings())], ""


class _Search:
    """The modules of a bundle, looked up by what the format calls each tensor of its model."""

    def __init__(self, bundle: Bundle, facts: ConfigFacts) -> None:
        self.bundle, self.facts, self.presence = bundle, facts, Presence(facts)
        tied = facts.given(TIED) is True
        self.model = Model(bundle.inventory.id, facts, tied=tied, tensors=())
        self.modules = {module.name: module for module in bundle.modules}
        # By names without their numbers: modules, with these.
        self.keyed: dict[str, list[tuple[BundleModule, tuple[int, ...]]]] = defaultdict(list)
        for module in bundle.modules:
            key, numbers = numbered_key(module.name)
            self.keyed[key].append((module, numbers))
        self.by_expert: dict[tuple[str, int], dict[tuple[int, ...], dict[int, BundleModule]]] = {}
        self.wrong: list[Diagnostic] = []

    def findings(self) -> Iterator[Diagnostic]:
        """What is wrong with the modules that are there, and which are not."""
        table = self.facts.table
        named: dict[Need, _Names] = {need: [] for need in table.needs.values()}
        for key, rule in table.names.items():
            for need in filter(None, rule.needs):
                named[need].append((key, rule))
        omitted = self._omitted()
        layers = self._layers(named, {layer for _, layer in omitted})
        left_out: dict[tuple[int | None, ...], list[str]] = defaultdict(list)
        for need, names in named.items():
            places: Iterable[int | None] = layers if need.in_layers else (None,)
            lacking = [layer for layer in places if not self._is_whole(need, layer, names)]
            dropped = [layer for layer in lacking if (need, layer) in omitted]
            # What the policy dropped is not missing, but readers may look for it.
            if dropped:
                self.presence.seen.setdefault(need, {}).update(dict.fromkeys(dropped, ""))
            asked = [] if need.optional else [at for at in dropped if self.facts.holds(need, at)]
            if need.slot == "lm_head":
                asked = dropped if self.facts.value(TIED) is False else []
            if asked:
                left_out[tuple(asked)].append(need.shown)
        yield from self.wrong
        yield from self.presence.shape_findings()
        yield from self.presence.absences(layers)
        for wanted, shown in left_out.items():
            numbers = _ranges(layer for layer in wanted if layer is not None)
            where = f" in layer{'s' if len(wanted) > 1 else ''} {numbers}" if numbers else ""
            what = first_few(sorted(shown))
            yield diagnostic("left-out-by-policy", model=self.model.id, what=what, where=where)
        yield from self._head_findings()

    def _layers(self, named: Mapping[Need, _Names], omitted: set[int | None]) -> list[int]:
        """The layers of the config that the bundle has, after a comparison of the two."""
        # What precedes the number of a layer in the names of the format's modules.
        blocks = {
            numbered_key(self._path(_tensor(need, (0, 0), *name, ())))[0].partition("#")[0]
            for need, names in named.items()
            if need.in_layers
            for name in names
        }
        # Counted before they are walked: a config may ask for any number of them.
        count, model, there, beyond = self.model.n_layers, self.model.id, {*omitted}, []
        for key, alike in self.keyed.items():
            if "#" in key and key.partition("#")[0] in blocks:
                there |= {numbers[0] for _, numbers in alike}
                past = ((module, numbers[0]) for module, numbers in alike if numbers[0] >= count)
                beyond += [one.name for one, layer in past if not self._is_mtp(one, key, layer)]
        missing = _ranges(layer for layer in range(count) if layer not in there)
        if missing:
            self._fail("missing-layers", model=model, missing=missing, n_layers=count)
        if beyond:
            tensors, shown = counted(len(beyond), "tensor"), first_few(sorted(beyond))
            self._fail("layer-beyond-config", tensors=tensors, n_layers=count, names=shown)
        return [layer for layer in range(count) if layer in there]

    def _is_mtp(self, module: BundleModule, key: str, layer: int) -> bool:
        """Whether a module after the last layer belongs to a block that predicts tokens."""
        table, announced = self.facts.table, self.model.n_layers + self.facts.n_mtp_blocks
        if table.mtp_layers is None:
            return False
        if layer < announced or module.role.startswith("mtp."):
            return True
        # Norms and routers stay where a policy drops the block's matrices.
        rule = outside(table, f"{key}.weight", beyond=True) or outside(table, key, beyond=True)
        return rule is not None and rule.roles[0].name.rpartition(".")[2] in SINGLE_ROLES

    def _omitted(self) -> set[tuple[Need, int | None]]:
        """What the record says was left out, so that nobody misses it."""
        found: set[tuple[Need, int | None]] = set()
        for name in self.bundle.record.omitted if self.bundle.record else ():
            key, numbers = numbered_key(name)
            if rule := self.facts.table.names.get(key):
                layer = None if rule.layer_at is None else numbers[rule.layer_at]
                found |= {(need, layer) for need in rule.needs if need is not None}
        return found

    def _path(self, tensor: ModelTensor) -> str:
        return self.bundle.format.spec.module_path(tensor, self.model)

    def _is_whole(self, need: Need, layer: int | None, names: _Names) -> bool:
        """Whether the bundle has it, also under each number that its names have."""
        numbers = range(self.facts.table.numbers)
        if all(self._look_up(need, (layer, number), names) for number in numbers):
            return True
        # One of several is none.
        self.presence.seen.get(need, {}).pop(layer, None)
        return False

    def _look_up(self, need: Need, place: _Place, names: _Names) -> bool:
        """Take the modules of the first of these names that the bundle has, if it has one."""
        layer, _ = place
        wanted = self.facts.shape(self.facts.sizes(need, layer))
        for key, rule in names:
            whole = _tensor(need, place, key, rule, wanted)
            format = self.bundle.format
            made = format.spec.parts(whole, self.model)
            parts = [one for one in made if format.review.left_out(one, self.model) is None]
            paths, by_expert = [self._path(one) for one in parts], whole.expert is not None
            if not parts and any(one.left_out for one in made):
                # The reader's own class does without it, where the model has it.
                if self.facts.holds(need, layer):
                    self.presence.seen.setdefault(need, {}).setdefault(layer, "")
                return True
            if parts and self.modules.keys() >= {*paths}:
                for part, path in zip(parts, paths, strict=True):
                    self._add(need, layer, self.modules[path], part, stack=by_expert)
                return True
            if parts and by_expert and self._add_apart(need, layer, paths[0], parts[0]):
                return True
        return False

    def _add(
        self, need: Need, layer: int | None, module: BundleModule, part: ModelTensor, *, stack: bool
    ) -> None:
        shape, added, count = module.shape, module.added, self.model.n_experts
        wanted = self.facts.shape(self.facts.sizes(need, layer))
        if stack and shape:
            if shape[0] - added not in (count, count - added):
                self.wrong += wrong_experts(need.slot, layer, range(shape[0]), count)
            shape = shape[1:]
        elif added and len(shape) > 0 and shape != wanted:
            shape = (shape[0] - added, *shape[1:])
        is_coded = isinstance(module.treatment, Coded)
        # Of a part that is right, the whole is.
        fits, is_joined = shape == part.shape, part.place is not None
        known = wanted if fits else None if is_joined or (is_coded and not module.shape) else shape
        self.presence.add(need, layer, module.name, known)
        if is_coded or self.bundle.inventory.container is not None:
            return
        dtypes = {tensor.dtype for tensor in module.tensors.values()} - _PLAIN
        if dtypes:
            dtype, readable = dtypes.pop(), "a plain tensor is BF16, F16 or F32"
            self._fail("unreadable-dtype", name=module.name, dtype=dtype, readable=readable)

    def _add_apart(self, need: Need, layer: int | None, path: str, part: ModelTensor) -> bool:
        """Take the modules of single experts; False if the bundle has none of them."""
        count = self.model.n_experts
        for layout in filter(None, self.bundle.format.spec.layouts.values()):
            held = self._numbered_like(layout.path(path, 0), layout.path(path, 1))
            there = sorted(number for number in held if number <= count)
            within = [number for number in there if number < count]
            for number in within:
                self._add(need, layer, held[number], part, stack=False)
            if within:
                self.wrong += wrong_experts(need.slot, layer, there, count)
                return True
        return False

    def _numbered_like(self, first: str, second: str) -> Mapping[int, BundleModule]:
        """The modules with names as these of expert 0 and 1, by the expert's number."""
        (key, numbers), (_, others) = numbered_key(first), numbered_key(second)
        at = next(at for at, (a, b) in enumerate(zip(numbers, others, strict=True)) if a != b)
        # A config may ask for any number of experts: looked up is what there is.
        if (key, at) not in self.by_expert:
            grouped = self.by_expert[key, at] = defaultdict(dict)
            for module, held in self.keyed.get(key, ()):
                grouped[*held[:at], *held[at + 1 :]][held[at]] = module
        return self.by_expert[key, at].get((*numbers[:at], *numbers[at + 1 :]), {})

    def _fail(self, code: str, **facts: Any) -> None:
        self.wrong.append(diagnostic(code, **facts))

    def _head_findings(self) -> Iterator[Diagnostic]:
        """A head that readers do not look for, or look for in vain."""
        given, because = self.facts.given(TIED), ""
        if given is None:
            given, because = self._assumed_tie()
        has_head = not self.modules.keys().isdisjoint(("lm_head", "language_model.lm_head"))
        about: dict[str, Any] = {"model": self.model.id, "what": "lm_head"}
        if given is True and has_head:
            reason = because or f"{TIED} is true"
            yield diagnostic("config-disagrees", reason=reason, where="", **about)
        need = self.facts.table.needs.get("lm_head")
        if given is False and not has_head and need not in self.presence.seen:
            yield diagnostic("missing-tensor", why=f"; {because}" if because else "", **about)

    def _assumed_tie(self) -> tuple[bool | None, str]:
        """What the first reader that assumes something of the head takes, and in words."""
        config, readers = self.model.config, self.bundle.format.spec.config_readers
        kinds = (reader_kind(reader, config) for reader in readers)
        for kind in filter(None, kinds):
            if kind.only.get(TIED) == [False]:
                return False, "its readers take no embedding as the head"
            if assumed := kind.top.assumes.get(TIED):
                # Of a null, Python makes false.
                tied = bool(assumed.defaults[0]) and TIED not in config
                word = "null" if TIED in config else "absent"
                return tied, f"{TIED} is {word}, which its readers take as {str(tied).lower()}"
        return None, ""


def _tensor(
    need: Need, place: _Place, key: str, rule: NameRule, shape: tuple[int, ...] | None
) -> ModelTensor:
    """A tensor as a source may call it, of expert 0 if there are several. shape: if known."""
    role, name = rule.roles[rule.needs.index(need)], key
    layer, number = place
    known = {rule.arranged.number_at if rule.arranged else None: number, rule.layer_at: layer}
    for at in range(key.count("#")):
        name = name.replace("#", str(known.get(at, 0)), 1)
    source, words = TensorInfo(name, "BF16", (), 0), (role.name, role.component, role.projection)
    expert = None if rule.expert_at is None and rule.fusion is None else 0
    return ModelTensor(source, *words, layer, expert, shape or (), bool(role.is_matrix))


def _ranges(numbers: Iterable[int]) -> str:
    """`0, 3-65535`: whole numbers in order, with those that follow each other as one."""
    return shown_first(n if n == last else f"{n}-{last}" for n, last in runs_of(numbers))
