"""Bundles and saved plans that earlier versions wrote; see tests/golden/records/README.md."""

from __future__ import annotations

import tarfile
from pathlib import Path

PACKED = Path(__file__).parents[2] / "golden" / "records" / "version_1.tar.xz"
TARGETS = ("gptq", "hipfire_hfq", "jangtq_prestack", "mlx_affine")


def unpack(folder: Path) -> Path:
    """The folder, with the source, and a policy, a bundle and saved plans for each target."""
    with tarfile.open(PACKED) as packed:
        packed.extractall(folder, filter="data")
    return folder
