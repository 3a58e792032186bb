"""One HFQ file: what hipfire writes is read, and every way to lie is named."""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import source_digest
from policy_dsl.sources.hfq_container import (
    QUANT_CODES,
    HfqContainer,
    read_container,
    read_hfq,
    stored_nbytes,
)
from policyc.reports import render_text
from policyc.reports.inspect_report import survey, survey_blocks, survey_document

GOLDEN = Path(__file__).parents[2] / "golden" / "hipfire"
FILES = sorted(
    path.name
    for path in GOLDEN.iterdir()
    if path.name.startswith("tiny-") and path.is_file() and path.suffix != ".json"
)
Bytes = Callable[..., bytes]


@dataclass(frozen=True)
class Held:
    """One file `m.mq4`, in memory."""

    content: bytes
    place: str = "memory"
    unread: tuple[str, ...] = ()

    @property
    def sizes(self) -> Mapping[str, int]:
        return {"m.mq4": len(self.content)}

    def read(self, file: str, start: int, stop: int) -> bytes:
        assert 0 <= start <= stop <= self.sizes[file]
        return self.content[start:stop]


def read(content: bytes) -> HfqContainer:
    """The container that these bytes are."""
    return read_container(Held(content), "m.mq4")


def defects(content: bytes) -> list[str]:
    """`code: message` of every defect of a file that is refused."""
    with pytest.raises(PolicyError) as caught:
        read(content)
    assert all("m.mq4" in found.message for found in caught.value.diagnostics)
    assert all(found.suggestion for found in caught.value.diagnostics)
    assert str(caught.value).replace("\n", "").isprintable()
    return [f"{found.code}: {found.message}" for found in caught.value.diagnostics]


@pytest.mark.parametrize("file", FILES)
def test_reads_what_hipfire_writes(file: str) -> None:
    content = (GOLDEN / file).read_bytes()
    model = file.partition(".")[0]
    manifest = json.loads((GOLDEN / f"{model}.manifest.json").read_text())[file]
    found = read(content)
    arch_id = {"tiny-minimax": 10, "tiny-llama": 0}[model]
    assert (found.arch_id, found.payload_start) == (arch_id, manifest["data_offset"])
    assert list(found.tensors) == list(manifest["tensors"])
    for name, wanted in manifest["tensors"].items():
        info, code, group_size = found.tensors[name]
        assert (code, group_size, info.nbytes) == (wanted["qt"], wanted["group"], wanted["bytes"])
        assert info.shape == tuple(wanted["shape"])
        assert info.dtype == QUANT_CODES[code].name
        digest = hashlib.sha256(content[info.start : info.stop]).hexdigest()
        assert digest.startswith(wanted["sha256"])


@pytest.mark.parametrize("file", FILES)
def test_every_byte_of_a_file_is_accounted_for(file: str) -> None:
    content = (GOLDEN / file).read_bytes()
    found = read(content)
    assert content[32 : found.index_start].endswith(b"}")
    assert json.loads(content[32 : found.index_start]) == found.metadata
    assert not any(content[found.index_stop : found.payload_start])
    infos = [tensor.info for tensor in found.tensors.values()]
    assert [info.start for info in infos] == [found.payload_start] + [
        info.stop for info in infos[:-1]
    ]
    assert infos[-1].stop == len(content)


def test_sizes_of_the_formats() -> None:
    # Short last groups are whole; rows of Q8HFQ are filled up to 128 bytes.
    assert stored_nbytes(3, (3, 100)) == 10 * 34
    assert stored_nbytes(19, (1, 300)) == 2 * 72
    assert stored_nbytes(30, (2, 256)) == 2 * 160
    assert stored_nbytes(5, (2, 1536)) == 3328
    assert stored_nbytes(5, (3, 512)) == 1920
    assert stored_nbytes(2, ()) == 4
    assert stored_nbytes(13, (0, 256)) == 0
    for unknown in (5, 21, 23, 24, 28, 29, 31, 44, 130, 255):
        assert stored_nbytes(unknown, (256,)) is None


def test_codes_without_a_settled_meaning_are_read(hfq: Bytes, entry: Bytes) -> None:
    unknown = entry("a", 31, (256, 2), 100), entry("b", 255, (), 0)
    content = hfq(*unknown, entry("c"), payload=108)
    infos = [tensor.info for tensor in read(content).tensors.values()]
    assert [(info.dtype, info.shape, info.nbytes) for info in infos] == [
        ("code31", (256, 2), 100),
        ("code255", (), 0),
        ("F16", (4,), 8),
    ]


def test_what_writers_may_do(hfq: Bytes, entry: Bytes) -> None:
    # Braces and quotes in texts, indentation, signs of other scripts, more room than needed.
    tricky = '{"}": "\\"\\\\{"}'
    texts = {"tokenizer": tricky, "é\u4e2d": "\\", "config": {"a": [{}, {"b": {}}]}}
    for metadata in (
        json.dumps(texts, indent=3, ensure_ascii=False).encode(),
        json.dumps(texts).encode(),
    ):
        content = hfq(entry("m.ü"), metadata=metadata, payload_start=65536)
        found = read(content)
        assert found.metadata == texts
        assert found.tensors["m.ü"].info.start == 65536
    assert read(hfq(payload=0)).tensors == {}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"version": 0}, "its version is 0; only 1 is known"),
        ({"version": 2}, "its version is 2"),
        ({"metadata_start": 0}, "metadata would begin at byte 0 and not at 32"),
        ({"metadata_start": 1 << 63}, "metadata would begin at byte 9223372036854775808"),
        ({"payload_start": 31}, "tensors would begin at byte 31, outside"),
        ({"payload_start": (1 << 64) - 1}, "tensors would begin at byte 18446744073709551615"),
        ({"payload_start": 40}, "object is not JSON: "),
        ({"payload_start": 68}, "it has no index between"),
        ({"counts": (1, 2)}, "its header counts 1 tensors, its index 2"),
        ({"counts": (2, 2)}, "entry 1 of its index goes past byte 104"),
        ({"counts": (9, 9)}, "an index of 9 tensors does not fit into 33 bytes"),
        ({"counts": (0xFFFFFFFF,) * 2}, "it would have 4294967295 tensors, over the limit"),
        ({"metadata": b""}, "do not begin with a brace"),
        ({"metadata": b' {"config": {}}'}, "do not begin with a brace"),
        ({"metadata": b"[]"}, "do not begin with a brace"),
        ({"metadata": b'{"config": {}'}, "object is not JSON"),
        ({"metadata": b'{"config": {}, "a": "'}, "object is not JSON"),
        ({"metadata": b"{config: 1}"}, "object is not JSON: Expecting property name"),
        ({"metadata": b'{"config": {}, "a": "\xff"}'}, "is not UTF-8 at byte 53"),
        ({"metadata": b'{"config": ' + b"9" * 5000 + b"}"}, "object is not JSON"),
        ({"metadata": b'{"a":' * 100_000}, "nested too deeply"),
        ({"metadata": b'{"a":' + b"[" * 100_000}, "nested too deeply"),
        ({"metadata": b"{}"}, "hold no config"),
        ({"metadata": b'{"config": null}'}, "hold no config"),
        ({"metadata": b'{"config": "{}"}'}, "hold no config"),
        # Readers take what follows the brace for the index.
        ({"metadata": b'{"config": {}}\n'}, "its header counts 1 tensors, its index 266"),
        ({"payload": 9}, "end at byte 4104, but the file goes on to 4105 bytes"),
    ],
)
def test_files_that_cannot_be(fields: dict[str, Any], said: str, hfq: Bytes, entry: Bytes) -> None:
    if "payload_start" in fields or "counts" in fields:
        # As much before the tensors as there must be, and no more.
        fields = {"payload_start": 104, **fields}
    [found] = defects(hfq(entry(), **fields))
    assert found.startswith("not-hfq: m.mq4 is not a whole HFQ file: ")
    assert said in found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "does not begin with HFQM"),
        (b"HFQ", "does not begin with HFQM"),
        (b"GGUF" + bytes(60), "does not begin with HFQM"),
        (b"HFQM", "only 4 bytes"),
        (b"HFQM" + bytes(27), "only 31 bytes"),
    ],
)
def test_files_without_a_header(content: bytes, said: str) -> None:
    [found] = defects(content)
    assert said in found


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"nbytes": 7}, "it has 7 bytes, but F16 [4] is 8 bytes"),
        ({"nbytes": (1 << 64) - 1}, "it has 18446744073709551615 bytes, but F16 [4]"),
        ({"code": 13, "shape": (1, 257)}, "it has 8 bytes, but MQ4G256 [1, 257] is 272 bytes"),
        ({"shape": (0xFFFFFFFF,) * 60}, "is more bytes than any file has"),
        ({"shape": (1,) * 65}, "it has 65 dimensions, more than 64"),
        ({"code": 99, "nbytes": 1 << 63}, "it ends at byte 9223372036854779912, the file at"),
        ({"name": b"\xff\xfe"}, "its name is not UTF-8"),
        ({"name": "\x1b[31m"}, "its name holds characters that cannot be printed"),
        ({"name": "good"}, "it is named twice"),
    ],
)
def test_entries_that_cannot_be_true(
    fields: dict[str, Any], said: str, hfq: Bytes, entry: Bytes
) -> None:
    [found] = defects(hfq(entry("good"), entry(**fields), payload=16))
    assert found.startswith('bad-tensor-entry: m.mq4: tensor "')
    assert said in found


def test_tensors_beyond_the_end_are_named_once(hfq: Bytes, entry: Bytes) -> None:
    [found] = defects(hfq(*(entry(name) for name in "abc"), payload=15))
    assert 'tensor "b": it ends at byte 4112, the file at 4111 bytes' in found


def test_names_have_bytes_and_not_letters(hfq: Bytes, entry: Bytes) -> None:
    name = "é" * 30_000
    assert list(read(hfq(entry(name), payload_start=1 << 17)).tensors) == [name]
    long = defects(hfq(entry("n" * 60_000, nbytes=7), payload_start=1 << 17))
    assert len(long[0]) < 400


def test_all_defects_come_at_once_and_not_endlessly(hfq: Bytes, entry: Bytes) -> None:
    content = hfq(*(entry(f"t{i}", nbytes=7) for i in range(500)))
    with pytest.raises(PolicyError) as caught:
        read(content)
    (found,) = caught.value.diagnostics
    assert found.notes == ("in all 500: t0, t1, t2, …",)


def test_a_header_too_large_to_be_one_is_not_read(hfq: Bytes) -> None:
    class Sparse(Held):
        @property
        def sizes(self) -> Mapping[str, int]:
            return {"m.mq4": 1 << 40}

    with pytest.raises(PolicyError, match="have 1099511627776 bytes, over the limit"):
        read_container(Sparse(hfq(payload_start=1 << 40)), "m.mq4")


def _places(content: bytes) -> list[int]:
    """Where the numbers of header and index stand, and the bytes around names and sizes."""
    found = read(content)
    at, places = found.index_start, [4, 8, 12, 16, 24, found.index_start]
    at += 4
    for tensor in found.tensors.values():
        after = at + 2 + len(tensor.info.name.encode())
        end = after + 2 + 4 * len(tensor.info.shape)
        places += [at, after, after + 1, after + 2, end, end + 4]
        at = end + 12
    assert at == found.index_stop
    return places


def _corrupted(content: bytes, places: list[int], chance: random.Random) -> bytes:
    """The file with one to three changes, mostly where its structure is."""
    changed = bytearray(content)
    header = places[-1] + 8
    for _ in range(chance.randint(1, 3)):
        kind = chance.choice(("flip", "number", "number", "cut", "insert", "remove", "join"))
        at = chance.choice((chance.randrange(header), chance.choice(places)))
        at = min(at, len(changed) - 1)
        if kind == "flip":
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == "number":
            size = chance.choice("BHIQ")
            limit = 1 << 8 * struct.calcsize(size)
            value = chance.choice((0, 1, limit - 1, limit // 2, chance.randrange(limit)))
            changed[at : at + struct.calcsize(size)] = struct.pack(f"<{size}", value)
        elif kind == "cut":
            del changed[chance.choice((at, chance.randrange(len(changed)))) + 1 :]
        elif kind == "insert":
            changed[at:at] = chance.randbytes(chance.randint(1, 40))
        elif kind == "remove":
            del changed[at : at + chance.randint(1, 40)]
            changed = changed or bytearray(b"H")
        else:
            changed += changed[: chance.choice((1, 4096, len(changed)))]
    return bytes(changed)


def test_corrupted_files_are_read_or_refused() -> None:
    chance = random.Random(20260429)
    goldens = [(GOLDEN / file).read_bytes() for file in FILES]
    cases = [(content, _places(content)) for content in goldens]
    reasons, codes, readable = set(), set(), 0
    for number in range(1000):
        content = _corrupted(*cases[number % len(cases)], chance)
        try:
            found = read_hfq(Held(content), "m.mq4", name="m")
        except PolicyError as error:
            str(error).encode()
            codes |= {one.code for one in error.diagnostics}
            reasons.add(re.sub(r'".*"|[0-9]+', "", error.diagnostics[0].message)[:70])
            continue
        readable += 1
        _check_inventory(found, len(content))
    # The changes reach every part of the file, and leave some files whole.
    assert codes == {"not-hfq", "bad-tensor-entry"}
    assert len(reasons) > 20
    assert 20 < readable < 500


def _check_inventory(found: Any, file_nbytes: int) -> None:
    spans = sorted((info.start, info.stop) for info in found.tensors.values())
    assert all(info.stop - info.start == info.nbytes for info in found.tensors.values())
    assert all(stop == start for (_, stop), (start, _) in pairwise(spans))
    assert not spans or spans[-1][1] == file_nbytes
    source_digest(found)
    seen = survey(found)
    assert seen.quantization == "hipfire HFQ"
    render_text(survey_blocks(seen)).encode()
    json.dumps(survey_document(seen))
