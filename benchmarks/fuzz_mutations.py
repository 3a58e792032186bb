"""Changes to documents, structure-aware: each takes a `random.Random` and decides by it alone.

Hypothesis has randoms too, so the tests use the same changes and get small examples of them.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from random import Random
from typing import Any

DIGITS = "9" * 5000
# What a terminal, a path, a pattern, a number's reader or a Markdown table may stumble over.
STRINGS = (
    *("", " ", "\0", "x" * 100_000, "\x1b[31mred\x1b]0;title\x07", "a\nerror[fake]: b", "\r"),
    *("\u202eabc", "\u2028", "\ud800", "\ufeff", "\U0010ffff", "e\u0301" * 50, "|", "`", "<b>"),
    *("../../escaped", "/etc/passwd", "a/../../b", "C:\\x", "~", ".", "..", "con", "a" * 300),
    *("model.safetensors", "config.json", "policyc.json", "model-00001-of-00002.safetensors"),
    *("{0-999999}", "{0-9999999999}.{0-9999999999}", "{", "}", "*" * 50, "(a*)*b", "(a|a)*" * 9),
    *("(?=x)", "(?!.*lm_head).*", "[", "\\", "+:.*", "-:.*", "model.layers.0", "lm_head", "re:"),
    *(DIGITS, "-1", "1e999", "NaN", "None", "true", "4bit", "bfloat16", "float8_e4m3fn", "BF16"),
    *("F4", "U8", "I64", "gptq", "fp8", "mxfp4", "compressed-tensors", "awq", "minimax_m2"),
    *("llama", "default", "yarn", "sliding_attention", "${x}", "%s%n", "{0.__class__}", "\u0000"),
)
# As JSON text: some are values that json.dumps does not write.
NUMBERS = (
    *("0", "-1", "1", "2", "3", "7", "-0.0", "0.5", "1.0", "1e999", "-1e999", "NaN", "Infinity"),
    *("-Infinity", "1e-999", "2147483648", "4294967296", "9223372036854775807"),
    *("9223372036854775808", "18446744073709551616", "1" + "0" * 40, DIGITS, "-" + DIGITS),
    *("1e308", "0." + "1" * 5000, "65536", "1000000", "1000000000", "3.14", "128", "256"),
)
OTHERS = (
    *("null", "true", "false", "{}", "[]", '{"":""}', "[[]]", "[null]", "[1,2,3]", '["x"]'),
    *('{"a":{"b":{"c":[]}}}', "[" * 60 + "]" * 60, "[" * 50_000 + "]" * 50_000),
    *('{"a":' * 20_000 + "1" + "}" * 20_000, "[" + "0," * 20_000 + "0]", "[true,false]"),
)


@dataclass(frozen=True)
class Raw:
    """A value of a document as JSON text, which need not be JSON."""

    text: str


@dataclass
class Pairs:
    """An object with its keys in order, some of them several times."""

    items: list[tuple[str, Any]]


def json_of(value: Any) -> str:
    """The JSON text of a value that may hold `Raw` and `Pairs`."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(k)}:{json_of(v)}" for k, v in value.items) + "}"
    if isinstance(value, dict):
        return json_of(Pairs(list(value.items())))
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(json_of, value)) + "]"
    return json.dumps(value)


def nasty(random: Random) -> Any:
    """A value that documents rarely hold: of another type, huge, deep, empty, odd."""
    kind = random.randrange(8)
    if kind < 3:
        return Raw(random.choice(NUMBERS))
    if kind < 6:
        return random.choice(STRINGS)
    return Raw(random.choice(OTHERS))


def changed_document(random: Random, document: Any, *, most: int = 4) -> Any:
    """A copy of a JSON document with one to `most` places changed."""
    held = [deepcopy(document)]
    for _ in range(random.choice([1, 1, 1, 2, most])):
        # The whole, or more often something in it.
        whole = random.random() < 0.02 or not held or not isinstance(held[0], dict | list)
        _change_place(random, held if whole else held[0])
    return held[0] if held else Raw("")


def _change_place(random: Random, held: Any) -> None:
    """Change something below `held`, a container: every depth has a fair chance."""
    keys = _keys(held)
    if not keys:
        return
    key = random.choice(keys)
    child = _get(held, key)
    if isinstance(child, dict | list | Pairs) and _keys(child) and random.random() < 0.75:
        _change_place(random, child)
    else:
        random.choice(_CHANGES)(random, held, key)


def _keys(held: Any) -> list[Any]:
    if isinstance(held, dict):
        return list(held)
    return list(range(len(held.items if isinstance(held, Pairs) else held)))


def _get(held: Any, key: Any) -> Any:
    return held.items[key][1] if isinstance(held, Pairs) else held[key]


def _put(held: Any, key: Any, value: Any) -> None:
    if isinstance(held, Pairs):
        held.items[key] = (held.items[key][0], value)
    else:
        held[key] = value


def _replace(random: Random, held: Any, key: Any) -> None:
    _put(held, key, nasty(random))


def _alter(random: Random, held: Any, key: Any) -> None:
    """Something near the value: what passes a check of types."""
    value = _get(held, key)
    if isinstance(value, bool) or value is None:
        _put(held, key, random.choice([not value, 0, 1, None, "true"]))
    elif isinstance(value, int | float):
        near = [value + 1, value - 1, -value, value * 2, value * 1000, float(value), str(value)]
        _put(held, key, random.choice([*near, 0, [value]]))
    elif isinstance(value, str):
        _put(held, key, changed_text(random, value))
    elif isinstance(value, list):
        most = [value[:1], value[1:], value * 2, value[::-1], value * 300, [value], [*value, None]]
        _put(held, key, random.choice(most))
    elif isinstance(value, dict):
        _put(held, key, random.choice([list(value), {**value, "x": value}, {}]))


def _delete(_random: Random, held: Any, key: Any) -> None:
    del (held.items if isinstance(held, Pairs) else held)[key]


def _rename(random: Random, held: Any, key: Any) -> None:
    if isinstance(held, dict):
        held[random.choice([*STRINGS, *held])] = held.pop(key)
    else:
        _replace(random, held, key)


def _twice(random: Random, held: Any, key: Any) -> None:
    """The same key again, with another value; only text can hold that, so it becomes text."""
    value = _get(held, key)
    if isinstance(held, dict) and isinstance(value, dict):
        pairs = Pairs(list(value.items()))
        pairs.items += [(name, nasty(random)) for name in list(value)[:2]]
        held[key] = pairs
    elif isinstance(held, list):
        held.insert(random.randrange(len(held) + 1), deepcopy(value))
    else:
        _replace(random, held, key)


def _add(random: Random, held: Any, key: Any) -> None:
    if isinstance(held, dict):
        held[random.choice(STRINGS)] = nasty(random)
    elif isinstance(held, list):
        held.append(nasty(random))
    else:
        _replace(random, held, key)


def _exchange(random: Random, held: Any, key: Any) -> None:
    other = random.choice(_keys(held))
    one, two = _get(held, key), _get(held, other)
    _put(held, key, two)
    _put(held, other, one)


_CHANGES: Sequence[Callable[[Random, Any, Any], None]] = (
    *(_replace, _replace, _replace, _alter, _alter, _alter, _delete, _rename, _twice, _add),
    _exchange,
)


def changed_json(random: Random, content: bytes) -> bytes:
    """JSON text with changes to its structure, and sometimes to its bytes."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return changed_bytes(random, content)
    if random.random() < 0.05:
        return json_of(nasty(random)).encode()
    if random.random() < 0.1:
        return changed_bytes(random, content)
    return json_of(changed_document(random, document)).encode()


def changed_text(random: Random, text: str) -> str:
    """A text with something put in, taken out or repeated."""
    start = random.randrange(len(text) + 1)
    stop = min(len(text), start + random.choice([0, 1, 3, 20]))
    middle = random.choice(
        ["", random.choice(STRINGS), text[start:stop] * 2, text[start:stop] * 200]
    )
    return text[:start] + middle + text[stop:]


def changed_bytes(random: Random, content: bytes) -> bytes:
    """Bytes with one to four places changed, or cut short."""
    made = bytearray(content)
    for _ in range(random.randint(1, 4)):
        _change_bytes(random, made)
    return bytes(made)


def _change_bytes(random: Random, made: bytearray) -> None:
    # Headers come first in every format: half of the changes go there.
    most = len(made) if random.random() < 0.5 else min(len(made), 64)
    at = random.randrange(most + 1)
    kind = random.randrange(6)
    if kind == 0 and at < len(made):
        made[at] ^= 1 << random.randrange(8)
    elif kind == 1:
        del made[at:]
    elif kind == 2:
        width = random.choice(["<B", "<H", "<I", "<Q"])
        top = 256 ** struct.calcsize(width)
        number = random.choice([0, 1, top - 1, top // 2, top // 4, random.randrange(top)])
        made[at : at + struct.calcsize(width)] = struct.pack(width, number)
    elif kind == 3:
        made[at:at] = random.choice([b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\0" * 4096])
    elif kind == 4:
        del made[at : at + random.choice([1, 8, 100])]
    else:
        made[at:at] = made[at : at + random.choice([1, 8, 100])]


def changed_safetensors(random: Random, content: bytes) -> bytes:
    """A safetensors file with another header, or other bytes."""
    if random.random() < 0.2:
        return changed_bytes(random, content)
    size = int.from_bytes(content[:8], "little")
    if random.random() < 0.4:
        header = _other_header(random, content[8 : 8 + size])
    else:
        header = changed_json(random, content[8 : 8 + size])
    length = len(header)
    if random.random() < 0.1:
        top = [0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 99_999_999, 10**8 + 1]
        length = random.choice(top) % 2**64
    return length.to_bytes(8, "little") + header + content[8 + size :]


def _other_header(random: Random, header: bytes) -> bytes:
    """A header that fits its file, of tensors that are called or shaped otherwise."""
    try:
        entries = json.loads(header)
        names = [name for name, entry in entries.items() if "shape" in entry]
        for name in random.sample(names, k=min(len(names), random.choice([1, 1, 3, 30]))):
            entry = entries.pop(name)
            if random.random() < 0.5:
                entries[other_name(random, name)] = entry
            else:
                entries[name] = entry | other_form(random, entry)
        return json.dumps(entries).encode()
    # An earlier change has left no header, or no entries of tensors.
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return changed_bytes(random, header)


def other_name(random: Random, name: str) -> str:
    """A tensor's name with other numbers or parts."""
    numbers = ["0", "1", "00", "01", "-1", "7", "99", "1000000", "99999999999999999999", DIGITS]
    parts = name.split(".")
    at = random.randrange(len(parts))
    places = [i for i, part in enumerate(parts) if part.isdigit()] or [at]
    kind = random.randrange(4)
    if kind < 2:
        parts[random.choice(places)] = random.choice(numbers)
    elif kind == 2:
        parts[at] = random.choice([*parts, *STRINGS[:30], "weight_scale_inv", "scales", "g_idx"])
    else:
        parts[at:at] = [random.choice([*parts, "model", "language_model", "experts", "3"])]
    return ".".join(parts)


WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I8": 1, "F8_E4M3": 1, "I32": 4}


def other_form(random: Random, entry: Any) -> dict[str, Any]:
    """Another dtype and shape for a tensor's entry, of as many bytes where that can be."""
    dtype, shape = entry["dtype"], entry["shape"]
    nbytes = WIDTHS.get(dtype, 1)
    for length in shape:
        nbytes *= length
    kind = random.randrange(4)
    if kind == 0:
        dtype = random.choice([*WIDTHS, "I16", "U16", "U32", "I64", "F4", "BOOL", "F8_E5M2"])
    count = nbytes // WIDTHS.get(dtype, 2)
    many = [count, 1] if kind else [count]
    shapes = [[], [0], [0, 2**62, 2**62], shape[::-1], [1, *shape], [*shape, 1], many, [1] * 64]
    if kind != 1:
        shapes = [many, [1, count], shape, shape[::-1]]
    return {"dtype": dtype, "shape": random.choice(shapes)}


def changed_hfq(random: Random, content: bytes) -> bytes:
    """An HFQ container with other numbers in its header, other metadata, or another index."""
    start = int.from_bytes(content[16:24], "little")
    kind = random.randrange(4)
    if kind == 0:
        return changed_bytes(random, content)
    if kind == 1:
        return changed_bytes(random, content[:32])[:32].ljust(32, b"\0") + content[32:]
    text = content[start:].decode("utf-8", "surrogateescape")
    try:
        length = json.JSONDecoder().raw_decode(text)[1]
    except (ValueError, RecursionError):
        return changed_bytes(random, content)
    stop = start + len(text[:length].encode("utf-8", "surrogateescape"))
    if kind == 2:
        made = changed_json(random, content[start:stop])
        # The rest moves along as far as the padding lets it.
        data = int.from_bytes(content[24:32], "little")
        index = content[stop:data].rstrip(b"\0") + b"\0" * 8
        shown = content[:start] + made + index
        padded = len(shown) + -len(shown) % 4096
        offset = struct.pack("<Q", padded)
        return (shown[:24] + offset + shown[32:]).ljust(padded, b"\0") + content[data:]
    return (
        content[:stop]
        + changed_bytes(random, content[stop : stop + 4096])
        + (content[stop + 4096 :])
    )


def changed_recorded(random: Random, document: Any) -> Any:
    """Recorded headers of other tensors, with the totals that they have."""
    made = deepcopy(document)
    groups = [(file, group) for file in made["files"] for group in file["tensors"]]
    for file, group in random.sample(groups, k=min(len(groups), random.randint(1, 3))):
        kind = random.randrange(3)
        if kind == 0:
            at = random.randrange(len(group["names"]))
            group["names"][at] = other_name(random, group["names"][at])
        elif kind == 1:
            group.update(other_form(random, group))
        else:
            file["tensors"].append({**group, "names": [other_name(random, group["names"][0])]})
        file["order"] = None
    return made


WORDS = re.compile(r"\s+|\w+|\"[^\"\n]*\"|/[^/\n]*/|.", re.DOTALL)
POLICY_WORDS = (
    *("experts", "all", "router", "norm", "attention", "embed, lm_head", "experts[0-1]", "mtp"),
    *("experts.down_proj", "layers 0-3", "layers -1", "layers middle 2", "boundary layers 2"),
    *("layers where i % 2 == 0", "layers where (i * 9999999999) / 3 > n", "except", "and", "or"),
    *("not", "in", ":", ";", ",", "{", "}", "(", ")", "4bit", "2bit mxtq", "8bit affine g64"),
    *("mq4", "bf16", "keep", "optional", "by awq", "by rtn", "sym", "asym", "g128", "drop"),
    *("*", "**", "?", "*.weight", "model.*", "[a-z]*", "*" * 40, "/.*/", "/(a+)+$/", "/(?=a)/"),
    *("/" + "(a*)*" * 20 + "/", "/\\d{1000}/", "/[/", "/(?i)X/", "/a{0,9999}/", "name", "family"),
    *("${x}", "${", "$${x}", "var x = 3", "extends base", "target mlx_affine", "target nope"),
    *("test size <= 3 GiB", "test bpw < 99999999999999999999", "on gptq {", "prune experts to 2"),
    *("output shard_size 1", "metadata a {}", "calibration imatrix x", "model ../x", "name: x"),
    *('"', "'", "\\", "#", "//", "\t", "\r\n", "\x1b[31m", "\u202e", "\ufeff", "\0", "é", "\u0661"),
    *("9" * 5000, "-1", "0", "1e999", "0x10", "1_000", "99999999999999999999", "2147483648"),
    *("&a [*a]", "<<: *a", "!!python/name:os.system", "!!binary x", "---", "...", "%YAML 1.2"),
    *(
        "? [a]",
        "yes",
        "null",
        "~",
        "|",
        ">-",
        "- ",
        "rules: |",
        "targets:",
        "transforms:",
        "tests:",
    ),
)


def changed_policy(random: Random, text: str, others: Sequence[str]) -> str:
    """A policy with lines of others, other words, repetitions and nesting."""
    for _ in range(random.choice([1, 1, 2, 3, 5])):
        text = random.choice(_POLICY_CHANGES)(random, text, others)
    return text


def _other_word(random: Random, text: str, _others: Sequence[str]) -> str:
    words = WORDS.findall(text) or [""]
    words[random.randrange(len(words))] = random.choice(POLICY_WORDS)
    return "".join(words)


def _more_word(random: Random, text: str, _others: Sequence[str]) -> str:
    words = WORDS.findall(text)
    words.insert(random.randrange(len(words) + 1), f" {random.choice(POLICY_WORDS)} ")
    return "".join(words)


def _exchange_words(random: Random, text: str, others: Sequence[str]) -> str:
    words, theirs = WORDS.findall(text) or [""], WORDS.findall(random.choice(others)) or [""]
    words[random.randrange(len(words))] = random.choice(theirs)
    return "".join(words)


def _other_lines(random: Random, text: str, others: Sequence[str]) -> str:
    lines, theirs = text.split("\n"), random.choice(others).split("\n")
    at, start = random.randrange(len(lines) + 1), random.randrange(len(theirs))
    lines[at : at + random.randrange(3)] = theirs[start : start + random.randint(1, 4)]
    return "\n".join(lines)


def _repeat(random: Random, text: str, _others: Sequence[str]) -> str:
    lines = text.split("\n")
    at = random.randrange(len(lines))
    times = random.choice([2, 2, 10, 300])
    lines[at : at + 1] = [lines[at]] * times
    return "\n".join(lines)


def _nest(random: Random, text: str, _others: Sequence[str]) -> str:
    words = WORDS.findall(text) or [""]
    at, deep = random.randrange(len(words)), random.choice([1, 30, 3000])
    left, right = random.choice([("(", ")"), ("[", "]"), ("{", "}"), ("not ", ""), ("- ", "")])
    words[at] = left * deep + words[at] + right * deep
    return "".join(words)


def _plain(random: Random, text: str, _others: Sequence[str]) -> str:
    return changed_text(random, text)


def _cut(random: Random, text: str, _others: Sequence[str]) -> str:
    lines = text.split("\n")
    at = random.randrange(len(lines) + 1)
    return "\n".join(lines[:at] + lines[at + random.randint(1, 2) :])


def _indent(random: Random, text: str, _others: Sequence[str]) -> str:
    lines = text.split("\n")
    at = random.randrange(len(lines))
    lines[at] = random.choice([" ", "  ", "\t", "      "]) + lines[at]
    return "\n".join(lines)


_POLICY_CHANGES: Sequence[Callable[[Random, str, Sequence[str]], str]] = (
    *(_other_word, _other_word, _other_word, _more_word, _more_word, _exchange_words),
    *(_exchange_words, _other_lines, _other_lines, _other_lines, _repeat, _nest, _plain, _cut),
    _indent,
)
