"""MLX affine and floating-point groups, as stock mlx-lm loads them."""

from typing import Final

from emitters.mlx_affine.spec import REVIEW, SPEC
from policy_dsl.formats import Codec, Files, Format, Method


def _codec() -> Codec:
    from emitters.mlx_affine.codec import CODEC

    return CODEC


def _files() -> Files:
    from emitters.mlx_affine.config import FILES

    return FILES


FORMAT: Final[Format] = Format(
    spec=SPEC, codec=_codec, files=_files, review=REVIEW, methods={"rtn": Method()}
)
