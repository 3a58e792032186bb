"""One header: what the reference library writes is read, and every way to lie is named."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import save

from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import DTYPE_BITS, TensorInfo, tensor_nbytes
from policy_dsl.sources.safetensors_header import header_nbytes, parse_header
from tests.models import TINY


def read(blob: bytes) -> dict[str, TensorInfo]:
    """The tensors of a whole file."""
    size = header_nbytes(blob[:8], file="m.safetensors", file_nbytes=len(blob))
    return parse_header(blob[8 : 8 + size], file="m.safetensors", file_nbytes=len(blob))


def blob(header: object, nbytes: int = 0) -> bytes:
    """A file with this header, JSON or bytes, and so many bytes of tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(nbytes)


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    """A tensor of a header, right unless told otherwise."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def defects(file: bytes) -> list[str]:
    """The messages for a file that is refused."""
    with pytest.raises(PolicyError) as caught:
        read(file)
    assert all("m.safetensors" in found.message for found in caught.value.diagnostics)
    assert all(found.suggestion for found in caught.value.diagnostics)
    return [f"{found.code}: {found.message}" for found in caught.value.diagnostics]


def test_reads_what_the_reference_library_writes() -> None:
    tensors = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a.weight": np.arange(5, dtype=np.uint8),
        "empty": np.zeros((0, 7), np.int64),
        "scalar": np.float16(3),
    }
    file = save({name: np.asarray(value) for name, value in tensors.items()}, {"format": "np"})
    found = read(file)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        array = np.asarray(value)
        assert found[name].shape == array.shape
        assert found[name].nbytes == array.nbytes
        assert file[found[name].start : found[name].stop] == array.tobytes()
        assert found[name].file == "m.safetensors"
    assert {name: info.dtype for name, info in found.items()} == {
        "b": "F32",
        "a.weight": "U8",
        "empty": "I64",
        "scalar": "F16",
    }


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype(dtype: str) -> None:
    nbytes = tensor_nbytes(dtype, (3, 4))
    assert read(blob({"t": entry(dtype, [3, 4], [0, nbytes])}, nbytes))["t"].nbytes == nbytes


def test_half_a_byte_is_refused() -> None:
    [said] = defects(blob({"t": entry("F4", [3], [0, 2])}, 2))
    assert "F4 [3] is 1 bytes and 4 bits" in said
    with pytest.raises(ValueError, match="inside a byte"):
        tensor_nbytes("F4", (3,))


def test_no_tensors_and_padding_pass() -> None:
    assert read(blob(b"{}")) == {}
    assert read(blob(b'{"__metadata__": {"a": "b"}}     ')) == {}


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (b"", "empty"),
        (b"\x08\0\0", "only 3 bytes"),
        (b"\xff" * 8, "over the limit"),
        ((100_000_001).to_bytes(8, "little"), "100000001 bytes, over the limit of 100000000"),
        (b"\x40" + bytes(7) + b"{}", "header of 64 bytes goes past its end at 10 bytes"),
        (bytes(8), "not a JSON object"),
        (blob([]), "not a JSON object"),
        (blob(b"null"), "not a JSON object"),
        (blob(b"{'a': 1}"), "not JSON"),
        (blob(b'{"a": '), "not JSON"),
        (blob(b'{"\xff": 1}'), "not UTF-8 at byte 2"),
        (blob(b'{"a":' * 100_000), "nested too deeply"),
        (blob(b'{"a":' + b"[" * 100_000), "nested too deeply"),
        (blob(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
    ],
)
def test_files_without_a_header(file: bytes, said: str) -> None:
    [found] = defects(file)
    assert found.startswith("not-safetensors: ")
    assert said in found


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"dtype": "U8"}, "needs a dtype, a shape and two data_offsets"),
        ([], "needs a dtype"),
        ("F32", "needs a dtype"),
        (None, "needs a dtype"),
        (entry(offsets=[0]), "needs a dtype"),
        (entry(offsets=[0, 4, 4]), "needs a dtype"),
        (entry(offsets=4), "needs a dtype"),
        (entry("f99"), 'dtype "f99" is not known'),
        (entry(["U8"]), "dtype a list is not known"),
        (entry(None), "dtype null is not known"),
        (entry(shape=4), "shape is not a list"),
        (entry(shape=[1] * 65), "shape is not a list of at most 64"),
        (entry(shape=[-4, -1]), "shape holds -4"),
        (entry(shape=[4.0]), "shape holds 4.0"),
        (entry(shape=[True, 4]), "shape holds true"),
        (entry(shape=["4"]), 'shape holds "4"'),
        (entry(shape=[[4]]), "shape holds a list"),
        (entry(shape=[1 << 63]), "shape holds 9223372036854775808"),
        (entry(offsets=[4, 0]), "data_offsets 4 to 0"),
        (entry(offsets=[-4, 0]), "data_offsets -4 to 0"),
        (entry(offsets=[False, 4]), "data_offsets false to 4"),
        (entry(offsets=[0, 4.0]), "data_offsets 0 to 4.0"),
        (entry(offsets=[0, float("nan")]), "data_offsets 0 to NaN"),
        (entry(shape=[5]), "hold 4 bytes, but U8 [5] is 5 bytes"),
        (entry(shape=[1 << 62, 4]), "is 18446744073709551616 bytes"),
        (entry(shape=[1 << 62] * 60), "more bytes than any file has"),
        (entry("F32", [4]), "hold 4 bytes, but F32 [4] is 16 bytes"),
    ],
)
def test_entries_that_cannot_be_true(wrong: object, said: str) -> None:
    found = defects(blob({"good": entry(), "bad": wrong}, 4))
    assert found[0].startswith('bad-tensor-entry: m.safetensors: tensor "bad": ')
    assert said in found[0]
    assert len(found) == 1


@pytest.mark.parametrize(
    ("header", "nbytes", "said"),
    [
        ({"a": entry(), "b": entry(offsets=[2, 6])}, 6, '"b": it starts at byte 130 and overlaps'),
        ({"a": entry(), "b": entry()}, 4, "overlaps tensor"),
        ({"a": entry(), "b": entry(offsets=[6, 10])}, 10, 'leaves a hole after tensor "a"'),
        ({"a": entry(offsets=[1, 5])}, 5, "leaves a hole after the header"),
        ({"a": entry()}, 3, "tensors end at byte 72, but the file ends at 71 bytes"),
        ({"a": entry()}, 6, "tensors end at byte 72, but the file goes on at 74 bytes"),
        ({}, 1, "tensors end at byte 10, but the file goes on"),
        ({"a": entry(offsets=[1 << 62, (1 << 62) + 4])}, 4, "leaves a hole"),
    ],
)
def test_places_that_contradict_each_other(header: object, nbytes: int, said: str) -> None:
    assert said in defects(blob(header, nbytes))[0]


def test_order_of_entries_does_not_matter() -> None:
    found = read(blob({"b": entry(offsets=[4, 8]), "a": entry()}, 8))
    assert found["b"].start == found["a"].stop


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"a": %s, "a": %s}', 'tensor "a": it is named twice'),
        (b'{"__metadata__": {"x": "y", "x": "z"}, "a": %s, "b": %s}', "starts at byte"),
    ],
)
def test_names_that_stand_twice(text: bytes, said: str) -> None:
    one = json.dumps(entry()).encode()
    assert said in defects(blob(text % (one, one), 4))[0]


def test_field_that_stands_twice() -> None:
    text = b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}'
    assert '"dtype" appears twice' in defects(blob(text, 4))[0]


@pytest.mark.parametrize("metadata", [None, [], "x", {"a": 1}, {"a": None}, {"a": {"b": "c"}}])
def test_metadata_is_text_to_text(metadata: object) -> None:
    [found] = defects(blob({"__metadata__": metadata}))
    assert '"__metadata__"' in found


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "\ud800", "a\0"])
def test_names_that_would_spoil_a_terminal(name: str) -> None:
    [found] = defects(blob({name: entry()}, 4))
    assert found.isprintable()
    found.encode()


def test_all_defects_come_at_once_and_not_endlessly() -> None:
    assert len(defects(blob({"a": entry("X"), "b": entry(shape=[3]), "c": 0}))) == 3
    with pytest.raises(PolicyError) as caught:
        read(blob({f"t{i}": entry("X") for i in range(5000)}))
    (found,) = caught.value.diagnostics
    assert found.notes == ("in all 5,000: t0, t1, t2, …",)


@pytest.mark.parametrize(
    ("dtype", "nbytes"),
    [
        *(("C64", 32), ("F64", 32), ("I64", 32), ("U64", 32), ("BOOL", 4), ("I16", 8)),
        *(("F8_E4M3FNUZ", 4), ("F8_E5M2FNUZ", 4), ("F8_E5M2", 4), ("F8_E8M0", 4)),
        *(("F6_E2M3", 3), ("F6_E3M2", 3), ("F4", 2)),
    ],
)
def test_every_dtype_of_the_reference_library_is_known(dtype: str, nbytes: int) -> None:
    file = blob({"a": entry(dtype, offsets=(0, nbytes))}, nbytes)
    deserialize(file)
    assert read(file)["a"].dtype == dtype


@pytest.mark.parametrize("dtype", ["F2_E1", "C128", "U4", "F8_E3M4", "BF8"])
def test_a_newer_dtype_is_not_called_damage(dtype: str) -> None:
    names = "abcd"
    file = blob({name: entry(dtype) for name in names}, 4)
    with pytest.raises(PolicyError) as caught:
        read(file)
    (found,) = caught.value.diagnostics
    assert (found.code, found.count) == ("unknown-dtype", 4)
    assert "damaged" not in str(found.suggestion)


def test_long_names_are_cut_in_messages() -> None:
    [found] = defects(blob({"n" * 100_000: entry("X")}))
    assert len(found) < 400


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), _JSON | st.builds(entry, _JSON, _JSON, _JSON)))
def test_any_json_is_read_or_refused(header: dict[str, object]) -> None:
    _read_or_refuse(blob(header, 4))


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(file: bytes) -> None:
    _read_or_refuse(file)
    _read_or_refuse(blob(file))


@settings(max_examples=300)
@given(st.data())
def test_a_corrupted_file_is_read_or_refused(data: st.DataObject) -> None:
    whole = (TINY / "model-00001-of-00004.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    whole = whole[: 8 + length] + whole[8 + length : 8 + length + 100]
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    _read_or_refuse(bytes(changed[: data.draw(st.integers(0, len(changed)))]))


def _read_or_refuse(file: bytes) -> None:
    try:
        found = read(file)
    except PolicyError as error:
        str(error).encode()
    else:
        assert sum(info.nbytes for info in found.values()) <= len(file)
        assert all(re.fullmatch("[A-Z0-9_]+", info.dtype) for info in found.values())
