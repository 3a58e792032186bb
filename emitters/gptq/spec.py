"""What GPTQ checkpoints can hold. Source: auto-round 0.16.1, GPTQModel 7.7.0, vLLM 0.33.0."""

from __future__ import annotations

from emitters.gptq.names import FAMILIES, module_path, plain_dtype
from emitters.gptq.readers import METADATA_KEYS, READERS, RUNTIMES
from emitters.gptq.schemes import GROUP_SIZES, RTN, SEARCHES, STORAGE, WIDTHS, part_shapes
from policy_dsl.formats import ExpertsApart, FormatSpec, SchemeSpec, Shards
from policy_dsl.roles.published_names import expert_path
from policy_dsl.sources.checkpoint import shard_name
from policy_dsl.sources.side_files import SIDE_FILES

_ABOUT = {
    "int": "integers with zero points, version 1",
    "int-gidx": "the same and a group number for each column",
    "int-v2": "zero points of version 2, which has a zero point 0",
    "int-v2-gidx": "version 2 and a group number for each column",
}


SPEC = FormatSpec(
    name="gptq",
    about="GPTQ-packed checkpoints for vLLM, AutoRound, GPTQModel and transformers",
    schemes=tuple(
        SchemeSpec(
            name,
            WIDTHS,
            GROUP_SIZES,
            (RTN, *SEARCHES),
            symmetries=(True, False),
            about=_ABOUT[name],
        )
        for name in STORAGE
    ),
    fill=tuple(("any", bits, "int") for bits in WIDTHS),
    plain_dtypes=("BF16", "F16", "F32"),
    plain_dtype=plain_dtype,
    fp8_rules=("bf16", "bf16_bf16", "f32"),
    families=FAMILIES,
    config_readers=tuple(READERS),
    runtimes=RUNTIMES,
    module_path=module_path,
    part_shapes=part_shapes,
    layouts={"apart": ExpertsApart(expert_path, (*STORAGE, None))},
    tensor_files=Shards(4 * 10**9, shard_name, metadata={"format": "pt"}),
    copied_files=SIDE_FILES,
    # AutoGPTQ and auto-round write files of their own.
    metadata_files=("config.json", "quantize_config.json", "quantization_config.json"),
    settings=("output.shard_size", "calibration.imatrix"),
    metadata_keys=METADATA_KEYS,
)
