"""Quantities as people read and write them: bytes in GB and GiB together, counts, layer lists."""

import re
from collections.abc import Iterable, Iterator
from itertools import count, groupby, takewhile

# Each decimal unit is shown beside its binary one: the two are mixed up too often.
_SCALES = ((9, "GB", 30, "GiB"), (6, "MB", 20, "MiB"), (3, "kB", 10, "KiB"))
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kKMGT]?)(i?)B)?")
_POWER = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int | None:
    """Bytes of a size such as 5GiB (1024³), 5GB (1000³) or 5; None if it is not a size."""
    written = _SIZE.fullmatch(text.strip())
    if written is None or len(written[1]) > 20 or (written[3] and not written[2]):
        return None
    unit: int = (1024 if written[3] else 1000) ** _POWER[written[2] or ""]
    return round(float(written[1]) * unit)


def both_units(nbytes: int) -> str:
    """`92.87 GB = 86.49 GiB`; smaller sizes in MB and MiB, kB and KiB, or bytes."""
    for decimal, word, binary, other in _SCALES:
        if abs(nbytes) >= 10**decimal:
            return f"{nbytes / 10**decimal:.2f} {word} = {nbytes / 2**binary:.2f} {other}"
    return f"{nbytes} bytes"


def signed_bytes(nbytes: int) -> str:
    """`+12.31 GB`, `-3.20 MB`, `+0 bytes`: a difference of sizes, in decimal units."""
    word, scale = column_unit(abs(nbytes))
    return f"{nbytes:+d} bytes" if scale == 1 else f"{nbytes / scale:+.2f} {word}"


def column_unit(nbytes: int) -> tuple[str, int]:
    """The unit in which a column that adds up to `nbytes` is read best, and its bytes."""
    units = ((word, 10**power) for power, word, _, _ in _SCALES if nbytes >= 10**power)
    return next(units, ("bytes", 1))


def in_unit(nbytes: int, scale: int) -> str:
    """`nbytes` as a figure of a column whose unit has `scale` bytes."""
    return str(nbytes) if scale == 1 else f"{nbytes / scale:.3f}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 file`, `96,103 tensors`; plural: of nouns that do not end in an s then."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {plural or f'{noun}s'}"


def first_few(names: Iterable[str], limit: int = 5) -> str:
    """`a, b, c`: the first few names, and how many more there are."""
    listed = list(names)
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more:,} more" if more > 0 else "")


def bits_per_weight(nbytes: int, parameters: int) -> float | None:
    """8 x bytes / parameters, None where there are no parameters."""
    return 8 * nbytes / parameters if parameters else None


def runs_of(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The first and the last of ascending numbers that follow each other, of each such run."""
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        held = [number for _, number in run]
        yield held[0], held[-1]


def layer_list(layers: Iterable[int]) -> str:
    """`0-1,60-61`, `2-59`; runs at even distances as `10,13,…,52` or `7-8,10-11,…,52-53`."""
    runs, parts = list(runs_of(sorted(set(layers)))), list[str]()
    while runs:
        (first, last), distance = runs[0], runs[min(1, len(runs) - 1)][0] - runs[0][0]
        even = ((first + n * distance, last + n * distance) for n in count())
        steps = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(runs, even, strict=False))))
        shown = ["-".join(map(str, sorted({*run}))) for run in runs[:steps]]
        # Every third layer protected is common, and twenty numbers are unreadable.
        parts += [*shown[:2], "…", shown[-1]] if steps > 3 else shown[:1]
        del runs[: steps if steps > 3 else 1]
    return ",".join(parts) or "-"
