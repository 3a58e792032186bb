"""What JANG's readers cannot load, or load wrongly: a table of constraints on a plan.

Source: jang 2.5.50 (`load_jangtq`, runs on a CPU), osaurus-ai/vmlx-swift at b298324c and
`jang-runtime` of FiditeNemini/jangq at bce65d4d (read).
"""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial

from emitters.checkpoints import QKV, at_layers, by_layer, omission
from emitters.jangtq_prestack.spec import MXTQ, NAME, READER, projection_of
from policy_dsl.formats import Review
from policy_dsl.plan import Draft, Module, Refusal
from policy_dsl.reader_config import refused
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.treatments import Coded, Plain, Stored, scheme_of

_LANGUAGE_ONLY = "jang's loader of these families builds the language model only"
_LEFT_OUT = {
    "lm_head": "readers use",
    "vision": _LANGUAGE_ONLY,
    "audio": _LANGUAGE_ONLY,
    "mtp": "jang's loader has no multi-token prediction for these families",
}
# Of fewer values, jang's codebooks differ from machine to machine.
_SHORTEST_ROW = 4
_EXPERTS = ("experts.gate_proj", "experts.up_proj", "experts.down_proj")


def _held(tensor: ModelTensor, model: Model, stored: Stored) -> str | None:
    if isinstance(stored, Plain):
        return None
    if stored.scheme == MXTQ:
        # Nothing in a bundle gives the length of other rows, which may end inside a word.
        if tensor.component != "experts":
            return "Swift readers know such codes of routed experts only"
        if tensor.shape[-1] < _SHORTEST_ROW:
            return f"rows of fewer than {_SHORTEST_ROW} values have no codebook"
    table = model.architecture
    if tensor.namesake in table.mlx.get("bare", ()):
        return f"readers hold the {tensor.namesake} of {table.family} as a bare parameter"
    return None


def _bundle(draft: Draft) -> Iterator[Refusal]:
    for runtime, reason in _faults(draft):
        if reason is not None:
            yield Refusal("", runtime, reason)
    yield from refused(draft, READER, "jang")


REVIEW = Review(left_out=partial(omission, reasons=_LEFT_OUT), held=_held, bundle=_bundle)


def _faults(draft: Draft) -> Iterator[tuple[str, str | None]]:
    """Reader -> what it loads or computes wrongly, if it does."""
    layers = by_layer(draft.modules)
    qkv = {
        at: {held[role].treatment for role in QKV if role in held} for at, held in layers.items()
    }
    widths = {at: [_width(held.get(role)) for role in _EXPERTS] for at, held in layers.items()}
    # Gate and up run in one kernel, which takes the width of gate for both.
    uneven = [at for at, (gate, up, _) in widths.items() if gate and up and gate != up]
    yield "jang", at_layers("mxtq gate and up of different widths are decoded wrongly", uneven)
    lacking = [at for at, (gate, up, down) in widths.items() if gate and up and not down]
    yield "jang", at_layers("where gate and up are mxtq, down must be mxtq too", lacking)
    if draft.model.architecture.facts(NAME).get("skips_qk_norms"):
        joined = [at for at, held in qkv.items() if len(held) == 1 and all(map(scheme_of, held))]
        reason = "it joins q, k and v of equal widths and then skips their norms and biases"
        yield "jang", at_layers(reason, joined)
    routers = (module for module in draft.modules if module.role == "router")
    others = [router.layer for router in routers if _group(router) not in (1, 64)]
    yield "jang", at_layers("it reads quantized routers in groups of 64", others)
    # Latent attention is split by heads on loading, and quantized again.
    head = draft.model.facts.value("qk_nope_head_dim")
    latent = (module for module in draft.modules if module.role == "attention.kv_b_proj")
    split = [one.layer for one in latent if isinstance(head, int) and head % _group(one)]
    reason = f"kv_b_proj is split by heads of {head} values, which its groups cross"
    yield "jang", at_layers(reason, split)
    yield "vmlx-swift", _one_width_each(draft)
    uneven = [at for at, held in qkv.items() if len(held) > 1]
    yield "vmlx-swift", at_layers("q, k and v of one layer must have one width", uneven)
    floats = (module.name for module in draft.modules if module.treatment == Plain("F32"))
    if (first := next(floats, None)) is not None:
        yield "jang-runtime", f"it ignores float32 tensors such as {first}"


def _one_width_each(draft: Draft) -> str | None:
    kinds: dict[str, set[Stored]] = defaultdict(set)
    for module in draft.modules:
        if name := projection_of(module.name):
            kinds["down" if name == "down_proj" else "gate and up"].add(module.treatment)
    for called, treatments in sorted(kinds.items()):
        if any(scheme_of(one) != MXTQ for one in treatments):
            return f"it takes experts only as mxtq, and {called} is not in every layer"
        if len(treatments) > 1:
            return f"it takes one width for {called} in the whole model"
    return None


def _group(module: Module) -> int:
    """Values that share a scale; 1 if it is not in groups."""
    return module.treatment.group_size or 1 if isinstance(module.treatment, Coded) else 1


def _width(module: Module | None) -> int:
    """The width of a module's mxtq codes; 0 if it has no such codes."""
    stored = module.treatment if module else None
    return stored.bits if isinstance(stored, Coded) and stored.scheme == MXTQ else 0
