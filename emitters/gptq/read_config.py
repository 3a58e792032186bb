"""What a configuration of either dialect says to readers about a module: its width, or nothing.

Its patterns are a stranger's, matched in bounded time. Readers match them with Python's `re`
(vLLM, auto-round) or PCRE2 (GPTQModel): what one may read otherwise is not guessed.
Source: vLLM 0.33.0 (`INCConfigParser`, `get_dynamic_override`), auto-round 0.16.1
(`get_layer_config`), gptqmodel 7.7.0 (`dynamic_get`), as far as they agree.
"""

import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any

from emitters.checkpoints import CONFIG, document, uneven_experts, wrong_metadata, wrong_tensor
from emitters.gptq.config import PACKING_FORMATS, metadata
from emitters.gptq.spec import AUTO_ROUND, GPTQ, READ, SIDECARS, WIDTHS, Width
from policy_dsl import formats
from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.formats import Claim, Claims, FileContents, Forms, TensorForm, Tensors
from policy_dsl.linear_patterns import PatternError, Where, regular_expression
from policy_dsl.policy import Regex
from policy_dsl.roles.architecture import architecture, families
from policy_dsl.roles.config_facts import written_value
from policy_dsl.roles.name_index import NameIndex, is_plain
from policy_dsl.treatments import WHOLE_ROW, Coded, Unread

_Entry = Mapping[str, Any]
_Said = Width | Unread | None
# Version of zero points; the width of a module, None if it is plain; whether groups are of any
# columns where these are numbered.
_Description = tuple[str, Callable[[str], _Said], bool]

_QUANTIZATION, _CODES, _HEAD = "quantization_config", ".qweight", "lm_head"
_PARTS = frozenset({"qweight", "qzeros", "scales"})
_WORD_BITS, _PLAIN_BITS = 32, 16
_PROJECTION = re.compile(r".*(?:_proj|\.w[123])")
_USUAL = "auto_round:auto_gptq"
_NOT = "-:"
_SIGNS = ("+:", _NOT)
# More values than any row has: a number of this size in a config is a mistake.
_LARGEST_GROUP = 2**20
# A name of a list is looked for in the name of a module so often.
_MOST_LOOKS = 5 * 10**7
# What the copy must say too; the rest is notes about how it was made.
_SHARED = (
    *("bits", "group_size", "sym", "desc_act", "lm_head", "dynamic", "checkpoint_format"),
    *("packing_format", "block_name_to_quantize", "extra_config"),
)
# Characters and steps of one pattern, characters of all of them.
_LONGEST, _MOST_STEPS = 10_000, 5_000
MOST_TEXT = 2**20
# Of a processor, for all patterns and modules; looked at after each so many bytes of names.
MOST_SECONDS = 2
_SLICE = 2**16
_LONGEST_NAME = 1000
# `re.escape(name)$`, which is looked up.
_NAME = re.compile(r"\^?((?:\\[^\w\s]|[\w-])+)\$", re.ASCII)
_UP_TO = re.compile(r"\{,[0-9]*\}")
_NO_MATCH = "no pattern is matched with a name that is not of printable ASCII, or too long"


def claims(files: FileContents, forms: Forms) -> dict[str, Claim]:
    """What readers understand of these files: packed module -> scheme, width, shape.

    Linears that they take for packed and that are not are among them, without a shape.
    Raises: ValueError without a config, or if it is another format's.
    """
    config = _quantization(files)
    if config is None:
        return {}
    method = config.get("quant_method")
    if method not in (AUTO_ROUND, GPTQ):
        raise ValueError(f"its quant_method is {method!r}")
    asked = [name for name, parts in forms.items() if _is_asked(name, parts)]
    try:
        default = _width(config, None)
        if method == GPTQ:
            version, width, acts = _gptq(config, default, asked)
        else:
            version, width, acts = _auto_round(config, default, asked, forms.keys())
    except ValueError as error:
        raise formats.UnreadError(str(error)) from None
    made = {}
    for name in asked:
        parts = forms[name]
        # In the first dialect linears that are not quantized must be named.
        said = width(name) if method == AUTO_ROUND or parts.keys() & _PARTS else None
        if said is not None:
            made[name] = _claim(said, parts, version, acts=acts)
    return made


def _is_asked(name: str, parts: Mapping[str, TensorForm]) -> bool:
    """Whether readers look for its width; scales without codes were packed once."""
    is_linear = "weight" in parts and _PROJECTION.fullmatch(name) is not None
    return is_linear or not parts.keys().isdisjoint(_PARTS)


def _quantization(files: FileContents) -> Mapping[str, Any] | None:
    """What `quantization_config` says, or the sidecar of a tool that writes none; else None."""
    held = _described(document(files, CONFIG))
    if isinstance(held, Mapping):
        return held
    if held is not None:
        raise ValueError(f"its {_QUANTIZATION} is not an object")
    for dialect, file in SIDECARS.items():
        copy = document(files, file) if file in files else {}
        # Older releases of AutoGPTQ do not say who they are.
        if "bits" in copy:
            return {"quant_method": dialect, **copy}
    return None


def _described(config: Mapping[str, Any]) -> Any:
    """The `quantization_config` of a config, or of its text part."""
    held, text = config.get(_QUANTIZATION), config.get("text_config")
    return text.get(_QUANTIZATION) if held is None and isinstance(text, Mapping) else held


def _claim(
    width: Width | Unread, parts: Mapping[str, TensorForm], version: str, *, acts: bool
) -> Claim:
    if isinstance(width, Unread):
        return Claim(width, (), "")
    words = parts["qweight"][1] if "qweight" in parts else ()
    stored = version, "g_idx" in parts, acts and "g_idx" in parts
    return _coded(width, stored, words, parts.get("scales", ("F16",))[0])


@lru_cache(4096)
def _coded(
    width: Width, stored: tuple[str, bool, bool], words: tuple[int, ...], dtype: str
) -> Claim:
    # Thousands of modules have the same form.
    scheme = next(scheme for scheme, storage in READ.items() if storage[:3] == stored)
    # No words are a matrix of any size.
    known = len(words) == 2 and 0 not in words
    shape = (words[1], words[0] * _WORD_BITS // width.bits) if known else ()
    return Claim(Coded(scheme, *width, ""), shape, dtype)


def _auto_round(
    config: _Entry, default: Width, asked: Collection[str], names: Collection[str]
) -> _Description:
    kind, packing = config.get("data_type", "int"), config.get("packing_format", _USUAL)
    if kind != "int":
        raise ValueError(f"its data_type is {kind!r}")
    if packing not in [*PACKING_FORMATS]:
        raise ValueError(f"its packing_format is {packing!r}")
    entries = _entries(config, "extra_config")
    # Named are modules; all other names are patterns, in their order.
    rules = {name: entry for name, entry in entries.items() if name not in names}
    verdict = _verdicts(rules, asked, "anywhere", default)
    keys = "block_name_to_quantize", "to_quant_block_names"
    texts = _texts(config, next((key for key in keys if key in config), keys[0]))
    # What the names of packed modules begin with; empty if nothing is said.
    covered = tuple(part for text in texts for part in text.split(",") if part)
    _ensure_few(covered, asked)

    def width(name: str) -> _Said:
        if name in entries:
            return _narrowed(entries[name], default)
        is_packed = name.startswith(covered) if covered else not name.endswith(_HEAD)
        return verdict(name, default if is_packed else None)

    return PACKING_FORMATS[packing], width, False


def _gptq(config: _Entry, default: Width, asked: Collection[str]) -> _Description:
    version = config.get("checkpoint_format", config.get("format", "gptq"))
    if version not in [*PACKING_FORMATS.values()]:
        raise ValueError(f"its checkpoint_format is {version!r}")
    listed = _texts(config, "modules_in_block_to_quantize")
    _ensure_few(listed, asked)
    rules = _entries(config, "dynamic")
    verdict = _verdicts(rules, asked, "start", default)

    def width(name: str) -> _Said:
        is_head = name.endswith(_HEAD)
        if is_head and not config.get("lm_head"):
            return None
        is_packed = not listed or is_head or any(text in name for text in listed)
        return verdict(name, default if is_packed else None)

    acts = any(entry.get("desc_act") is True for entry in (config, *rules.values()))
    return version, width, acts


def _entries(config: _Entry, key: str) -> Mapping[str, _Entry]:
    """What differs, by names of modules and patterns. Raises: ValueError."""
    entries = config.get(key) or {}
    if not isinstance(entries, Mapping):
        raise ValueError(f"its {key} is not an object")
    for name, entry in entries.items():
        if not isinstance(entry, Mapping):
            raise ValueError(f"its {key} has no object for {name!r}")
    return entries


def _ensure_few(texts: Sequence[str], asked: Collection[str]) -> None:
    """Raises: ValueError if it takes long to look for each text in each name."""
    if len(texts) * len(asked) > _MOST_LOOKS:
        raise ValueError(f"it lists {len(texts):,} names for {len(asked):,} modules, too many")


def _narrowed(entry: _Entry, default: Width) -> Width | None:
    bits = entry.get("bits", default.bits)
    is_plain = isinstance(bits, int | float) and bits >= _PLAIN_BITS
    return None if is_plain else _width(entry, default)


def _width(entry: _Entry, default: Width | None) -> Width:
    """The width in an entry, its gaps filled by the default. Raises: ValueError."""
    usual: _Entry = {"sym": True} if default is None else default._asdict()
    bits, size, symmetric = (entry.get(key, usual.get(key)) for key in Width._fields)
    if type(bits) is not int or bits not in WIDTHS:
        raise ValueError(f"bits {bits!r} are none of {', '.join(map(str, sorted(WIDTHS)))}")
    if type(size) is not int or (not 1 <= size <= _LARGEST_GROUP and size != WHOLE_ROW):
        raise ValueError(f"group_size {size!r} is not a number of values")
    if type(symmetric) is not bool:
        raise ValueError(f"sym {symmetric!r} is neither true nor false")
    return Width(bits, size, symmetric)


def _texts(config: _Entry, key: str) -> list[str]:
    """The texts of an entry, which may be one, a list, or lists in a list."""
    entry = config.get(key) or []
    outer = entry if isinstance(entry, list) else [entry]
    texts = [text for item in outer for text in (item if isinstance(item, list) else [item])]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"its {key} is not a list of names")
    return texts


def defects(
    folder: Path, files: FileContents, tensors: Tensors, claims: Claims
) -> Iterator[Diagnostic]:
    """What readers would miss, or read without a word of complaint.

    claims: of every packed module, found to be right.
    """
    config = document(files, CONFIG)
    for file in reversed(SIDECARS.values()):
        yield from _copy_defects(files, file, _described(config))
    keys = (key for family in families() for key in architecture(family).experts)
    count = next(filter(None, map(partial(written_value, config), keys)), None)
    if count is not None:
        yield from uneven_experts(claims, count)
    for name, tensor in tensors.items():
        # Codes that readers take for nothing they know, and leave the linear random.
        if name.endswith(_CODES) and name.removesuffix(_CODES) not in claims:
            reason = f"{CONFIG} says that its module is not quantized"
            yield wrong_tensor(tensor.file or "", name, reason)


def _copy_defects(files: FileContents, file: str, described: Any) -> Iterator[Diagnostic]:
    if file not in files:
        return
    if described is None:
        reason = f"only {file} describes the packed weights; most readers look here"
        yield diagnostic("metadata-elsewhere", file=CONFIG, reason=reason)
        return
    try:
        copy = document(files, file)
    except formats.ForeignMetadataError:
        yield wrong_metadata(file, "it is not a JSON object, and some readers look there first")
        return
    wrong = [key for key in _SHARED if copy.get(key) != described.get(key)]
    if wrong:
        reason = f"its {wrong[0]} differs from that in {CONFIG}, and readers look at either"
        yield wrong_metadata(file, reason)


def _verdicts(
    rules: Mapping[str, _Entry], asked: Collection[str], where: Where, default: Width
) -> Callable[[str, Width | None], _Said]:
    """verdict(module, otherwise): its width by the first rule that matches it, if that is known.

    rules: what differs, by patterns, which may have a sign where they match the start of a name.
    default: fills what a rule leaves open. verdict raises ValueError for an entry that does not.
    Raises: ValueError if the patterns are too long, or take too long.
    """
    signs, stop = _SIGNS if where == "start" else (), time.thread_time() + MOST_SECONDS
    parts = [(text[:2], text[2:]) if text[:2] in signs else ("", text) for text in rules]
    if sum(len(pattern) for _, pattern in parts) > MOST_TEXT:
        raise ValueError(f"its patterns have more than {MOST_TEXT:,} characters")
    usual = {name for name in asked if len(name) <= _LONGEST_NAME and is_plain(name)}
    index, entries, first = NameIndex(usual), [*rules.values()], dict[str, int]()
    # What rules say whose patterns are not read -> the first of these, and why it is not read.
    unread: dict[object, tuple[int, str]] = {}

    def ensure_time() -> None:
        if time.thread_time() > stop:
            about = f"{len(rules):,} patterns and {len(usual):,} modules"
            raise ValueError(f"{about} take more than {MOST_SECONDS} seconds")

    def says(at: int) -> Width | None:
        return None if parts[at][0] == _NOT else _narrowed(entries[at], default)

    def says_unless_wrong(at: int) -> object:
        try:
            return says(at)
        except ValueError:
            # What equals nothing.
            return object()

    for at, (sign, pattern) in enumerate(parts):
        try:
            found = _matching(pattern, where, usual, index, ensure_time)
            first.update((name, at) for name in found if name not in first)
        except PatternError as error:
            unread.setdefault(says_unless_wrong(at), (at, f"{sign}{pattern:.80}: {error}"))

    def verdict(name: str, otherwise: Width | None) -> _Said:
        if not rules:
            return otherwise
        if name not in usual:
            return Unread(_NO_MATCH)
        known = says(first[name]) if name in first else otherwise
        # It does not matter whether a rule matches that says the same.
        doubts = (rule for said, rule in unread.items() if said != known)
        at, reason = next(doubts, (len(rules), ""))
        return Unread(reason) if at < first.get(name, len(rules)) else known

    return verdict


def _matching(
    text: str, where: Where, names: set[str], index: NameIndex, ensure_time: Callable[[], None]
) -> Iterator[str]:
    """The names that all readers match. Raises: PatternError if they may not agree."""
    ensure_time()
    named = _NAME.fullmatch(text)
    if named and (where == "start" or text[0] == "^"):
        name = re.sub(r"\\(.)", r"\1", named[1])
        yield from {name} & names
        return
    if not text.isascii():
        raise PatternError("it has characters that are not ASCII")
    if _UP_TO.search(text):
        raise PatternError("{,n} is up to n times to some readers, and itself to others")
    pattern = regular_expression(text, where=where, longest=_LONGEST, most_steps=_MOST_STEPS)
    # Python is stricter in a few places. What RE2 has read is nothing that takes it long.
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"Python refuses it: {error}") from None
    lines = BytesIO(index.holding(Regex(text)))
    while some := lines.read(_SLICE) + lines.readline():
        ensure_time()
        yield from pattern.among(some)


FILES = formats.Files(metadata=metadata, claims=claims, defects=defects)
