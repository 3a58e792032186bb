"""What JANG's readers cannot load, or load wrongly: a table of constraints on a plan.

Source: jang 2.5.50 (`load_jangtq`, runs on a CPU), osaurus-ai/vmlx-swift at b298324c and
`jang-runtime` of FiditeNemini/jangq at bce65d4d (read).
"""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial

from emitters.checkpoints import QKV, at_layers, omission
from emitters.jangtq_prestack.spec import MXTQ, NAME, READER, projection_of
from policy_dsl.formats import Review
from policy_dsl.plan import Draft, Refusal, coded_modules
from policy_dsl.reader_config import refused
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.roles.model import is_one_of, module_name
from policy_dsl.treatments import Plain, Stored, scheme_of

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
    # jang's loader builds mlx-lm's classes.
    if is_one_of(module_name(tensor, model), table.mlx.bare):
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
    coded, qkv = [*coded_modules(draft.modules)], defaultdict[int | None, set[Stored]](set)
    for module in draft.modules:
        if module.role in QKV:
            qkv[module.layer].add(module.treatment)
    mxtq = {(module.layer, module.role): how.bits for module, how in coded if how.scheme == MXTQ}
    widths = {at: [mxtq.get((at, role), 0) for role in _EXPERTS] for at, _ in mxtq}
    groups = [(module.layer, module.role, how.group_size or 1) for module, how in coded]
    # Gate and up run in one kernel, which takes the width of gate for both.
    uneven = [at for at, (gate, up, _) in widths.items() if gate and up and gate != up]
    yield "jang", at_layers("mxtq gate and up of different widths are decoded wrongly", uneven)
    lacking = [at for at, (gate, up, down) in widths.items() if gate and up and not down]
    yield "jang", at_layers("where gate and up are mxtq, down must be mxtq too", lacking)
    if draft.model.architecture.facts(NAME).get("skips_qk_norms"):
        joined = [at for at, held in qkv.items() if len(held) == 1 and all(map(scheme_of, held))]
        reason = "it joins q, k and v of equal widths and then skips their norms and biases"
        yield "jang", at_layers(reason, joined)
    others = [at for at, role, size in groups if role == "router" and size not in (1, 64)]
    yield "jang", at_layers("it reads quantized routers in groups of 64", others)
    # Latent attention is split by heads on loading, and quantized again.
    value = draft.model.facts.value("qk_nope_head_dim")
    head = value if isinstance(value, int) else 0
    split = [at for at, role, size in groups if role == "attention.kv_b_proj" and head % size]
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
