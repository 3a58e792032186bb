"""MLX affine and floating-point groups, as stock mlx-lm loads them."""

from typing import Final

from emitters.mlx_affine.spec import REVIEW, SPEC
from policy_dsl.formats import Codec, Files, Format, Method


def _codec() -> Codec:
    from emitters.mlx_affine.codec import beyond, decode, encode

    return Codec(encode, decode, beyond)


def _files() -> Files:
    from emitters.mlx_affine.config import claims, defects, metadata

    return Files(metadata=metadata, claims=claims, defects=defects)


FORMAT: Final[Format] = Format(
    spec=SPEC, codec=_codec, files=_files, review=REVIEW, methods={"rtn": Method()}
)
