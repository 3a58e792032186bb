"""Which files beside a model's weights belong to its tokenizer, processor or generation.

Patterns are of paths in the checkpoint; a `/` is one known subfolder, and no deeper one is ever
looked into.
Source: transformers 5.24.0 (`vocab_files_names` of its tokenizers, `save_pretrained` of
tokenizers and processors, the names in utils/hub.py), mistral_common (tekken.json).
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

# Any of these is a vocabulary: without one there is no tokenizer.
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.*.json", "tekken.json", "*.tiktoken"),
    # SentencePiece and others: tokenizer.model, spiece.model, sentencepiece.bpe.model …
    *("*.model", "*.model.v*", "*.spm", "*.tokenizer"),
    *("vocab.json", "vocab.txt", "vocab-src.json", "vocab-tgt.json", "byte_maps.json"),
)
_BESIDE_A_VOCABULARY = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("normalizer.json", "merges.txt", "bpe.codes", "dict.txt", "target_vocab.json"),
    *("entity_vocab.json", "emoji.json", "word_shape.json", "word_pronunciation.json"),
    *("*.jinja", "chat_template.json"),
)
_TOKENIZER = (*VOCABULARIES, *_BESIDE_A_VOCABULARY)
_PROCESSOR = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    "audio_tokenizer_config.json",
)
# Where a processor of several tokenizers keeps the others.
_SECOND_TOKENIZERS = (
    *("alignment_tokenizer", "generator_tokenizer", "protein_tokenizer", "qformer_tokenizer"),
    "question_encoder_tokenizer",
)
SIDE_FILES = (
    *_TOKENIZER,
    *_PROCESSOR,
    "generation_config.json",
    "additional_chat_templates/*.jinja",
    *(f"{folder}/{name}" for folder in _SECOND_TOKENIZERS for name in _TOKENIZER),
)
# Licences bind whoever passes a model on, and custom modeling code is part of it.
ALWAYS_COPIED = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "*.py")
# What any reader or format looks for by its name: none of these may be missing unnoticed.
_WANTED = (
    *(*SIDE_FILES, *ALWAYS_COPIED, "config.json", "configuration.json", "policyc.json"),
    *("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "model_index.json"),
    *("jang_config.json", "quantize_config.json", "quantization_config.json"),
)
SUBFOLDERS = frozenset(name.partition("/")[0] for name in SIDE_FILES if "/" in name)

_OTHER_WEIGHTS = "it holds weights in another form"
_REASONS = {
    **dict.fromkeys(("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt"), _OTHER_WEIGHTS),
    **dict.fromkeys(("*.pkl", "*.gguf", "*.onnx", "*.h5", "*.msgpack"), _OTHER_WEIGHTS),
    "*/": "folders are not copied",
    "*": "readers of the model do not need it",
}


def is_one_of(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name fits a pattern; `*` matches no `/`."""
    depth = name.count("/")
    return any(depth == one.count("/") and fnmatchcase(name, one) for one in patterns)


def is_looked_at(path: str) -> bool:
    """Whether a file of a checkpoint, by its path there, may be a side file."""
    return "/" not in path or is_one_of(path, SIDE_FILES)


def is_wanted(path: str) -> bool:
    """Whether a file of a checkpoint, by its path there, is one that something reads."""
    return is_one_of(path, _WANTED)


def unread(paths: Iterable[str], special: Iterable[str] = ()) -> tuple[str, ...]:
    """What is not looked at: folders as `name/`, and what else is in the known subfolders.

    special: pipes, links and the like, which are not looked at whatever they are called.
    """
    names = set()
    for path in (*special, *(path for path in paths if not is_looked_at(path))):
        folder, sign, _ = path.partition("/")
        names.add(path if not sign or folder in SUBFOLDERS else f"{folder}/")
    # What version control and downloads keep for themselves does not belong to a model.
    return tuple(name for name in sorted(names) if not name.startswith("."))


def why_left_out(name: str, target: str) -> str:
    """Why a bundle of `target` does not have a side file of its source."""
    if is_one_of(name, SIDE_FILES):
        return f"{target} has no place for it"
    return next(reason for pattern, reason in _REASONS.items() if fnmatchcase(name, pattern))
