"""The codes of bundles on disk and of building them."""

from __future__ import annotations

from policy_dsl.codes.kinds import Code, error, warning

BUNDLE_CODES: dict[str, Code] = {
    "head-differs": error(
        "{name} differs from {embedding} ({place}), but the config says that they are tied",
        "Readers of a tied model use its embedding as the head: without its own it answers "
        "something else. A rule that names `lm_head` stores it; `drop` leaves it out.",
    ),
    # where bundles can be built
    "unsupported-system": error(
        "bundles are not built on {system}: {reason}",
        "A build holds locks and writes at offsets as Linux and macOS have them. Everything "
        "that only reads works there too.",
    ),
    "numba-unusable": error(
        "numba, which compiles the kernels, cannot be used: {reason}",
        "Its installation or its settings in the environment are to blame; planning needs no "
        "kernel.",
    ),
    # a bundle on disk
    "not-a-bundle": error("{path} is not a bundle: {reason}", "A bundle is a folder with weights."),
    "bad-bundle-metadata": error(
        "{path}: {reason}", "Readers of the target could not make sense of the metadata files."
    ),
    "unknown-pattern": error(
        "{path}: how {modules} are stored depends on a pattern that is not read: {reason}",
        "Look-around and references to groups cannot be matched in bounded time, and some "
        "patterns mean different things to different readers. Nothing is guessed: "
        "`inspect` shows such modules as unknown, `diff` and `verify` do not pass them.",
    ),
    "metadata-elsewhere": warning(
        "{file}: {reason}",
        "Readers look for a description of the quantization in different places.",
    ),
    "linked-file": warning(
        '{file} is a link out of the bundle, to "{target}"',
        "The bytes are not in the folder: whoever copies or uploads it has a link to nothing.",
        each="file",
    ),
    "bad-record": error(
        "policyc.json of {path} cannot be read: {reason}",
        "The provenance record says what every file must hold.",
    ),
    "no-record": warning(
        "{path} has no policyc.json: hashes cannot be checked",
        "The bundle was made by another tool, or the record was lost.",
    ),
    "left-out-by-policy": warning(
        "{model} has no {what}{where}: its policy dropped it; readers may refuse the bundle",
        "The record says that the policy dropped it, and the config means a model that has it. "
        "`drop` is for towers and heads that nobody reads.",
    ),
    "missing-bundle-file": error(
        "{file} is not there, but the {where} names it", "The bundle is not complete.", each="file"
    ),
    "stray-bundle-file": error(
        "{file} is not in the record",
        "A reader loads weights that the build did not write.",
        each="file",
    ),
    "unrecorded-file": warning(
        "{file} is not in the record",
        "It was added after the build; readers ignore it.",
        each="file",
    ),
    "file-changed": error(
        "{file} is not what was built: {reason}",
        "Size or SHA-256 differ from the record.",
        each="file",
    ),
    "tensor-changed": error(
        "tensor {tensor} is not what was built: {reason}",
        "Dtype, shape, or SHA-256 differ from the record.",
        each="tensor",
    ),
    "index-disagrees": error(
        "model.safetensors.index.json: {reason}", "The index and the files tell different things."
    ),
    "width-disagrees": error(
        "module {module}: {found}, config.json says {written}",
        "Readers take widths from the config; wrong ones load as noise or not at all.",
        each="module",
    ),
    "incomplete-module": error(
        "module {module}: {reason}",
        "A quantized module has codes, scales and maybe biases.",
        each="module",
    ),
    "not-comparable": error(
        "the source cannot be compared with this bundle: {reason}",
        "`verify --source` needs the checkpoint that the bundle was built from.",
    ),
    "other-source": error(
        "the bundle was not built from {given} as it is now: "
        "its record has another digest for {recorded}",
        "The record has the digest of the source's config, and of the names, shapes and places "
        "of its tensors.",
    ),
    "source-tensors-missing": error(
        "the bundle lacks {tensors} of the source: {names}",
        "Neither the record nor the rules of the target say that they are left out.",
    ),
    "values-differ": error(
        "differ from the source: {values} of {modules}",
        "What is kept or cast has one right value for every element.",
    ),
    "codes-differ": error(
        "not what the build makes of the source: {values} of {modules}",
        "The source was coded again in the recorded way, and other bytes came out.",
    ),
    "codes-not-nearest": error(
        "farther from the source than rounding can explain: {values} of {modules}",
        "Values that were rounded are within half a step of the scales stored with them.",
    ),
    "unlike-source": error(
        "not the values of the source, or too far from them: {modules}",
        "Relative error or cosine are outside what codes of this width come to.",
    ),
    "added-not-zero": error(
        "not zero in added experts: {values} of {modules}",
        "These experts are not in the source: they were added, and must decode to zeros.",
    ),
    "nothing-left": error(
        "nothing is left of {modules}: the values are 0, and the source's are not",
        "Values that are too small for the dtype or the scales become 0.",
    ),
    "non-finite-decoded": error(
        "not finite in the bundle or in its source: {values} of {tensor}",
        "Such weights break a model.",
        each="tensor",
    ),
    # building a bundle
    "source-without-files": error(
        "the weights of {model} are not on this machine, only its headers",
        "A plan needs headers only; a build reads the weights.",
    ),
    "pending-statistics": error(
        "the build needs statistics that are not there: {pending}",
        "A plan never needs statistics; the methods that this policy chooses do.",
    ),
    "unreadable-values": error(
        'tensor "{tensor}" is {dtype}: its values cannot be read as numbers',
        "Values are BF16, F16, F32, or FP8 with scales.",
        each="tensor",
    ),
    "non-finite-source": error(
        'tensor "{tensor}" holds {value} at {place}',
        "A weight that is no finite number breaks the model; it is never written.",
    ),
    "value-overflow": error(
        'tensor "{tensor}": {what} is too large for {dtype}',
        "Written as an infinity it would break the model. What the target stores is tried, and "
        "what would hold the value is named.",
    ),
    "value-underflow": error(
        'tensor "{tensor}": nothing is left of its {values} as {treatment}',
        "They are too small for the dtype or the scales, and become 0. What the target stores "
        "is tried, and what would hold them is named.",
        each="tensor",
    ),
    "unstorable-value": error(
        'tensor "{tensor}": {place} cannot be stored as {treatment}: {reason}',
        "Readers would decode other values than those that were meant.",
    ),
    "source-changed": error(
        "{file} changed after it was first read: {reason}",
        "A bundle of two states of a checkpoint would be neither. Sizes, times and headers are "
        "compared when a build begins, sizes and times at every read.",
    ),
    "output-exists": error(
        "{path} is already there", "An existing output is replaced only when that is asked for."
    ),
    "output-in-source": error(
        "the output folder {path} overlaps the source folder",
        "The source is never written to, and never deleted with an output.",
    ),
    "output-not-a-bundle": error(
        "{path} is not a bundle as policyc made it: {reason}",
        "Only what a build made is replaced by another build. The record must be one that "
        "policyc wrote, and every file that it names must be there with the recorded size; the "
        "contents of small files are compared too.",
    ),
    "output-has-other-files": error(
        "{path} holds files that no build made: {names}",
        "Only what a build made is deleted by another build, so that nothing here is replaced.",
    ),
    "output-not-plain": error(
        "{path} is {kind}, and a build needs {wanted} there",
        "A build never writes through links, nor to pipes and devices, and deletes none.",
    ),
    "output-left-over": warning(
        "the bundle is complete, but {path} is still there: {reason}",
        "What no build made stays where it is. It stops no later build.",
    ),
    "output-in-use": error(
        "another build is writing {path}", "One build at a time works on an output."
    ),
    "other-build": error(
        "{path} is the unfinished build of another {what}",
        "A build is resumed only with the same policy, source and version.",
    ),
    "damaged-partial": error(
        "{path} cannot be resumed: {reason}", "Something else changed the unfinished build."
    ),
    "disk-full": error(
        "no room for {path}: {reason}", "What is finished stays; the build can be resumed."
    ),
    "too-little-memory": error(
        "{given} are too little to build in; at least {needed} are needed",
        "Libraries and one block must fit; what is coded takes whole rows, all else is split.",
    ),
    "wrong-result": error(
        "the written bundle is not what was planned: {reason}",
        "The build checks what it wrote before it gives it its name.",
    ),
}
