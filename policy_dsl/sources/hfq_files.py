"""HFQ files among a folder's files, and one of them as an Inventory.

The magic decides, not the extension: published files end in `.hfq`, `.mq4`, `.mq2-lloyd` ….
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policy_dsl.diagnostics import fail
from policy_dsl.inventory import Container, Inventory
from policy_dsl.sources.checkpoint import CONFIG, CheckpointFiles
from policy_dsl.sources.hfq_codes import ARCH_FAMILIES
from policy_dsl.sources.hfq_container import MAGIC, read_container
from policy_dsl.sources.shard_map import SUFFIX, listed

FORM = "hipfire HFQ"
# The extensions that hipfire's quantizer and the published files use.
_EXTENSION = re.compile(r"\.(hfq[0-9]?|mq[0-9](-lloyd)?|q8f16)$")


def is_called_hfq(name: str) -> bool:
    """Whether a file has a name as HFQ files have."""
    return _EXTENSION.search(name) is not None


def model_name(file: str) -> str:
    """The name of an HFQ file without its extension."""
    return _EXTENSION.sub("", file)


def find_hfq(files: CheckpointFiles) -> str | None:
    """The HFQ file that is the model of these files; None if they are of another kind.

    Raises: PolicyError if there are several, or a file cannot be read.
    """
    # Safetensors come first, and their folders need no look into every file.
    if any(file.endswith(SUFFIX) for file in files.sizes):
        return None
    length = len(MAGIC)
    long_enough = sorted(file for file, size in files.sizes.items() if size >= length)
    found = [file for file in long_enough if files.read(file, 0, length) == MAGIC]
    if len(found) > 1:
        cure = "give one of the files"
        raise fail("several-hfq", place=files.place, files=listed(found), suggestion=cure)
    return found[0] if found else None


def read_hfq(files: CheckpointFiles, file: str, *, name: str, root: Path | None) -> Inventory:
    """The inventory of a model, called `name`, that is one HFQ file; its config is in it.

    Raises: PolicyError with the file's defects.
    """
    found = read_container(files, file)
    metadata = found.metadata
    return Inventory(
        id=name,
        config=metadata["config"],
        tensors={key: tensor.info for key, tensor in found.tensors.items()},
        side_files={
            other: size for other, size in files.sizes.items() if other not in (file, CONFIG)
        },
        unread=files.unread,
        root=root,
        file_nbytes={file: files.sizes[file]},
        container=Container(
            form=FORM,
            arch_id=found.arch_id,
            family=ARCH_FAMILIES.get(found.arch_id),
            tokenizer=_has_tokenizer(metadata.get("tokenizer")),
            chat_template=_has_template(metadata.get("tokenizer_config")),
        ),
    )


def _has_tokenizer(text: object) -> bool:
    # Its text, or that of an empty object; loaders read nothing else, a nested object neither.
    return isinstance(text, str) and text.strip() not in ("", "{}")


def _has_template(config: Mapping[str, Any] | object) -> bool:
    return isinstance(config, dict) and config.get("chat_template") is not None
