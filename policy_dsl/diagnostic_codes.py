"""The catalogue of diagnostic codes: severity, message template, and what it means.

A code names the defect, never the cure. `docs/errors.md` is checked against this table.
"""

from __future__ import annotations

from policy_dsl.code_kinds import Code, Severity
from policy_dsl.code_kinds import error as _error
from policy_dsl.code_kinds import warning as _warning
from policy_dsl.language_codes import LANGUAGE_CODES

__all__ = ["CODES", "Code", "Severity"]

CODES: dict[str, Code] = {
    **LANGUAGE_CODES,
    # the vocabulary
    "unknown-role": _error(
        '{where} has no role "{role}"',
        "The name is no component, projection, role or alias of the architecture.",
    ),
    # sources
    "unknown-source": _error(
        '"{reference}" is no folder, no file, no model of the catalog and no hub id',
        "A source is a checkpoint folder, a recorded headers file, a catalog name or org/name.",
    ),
    "missing-config": _error(
        "{place} has no config.json", "The config names the architecture; a source needs it."
    ),
    "bad-source-json": _error(
        "{file}: {reason}", "A JSON file of the checkpoint cannot be read as what it should be."
    ),
    "no-weights": _error(
        "{place} holds no safetensors file", "Weights are read from safetensors files only."
    ),
    "pickled-weights": _error(
        "{place} holds its weights as pickles ({files}), which are never read",
        "Reading a pickle runs code that stands in it.",
    ),
    "ambiguous-weights": _error(
        "{place} has no index, and its safetensors files are no numbered set: {files}",
        "Without an index only model.safetensors, one file, or a whole numbered set is clear.",
    ),
    "shard-outside": _error(
        'the index names "{file}", which is not the plain name of a safetensors file',
        "Shards lie beside the index; a path would lead out of the checkpoint.",
    ),
    "missing-shard": _error(
        "{file} is not there; {expected}", "A file that the checkpoint needs is missing."
    ),
    "index-mismatch": _error(
        'tensor "{tensor}": {reason}', "The index and the shards disagree."
    ),
    "one-shard": _error(
        "{file} is one of {shards} shards", "The index says that the model has more files."
    ),
    "duplicate-tensor": _error(
        'tensor "{tensor}" is in {file} and in {other}', "Two shards hold the same tensor."
    ),
    "stray-safetensors": _warning(
        "{place}: {files} not among the model's weights and not read",
        "Adapters, or a second copy of the weights, lie beside the checkpoint.",
    ),
    "not-safetensors": _error(
        "{file} is not a whole safetensors file: {reason}",
        "The header is broken, or the file is cut short or has bytes left over.",
    ),
    "bad-tensor-entry": _error(
        '{file}: tensor "{tensor}": {reason}', "One entry of a safetensors header is broken."
    ),
    "hub-offline": _error(
        "{what} is not whole in the hub's cache, and HF_HUB_OFFLINE forbids asking the hub",
        "Offline, only snapshots that were fetched whole can be opened.",
    ),
    "hub-no-access": _error(
        "{what}: the hub refuses access (HTTP {status})",
        "The repository is gated, private or absent, or the token is not valid.",
    ),
    "hub-not-found": _error(
        "{what} is not on the hub, and no folder here",
        "The repository, its revision or the file does not exist.",
    ),
    "hub-no-ranges": _error(
        "{what}: the server answers without ranges and would send all {size} bytes",
        "Headers are read by range; a plan never downloads weights.",
    ),
    "hub-failed": _error(
        "{what}: {reason}", "The hub cannot be reached, or its answer cannot be used."
    ),
    "bad-recorded-headers": _error(
        "{file} is no recorded headers file: {reason}",
        "Recorded headers are what `policyc inspect --save-headers` writes.",
    ),
    # a policy against a model and a target
    "not-the-boundary": _warning(
        "these layers are not the boundary of a model of {n_layers} layers",
        "`boundary layers …` says as many first layers as last ones; here it does not.",
    ),
    "middle-without-boundary": _error(
        "`middle` needs exactly one boundary in the policy, which has {count}",
        "`middle` is the complement of the policy's one `boundary`.",
    ),
    "unknown-family": _error(
        'there is no family "{family}"', "`policyc formats` lists the model families."
    ),
    "number-outside-model": _error(
        "{kind} {written} is outside the model, which has {kind}s 0-{last}",
        "Layers and experts count from 0; negative numbers count from the end.",
    ),
    "matches-nothing": _error(
        "the rule touches no tensor of {model}",
        "The selector means nothing in this model, or only tensors that it may not touch.",
    ),
    "tied-lm-head": _warning(
        "lm_head is tied to embed in this model: the rule has nothing to decide",
        "A tied head has no tensor of its own; the rule for embed decides.",
    ),
    "shadowed-rule": _warning(
        "every one of the {count} tensors that this rule matches is decided by {rules}",
        "The last rule that matches decides; this rule decides nothing.",
    ),
    "unreached-matrices": _warning(
        "no rule reaches {count} matrices ({roles}); they take `otherwise`: {nbytes}",
        "Matrices that no rule names are often forgotten ones.",
    ),
    "router-quantized": _warning(
        "{count} routers are quantized", "Routers are small and choose the experts."
    ),
    "larger-than-source": _warning(
        "{count} outputs are larger than their source: {before} become {after}",
        "More bits than the source has cost bytes and gain nothing.",
    ),
    "no-target": _error(
        "policy {policy} does not say which target to plan for; choose --target: {choices}",
        "A policy with no target or several needs --target.",
    ),
    "unknown-target": _error(
        'there is no target "{target}"; there are {known}', "Targets are bundle formats."
    ),
    "unavailable-target": _error(
        "this version of policyc cannot write {target} yet; it writes {known}",
        "The language knows the target, the program has no emitter for it.",
    ),
    "already-quantized": _error(
        "{model} is already quantized ({form}); take the original checkpoint, "
        "or --allow-requantize",
        "Quantizing twice adds two errors. Releases in block-scaled FP8 or MXFP4 are not "
        "meant.",
    ),
    "requantized": _warning(
        "{model} is already quantized ({form}): its error and this one add up",
        "Allowed by --allow-requantize.",
    ),
    "unsupported-family": _error(
        "{target} does not take family {family}: {reason}",
        "The bundle would not load; refused before work starts.",
    ),
    "unknown-fp8-rule": _error(
        'there is no FP8 rule "{rule}"; there are {rules}',
        "How FP8 weights are rounded when they are dequantized.",
    ),
    "prune-count": _error(
        "experts cannot be pruned to {to}: the model has {count}",
        "Pruning keeps at least one expert and at most all.",
    ),
    "unsupported-transform": _error(
        "{target} cannot {transform} yet", "The transform is known, the target does not run it."
    ),
    "unsupported-dtype": _error(
        "{target} does not store {dtype}; it stores {held}", "Plain dtypes of the target."
    ),
    "unknown-scheme": _error('there is no scheme "{scheme}"', "No target has this scheme."),
    "foreign-scheme": _error(
        "scheme {scheme} belongs to target {homes}, not to {target}",
        "Schemes are bound to the formats that store them.",
    ),
    "missing-bits": _error(
        "{scheme} needs a width: {widths}",
        "The scheme stores several widths and none is given.",
    ),
    "unsupported-bits": _error(
        "{target} cannot store {scheme} at {bits} bits; it has {widths}",
        "The target's readers know no such width.",
    ),
    "unsupported-group-size": _error(
        "{target} cannot store {scheme} in groups of {group_size}; it has {sizes}",
        "The target's readers know no such group size.",
    ),
    "unsupported-method": _error(
        "{target} has no method {method} for {scheme}; it has {methods}",
        "The method does not go with the scheme.",
    ),
    "no-symmetric-choice": _error(
        "{scheme} of {target} is neither `sym` nor `asym`: leave it out",
        "The scheme has one way of storing zero.",
    ),
    "unsupported-source-layout": _error(
        "{target} cannot take {role} from this source: rows are interleaved or transposed",
        "The source stores the matrix in an order that this target's build does not undo.",
    ),
    "raw-unreadable": _error(
        "readers of {target} cannot use the source's {dtype} bytes as they are",
        "`raw` copies bytes; the target's readers must know the dtype.",
    ),
    "not-a-matrix": _error(
        "{role} of shape {shape} is not a matrix and cannot be quantized",
        "Only matrices are quantized.",
    ),
    "unquantizable": _error(
        "{target} cannot quantize {role}: {reason}", "The target's readers take it plain only."
    ),
    "group-does-not-divide": _error(
        "groups of {group_size} do not divide the {columns} columns",
        "Groups lie along the last axis and may not be split.",
    ),
    "mixed-stack": _error(
        "experts of one stack are treated differently: {one}, {other}",
        "The target stores all experts of a projection in one tensor of one width.",
    ),
    "uneven-stack": _error(
        "experts of one stack have shapes {one} and {other}",
        "The target stores all experts of a projection in one tensor.",
    ),
    # a checkpoint read through its architecture
    "unknown-architecture": _error(
        'no architecture table knows the model_type "{model_type}" of {model}',
        "Roles come from a table by model family; without one, no name has a meaning.",
    ),
    "missing-config-key": _error(
        "the config of {model} has no {key}{why}",
        "Sizes come from config.json, so that an incomplete checkpoint is noticed.",
    ),
    "bad-config-value": _error(
        "the config of {model} gives {key} as {value}",
        "A count of layers or experts is a whole number of a plausible size.",
    ),
    "tensor-without-role": _error(
        "{count} tensors have no role in architecture {family}: {names}",
        "The family's table does not have these names; nothing is skipped silently.",
    ),
    "ambiguous-tensor": _error(
        "{first} and {second} are the same {role} twice",
        "The checkpoint holds a matrix under two names; which one counts is unknown.",
    ),
    "layer-beyond-config": _error(
        "{count} tensors stand in layers beyond the config's {n_layers}: {names}",
        "Only multi-token prediction blocks that the config announces follow the last layer.",
    ),
    "missing-layers": _error(
        "{model} has no tensors of layers {missing}; its config says {n_layers} layers",
        "The checkpoint is incomplete, or the config is another model's.",
    ),
    "missing-experts": _error(
        "{role} of layer {layer} lacks experts {missing}; the config says {count}",
        "Every layer has all experts, numbered from 0.",
    ),
    "expert-beyond-config": _error(
        "{role} of layer {layer} has experts {beyond}; the config says {count}",
        "Every layer has as many experts as the config says, numbered from 0.",
    ),
    "missing-tensor": _error(
        "{model} has no {role}",
        "A language model has embeddings, and a head unless it is tied.",
    ),
    "missing-scale": _error(
        "{count} FP8 or MXFP4 tensors have no scales: {names}",
        "Values are codes times scales; a weight without its scales cannot be read.",
    ),
    "missing-block-size": _error(
        "{model} has FP8 scales but its config no quantization_config.weight_block_size",
        "The block is never guessed from shapes: ragged edges would be read wrong.",
    ),
    "wrong-scale-grid": _error(
        "the scales of {name} {shape} are {found}, not {wanted}",
        "There is one scale for each block, edge blocks included.",
    ),
    "wrong-scale-dtype": _error(
        "{name} is {dtype} with scales of {scale}",
        "FP8 weights have float scales, MXFP4 blocks have byte exponents.",
    ),
    "wrong-shape": _error(
        "{name} has shape {shape}, not {wanted}",
        "The shape contradicts the role or the config.",
    ),
    "unreadable-dtype": _error(
        "{name} is {dtype}; a matrix is BF16, F16, F32, or FP8 with scales",
        "Other dtypes are codes of a format that is not read as a source.",
    ),
    # the plan's own tests, saved plans, the command line
    "test-failed": _error(
        "the test `{test}` fails: it is {found}", "An assertion of the policy does not hold."
    ),
    "test-without-tensors": _error(
        "the test `{test}` is about no tensor of this plan",
        "A test that measures nothing proves nothing.",
    ),
    "bad-saved-plan": _error(
        "{path} is no saved plan: {reason}",
        "Saved plans are what `policyc plan --save` writes.",
    ),
    "bad-argument": _error("{option}: {reason}", "An option's value is not what it must be."),
    "unwritable-output": _error(
        "cannot write {path}: {reason}", "The folder is missing, full, or not permitted."
    ),
    "system-refused": _error(
        "{path}: {reason}", "The system refused to read or write: not permitted, full, missing."
    ),
    "no-model": _error(
        "policy {policy} names no model: give one with --model",
        "Planning needs headers: a folder, a recorded headers file, a hub id, a catalog name.",
    ),
    "unknown-tensor": _error(
        '{model} has no tensor "{name}"',
        "`explain` takes names of the source or of the output, and globs.",
    ),
    "many-tensors": _error(
        '"{name}" means {count} different decisions: {examples}',
        "`explain` explains one decision; narrow the pattern.",
    ),
    # a bundle on disk
    "not-a-bundle": _error(
        "{path} is no bundle: {reason}", "A bundle is a folder with weights."
    ),
    "bad-bundle-metadata": _error(
        "{path}: {reason}", "Readers of the target could not make sense of the metadata files."
    ),
    "bad-record": _error(
        "policyc.json of {path} cannot be read: {reason}",
        "The provenance record says what every file must hold.",
    ),
    "no-record": _warning(
        "{path} has no policyc.json: hashes cannot be checked",
        "The bundle was made by another tool, or the record was lost.",
    ),
    "missing-bundle-file": _error(
        "{file} is not there, but the {where} names it", "The bundle is not complete."
    ),
    "stray-bundle-file": _error(
        "{file} is not in the record", "A reader loads weights that the build did not write."
    ),
    "unrecorded-file": _warning(
        "{file} is not in the record", "It was added after the build; readers ignore it."
    ),
    "file-changed": _error(
        "{file} is not what was built: {reason}", "Size or SHA-256 differ from the record."
    ),
    "tensor-changed": _error(
        "tensor {tensor} is not what was built: {reason}",
        "Dtype, shape, or SHA-256 differ from the record.",
    ),
    "index-disagrees": _error(
        "model.safetensors.index.json: {reason}",
        "The index and the files tell different things.",
    ),
    "width-disagrees": _error(
        "module {module}: the tensors say {found}, config.json says {written}",
        "Readers take widths from the config; wrong ones load as noise or not at all.",
    ),
    "incomplete-module": _error(
        "module {module}: {reason}", "A quantized module has codes, scales and maybe biases."
    ),
    "not-comparable": _error(
        "the source cannot be compared with this bundle: {reason}",
        "`verify --source` needs the checkpoint that the bundle was built from.",
    ),
    "non-finite-decoded": _error(
        "{tensor}, or its source, has {count} values that are no finite numbers",
        "Such weights break a model.",
    ),
    # building a bundle
    "source-without-files": _error(
        "the weights of {model} are not on this machine, only its headers",
        "A plan needs headers only; a build reads the weights.",
    ),
    "pending-statistics": _error(
        "the build needs statistics that are not there: {pending}",
        "A plan never needs statistics; the methods that this policy chooses do.",
    ),
    "unreadable-values": _error(
        'tensor "{tensor}" is {dtype}: its values cannot be read as numbers',
        "Values are BF16, F16, F32, or FP8 with scales.",
    ),
    "non-finite-source": _error(
        'tensor "{tensor}" holds {value} at {place}',
        "A weight that is no finite number breaks the model; it is never written.",
    ),
    "value-overflow": _error(
        'tensor "{tensor}": the value at {place} is too large for {dtype}',
        "Written as an infinity it would break the model.",
    ),
    "source-changed": _error(
        "{file} of the source changed during the build: {reason}",
        "A bundle of two states of a checkpoint would be neither.",
    ),
    "output-exists": _error(
        "{path} is already there", "An existing output is replaced only when that is asked for."
    ),
    "output-in-source": _error(
        "the output {path} lies in the source's folder or around it",
        "The source is never written to, and never deleted with an output.",
    ),
    "output-not-a-bundle": _error(
        "{path} is no bundle of policyc and is not replaced",
        "Only what a build made is deleted by another build.",
    ),
    "output-in-use": _error(
        "another build is writing {path}", "One build at a time works on an output."
    ),
    "other-build": _error(
        "{path} is the unfinished build of another {what}",
        "A build is resumed only with the same policy, source and version.",
    ),
    "damaged-partial": _error(
        "{path} cannot be resumed: {reason}", "Something else changed the unfinished build."
    ),
    "disk-full": _error(
        "no room for {path}: {reason}", "What is finished stays; the build can be resumed."
    ),
    "too-little-memory": _error(
        "{given} are too little to build in; at least {needed} are needed",
        "Libraries and one block of rows must fit.",
    ),
    "wrong-result": _error(
        "the written bundle is not what was planned: {reason}",
        "The build checks what it wrote before it gives it its name.",
    ),
}
