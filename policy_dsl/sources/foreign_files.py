"""What people give instead of a checkpoint: what it is, and what to give.

Only names are looked at, the first bytes of a file that is given alone, and an adapter's
configuration.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from policy_dsl.diagnostics import PolicyError, fail
from policy_dsl.escaping import shown
from policy_dsl.regular_files import opened, read_whole
from policy_dsl.sources.checkpoint import (
    CONFIG,
    PICKLES,
    SUFFIX,
    CheckpointFiles,
    find_index,
    pickled_weights,
    read_json,
)

_ORIGINAL = "it is not read: give the safetensors checkpoint that it was made of"
# How names end -> what such files are.
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
_GGUF_MAGIC = b"GGUF"
_ADAPTER = "adapter_config.json"
_PIPELINE = "model_index.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CACHED = "models--"
_MOST_SHOWN = 3
_LONGEST_REF = 1000


def ensure_checkpoint(files: CheckpointFiles) -> None:
    """Raises: PolicyError if the files are known to be something else than a checkpoint's."""
    names = list(files.sizes)
    weights = [name for name in names if name.endswith(SUFFIX)]
    if _ADAPTER in names and all(name.startswith("adapter") for name in weights):
        raise _adapter(files)
    if weights or find_index(files.sizes):
        return
    if _PIPELINE in names:
        cure = f"give the folder of its language model, such as {files.place}/text_encoder"
        raise _not_a_checkpoint(files.place, "a pipeline of diffusers", cure)
    # What is beside the model may not have been looked at.
    for name in (*names, *files.unread):
        if kind := _kind(name):
            raise _not_a_checkpoint(files.place, f"{kind} ({shown(name, 80)})", _ORIGINAL)


def ensure_no_outer_folder(folder: Path, files: CheckpointFiles) -> None:
    """Raises: PolicyError if the checkpoint is further inside, naming where."""
    if CONFIG in files.sizes or any(name.endswith(SUFFIX) for name in files.sizes):
        return
    if (folder / "snapshots").is_dir():
        places = [f"{folder}/snapshots/{commit}" for commit in _commits(folder)]
        what = "the folder of a model in the hub's cache"
        raise _outer(folder, what, "its snapshot is", places)
    inner = _folders(folder)
    cached = (name for name in inner if name.startswith(_CACHED))
    ids = [name.removeprefix(_CACHED).replace("--", "/", 1) for name in cached]
    if ids:
        raise _outer(folder, "the hub's cache", "give the name of a model in it,", ids)
    places = [f"{folder}/{name}" for name in inner if (folder / name / CONFIG).is_file()]
    if places:
        raise _outer(folder, "a folder of checkpoints", "give", places)


def ensure_no_other_file(path: Path) -> None:
    """Raises: PolicyError if a file that was given alone is known to be something else."""
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise pickled_weights(str(path.parent), shown(path.name, 80))
    with opened(path) as file:
        is_gguf = file.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC
    kind = _KINDS[".gguf"] if is_gguf else _kind(path.name)
    if kind:
        raise _not_a_checkpoint(str(path), kind, _ORIGINAL)
    if path.name in (CONFIG, _ADAPTER) or path.name.endswith(f"{SUFFIX}.index.json"):
        what = "one file of a checkpoint"
        raise _not_a_checkpoint(str(path), what, f"give the folder, {path.parent}")


def _kind(name: str) -> str:
    """What files of this name are, empty if that is not known."""
    return _KINDS.get(os.path.splitext(name)[1].lower(), "")


def _adapter(files: CheckpointFiles) -> PolicyError:
    config = read_json(files, _ADAPTER)
    # PEFT and mlx-lm name the model under different keys.
    base = config.get("base_model_name_or_path") or config.get("model")
    what = "a LoRA adapter" if str(config.get("peft_type", "LORA")) == "LORA" else "an adapter"
    if isinstance(base, str) and base:
        what = f"{what} for {shown(base, 120)}"
    cure = "merge it into that model first, and give the merged checkpoint"
    return _not_a_checkpoint(files.place, what, cure)


def _commits(folder: Path) -> Iterator[str]:
    """The snapshots of a model in the hub's cache, that of the main branch alone if known."""
    try:
        main = read_whole(folder / "refs" / "main", most=_LONGEST_REF).decode("ascii").strip()
    except (PolicyError, ValueError):
        main = ""
    commits = [name for name in _folders(folder / "snapshots") if _COMMIT.fullmatch(name)]
    yield from [main] if main in commits else commits


def _folders(folder: Path) -> list[str]:
    try:
        inner = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return []
    return [name for name in inner if name.isprintable()]


def _outer(folder: Path, what: str, verb: str, places: list[str]) -> PolicyError:
    # Whole, so that they can be given as they are.
    more = f" or {len(places) - _MOST_SHOWN} more" if len(places) > _MOST_SHOWN else ""
    cure = f"{verb} {' or '.join(places[:_MOST_SHOWN])}{more}" if places else None
    return fail("not-a-checkpoint", place=str(folder), what=what, suggestion=cure)


def _not_a_checkpoint(place: str, what: str, cure: str) -> PolicyError:
    return fail("not-a-checkpoint", place=place, what=what, suggestion=cure)
