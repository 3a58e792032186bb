"""A checkpoint's files, wherever they are, to an Inventory: config, index, shard headers.

With an index: the shards that it names, checked against their headers; other safetensors files
(adapters, a second copy of the weights) are not read, and a warning says so. Without:
`model.safetensors`, or the only safetensors file, or one whole set of files numbered `-I-of-N`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from os.path import splitext
from typing import Any, Protocol, TypeVar

from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import Diagnostic, PolicyError, UnreadableError, diagnostic, fail
from policy_dsl.escaping import is_plain_name, shown
from policy_dsl.inventory import Inventory, TensorInfo
from policy_dsl.quantities import first_few
from policy_dsl.regular_files import refuse_placeholder
from policy_dsl.sources.safetensors_header import LENGTH_NBYTES, header_nbytes, parse_header

SUFFIX = ".safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
ADAPTER = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HFQ_MAGIC = b"HFQM"
# The extensions that hipfire's quantizer and the published files use.
HFQ_EXTENSION = re.compile(r"\.(hfq[0-9]?|mq[0-9](-lloyd)?|q8f16)$")
# Larger than any config, entries for single modules included.
MAX_CONFIG_NBYTES = 32 * 2**20
# Twice the size of the largest tokenizers.
MAX_JSON_NBYTES = 64 * 2**20
# Large enough for the index of a trillion-parameter model, small enough to read whole.
MAX_INDEX_NBYTES = 128 * 2**20
# The first read of a shard: mostly it holds the whole header, which saves a round trip.
FIRST_NBYTES = 1 << 16

_NUMBERED = re.compile(r"(.+)-([0-9]{1,6})-of-([0-9]{1,6})\.safetensors")
# How names of what people give instead of a checkpoint end -> what such files are.
_KINDS: Mapping[str, str] = {
    ".gguf": "a GGUF model of llama.cpp",
    ".onnx": "an ONNX model",
    ".tflite": "a TensorFlow Lite model",
    ".task": "a MediaPipe model",
    ".litertlm": "a LiteRT model",
    ".mlmodel": "a Core ML model",
    ".engine": "a TensorRT engine",
    ".xml": "an OpenVINO model",
    ".h5": "a TensorFlow checkpoint",
    ".msgpack": "a Flax checkpoint",
    ".npz": "a NumPy archive, as MLX once wrote",
}
# What to do about files that are not a checkpoint's.
ORIGINAL = "it is not read: give the safetensors checkpoint that it was made of"

T = TypeVar("T")
Apply = Callable[[Callable[[str], Any], Iterable[str]], Iterable[Any]]
Header = dict[str, TensorInfo]
Headers = Mapping[str, Header]
# The shards to read, sorted, and what is missing.
_Shards = tuple[list[str], Iterable[Diagnostic]]


class UnreachableError(PolicyError):
    """The place refuses, not one of its files: nothing more is asked of it."""


class CheckpointFiles(Protocol):
    """Where a checkpoint's files are: what to call the place, their sizes, their bytes.

    sizes: of every file at the top level, and of side files in subfolders. unread: what else
    is there, folders as `name/`.
    """

    @property
    def place(self) -> str: ...
    @property
    def sizes(self) -> Mapping[str, int]: ...
    @property
    def unread(self) -> tuple[str, ...]: ...
    def read(self, file: str, start: int, stop: int) -> bytes:
        """Exactly the bytes `start` to `stop`. Raises: PolicyError if they cannot be had."""


def read_checkpoint(
    files: CheckpointFiles, *, name: str, apply: Apply = map, headers: Headers | None = None
) -> Inventory:
    """The inventory of a checkpoint, called `name`.

    apply: like `map`; runs the reading of headers, so an executor's map reads several at once.
    headers: of files whose headers are known and not read.
    Raises: PolicyError if the files are known to be something else, or with the defects of all
    of them; UnreadableError if files are missing and nothing else is wrong.
    """
    _refuse_other(files)
    # Both are tried before anything is raised: one run shows every defect.
    config, held = _tried(_config, files), _tried(_headers, files, apply, headers)
    if isinstance(config, PolicyError) or isinstance(held, PolicyError):
        raise joined(read for read in (config, held) if isinstance(read, PolicyError))
    sizes, weights = files.sizes, weights_of(files)
    others = {CONFIG, find_index(sizes), *weights}
    left = sorted({*weights} - held.keys())
    strays = f"{listed(left)} {'is' if len(left) == 1 else 'are'}"
    findings = [diagnostic("stray-safetensors", place=files.place, files=strays)] if left else []
    return Inventory(
        id=name,
        config=config,
        tensors={key: tensor for header in held.values() for key, tensor in header.items()},
        side_files={file: size for file, size in sizes.items() if file not in others},
        unread=files.unread,
        file_nbytes={file: sizes[file] for file in held},
        findings=tuple(findings),
    )


def read_json(files: CheckpointFiles, file: str, *, most: int = MAX_JSON_NBYTES) -> dict[str, Any]:
    """The JSON object that a file of the checkpoint holds; NaN and repeated keys pass.

    Raises: PolicyError if it has more than `most` bytes, is not UTF-8, not JSON, or no object.
    """
    # Its size is known before it is read, so a huge one is never in memory.
    size = files.sizes[file]
    if size > most:
        raise _bad_json(file, f"it has {size} bytes, more than {most}")
    content = files.read(file, 0, size)
    refuse_placeholder(file, content, size)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise _bad_json(file, str(error)) from error
    if not isinstance(value, dict):
        raise _bad_json(file, "it is not a JSON object")
    return value


def indexed(files: CheckpointFiles, index: str) -> dict[str, str]:
    """Tensor -> shard, as the index says.

    Raises: PolicyError if it is not an index, or names what is not a plain shard name.
    """
    weight_map = read_json(files, index, most=MAX_INDEX_NBYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _bad_json(index, "it has no weight_map")
    if not all(type(shard) is str for shard in weight_map.values()):
        raise _bad_json(index, "its weight_map holds no file names")
    if wrong := sorted(file for file in set(weight_map.values()) if not is_shard_name(file)):
        raise PolicyError(diagnostic("shard-outside", file=shown(shard)) for shard in wrong)
    return weight_map


def is_shard_name(file: str) -> bool:
    """Whether this is a plain name that ends as safetensors files do."""
    return is_plain_name(file) and file.endswith(SUFFIX)


def shard_name(number: int, count: int) -> str:
    """The file name that transformers gives a shard, counted from 1; a single one has no number."""
    return f"model-{number:05d}-of-{count:05d}{SUFFIX}" if count > 1 else f"model{SUFFIX}"


def finite(value: Any) -> Any:
    """A config's value with floats that JSON lacks written as transformers writes them."""
    if isinstance(value, float) and not math.isfinite(value):
        signed = "Infinity" if value > 0 else "-Infinity"
        return {"__float__": "NaN" if math.isnan(value) else signed}
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def weights_of(files: CheckpointFiles) -> list[str]:
    """The safetensors files, sorted."""
    return sorted(file for file in files.sizes if file.endswith(SUFFIX))


def find_index(sizes: Mapping[str, int]) -> str | None:
    """The index among these files: the usual one, else the only `*.safetensors.index.json`."""
    if INDEX in sizes:
        return INDEX
    # Mistral and others name it after their own files.
    others = [file for file in sizes if file.endswith(SUFFIX + ".index.json")]
    return others[0] if len(others) == 1 else None


def listed(files: Iterable[str]) -> str:
    """The first few files, and how many are left out."""
    return first_few((shown(file, 80) for file in files), 4)


def joined(errors: Iterable[PolicyError]) -> PolicyError:
    """One error with all defects; an UnreadableError if all of them are."""
    errors = list(errors)
    kind = UnreadableError if all(isinstance(e, UnreadableError) for e in errors) else PolicyError
    return kind(defect for error in errors for defect in error.diagnostics)


def pickled_weights(place: str, files: Iterable[str]) -> PolicyError:
    """The error of weights that only running code could read."""
    cure = "use a revision or conversion of the model with safetensors files"
    return fail("pickled-weights", place=place, files=listed(files), suggestion=cure)


def kind_of(name: str) -> str:
    """What files of this name are that are not a checkpoint's; empty if that is not known."""
    return _KINDS.get(splitext(name)[1].lower(), "")


def _refuse_other(files: CheckpointFiles) -> None:
    """Raises: PolicyError if the files are known to be something else than a checkpoint's."""
    weights, place = weights_of(files), files.place
    if ADAPTER in files.sizes and all(name.startswith("adapter") for name in weights):
        cure = "merge it into that model first, and give the merged checkpoint"
        what = _adapter(read_json(files, ADAPTER))
        raise fail("not-a-checkpoint", place=place, what=what, suggestion=cure)
    if weights or find_index(files.sizes):
        return
    if "model_index.json" in files.sizes:
        cure = f"give the folder of its language model, such as {place}/text_encoder"
        what = "a pipeline of diffusers"
        raise fail("not-a-checkpoint", place=place, what=what, suggestion=cure)
    # What is beside the model may not have been looked at.
    for name in (*files.sizes, *files.unread):
        if kind := kind_of(name):
            what = f"{kind} ({shown(name, 80)})"
            raise fail("not-a-checkpoint", place=place, what=what, suggestion=ORIGINAL)


def _adapter(config: Mapping[str, Any]) -> str:
    what = "a LoRA adapter" if str(config.get("peft_type", "LORA")) == "LORA" else "an adapter"
    # PEFT and mlx-lm name the model under different keys.
    base = config.get("base_model_name_or_path") or config.get("model")
    return f"{what} for {shown(base, 120)}" if isinstance(base, str) and base else what


def _tried(read: Callable[..., T], *given: Any) -> T | PolicyError:
    """What is read, or its error, so that the defects of all files come at once."""
    try:
        return read(*given)
    except UnreachableError:
        raise
    except PolicyError as error:
        return error


def _config(files: CheckpointFiles) -> dict[str, Any]:
    if CONFIG in files.sizes:
        return read_json(files, CONFIG, most=MAX_CONFIG_NBYTES)
    cure = "put the model's config.json beside its weights"
    raise UnreadableError([diagnostic("missing-config", place=files.place, suggestion=cure)])


def _headers(files: CheckpointFiles, apply: Apply, known: Headers | None) -> dict[str, Header]:
    index = find_index(files.sizes)
    weight_map = indexed(files, index) if index else None
    names, missing = _unindexed(files) if weight_map is None else _indexed(files, weight_map)
    errors: list[PolicyError] = [UnreadableError(missing)]
    headers: dict[str, Header] = {}
    for name, read in zip(names, apply(partial(_tried, _header, files, known), names), strict=True):
        if isinstance(read, PolicyError):
            errors.append(read)
        else:
            headers[name] = read
    # As they come: an index of strangers may give millions.
    errors.append(PolicyError(_placement_defects(headers, weight_map)))
    if errors := [error for error in errors if error.diagnostics]:
        raise joined(errors)
    return headers


def _header(files: CheckpointFiles, known: Headers | None, file: str) -> Header:
    if known and file in known:
        return known[file]
    size = files.sizes[file]
    first = files.read(file, 0, min(size, FIRST_NBYTES))
    refuse_placeholder(file, first, size)
    stop = LENGTH_NBYTES + header_nbytes(first, file=file, file_nbytes=size)
    if stop > len(first):
        first += files.read(file, len(first), stop)
    return parse_header(first[LENGTH_NBYTES:stop], file=file, file_nbytes=size)


def _indexed(files: CheckpointFiles, weight_map: Mapping[str, str]) -> _Shards:
    # What the names count up to does not matter here: publishers get it wrong.
    needed = Counter(weight_map.values())
    cure = "fetch the file, or the whole checkpoint again"
    expected = "the index puts {} tensors in it"
    missing = (
        diagnostic("missing-shard", file=file, expected=expected.format(count), suggestion=cure)
        for file, count in sorted(needed.items())
        if file not in files.sizes
    )
    return sorted(needed.keys() & files.sizes.keys()), missing


def _unindexed(files: CheckpointFiles) -> _Shards:
    """Raises: PolicyError if it is not clear which files are the weights."""
    weights, place = weights_of(files), files.place
    if not weights:
        if pickles := sorted(file for file in files.sizes if file.endswith(PICKLES)):
            raise pickled_weights(place, pickles)
        raise UnreadableError([diagnostic("no-weights", place=place)])
    # The name that loaders look for first.
    if "model.safetensors" in weights:
        return ["model.safetensors"], []
    parts = [part for part in map(_NUMBERED.fullmatch, weights) if part]
    if len(weights) == 1 and not parts:
        return weights, []
    if len({(part[1], part[3]) for part in parts}) != 1 or len(parts) > int(parts[0][3]):
        cure = f"add {INDEX}, or give one of the files"
        raise fail("ambiguous-weights", place=place, files=listed(weights), suggestion=cure)
    stem, total = parts[0][1], parts[0][3]
    names, present = [part[0] for part in parts], {int(part[2]) for part in parts}
    # MiniMax-M2.7 counts from 0 (and to a wrong total, which only an index can set right).
    begin = 0 if 0 in present else 1
    gap = next((n for n in range(begin, begin + int(total)) if n not in present), None)
    if gap is None:
        return names, []
    file = f"{stem}-{gap:0{len(total)}d}-of-{total}{SUFFIX}"
    expected = f"{len(present)} of {total} numbered files are, and no index"
    cure = f"fetch the rest; if the count in the names is wrong, add {INDEX}"
    missing = diagnostic("missing-shard", file=file, expected=expected, suggestion=cure)
    return names, [missing]


def _placement_defects(
    headers: Headers, weight_map: Mapping[str, str] | None
) -> Iterator[Diagnostic]:
    """Where headers contradict each other or the index. Shards without one are not judged."""
    first: dict[str, TensorInfo] = {}
    for file, held in headers.items():
        for name in first.keys() & held.keys():
            other = first[name].file
            yield diagnostic("duplicate-tensor", tensor=shown(name), file=other, other=file)
        first |= held
    if weight_map is None:
        return
    for name, file in weight_map.items():
        if file in headers and name not in headers[file]:
            yield _mismatch(name, f"the index puts it in {file}, which does not hold it")
    for file, held in headers.items():
        # Not a difference of keys: that would walk the whole index for every shard.
        for name in held:
            if name not in weight_map:
                yield _mismatch(name, f"{file} holds it, but the index does not name it")


def _mismatch(name: str, reason: str) -> Diagnostic:
    cure = "fetch the index and the shards again, of the same revision, or repair the index"
    return diagnostic("index-mismatch", tensor=shown(name), reason=reason, suggestion=cure)


def _bad_json(file: str, reason: str) -> PolicyError:
    return fail("bad-source-json", file=file, reason=reason)
