"""Policies that pack every width and group size in one model."""

from __future__ import annotations

import itertools

PLAIN_ENDS = "embed, lm_head: keep"
# Bits and group sizes, one of them for each half of the blocks of a Llama of 9 layers.
WIDTHS = tuple(itertools.product((4, 8, 3, 2), (128, 64, 32, -1)))


def mixed(storage: str, *, dialect: str = "auto-round") -> str:
    """All widths and group sizes, stored like `int sym`; the last block as the first."""
    scheme, symmetry = storage.split()
    lines = [f"metadata dialect {dialect}", f"all: 4bit {scheme} g128 {symmetry}"]
    for i, (bits, group_size) in enumerate(WIDTHS):
        half = "mlp" if i % 2 else "attention"
        treatment = f"{bits}bit {scheme} g{group_size} {symmetry}"
        lines.append(f"{half} in layers {i // 2}: {treatment}")
    return "\n".join([*lines, PLAIN_ENDS])


def uniform(treatment: str, *, dialect: str = "auto-round") -> str:
    """One width for all linears, but for a block that predicts more tokens."""
    kept = f"{PLAIN_ENDS}\nmtp: keep optional"
    return f"metadata dialect {dialect}\nall: {treatment}\n{kept}"
