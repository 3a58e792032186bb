"""What a configuration of either dialect says to readers about a module: its width, or nothing.

Its patterns are a stranger's, matched in bounded time. Readers match them with Python's `re`
(vLLM, auto-round) or PCRE2 (GPTQModel): what one may read otherwise is not guessed.
Source: vLLM 0.33.0 (`INCConfigParser`, `get_dynamic_override`), auto-round 0.16.1
(`get_layer_config`), gptqmodel 7.7.0 (`dynamic_get`), as far as they agree.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from emitters.checkpoints import CONFIG, document, uneven_experts, wrong_metadata, wrong_tensor
from emitters.gptq.config import PACKING_FORMATS
from emitters.gptq.spec import AUTO_ROUND, GPTQ, READ, SIDECARS, WIDTHS, Storage, Width
from policy_dsl import formats
from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.formats import Claim, FileContents, Forms, TensorForm, Tensors
from policy_dsl.linear_patterns import Pattern, PatternError, Where, regular_expression
from policy_dsl.policy import Regex
from policy_dsl.roles.architecture import architecture, families
from policy_dsl.roles.config_facts import written_value
from policy_dsl.roles.name_index import NameIndex, is_plain
from policy_dsl.treatments import WHOLE_ROW, Coded, Unread

_Entry = Mapping[str, Any]
_Said = Width | Unread | None

_QUANTIZATION = "quantization_config"
_CODES = ".qweight"
_PARTS = frozenset({"qweight", "qzeros", "scales"})
_WORD_BITS = 32
_PROJECTION = re.compile(r".*(?:_proj|\.w[123])")
_USUAL = "auto_round:auto_gptq"
_PLAIN_BITS = 16
_HEAD = "lm_head"
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


class _Description(NamedTuple):
    """What a configuration says. version: of the zero points. width(module): None if plain.

    covers: whether linears that are not quantized must be named. act_order: whether groups may
    be of any columns, where they are numbered.
    """

    version: str
    width: Callable[[str], _Said]
    covers: bool
    act_order: bool = False


def claims(files: FileContents, forms: Forms) -> dict[str, Claim]:
    """What readers understand of these files: packed module -> scheme, width, shape.

    Linears that they take for packed and that are not are among them, without a shape.
    Raises: ValueError without a config, or if it is another format's.
    """
    described = _quantization(files)
    if described is None:
        return {}
    # Whose width readers look for; scales without codes were packed once.
    asked = [
        name
        for name, parts in forms.items()
        if ("weight" in parts and _PROJECTION.fullmatch(name)) or parts.keys() & _PARTS
    ]
    description = _read(described, forms.keys(), asked)
    made = {name: _claim(description, name, forms[name]) for name in asked}
    return {name: claim for name, claim in made.items() if claim is not None}


def _read(config: Any, names: Collection[str], asked: Collection[str]) -> _Description:
    """What a configuration says of modules. names: of all; asked: in question."""
    if not isinstance(config, Mapping):
        raise ValueError(f"its {_QUANTIZATION} is not an object")
    method = config.get("quant_method")
    if method not in (AUTO_ROUND, GPTQ):
        raise ValueError(f"its quant_method is {method!r}")
    try:
        default = _width(config, None)
        if method == AUTO_ROUND:
            return _auto_round(config, default, names, asked)
        return _gptq(config, default, asked)
    except ValueError as error:
        raise formats.UnreadError(str(error)) from None


def _quantization(files: FileContents) -> Any:
    """What `quantization_config` says, or the sidecar of a tool that writes none; else None."""
    if (held := _described(document(files, CONFIG))) is not None:
        return held
    for dialect, file in SIDECARS.items():
        copy = document(files, file) if file in files else {}
        # Older releases of AutoGPTQ do not say who they are.
        if "bits" in copy:
            return {"quant_method": dialect, **copy}
    return None


def _described(config: Mapping[str, Any]) -> Any:
    """The `quantization_config` of a config, or of its text part."""
    levels = (level for level in (config, config.get("text_config")) if isinstance(level, Mapping))
    held = (level.get(_QUANTIZATION) for level in levels)
    return next((one for one in held if one is not None), None)


def _claim(said: _Description, name: str, parts: Mapping[str, TensorForm]) -> Claim | None:
    width = said.width(name) if said.covers or parts.keys() & _PARTS else None
    if width is None:
        return None
    if isinstance(width, Unread):
        return Claim(width, (), "")
    numbered = "g_idx" in parts
    stored = Storage(said.version, numbered, numbered and said.act_order)
    scheme = next(scheme for scheme, storage in READ.items() if storage == stored)
    words = parts["qweight"][1] if "qweight" in parts else ()
    # No words are a matrix of any size.
    known = len(words) == 2 and 0 not in words
    shape = (words[1], words[0] * _WORD_BITS // width.bits) if known else ()
    return Claim(Coded(scheme, *width, ""), shape, parts.get("scales", ("F16",))[0])


def _auto_round(
    config: _Entry, default: Width, names: Collection[str], asked: Collection[str]
) -> _Description:
    kind, packing = config.get("data_type", "int"), config.get("packing_format", _USUAL)
    if kind != "int":
        raise ValueError(f"its data_type is {kind!r}")
    if packing not in [*PACKING_FORMATS]:
        raise ValueError(f"its packing_format is {packing!r}")
    entries = _entries(config, "extra_config")
    # Named are modules; all other names are patterns, in their order.
    rules = [_Rule("", name, entry) for name, entry in entries.items() if name not in names]
    verdicts = _Verdicts(rules, asked, "anywhere", default)
    keys = "block_name_to_quantize", "to_quant_block_names"
    texts = _texts(config, next((key for key in keys if key in config), keys[0]))
    # What the names of packed modules begin with; empty if nothing is said.
    covered = tuple(part for text in texts for part in text.split(",") if part)
    _ensure_few(covered, asked)

    def width(name: str) -> _Said:
        if name in entries:
            return _narrowed(entries[name], default)
        is_packed = name.startswith(covered) if covered else not name.endswith(_HEAD)
        return verdicts.of(name, default if is_packed else None)

    return _Description(PACKING_FORMATS[packing], width, covers=True)


def _gptq(config: _Entry, default: Width, asked: Collection[str]) -> _Description:
    version = config.get("checkpoint_format", config.get("format", "gptq"))
    if version not in [*PACKING_FORMATS.values()]:
        raise ValueError(f"its checkpoint_format is {version!r}")
    listed = _texts(config, "modules_in_block_to_quantize")
    _ensure_few(listed, asked)
    rules = [_signed(name, entry) for name, entry in _entries(config, "dynamic").items()]

    verdicts = _Verdicts(rules, asked, "start", default)

    def width(name: str) -> _Said:
        is_head = name.endswith(_HEAD)
        if is_head and not config.get("lm_head"):
            return None
        is_packed = not listed or is_head or any(text in name for text in listed)
        return verdicts.of(name, default if is_packed else None)

    acts = any(entry.get("desc_act") is True for entry in (config, *(one.entry for one in rules)))
    return _Description(version, width, covers=False, act_order=acts)


def _entries(config: _Entry, key: str) -> Mapping[str, _Entry]:
    """What differs, by names of modules and patterns. Raises: ValueError."""
    entries = config.get(key) or {}
    if not isinstance(entries, Mapping):
        raise ValueError(f"its {key} is not an object")
    for name, entry in entries.items():
        if not isinstance(entry, Mapping):
            raise ValueError(f"its {key} has no object for {name!r}")
    return entries


def _signed(name: str, entry: _Entry) -> _Rule:
    sign = name[:2] if name[:2] in _SIGNS else ""
    return _Rule(sign, name.removeprefix(sign), entry)


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
    bits, size, symmetric = (
        entry.get(key, usual.get(key)) for key in ("bits", "group_size", "sym")
    )
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
    folder: Path, files: FileContents, tensors: Tensors, claims: Mapping[str, Claim]
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


class _Rule(NamedTuple):
    """A pattern, its sign, `-:` or empty, and what differs for the modules it matches."""

    sign: str
    pattern: str
    entry: Mapping[str, Any]


class _Verdicts:
    """What the first rule that matches says of each module, as far as that is known."""

    def __init__(
        self, rules: Sequence[_Rule], names: Collection[str], where: Where, default: Width
    ) -> None:
        """where: of a name a pattern matches. default: fills what a rule leaves open.

        Raises: ValueError if the patterns are too long, or take too long.
        """
        self._rules, self._where, self._default = rules, where, default
        self._first: dict[str, int] = {}
        # Rules whose patterns are not read: number, reason, and what they say.
        self._unread: list[tuple[int, str, object]] = []
        self._usual = {name for name in names if len(name) <= _LONGEST_NAME and is_plain(name)}
        self._stop = time.thread_time() + MOST_SECONDS
        self._match_all()
        alike = takewhile(lambda rule: rule[2] == self._unread[0][2], self._unread)
        self._n_alike = len(list(alike))

    def of(self, name: str, otherwise: Width | None) -> Width | Unread | None:
        """The width of a module; otherwise: if no rule matches it. Raises: ValueError."""
        if not self._rules:
            return otherwise
        if name not in self._usual:
            return Unread(_NO_MATCH)
        first = self._first.get(name, len(self._rules))
        known = self._says(self._rules[first]) if name in self._first else otherwise
        before = bisect_left(self._unread, (first,))
        # It does not matter whether a rule matches that says the same.
        same = self._n_alike if self._unread and self._unread[0][2] == known else 0
        return known if before <= same else Unread(self._unread[same][1])

    def _says(self, rule: _Rule) -> Width | None:
        return None if rule.sign == _NOT else _narrowed(rule.entry, self._default)

    def _match_all(self) -> None:
        if sum(len(rule.pattern) for rule in self._rules) > MOST_TEXT:
            raise ValueError(f"its patterns have more than {MOST_TEXT:,} characters")
        index = NameIndex(self._usual)
        for at, rule in enumerate(self._rules):
            self._check_time()
            try:
                for name in self._matching(rule.pattern, index):
                    self._first.setdefault(name, at)
            except PatternError as error:
                reason = f"{rule.sign}{rule.pattern:.80}: {error}"
                try:
                    self._unread.append((at, reason, self._says(rule)))
                except ValueError:
                    # What equals nothing.
                    self._unread.append((at, reason, object()))

    def _matching(self, text: str, index: NameIndex) -> Iterator[str]:
        """The names that readers match. Raises: PatternError; ValueError."""
        named = _NAME.fullmatch(text)
        if named and (self._where == "start" or text[0] == "^"):
            name = re.sub(r"\\(.)", r"\1", named[1])
            yield from {name} & self._usual
            return
        pattern = _read_alike(text, self._where)
        for lines in _slices(index.holding(Regex(text))):
            self._check_time()
            yield from pattern.among(lines)

    def _check_time(self) -> None:
        if time.thread_time() > self._stop:
            about = f"{len(self._rules):,} patterns and {len(self._usual):,} modules"
            raise ValueError(f"{about} take more than {MOST_SECONDS} seconds")


def _read_alike(text: str, where: Where) -> Pattern:
    """The pattern as all readers read it. Raises: PatternError if they may not."""
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
    return pattern


def _slices(lines: bytes) -> Iterator[bytes]:
    """The lines in slices, with none cut."""
    start = 0
    while start < len(lines):
        end = lines.find(b"\n", start + _SLICE)
        yield lines[start : end if end >= 0 else len(lines)]
        start = end + 1 if end >= 0 else len(lines)
