"""Files beside a model's weights, by their names, and the token ids that they and configs name."""

import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from math import isfinite
from pathlib import Path
from typing import Any

from policy_dsl import packaged_table
from policy_dsl.escaping import quoted, shown
from policy_dsl.quantities import counted

_NAMES: Mapping[str, list[str]] = packaged_table(Path(__file__).with_name("side_files.yaml"))
VOCABULARIES = tuple(_NAMES["vocabularies"])
_TOKENIZER = (*VOCABULARIES, *_NAMES["beside_a_vocabulary"])
SIDE_FILES = (
    *(*_TOKENIZER, *_NAMES["of_processor_and_generation"]),
    *(f"{folder}/{name}" for folder in _NAMES["second_tokenizers"] for name in _TOKENIZER),
)
ALWAYS_COPIED = tuple(_NAMES["always_copied"])
# None of these may be missing unnoticed.
WANTED = (*SIDE_FILES, *ALWAYS_COPIED, *_NAMES["wanted"])
SUBFOLDERS = frozenset(name.partition("/")[0] for name in SIDE_FILES if "/" in name)

_WEIGHTS = "*.bin *.bin.index.json *.pt *.pth *.ckpt *.pkl *.gguf *.onnx *.h5 *.msgpack"
_REASONS = {
    **dict.fromkeys(_WEIGHTS.split(), "it holds weights in another form"),
    "*/": "folders are not copied",
    "*": "readers of the model do not need it",
}

# Types of models in a tokenizer.json whose vocabulary is an object, and the one of a list.
_MAPPED, _LISTED = ("BPE", "WordPiece", "WordLevel"), "Unigram"
_TOKEN, _SMALL = re.compile("[0-9]{1,10}"), re.compile("[0-9]{1,9}")
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def is_one_of(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name fits a pattern; `*` matches no `/`."""
    depth = name.count("/")
    return any(depth == one.count("/") and fnmatchcase(name, one) for one in patterns)


def is_looked_at(path: str) -> bool:
    """Whether a file of a checkpoint, by its path there, may be a side file."""
    return "/" not in path or is_one_of(path, SIDE_FILES)


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


def tokens_beyond(file: str, document: Mapping[str, Any], rows: int) -> list[str]:
    """The tokens that a file of this name gives ids beyond an embedding of `rows` rows."""
    # A negative id means that there is no such token.
    return [f"{shown(name, 40)} {id_}" for name, id_ in _tokens(file, document) if id_ >= rows]


def odd_tokens(file: str, document: Mapping[str, Any]) -> Iterator[str]:
    """What a file of this name, beside the tokenizer.json, gives tokens that is not an id."""
    if file in ("vocab.json", "added_tokens.json"):
        # Some files have a vocabulary for each language.
        flat = {name: id_ for name, id_ in document.items() if not isinstance(id_, Mapping)}
        yield from _without_ids("it has", flat)
    elif file == "tokenizer_config.json":
        yield from _decoder_faults(document.get("added_tokens_decoder"))
    for key in _SPECIAL if file == "generation_config.json" else ():
        # -1 is written for a token that there is not.
        ids = [id_ for id_ in _listed(document.get(key)) if id_ not in (None, -1)]
        if wrong := [id_ for id_ in ids if not _is_id(id_)]:
            yield f"its {key} is {quoted(wrong[0])}, not the number of a token"


def tokenizer_faults(document: Mapping[str, Any]) -> Iterator[str]:
    """Why the tokenizers library cannot load a tokenizer.json, as far as its tokens show.

    Tokens that share an id, and gaps between ids, are not faults.
    """
    model, added = document.get("model", {}), document.get("added_tokens", [])
    if not isinstance(model, Mapping):
        yield f"its model is {quoted(model)}, not an object"
    elif "vocab" in model:
        yield from _vocabulary_faults(model.get("type"), model["vocab"])
    if not isinstance(added, list):
        yield f"its added_tokens are {quoted(added)}, not a list"
    elif wrong := [one for one in added if not _is_id(_object(one).get("id"))]:
        entries = counted(len(wrong), "entry", "entries")
        yield f"its added_tokens have {entries} without a whole number as id: {quoted(wrong[0])}"


def _vocabulary_faults(type_: Any, vocabulary: Any) -> Iterator[str]:
    if isinstance(vocabulary, Mapping) and type_ != _LISTED:
        yield from _without_ids("its vocab has", vocabulary)
    elif isinstance(vocabulary, list) and type_ not in _MAPPED:
        if not all(map(_is_scored, vocabulary)):
            yield "its vocab has entries that are not a text and a number"
    else:
        wanted = "a list" if type_ == _LISTED else "an object"
        yield f"its vocab is {quoted(vocabulary)}, not {wanted}"


def _decoder_faults(decoder: Any) -> Iterator[str]:
    its = "its added_tokens_decoder"
    if not isinstance(decoder, Mapping | None):
        yield f"{its} is {quoted(decoder)}, not an object"
    for number, entry in _object(decoder).items():
        if not _TOKEN.fullmatch(number):
            yield f"{its} has {quoted(number)}, which is not an id"
            return
        if not isinstance(entry, Mapping | str):
            yield f"{its} has {quoted(entry)} as token {number}, not an object"
            return


def _without_ids(has: str, vocabulary: Mapping[str, Any]) -> Iterator[str]:
    wrong = [name for name, id_ in vocabulary.items() if not _is_id(id_)]
    if wrong:
        first = ", ".join(f"{quoted(name)}: {quoted(vocabulary[name])}" for name in wrong[:3])
        more, tokens = ", …" if len(wrong) > 3 else "", counted(len(wrong), "token")
        yield f"{has} {tokens} without a whole number from 0 as id: {first}{more}"


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**32


def _is_scored(entry: Any) -> bool:
    match entry:
        case [str(), int() | float() as score]:
            return type(score) is not bool and isfinite(score)
    return False


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _tokens(file: str, document: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The tokens that a file of this name lists, of those whose id is a number."""
    pairs: list[tuple[Any, Any]] = []
    if file == "tokenizer.json":
        pairs = [*_of_tokenizer(document)]
    elif file in ("vocab.json", "added_tokens.json"):
        pairs = [*document.items()]
    elif file == "tokenizer_config.json":
        for number, entry in _object(document.get("added_tokens_decoder")).items():
            token = entry.get("content") if isinstance(entry, Mapping) else entry
            pairs.append((token, int(number) if _SMALL.fullmatch(number) else None))
    elif file in ("config.json", "generation_config.json"):
        for config in (document, _object(document.get("text_config"))):
            pairs += ((key, id_) for key in _SPECIAL for id_ in _listed(config.get(key)))
    yield from ((str(token), id_) for token, id_ in pairs if type(id_) is int)


def _of_tokenizer(document: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    vocabulary, added = _object(document.get("model")).get("vocab"), document.get("added_tokens")
    # Unigram: pairs of a piece and its score, the id is the place.
    for number, entry in enumerate(vocabulary if isinstance(vocabulary, list) else ()):
        yield entry[0] if isinstance(entry, list) and entry else entry, number
    yield from _object(vocabulary).items()
    for one in map(_object, added if isinstance(added, list) else ()):
        yield one.get("content"), one.get("id")
