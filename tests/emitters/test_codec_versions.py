"""The bytes of an encoder change only together with its format's codec version.

tests/golden/codec_versions.json holds, by format, codec version and way of coding, the SHA-256
of what fixed values become. `UPDATE_SNAPSHOTS=1` adds what is missing and changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import emitters
from emitters.numerics import Array
from emitters.numerics.rounding import cast
from policy_dsl.formats import Encode, Format, SchemeSpec, UnstorableError
from policy_dsl.treatments import Coded

PATH = Path(__file__).parents[1] / "golden" / "codec_versions.json"
ROWS, COLUMNS = 32, 512


@cache
def values() -> Array:
    """float32 [rows, columns]: heavy-tailed, a row of zeros, a constant row; the same anywhere."""
    places = np.arange(ROWS * COLUMNS, dtype=np.uint64)
    mixed = (places * 2654435761 + 12345) % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 2246822519 % 2**32
    even = (mixed % 65536).astype(np.float32) / 32768 - 1
    made = (even * even * even * np.float32(0.25)).reshape(ROWS, COLUMNS)
    made[3] = 0
    made[5] = np.float32(0.125)
    made[7] *= 64
    return made


class Inputs:
    """Statistics in which every matrix got the same inputs."""

    def of_matrix(self, module: Any, source: int) -> Array:
        """float32 [columns]: mean squares of what meets the columns of any matrix."""
        return 1 + np.arange(COLUMNS, dtype=np.float32) % 7


def ways(format: Format, scheme: SchemeSpec) -> Iterator[tuple[Coded, str]]:
    """Every way of coding that a scheme has, for each value type that its encoder takes."""
    dtypes = (scheme.values,) if scheme.values else format.spec.plain_dtypes
    for bits, method in product(scheme.bits, scheme.methods):
        kinds = product(scheme.group_sizes or (0,), scheme.symmetries, dtypes)
        for group_size, symmetric, dtype in kinds:
            yield Coded(scheme.name, bits, group_size, symmetric, method), dtype


def encoders(format: Format, how: Coded) -> Iterator[Encode]:
    """What codes in this way: without statistics, and with them where they are an option."""
    yield format.codec().encode
    method = format.methods.get(how.method)
    if method is not None and method.uses and method.solver:
        module: Any = SimpleNamespace(treatment=how)
        inputs: Any = Inputs()
        yield method.solver().context(module, module, 0, inputs).encode


def encoded(encode: Encode, how: Coded, dtype: str) -> dict[str, Array]:
    """The parts of the fixed values, or, if these have no zero points, of as many of each sign."""
    try:
        return encode(cast(values(), "F32", dtype), dtype, how)
    except UnstorableError:
        storable = values() + (values() == 0)
        storable[:, 1::2] = -storable[:, ::2]
        return encode(cast(storable, "F32", dtype), dtype, how)


def digests(format: Format, scheme: SchemeSpec) -> dict[str, str]:
    """Bits and method -> SHA-256 of what encoders make of the fixed values, in all other ways."""
    found: dict[str, Any] = {}
    for how, dtype in ways(format, scheme):
        digest = found.setdefault(f"{how.bits}bit {scheme.name} by {how.method}", hashlib.sha256())
        for encode in encoders(format, how):
            for part, array in sorted(encoded(encode, how, dtype).items()):
                digest.update(f"{how} {dtype} {part} {array.dtype} {array.shape} ".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
    return {way: digest.hexdigest() for way, digest in found.items()}


SCHEMES = [
    pytest.param(format, scheme, id=f"{name}-{scheme.name}")
    for name, format in emitters.FORMATS.items()
    for scheme in format.spec.schemes
]


@pytest.mark.parametrize(("format", "scheme"), SCHEMES)
def test_bytes_change_only_with_the_codec_version(format: Format, scheme: SchemeSpec) -> None:
    golden = json.loads(PATH.read_text("utf-8"))
    version = str(format.spec.codec_version)
    known = golden.setdefault(format.name, {}).setdefault(version, {})
    found = digests(format, scheme)
    changed = sorted(way for way in found.keys() & known.keys() if found[way] != known[way])
    assert not changed, "the bytes are others: raise codec_version in the format's spec"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        known |= found
        PATH.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n", "utf-8")
    assert {way for way in known if f"bit {scheme.name} by " in way} == found.keys()
