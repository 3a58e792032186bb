"""Recorded headers: an Inventory as a small JSON file, so that planning needs no checkpoint.

Tensors are grouped by file, dtype and shape, and their names are written as patterns:
`layers.{0-61}.experts.{0-255}.w1.weight`. A field holds whole numbers: `{0-3}`, `{5}`,
`{0-3,7,9-12}`; several fields mean every combination. A brace of the name itself is doubled.

A file's tensors are placed by dtype in the order of its groups, then by name, as the safetensors
library writes them, unless `order` lists them; and they fill the file to its end. A null file
says that the shard map is not known.
"""

import gzip
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import chain, groupby
from math import prod
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import fail
from policy_dsl.documents import Limits, first_defect
from policy_dsl.documents.saved import Size
from policy_dsl.escaping import is_plain_name, shown
from policy_dsl.inventory import DTYPE_BITS, Inventory, TensorInfo, tensor_nbytes
from policy_dsl.quantities import runs_of
from policy_dsl.regular_files import read_whole, refuse_placeholder
from policy_dsl.sources.checkpoint import is_shard_name
from policy_dsl.sources.safetensors_header import LENGTH_NBYTES, MAX_DIMENSIONS
from policy_dsl.sources.side_files import SUBFOLDERS

# Of its text, unpacked. Those of the largest models have a few thousand bytes.
MAX_NBYTES = 32 * 2**20
# Five times what the largest releases have; each costs some microseconds to understand.
MAX_TENSORS = 250_000
MAX_LETTERS = 25_000_000
MAX_PATTERN_LENGTH = 2000
_MOST_SHOWN = 200

_TOKEN = re.compile(r"(\{\{|\}\}|[^{}]+)|\{(\d{1,9}(?:-\d{1,9})?(?:,\d{1,9}(?:-\d{1,9})?)*)\}")
# `07` would come back as `7`, so it is text.
_NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]{0,8})(?![^.])")

Numbers = tuple[int, ...]


class TensorGroup(TypedDict):
    """Tensors of one dtype and shape; `names` are patterns."""

    dtype: str
    shape: Annotated[list[Size], Limits(most=MAX_DIMENSIONS)]
    names: list[str]


class RecordedFile(TypedDict):
    """The tensors of one shard; file and nbytes are null if the shard map is not known."""

    file: str | None
    nbytes: Size | None
    order: NotRequired[list[str] | None]
    tensors: list[TensorGroup]


class RecordedTotals(TypedDict):
    """What all tensors add up to, to check a record that was written or edited by hand."""

    tensors: Size
    nbytes: Size


class RecordedHeaders(TypedDict):
    """Recorded headers."""

    policyc_headers: Literal[1]
    id: str
    notes: NotRequired[list[str]]
    config: dict[str, Any]
    side_files: dict[str, Size] | None
    totals: RecordedTotals
    files: list[RecordedFile]


def write_recorded(inventory: Inventory) -> str:
    """The inventory as JSON text, one line per group of tensors; its root is left out.

    Raises: PolicyError if it is not a safetensors checkpoint; ValueError if the tensors of a
    file leave holes, which no reader lets through.
    """
    if container := inventory.container:
        raise fail("unrecordable-source", model=inventory.id, form=container.form)
    by_file: dict[str | None, list[TensorInfo]] = defaultdict(list)
    for tensor in sorted(inventory.tensors.values(), key=attrgetter("start")):
        by_file[tensor.file].append(tensor)
    # A shard without tensors is still a file of the checkpoint.
    for file in inventory.file_nbytes:
        by_file.setdefault(file, [])
    facts = {
        "policyc_headers": 1,
        "id": inventory.id,
        "notes": inventory.notes,
        "config": dict(inventory.config),
        "side_files": None if inventory.side_files is None else dict(inventory.side_files),
        "totals": {"tensors": len(inventory.tensors), "nbytes": inventory.nbytes},
    }
    lines = [f'"{key}": {json.dumps(value)}' for key, value in facts.items()]
    sizes = inventory.file_nbytes
    files = (_file_text(file, sizes.get(file or ""), held) for file, held in by_file.items())
    lines.append('"files": [' + ",\n  ".join(files) + "]")
    return "{" + ",\n ".join(lines) + "}\n"


def _file_text(file: str | None, nbytes: int | None, tensors: Sequence[TensorInfo]) -> str:
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.dtype, tensor.shape].append(tensor.name)
    named = {tensor.name: tensor for tensor in tensors}
    is_usual = nbytes is None or list(named) == _usual_order(named)
    order = None if is_usual else list(named)
    if file is not None and nbytes is not None and _placed(file, nbytes, order, named) != named:
        raise ValueError(f"the tensors of {file} do not fill it without holes to its end")
    head = json.dumps({"file": file, "nbytes": nbytes, "order": order})
    lines = ",\n   ".join(
        json.dumps({"dtype": dtype, "shape": shape, "names": name_patterns(names)})
        for (dtype, shape), names in groups.items()
    )
    return f'{head[:-1]}, "tensors": [\n   {lines}]}}'


def read_recorded(path: Path) -> Inventory:
    """The inventory that a recorded headers file holds, gzipped or not. Raises: PolicyError."""
    try:
        document = parse_json(_read_text(path))
        # The first defect says enough, and a million of them would fill the memory.
        if defect := first_defect(document, RecordedHeaders):
            raise ValueError(defect)
        return _inventory(cast("RecordedHeaders", document))
    except ValueError as error:
        raise fail("bad-recorded-headers", file=str(path), reason=str(error)) from error


def _read_text(path: Path) -> bytes:
    text = read_whole(path, most=MAX_NBYTES)
    # By its first bytes: names may deceive.
    if text.startswith(b"\x1f\x8b"):
        try:
            # One byte more than allowed shows a bomb without unpacking it.
            with gzip.open(BytesIO(text)) as unpacked:
                text = unpacked.read(MAX_NBYTES + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"its compression is broken: {error}") from error
    refuse_placeholder(path.name, text, len(text))
    if len(text) > MAX_NBYTES:
        raise ValueError(f"it holds more than {MAX_NBYTES} bytes")
    return text


def _inventory(record: RecordedHeaders) -> Inventory:
    _check_names(record)
    tensors: dict[str, TensorInfo] = {}
    letters = 0
    for held in record["files"]:
        here = _file_tensors(held, MAX_TENSORS - len(tensors), MAX_LETTERS - letters)
        letters += sum(map(len, here))
        if both := tensors.keys() & here.keys():
            raise ValueError(f'the tensor "{min(both)}" is in two files')
        tensors |= here
    sizes = ((held["file"], held["nbytes"]) for held in record["files"])
    inventory = Inventory(
        id=record["id"],
        config=record["config"],
        tensors=tensors,
        side_files=record["side_files"],
        file_nbytes={file: size for file, size in sizes if file is not None and size is not None},
        notes=tuple(record.get("notes", ())),
    )
    # Written records are right by construction; this catches edits by hand.
    totals = {"tensors": len(tensors), "nbytes": inventory.nbytes}
    if totals != record["totals"]:
        raise ValueError(f"its totals are {record['totals']}, its tensors have {totals}")
    return inventory


def _check_names(record: RecordedHeaders) -> None:
    # JSON can escape half of a pair, which no digest and no record of a bundle can hold.
    model = record["id"]
    if not model.isascii() and any("\ud800" <= char <= "\udfff" for char in model):
        raise ValueError(f'its id "{shown(model, 80)}" is not a text')
    files = [held["file"] for held in record["files"]]
    if len(set(files)) != len(files):
        raise ValueError("a file is listed twice")
    # A recorded file's names must not lead anywhere, whatever is done with them later.
    wrong = [file for file in files if file is not None and not is_shard_name(file)]
    for file in record["side_files"] or ():
        folder, sign, name = file.rpartition("/")
        if not is_plain_name(name) or (sign and folder not in SUBFOLDERS):
            wrong.append(file)
    if wrong:
        raise ValueError(f'"{shown(wrong[0], 80)}" is not the plain name of such a file')


def _file_tensors(held: RecordedFile, limit: int, letters: int) -> dict[str, TensorInfo]:
    """The tensors of a file: at most so many, and so many letters of their names together."""
    file, file_nbytes, named = held["file"], held["nbytes"], 0
    tensors: dict[str, TensorInfo] = {}
    for group in held["tensors"]:
        dtype, shape = group["dtype"], tuple(group["shape"])
        if dtype not in DTYPE_BITS:
            raise ValueError(f'the dtype "{dtype[:40]}" is not known')
        nbytes = tensor_nbytes(dtype, shape)
        for pattern in group["names"]:
            names = expand_pattern(pattern, limit=limit - named, letters=letters)
            named += len(names)
            letters -= sum(map(len, names))
            tensors |= {name: TensorInfo(name, dtype, shape, nbytes, file) for name in names}
    if len(tensors) != named:
        raise ValueError("two name patterns of a file expand to the same tensor")
    if file is None or file_nbytes is None:
        return tensors
    return _placed(file, file_nbytes, held.get("order"), tensors)


def _placed(
    file: str, file_nbytes: int, order: list[str] | None, tensors: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """The tensors of a file with their places in it. Raises: ValueError unless they fit there."""
    names = _usual_order(tensors) if order is None else order
    if len(names) != len(tensors) or tensors.keys() != set(names):
        raise ValueError(f"the order of {file} does not name each of its tensors once")
    # Tensors fill a file to its end, so the end says where they begin.
    place = file_nbytes - sum(tensor.nbytes for tensor in tensors.values())
    if place < LENGTH_NBYTES + len("{}"):
        raise ValueError(f"{file} has {file_nbytes} bytes, too few for its tensors")
    placed = {}
    for name in names:
        start, place = place, place + tensors[name].nbytes
        placed[name] = tensors[name]._replace(start=start, stop=place)
    return placed


def _usual_order(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Names by dtype in order of first sight, then by name in order of bytes."""
    ranks = list(dict.fromkeys(tensor.dtype for tensor in tensors.values()))
    return sorted(tensors, key=lambda name: (ranks.index(tensors[name].dtype), name.encode()))


def name_patterns(names: Iterable[str]) -> list[str]:
    """The fewest simple patterns that expand to exactly these names, in order of first sight.

    Only whole dotted parts become fields: the 1 of `w1` stays as it is, and so does `07`.
    """
    numbers: dict[tuple[str, ...], set[Numbers]] = defaultdict(set)
    for name in names:
        # Every second part is a number.
        parts = _NUMBER.split(name.replace("{", "{{").replace("}", "}}"))
        numbers[tuple(parts[::2])].add(tuple(map(int, parts[1::2])))
    return [
        "".join(chain.from_iterable(zip(texts, (*map(_field, fields), ""), strict=True)))
        for texts, rows in numbers.items()
        for fields in _products(sorted(rows))
    ]


def _products(rows: list[Numbers]) -> Iterator[list[Numbers]]:
    """Lists of values per field whose combinations, together, are exactly the sorted rows."""
    if not rows[0]:
        yield []
        return
    # First numbers followed by the same rest make one product with it.
    alike: dict[tuple[Numbers, ...], list[int]] = defaultdict(list)
    for first, group in groupby(rows, key=itemgetter(0)):
        alike[tuple(row[1:] for row in group)].append(first)
    for rest, firsts in alike.items():
        for fields in _products(list(rest)):
            yield [tuple(firsts), *fields]


def _field(numbers: Numbers) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    parts = (str(n) if n == last else f"{n}-{last}" for n, last in runs_of(numbers))
    return "{" + ",".join(parts) + "}"


def expand_pattern(pattern: str, *, limit: int, letters: int) -> list[str]:
    """Every name of a pattern, the last field running fastest.

    Raises: ValueError if the pattern is malformed, cannot be printed, or expands to more than
    `limit` names, or to more than `letters` letters.
    """
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise ValueError(f"a name pattern has {len(pattern)} characters")
    # A text is a field of one choice.
    pieces = list(_pieces(pattern))
    quoted = shown(pattern, _MOST_SHOWN)
    # Counted before anything is made: ranges multiply.
    count = prod(sum(map(len, piece)) for piece in pieces)
    if count > limit:
        raise ValueError(f'the name pattern "{quoted}" expands to {count:,} names')
    longest = sum(max(len(str(part[-1])) for part in piece) for piece in pieces)
    if count * longest > letters:
        size = f"{count:,} names of up to {longest:,} characters, more than {letters:,} in all"
        raise ValueError(f'the name pattern "{quoted}" expands to {size}')
    # Prefix by prefix: a hundred thousand names take a twentieth of a second.
    names = [""]
    for piece in pieces:
        ends = [*map(str, chain(*piece))]
        names = [name + end for name in names for end in ends]
    return names


def _pieces(pattern: str) -> Iterator[list[range] | list[tuple[str]]]:
    if not pattern.isprintable():
        raise ValueError(f"the name pattern {pattern!a} cannot be printed")
    place = 0
    while place < len(pattern):
        token = _TOKEN.match(pattern, place)
        ranges = []
        for part in token[2].split(",") if token and token[2] else ():
            first, _, last = part.partition("-")
            ranges.append(range(int(first), int(last or first) + 1))
        if token is None or not all(ranges):
            raise ValueError(f'the name pattern "{pattern}" is malformed at {place}')
        place = token.end()
        yield ranges or [({"{{": "{", "}}": "}"}.get(token[1], token[1]),)]
