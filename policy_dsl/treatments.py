"""What happens to a tensor: as a policy writes it, and as a bundle stores it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Action = Literal["quantize", "keep", "cast", "raw", "drop"]
# Word of the language -> safetensors dtype, and back.
PLAIN_DTYPES: Mapping[str, str] = {"f16": "F16", "bf16": "BF16", "f32": "F32"}
PLAIN_WORDS: Mapping[str, str] = {dtype: word for word, dtype in PLAIN_DTYPES.items()}
MAX_BITS = 16
# The group size that means one group a row.
WHOLE_ROW = -1


@dataclass(frozen=True, slots=True)
class Written:
    """What a policy says about a tensor. What is None was left out; `fill` decides it.

    cast: to `dtype`, one of f16, bf16, f32; keep: the target's plain dtype; raw: the source's
    bytes; drop: nothing is written.
    """

    action: Action
    bits: int | None = None
    scheme: str | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    method: str | None = None
    dtype: str | None = None


KEEP = Written("keep")


@dataclass(frozen=True, slots=True)
class Plain:
    """Values as they are. dtype: safetensors' name, such as BF16."""

    dtype: str


@dataclass(frozen=True, slots=True)
class Coded:
    """Quantized values. group_size: 0 without groups, WHOLE_ROW for rows. method: how the codes
    were chosen; empty where a bundle does not say. symmetric: a choice, or a fact of the scheme."""

    scheme: str
    bits: int
    group_size: int
    symmetric: bool
    method: str


Stored = Plain | Coded


@dataclass(frozen=True, slots=True)
class Unread:
    """A module of somebody else's bundle whose metadata cannot be read; the reason."""

    reason: str


def describe(stored: Stored | Unread) -> str:
    """What is stored, such as `4bit affine g64` or `bf16`; rounding to nearest is not named."""
    if isinstance(stored, Unread):
        return "unknown"
    if isinstance(stored, Plain):
        return PLAIN_WORDS.get(stored.dtype, stored.dtype)
    group = f" g{stored.group_size}" if stored.group_size else ""
    symmetry = (" sym" if stored.symmetric else " asym") * has_symmetry_choice(stored.scheme)
    method = f" by {stored.method}" if stored.method not in ("", "rtn") else ""
    return f"{stored.bits}bit {stored.scheme}{group}{symmetry}{method}"


def scheme_of(stored: Stored) -> str:
    """The scheme of coded values; empty for plain ones."""
    return stored.scheme if isinstance(stored, Coded) else ""


def coded(stored: Stored | Unread) -> Coded:
    """How a module is coded that is known to be. Raises: TypeError if it is not."""
    if not isinstance(stored, Coded):
        raise TypeError(f"not quantized: {stored}")
    return stored


def has_symmetry_choice(scheme: str) -> bool:
    """Whether the scheme leaves a choice of symmetric groups, so that texts name it."""
    return scheme.partition("-")[0] == "int"
