"""A thousand damaged files: each is refused with a reason or found, and none is a crash."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from emitters.core.bundle_reading import bundle_outline
from emitters.core.verify import verify_bundle
from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import Inventory
from policy_dsl.sources.hfq_container import read_container
from policy_dsl.sources.local_files import local_files
from policy_dsl.sources.reference import open_source

GOLDEN = Path(__file__).parents[2] / "golden" / "hipfire"
DENSE = "tiny-llama.mq4"
COUNTS = pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])


def spans(path: Path) -> list[tuple[int, int]]:
    """Header, metadata, index, padding, tensors, and the first block of each tensor."""
    found, size = read_container(local_files(path.parent), path.name), path.stat().st_size
    places = [0, 32, found.index_start, found.index_stop, found.payload_start, size]
    blocks = [(one.info.start, one.info.start + 8) for one in found.tensors.values()]
    return [*pairwise(places), *blocks]


def damaged(content: bytes, span: tuple[int, int], chance: random.Random) -> bytes:
    """Other bytes: from somewhere in a span, some are changed, cut out, or doubled."""
    at = chance.randrange(*span)
    length = chance.choice((1, 1, 2, 4, 8, 100))
    kind = chance.randrange(6)
    if kind == 0:
        flipped = bytes([content[at] ^ 1 << chance.randrange(8)])
        return content[:at] + flipped + content[at + 1 :]
    if kind == 1:
        filling = bytes([chance.choice((0, 0x7F, 0x80, 0xFF))]) * length
        return content[:at] + filling + content[at + length :]
    if kind == 2:
        return content[:at] + chance.randbytes(length) + content[at + length :]
    if kind == 3:
        return content[:at] + content[at + length :]
    if kind == 4:
        return content[: at + length] + content[at:]
    return content[:at]


def attempts(path: Path, count: int) -> Iterator[int]:
    """Damages the file, again and again from the whole; yields how often it did."""
    content, places, chance = path.read_bytes(), spans(path), random.Random(4)
    made = 0
    while made < count:
        other = damaged(content, places[made % len(places)], chance)
        if other != content:
            path.write_bytes(other)
            made += 1
            yield made
    path.write_bytes(content)


def is_told(path: Path, source: Inventory | None = None) -> bool:
    """Whether verifying refuses a bundle or finds something, always with words."""
    try:
        report = verify_bundle(path, source, jobs=1)
    except PolicyError as error:
        return all(found.message for found in error.diagnostics)
    return not report.ok and all(found.message for found in report.findings)


@COUNTS
def test_none_passes_for_what_was_built(
    upstream: Callable[[str], Path], tmp_path: Path, count: int
) -> None:
    bundle = Path(shutil.copytree(upstream(DENSE), tmp_path / "bundle"))
    missed = [number for number in attempts(bundle / DENSE, count) if not is_told(bundle)]
    assert missed == []
    assert verify_bundle(bundle, jobs=1).findings == ()


@COUNTS
@pytest.mark.parametrize("name", [DENSE, "tiny-minimax.mq2-lloyd"])
def test_none_is_a_crash_where_there_is_no_record(tmp_path: Path, name: str, count: int) -> None:
    path = Path(shutil.copyfile(GOLDEN / name, tmp_path / name))
    source = open_source(str(GOLDEN / f"{name.partition('.')[0]}-src"))
    told = 0
    for number in attempts(path, count):
        # Decoding all of it takes longer than the rest.
        told += is_told(path, source if number % 8 == 0 else None)
        with suppress(PolicyError):
            bundle_outline(path)
    # The others have other numbers as codes and scales, or other metadata.
    assert told > count / 2
