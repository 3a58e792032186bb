"""The codes of defects in checkpoints: files, headers, the hub, names and shapes."""

from __future__ import annotations

from policy_dsl.codes.kinds import Code, error, warning

SOURCE_CODES: dict[str, Code] = {
    # sources
    "unknown-source": error(
        '"{reference}" is not a folder, a file, a model of the catalog or a hub id',
        "A source is a checkpoint folder or file, a recorded headers file, a catalog name or "
        "org/name.",
    ),
    "missing-config": error(
        "{place} has no config.json", "The config names the architecture; a source needs it."
    ),
    "link-outside": error(
        '{file} is a link out of the folder, to "{target}"',
        "A folder of somebody else may link to any file of this machine. Links of weights are "
        "followed unless `--no-links` is given; those of other files are not, but for the "
        "blobs of the hub's cache.",
        each="file",
    ),
    "bad-source-json": error(
        "{file}: {reason}", "A JSON file of the checkpoint cannot be read as what it should be."
    ),
    "not-the-file": error(
        "{file} is {what}",
        "A clone without git-lfs, or a download that failed, leaves something else under the "
        "file's name.",
        each="file",
    ),
    "no-tokenizer": warning(
        "the bundle for {target} has no tokenizer",
        "Readers load the weights and then fail, for they cannot turn text into tokens.",
    ),
    "odd-token-ids": warning(
        "{file}: {reason}",
        "Readers pass over such an id, or fail when they load the tokenizer or generate.",
    ),
    "token-beyond-embedding": warning(
        "{file} has {ids} beyond the {rows} rows of the embedding: {tokens}",
        "The model works until such a token is used: transformers then fails with an index "
        "error, mlx reads other memory. More rows than tokens are usual padding.",
    ),
    "not-a-checkpoint": error(
        "{place} is {what}, not a checkpoint",
        "Only safetensors checkpoints of whole models, and HFQ files, are read.",
    ),
    "unknown-dtype": error(
        '{file}: tensor "{tensor}" has the dtype {dtype}, which is not read',
        "The file is newer than this version of policyc, or its header is damaged.",
        each="tensor",
    ),
    "no-weights": error(
        "{place} holds no safetensors file",
        "Weights are read from safetensors files; a model may also be one HFQ file.",
    ),
    "pickled-weights": error(
        "{place} holds its weights as pickles ({files}), which are never read",
        "Reading a pickle runs code that stands in it.",
    ),
    "ambiguous-weights": error(
        "{place} has no index, and its safetensors files are not a numbered set: {files}",
        "Without an index only model.safetensors, one file, or a whole numbered set is clear.",
    ),
    "shard-outside": error(
        'the index names "{file}", which is not the plain name of a safetensors file',
        "Shards lie beside the index; a path would lead out of the checkpoint.",
        each="file",
    ),
    "missing-shard": error(
        "{file} is not there; {expected}",
        "A file that the checkpoint needs is missing.",
        each="file",
    ),
    "index-mismatch": error(
        'tensor "{tensor}": {reason}', "The index and the shards disagree.", each="tensor"
    ),
    "one-shard": error(
        "{file} is one of {shards} shards", "The index says that the model has more files."
    ),
    "duplicate-tensor": error(
        'tensor "{tensor}" is in {file} and in {other}',
        "Two shards hold the same tensor.",
        each="tensor",
    ),
    "stray-safetensors": warning(
        "{place}: {files} not among the model's weights and not read",
        "Adapters, or a second copy of the weights, lie beside the checkpoint.",
    ),
    "not-safetensors": error(
        "{file} is not a whole safetensors file: {reason}",
        "The header is broken, or the file is cut short or has bytes left over.",
        each="file",
    ),
    "bad-tensor-entry": error(
        '{file}: tensor "{tensor}": {reason}',
        "One entry of a file's list of tensors is broken.",
        each="tensor",
    ),
    "not-hfq": error(
        "{file} is not a whole HFQ file: {reason}",
        "The header, the metadata or the index is broken, or the file is cut short or goes on.",
    ),
    "several-hfq": error(
        "{place} holds several HFQ files: {files}", "Each of them is a whole model."
    ),
    "hfq-without-roles": warning(
        "the tensors of {model} are shown without roles: {reason}",
        "The file itself can be read; its names are not those of a family that is known.",
    ),
    "unrecordable-source": error(
        "headers of {model} cannot be recorded: it is a {form} file",
        "Recorded headers stand for checkpoints of safetensors files.",
    ),
    "hub-offline": error(
        "{what} is not whole in the hub's cache, and HF_HUB_OFFLINE forbids asking the hub",
        "Offline, only snapshots that were fetched whole can be opened.",
    ),
    "hub-no-access": error(
        "{what}: the hub refuses access (HTTP {status})",
        "The repository is gated, private or absent, or the token is not valid.",
    ),
    "hub-not-found": error(
        "{what} is not on the hub, and no folder here",
        "The repository, its revision or the file does not exist.",
    ),
    "hub-no-ranges": error(
        "{what}: the server answers without ranges and would send all {size} bytes",
        "Headers are read by range; a plan never downloads weights.",
    ),
    "hub-failed": error(
        "{what}: {reason}", "The hub cannot be reached, or its answer cannot be used."
    ),
    "bad-recorded-headers": error(
        "{file} is not a recorded headers file: {reason}",
        "Recorded headers are what `policyc inspect --save-headers` writes.",
    ),
    "quantization-not-shown": warning(
        "the config of {model} says that it is quantized ({form}), and no tensor is",
        "Merged or dequantized checkpoints keep the entry of what they were made of.",
    ),
    # a checkpoint read through its architecture
    "unknown-architecture": error(
        'no architecture table knows the model_type "{model_type}" of {model}',
        "Roles come from a table by model family; without one, no name has a meaning.",
    ),
    "missing-config-key": error(
        "the config of {model} has no {key}{why}",
        "Sizes come from config.json, so that an incomplete checkpoint is noticed.",
    ),
    "bad-config-value": error(
        "the config of {model} gives {key} as {value}",
        "Counts and sizes are whole numbers, plausible ones, and those of the tensors.",
    ),
    "tensor-without-role": error(
        "architecture {family} has no role for {tensors}: {names}",
        "The family's table does not have these names; nothing is skipped silently.",
    ),
    "ambiguous-tensor": error(
        "{first} and {second} are the same {role} twice",
        "The checkpoint holds a matrix under two names; which one counts is unknown.",
        each="first",
    ),
    "layer-beyond-config": error(
        "{tensors} in layers beyond the {n_layers} of the config: {names}",
        "Only multi-token prediction blocks that the config announces follow the last layer.",
    ),
    "missing-layers": error(
        "{model} has no tensors of layers {missing}; its config says {n_layers} layers",
        "The checkpoint is incomplete, or the config is another model's.",
    ),
    "missing-experts": error(
        "{role} of layer {layer} lacks experts {missing}; the config says {count}",
        "Every layer has all experts, numbered from 0.",
        each="layer",
    ),
    "expert-beyond-config": error(
        "{role} of layer {layer} has experts {beyond}; the config says {count}",
        "Every layer has as many experts as the config says, numbered from 0.",
        each="layer",
    ),
    "missing-tensor": error(
        "{model} has no {what}{why}",
        "The checkpoint is incomplete, or the config is another model's: what each layer of a "
        "family must hold follows from its table and the config.",
    ),
    "config-disagrees": error(
        "{reason}, but {model} has {what}{where}",
        "The config says another kind of layer than the tensors are; readers build what it says.",
    ),
    "missing-scale": error(
        "{tensors} of FP8 or MXFP4 without scales: {names}",
        "Values are codes times scales; a weight without its scales cannot be read.",
    ),
    "missing-block-size": error(
        "{model} has FP8 scales but its config has no quantization_config.weight_block_size",
        "The block is never guessed from shapes: ragged edges would be read wrong.",
    ),
    "wrong-scale-grid": error(
        "the scales of {name} {shape} are {found}, not {wanted}",
        "There is one scale for each block, edge blocks included.",
        each="name",
    ),
    "wrong-scale-dtype": error(
        "{name} is {dtype} with scales of {scale}",
        "FP8 weights have float scales, MXFP4 blocks have byte exponents.",
        each="name",
    ),
    "wrong-shape": error(
        "{name} has shape {shape}, not {wanted}",
        "The shape contradicts the role or the config.",
        each="name",
    ),
    "unreadable-dtype": error(
        "dtype {dtype} of {name}: {readable}",
        "Other dtypes are codes of a format that is not read as a source.",
    ),
}
