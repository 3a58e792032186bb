"""What JANGTQ bundles can hold, under which names, and in which order shards are filled.

Their converter writes experts apart, in the order of the source; their rebundler then takes
all stacks first, and the rest as it is in the converter's shards.
Source: jang 2.5.50, converter (`convert_minimax_jangtq`), `rebundle_jangtq_stacked`, loader.
"""

import re
from collections.abc import Sequence
from functools import partial
from operator import attrgetter, itemgetter

from emitters.checkpoints import CONFIG
from policy_dsl import formats
from policy_dsl.formats import ExpertsApart, FormatSpec, PartShape, SchemeSpec, Shards, in_order
from policy_dsl.plan import Module, PlannedTensor
from policy_dsl.roles.architecture import facts_of
from policy_dsl.roles.model import SHORT_NAMES, Model, ModelTensor, stacked_path
from policy_dsl.sources.side_files import SIDE_FILES
from policy_dsl.treatments import Plain, Stored

NAME = "jangtq_prestack"
MXTQ, _MXTQ_ABOUT = "mxtq", "rotated rows, Lloyd-Max codebook"
# Of the rotation; the same in every bundle that was ever shipped.
SEED = 42
JANG_CONFIG = "jang_config.json"
TEMPLATE, TOKENIZER = "chat_template.jinja", "tokenizer_config.json"
AFFINE_WIDTHS = (8, 6, 5, 4, 3, 2)
SHARD_NBYTES = 10**9
# jang's loader builds the classes of mlx-lm.
READER = "mlx_lm"
SENSES = ("vision", "audio", "video")
# What a policy's `metadata` may say: names that JANG has registered.
_METADATA_KEYS: dict[str, formats.MetadataValues] = {
    "reasoning_parser": (
        *("deepseek_r1", "gemma4", "inkling", "minimax_m3", "mistral", "muse_glimmer"),
        *("openai_gptoss", "qwen3", "think_xml"),
    ),
    "tool_parser": (
        *("atem", "deepseek", "dsml", "gemma4", "glm47", "hunyuan", "inkling", "lfm2"),
        *("llama", "minimax", "minimax_m3", "mistral", "nemotron", "openpangu", "qwen"),
        *("qwen3_coder", "step3p5", "xml_function", "zaya_xml"),
    ),
    "cache_type": ("hybrid", "kv", "mamba", "mla"),
    "modality": ("text", *SENSES),
    "think_in_template": bool,
    "supports_tools": bool,
    "supports_thinking": bool,
    "source_model": {"name": str, "org": str, "architecture": str},
}
# In the order of JANG's own writer.
PROJECTIONS = tuple(SHORT_NAMES)
_LAST_WORDS = {word: name for name, short in SHORT_NAMES.items() for word in (name, short)}
_IN_EXPERTS = re.compile(r"\.(?:switch_mlp|experts\.\d+)\.\w+$")


def _expert_path(path: str, expert: int) -> str:
    """The module of one expert of a stack, where experts are apart."""
    block, _, projection = path.rpartition(".switch_mlp.")
    if block.endswith(".block_sparse_moe"):
        projection = SHORT_NAMES[projection]
    return f"{block}.experts.{expert}.{projection}"


def projection_of(path: str) -> str | None:
    """The projection of an expert's or a stack's module, from its name; None for others."""
    projection = _LAST_WORDS.get(path[path.rfind(".") + 1 :])
    # The word first: of the many modules few but experts get to the pattern.
    return projection if projection and _IN_EXPERTS.search(path) else None


def _part_shapes(treatment: Stored, shape: tuple[int, ...], dtype: str) -> tuple[PartShape, ...]:
    """The tensors of a module: codes, norms and width of MXTQ, or those of MLX affine, or one.

    Codes of an MXTQ row are packed into whole uint32 words, `32 // bits` a word.
    """
    if isinstance(treatment, Plain):
        return (PartShape("weight", dtype, shape),)
    bits, (*lead, columns) = treatment.bits, shape
    if treatment.scheme == MXTQ:
        return (
            PartShape("tq_packed", "U32", (*lead, -(-columns // (32 // bits)))),
            PartShape("tq_norms", "F16", tuple(lead)),
            PartShape("tq_bits", "U8", (1,), constant=bytes([bits])),
        )
    packed = PartShape("weight", "U32", (*lead, columns * bits // 32))
    groups = (*lead, columns // treatment.group_size)
    return packed, *(PartShape(part, dtype, groups) for part in ("scales", "biases"))


def _plain_dtype(_tensor: ModelTensor, _model: Model) -> str:
    return "F16"


def _shard_name(number: int, count: int) -> str:
    # jang's loader looks for the dash.
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def file_order(modules: Sequence[Module]) -> Sequence[PlannedTensor]:
    """All tensors of a bundle in the order in which its shards are filled."""
    # A matrix of the source each, in the order of its files.
    pieces = sorted(
        ((view.tensor.file or "", view.tensor.name, view.place(0, 0)), number)
        for number, module in enumerate(modules)
        for view in module.sources
    )
    if any(projection_of(module.name) and not _is_stack(module) for module in modules):
        # Stacks beside experts that are apart come where their first expert would.
        placed = [modules[number] for number in dict.fromkeys(number for _, number in pieces)]
        added = sorted((module for module in modules if not module.sources), key=_added_key)
        return in_order([*placed, *added])
    # The rest is in the shards of the converter, who writes every expert by itself.
    rest: list[tuple[int, str, PlannedTensor]] = []
    shard = nbytes = 0
    for _, number in pieces:
        module = modules[number]
        for tensor in module.tensors:
            if not _is_stack(module):
                rest.append((shard, tensor.name, tensor))
            apart = _is_stack(module) and not tensor.is_constant
            nbytes += tensor.nbytes // module.shape[0] if apart else tensor.nbytes
            if nbytes >= SHARD_NBYTES:
                shard, nbytes = shard + 1, 0
    stacks = sorted((module for module in modules if _is_stack(module)), key=attrgetter("name"))
    return [*in_order(stacks), *(tensor for *_, tensor in sorted(rest, key=itemgetter(0, 1)))]


def _is_stack(module: Module) -> bool:
    return len(module.shape) == 3


def _added_key(module: Module) -> tuple[int, int, int]:
    """Added experts come last: by layer, expert, and projection."""
    order = PROJECTIONS.index(projection_of(module.name) or PROJECTIONS[0])
    return module.layer or 0, int(module.name.split(".")[-2]), order


SPEC = FormatSpec(
    name=NAME,
    about="JANGTQ bundles for JANG's MLX runtimes on Apple silicon",
    schemes=(
        SchemeSpec(MXTQ, (2, 3, 4, 1), (), ("rtn",), (True,), "F32", about=_MXTQ_ABOUT),
        SchemeSpec("affine", AFFINE_WIDTHS, (64, 32, 128), about="scale and bias a group"),
    ),
    fill=(
        *(("experts", bits, MXTQ) for bits in (1, 2, 3, 4)),
        *(("any", bits, "affine") for bits in AFFINE_WIDTHS),
    ),
    plain_dtypes=("F16", "BF16", "F32"),
    fp8_rules=("f32", "bf16", "bf16_bf16"),
    module_path=stacked_path,
    part_shapes=_part_shapes,
    # Of what affine groups are made of, too.
    plain_dtype=_plain_dtype,
    tensor_files=Shards(
        SHARD_NBYTES, _shard_name, order=file_order, fill=partial(formats.filled, past=True)
    ),
    # Readers stack codes themselves; of other tensors they would take the first layer's only.
    layouts={"prestacked": None, "per_expert": ExpertsApart(_expert_path, (MXTQ,))},
    padding={
        family: formats.ExpertPadding(**padding)
        for family, padding in facts_of(NAME, "expert_padding").items()
    },
    metadata_keys=_METADATA_KEYS,
    edited_files=(TEMPLATE, TOKENIZER),
    copied_files=(*SIDE_FILES, "configuration.json"),
    metadata_files=(CONFIG, JANG_CONFIG),
    settings=("output.shard_size", "output.layout", "output.pad_experts"),
    config_readers=(READER,),
    runtimes={
        "jang": "jang_tools, Python with MLX on Apple silicon",
        "vmlx-swift": "vMLX-Swift, also inside Osaurus",
        "jang-runtime": "the older Swift reader",
    },
)
