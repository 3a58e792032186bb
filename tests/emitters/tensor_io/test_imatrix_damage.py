"""Importance matrices that are not what they should be: an error that says why, and no more."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from imatrix_files import (
    GATE,
    QUERY,
    Array,
    Statistics,
    gate_sums,
    gguf_tensors,
    legacy_entry,
    legacy_file,
    query_sums,
    random_statistics,
    write_gguf,
)

from emitters.tensor_io.imatrix import InputSums, open_imatrix
from policy_dsl.diagnostics import PolicyError, SourceText, Span

Tensors = dict[str, Array]


def text(content: str) -> bytes:
    """A string of a GGUF header."""
    return struct.pack("<Q", len(content)) + content.encode()


def header(*parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    """A GGUF file of a header with these parts."""
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


KIND = text("general.type") + struct.pack("<I", 8) + text("imatrix")


def numbers(key: str, length: int, nested: int = 0, content: bytes = b"") -> bytes:
    """A key with an array of bytes, inside of `nested` others of length 1."""
    outer = struct.pack("<IQ", 9, 1) * nested
    return text(key) + struct.pack("<I", 9) + outer + struct.pack("<IQ", 0, length) + content


def tensor(name: str, *shape: int, dtype: int = 0, offset: int = 0) -> bytes:
    """What a GGUF header says of a tensor."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", dtype, offset)


def padded(kind: bytes, *tensors: bytes) -> bytes:
    """A GGUF file of these tensors, with zeros where they would be."""
    content = header(kind, *tensors, tensors=len(tensors), keys=1)
    return content + bytes(-len(content) % 32 + 1024)


def named(value: object) -> str:
    """What pytest calls a case by: its reason."""
    return value if isinstance(value, str) else ""


def code_and_message(found: PolicyError) -> tuple[str, str]:
    """Of its first diagnostic, which always has a cure."""
    first = found.diagnostics[0]
    assert first.suggestion or first.code in ("unreadable-file", "source-changed")
    return first.code, first.message


def read_all(path: Path) -> tuple[InputSums, InputSums]:
    """Both entries of `random_statistics`."""
    imatrix = open_imatrix(path)
    return query_sums(imatrix), gate_sums(imatrix)


def refusal(path: Path) -> tuple[str, str]:
    """The error of opening a file, or else of reading its entries."""
    with pytest.raises(PolicyError) as caught:
        read_all(path)
    return code_and_message(caught.value)


def set_sum(value: float) -> Callable[[Tensors], None]:
    """A change of one sum of the experts."""
    return lambda tensors: tensors[f"{GATE}.in_sum2"].__setitem__((1, 5), value)


def set_count(value: float) -> Callable[[Tensors], None]:
    """A change of the count of the second expert."""
    return lambda tensors: tensors[f"{GATE}.counts"].__setitem__(1, value)


def narrow(tensors: Tensors) -> None:
    """Sums in half precision."""
    tensors[f"{GATE}.in_sum2"] = np.zeros((4, 32), np.float16)


def clear(tensors: Tensors) -> None:
    """An entry that no token reached."""
    tensors[f"{QUERY}.in_sum2"][:] = 0
    tensors[f"{QUERY}.counts"][:] = 0


def fewer(tensors: Tensors) -> None:
    """Counts of three experts for the sums of four."""
    tensors[f"{GATE}.counts"] = tensors[f"{GATE}.counts"][:3]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_sum(np.nan), "sum 37 is nan"),
        (set_sum(-1.0), "sum 37 is -1.0"),
        (set_sum(np.inf), "sum 37 is inf"),
        (set_count(np.nan), "count 1 is nan"),
        (set_count(-3), "count 1 is -3.0"),
        (set_count(0.5), "count 1 is 0.5"),
        (set_count(0), "matrices without tokens have sums"),
        (clear, "no token reached it"),
        (lambda tensors: tensors.pop(f"{GATE}.counts"), "it has no .counts"),
        (lambda tensors: tensors.pop(f"{GATE}.in_sum2"), "it has no .in_sum2"),
        (narrow, "its .in_sum2 are F16, not F32"),
        (fewer, "it has sums of shape [32, 4] and 3 counts"),
    ],
)
def test_entries_that_mean_nothing(
    tmp_path: Path, change: Callable[[Tensors], None], reason: str
) -> None:
    tensors = gguf_tensors(random_statistics())
    change(tensors)
    path = write_gguf(tmp_path / "i.gguf", tensors)
    entry = QUERY if change is clear else GATE
    message = f'importance matrix {path}, entry "{entry}": {reason}'
    assert refusal(path) == ("bad-imatrix-entry", message)


def test_a_mistake_that_all_entries_share_is_one_error(tmp_path: Path) -> None:
    tensors = gguf_tensors(random_statistics())
    for name in (GATE, QUERY):
        sums = tensors[f"{name}.in_sum2"]
        tensors[f"{name}.in_sum2"] = sums.astype(np.float64)
    path = write_gguf(tmp_path / "i.gguf", tensors)
    with pytest.raises(PolicyError) as caught:
        open_imatrix(path)
    (found,) = caught.value.diagnostics
    assert found.message.endswith('": its .in_sum2 are F64, not F32')
    assert found.notes == (f"in all 2: {GATE}, {QUERY}",)


@pytest.mark.parametrize("value", [np.nan, -1.0, np.inf])
def test_legacy_sums_that_mean_nothing(tmp_path: Path, value: float) -> None:
    statistics = random_statistics()
    statistics[QUERY].sums[0, 3] = value
    path = tmp_path / "i.dat"
    path.write_bytes(legacy_file(statistics))
    with pytest.raises(PolicyError, match=r"bad-imatrix-entry.*sum 3 is"):
        query_sums(open_imatrix(path))


def test_a_legacy_entry_of_placeholders_alone(tmp_path: Path) -> None:
    statistics = {GATE: Statistics(np.zeros((4, 32), np.float32), np.zeros(4, np.float32))}
    content = legacy_entry(GATE, statistics[GATE])
    calls = content.index(GATE.encode()) + len(GATE)
    ones = struct.pack("<ii", 1, 128) + np.ones(128, np.float32).tobytes()
    path = tmp_path / "i.dat"
    path.write_bytes(struct.pack("<i", 1) + content[:calls] + ones)
    with pytest.raises(PolicyError, match="no token reached it"):
        gate_sums(open_imatrix(path))


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_statistics_of_another_model(tmp_path: Path, suffix: str) -> None:
    statistics = random_statistics()
    path = tmp_path / f"i.{suffix}"
    if suffix == "gguf":
        write_gguf(path, gguf_tensors(statistics))
    else:
        path.write_bytes(legacy_file(statistics))
    imatrix = open_imatrix(path)
    for experts, columns in [(4, 64), (8, 32), (3, 32), (1, 32), (2, 128), (0, 32)]:
        with pytest.raises(PolicyError, match="imatrix-of-another-model"):
            imatrix.sums("experts.gate_proj", 0, n_matrices=experts, columns=columns)
    with pytest.raises(PolicyError) as caught:
        imatrix.sums("attention.q_proj", 0, columns=48)
    says = f'importance matrix {path}, entry "{QUERY}": 1 matrices of 32 columns'
    expected = ("imatrix-of-another-model", f"{says}, the model has 1 of 48")
    assert code_and_message(caught.value) == expected


def test_missing_entries_and_the_place_that_asks(tmp_path: Path) -> None:
    policy = SourceText("p.qpol", 'calibration imatrix "i.gguf"\n')
    path = write_gguf(tmp_path / "i.gguf", gguf_tensors(random_statistics()))
    imatrix = open_imatrix(path, Span(policy, 20, 28))
    with pytest.raises(PolicyError) as caught:
        imatrix.sums("experts.up_proj", 3, n_matrices=4, columns=32)
    (found,) = caught.value.diagnostics
    assert found.message.endswith("i.gguf has nothing about experts.up_proj of layer 3")
    assert found.suggestion is not None
    assert found.suggestion.startswith("it should be called blk.3.ffn_up_exps.weight: ")
    assert found.span is not None
    assert found.span.location == "p.qpol:1:21"


@pytest.mark.parametrize(
    ("role", "layer", "cure"),
    [
        ("lm_head", None, "run llama-imatrix with --process-output, or write `lm_head: 4bit`"),
        ("embed", None, "llama-imatrix writes nothing about embed: write `embed: 4bit`"),
        (
            "linear_attention.out_proj",
            0,
            "llama-imatrix writes nothing about linear_attention.out_proj: "
            "write `linear_attention.out_proj: 4bit`",
        ),
        (
            "mtp.down_proj",
            None,
            "llama-imatrix writes nothing about mtp.down_proj: write `mtp.down_proj: 4bit`",
        ),
    ],
)
def test_what_llama_imatrix_leaves_out_has_a_cure(
    tmp_path: Path, role: str, layer: int | None, cure: str
) -> None:
    path = write_gguf(tmp_path / "i.gguf", gguf_tensors(random_statistics()))
    with pytest.raises(PolicyError) as caught:
        open_imatrix(path).sums(role, layer, columns=32, instead="4bit")
    (found,) = caught.value.diagnostics
    assert (found.code, found.suggestion) == ("missing-imatrix-entry", cure)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"GG", "it has only 2 bytes"),
        (b"GGUF", "it is cut short: 1 values do not fit into 0 bytes"),
        (header(version=1), "Sorry, file appears to be version 1 which we cannot handle"),
        (header(version=0x3000000), "its numbers are big-endian"),
        (header(), 'its general.type is "None", not "imatrix"'),
        (header(KIND, keys=1), "it has no entries"),
        (header(KIND, keys=2), "it is cut short: 1 values do not fit into 0 bytes"),
        (header(KIND, KIND, keys=2), "Duplicate general.type already in list"),
        (header(tensors=2**63), "it is cut short"),
        (header(keys=2**64 - 1), "it is cut short"),
        (header(struct.pack("<Q", 2**63), keys=1), "it is cut short"),
        (header(numbers("a", 2**62), keys=1), "it is cut short"),
        (header(numbers("a", 2**64 - 1), keys=1), "it is cut short"),
        (header(numbers("a", 1, 5000), keys=1), "recursion"),
        (header(text("a") + struct.pack("<I", 77), keys=1), "is not a valid GGUFValueType"),
        (header(struct.pack("<Q", 1) + b"\xff" + bytes(8), keys=1), "'utf-8' codec"),
        (header(KIND, tensor("a", 4), tensors=1, keys=1), "it is cut short"),
        (header(KIND, tensor("a", 2**62), tensors=1, keys=1), "it is cut short"),
        (padded(KIND, tensor("a", 2**32, 2**32)), "cannot reshape"),
        (padded(KIND, tensor("a", *([1] * 80))), "maximum supported dim"),
        (header(KIND, tensor("a", 1, dtype=99), tensors=1, keys=1), "is not a valid GGMLQ"),
        (header(KIND, tensor("a", 0, offset=2**64 - 1), tensors=1, keys=1), "overflow"),
        (padded(KIND, tensor("a", 0, offset=32)), "starts at byte 128 and not at 96"),
        (padded(KIND, tensor("a", 0), tensor("a", 0)), "duplicated tensor"),
        (header(KIND, struct.pack("<QI", 1, 5), tensors=1, keys=1), "it is cut short"),
    ],
    ids=named,
)
def test_what_no_gguf_file_may_say(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "i.gguf"
    path.write_bytes(content)
    code, message = refusal(path)
    assert (code, reason in message) == ("not-an-imatrix", True), message


@pytest.mark.parametrize("alignment", [0, 3, 2**31])
def test_an_alignment_that_is_none(tmp_path: Path, alignment: int) -> None:
    key = text("general.alignment") + struct.pack("<II", 4, alignment)
    (tmp_path / "i.gguf").write_bytes(header(KIND, key, keys=2))
    assert refusal(tmp_path / "i.gguf")[0] == "not-an-imatrix"


def test_a_model_is_no_importance_matrix(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(random_statistics()), "model")
    reason = 'its general.type is "model", not "imatrix"'
    message = f"{path} is not a whole importance matrix: {reason}"
    assert refusal(path) == ("not-an-imatrix", message)


ENTRY = legacy_entry(QUERY, random_statistics()[QUERY])
ONE, NAME = struct.pack("<i", 1), struct.pack("<i", len(QUERY)) + QUERY.encode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (struct.pack("<i", 0), "it begins neither as GGUF nor with a count of entries"),
        (struct.pack("<i", -1), "it begins neither as GGUF nor with a count of entries"),
        (b'{"a": 1}', "it begins neither as GGUF nor with a count of entries"),
        (ONE, "entry 1 of 1: it needs 4 bytes where 0 are left"),
        (ONE + struct.pack("<i", 0), "its name would have 0 bytes"),
        (ONE + struct.pack("<i", -5), "its name would have -5 bytes"),
        (ONE + struct.pack("<i", 2**31 - 1), "its name would have 2147483647 bytes"),
        (ONE + struct.pack("<i", 2) + b"\xff\xff" + bytes(8), "'utf-8' codec"),
        (ONE + struct.pack("<i", 2) + b"a\n" + bytes(8), "cannot be printed"),
        (ONE + NAME + struct.pack("<ii", 0, 4), "says 0 calls and 4 sums"),
        (ONE + NAME + struct.pack("<ii", 4, -1), "says 4 calls and -1 sums"),
        (ONE + NAME + struct.pack("<ii", 4, 2**31 - 1), "it needs 8589934588 bytes"),
        (struct.pack("<i", 2) + ENTRY, "entry 2 of 2: it needs 4 bytes where 0 are left"),
        (struct.pack("<i", 2) + ENTRY * 2, f'there are two entries "{QUERY}"'),
        (ONE + ENTRY + b"abc", "it needs 4 bytes where 3 are left"),
        (ONE + ENTRY + struct.pack("<ii", 1, 9) + b"text", "4 bytes follow its last entry"),
        (ONE + ENTRY + struct.pack("<ii", 1, -9) + b"text", "4 bytes follow its last entry"),
    ],
    ids=named,
)
def test_what_no_legacy_file_may_say(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(content)
    code, message = refusal(path)
    assert (code, reason in message) == ("not-an-imatrix", True), message


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "absent"):
        assert refusal(path)[0] == "unreadable-file"


@pytest.mark.parametrize("kind", ["gguf", "dat"])
def test_300_damaged_files_are_refused_or_read(tmp_path: Path, kind: str) -> None:
    statistics = random_statistics(columns=32)
    path = tmp_path / f"i.{kind}"
    whole = legacy_file(statistics)
    if kind == "gguf":
        whole = write_gguf(path, gguf_tensors(statistics)).read_bytes()
    random, refused = np.random.default_rng(7), 0
    for number in range(300):
        content = bytearray(whole)
        if number % 3 == 0:
            del content[random.integers(len(whole)) :]
        else:
            # Half of the time within the header, where lengths and places are.
            end = len(whole) if number % 2 else 700
            for at in random.integers(0, end, random.integers(1, 5)):
                content[at] = random.choice([0, 1, 0x7F, 0x80, 0xFF, random.integers(256)])
        path.write_bytes(content)
        try:
            for found in read_all(path):
                assert np.isfinite(found.importance()).all()
                assert (found.sums >= 0).all()
        except PolicyError as error:
            code_and_message(error)
            refused += 1
    assert refused > 150


def test_damage_does_not_fill_the_memory(tmp_path: Path) -> None:
    # Bytes are the worst that a header can hold: each becomes an array of its own.
    content = header(numbers("a", 2_000_000, content=bytes(2_000_000)), keys=1)
    (tmp_path / "i.gguf").write_bytes(content)
    program = (
        "import resource, sys; from pathlib import Path\n"
        "import gguf.gguf_reader\n"
        "from emitters.tensor_io.imatrix import open_imatrix\n"
        "from policy_dsl.diagnostics import PolicyError\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "try: open_imatrix(Path(sys.argv[1]))\n"
        "except PolicyError as error: print('more parts than' in str(error))\n"
        "print(peak() - before < 50 * 1024)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "i.gguf")],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.stdout.split(), run.stderr) == (["True", "True"], "")
