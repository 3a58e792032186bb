"""Signs and centroids: the reference's, without compiling anything, on any numpy."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from emitters.numerics.mxtq_tables import codebook, signs

ROOT = Path(__file__).parents[3]


def test_the_first_signs() -> None:
    text = "".join("+" if sign > 0 else "-" for sign in signs(16))
    assert text == "-++--+-+--++++++"


@pytest.mark.parametrize(
    ("columns", "positive"),
    [(64, 36), (128, 68), (256, 126), (1536, 775), (3072, 1527), (8192, 4025)],
)
def test_how_many_signs_are_positive(columns: int, positive: int) -> None:
    assert (signs(columns) == 1).sum() == positive
    assert (signs(columns) == -1).sum() == columns - positive


@pytest.mark.parametrize(
    ("columns", "digest"),
    [(256, "95ca097474c5b016"), (1536, "fdd1de1a58fd7bd9"), (3072, "fdd343d1802c07b4")],
)
def test_digests_of_signs(columns: int, digest: str) -> None:
    assert hashlib.sha256(signs(columns).tobytes()).hexdigest().startswith(digest)


def test_short_rows_have_the_first_signs_of_long_ones() -> None:
    for columns in (1, 2, 37, 64, 1535):
        assert (signs(columns, 7) == signs(4096, 7)[:columns]).all()


@pytest.mark.parametrize("columns", [64, 192, 1536, 3072, 8192])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codebooks_ascend_and_are_symmetric(columns: int, bits: int) -> None:
    table = codebook(columns, bits)
    assert (table.dtype, table.shape) == (np.float32, (2**bits,))
    assert (np.diff(table) > 0).all()
    assert (table == -table[::-1]).all()


def test_tables_cannot_be_changed() -> None:
    for table in (codebook(64, 2), signs(64)):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0


@pytest.mark.parametrize(("columns", "bits"), [(64, 0), (64, 5), (3, 2), (0, 2), (-64, 2)])
def test_what_has_no_codebook_is_refused(columns: int, bits: int) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        codebook(columns, bits)


def test_planning_can_ask_without_loading_a_compiler() -> None:
    program = (
        "import sys; from emitters.numerics.mxtq_tables import codebook, signs;"
        "codebook(3072, 4); signs(3072); print('numba' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"
