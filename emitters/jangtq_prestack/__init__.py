"""JANGTQ bundles: MXTQ experts and MLX affine groups, as JANG's MLX runtimes load them."""

from typing import Final

from emitters.jangtq_prestack.review import REVIEW
from emitters.jangtq_prestack.spec import SPEC
from policy_dsl.formats import Codec, Files, Format, Method


def _codec() -> Codec:
    from emitters.jangtq_prestack.codec import CODEC

    return CODEC


def _files() -> Files:
    from emitters.jangtq_prestack.config import FILES

    return FILES


FORMAT: Final[Format] = Format(
    spec=SPEC, codec=_codec, files=_files, review=REVIEW, methods={"rtn": Method()}
)
