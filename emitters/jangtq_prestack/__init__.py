"""JANGTQ bundles: MXTQ experts and MLX affine groups, as JANG's MLX runtimes load them."""

from typing import Final

from emitters.jangtq_prestack.review import REVIEW
from emitters.jangtq_prestack.spec import SPEC
from policy_dsl.formats import Codec, Files, Format, Method


def _codec() -> Codec:
    from emitters.jangtq_prestack.codec import beyond, decode, encode
    from emitters.jangtq_prestack.side_files import value_defects

    return Codec(encode, decode, beyond, value_defects)


def _files() -> Files:
    from emitters.jangtq_prestack.config import metadata
    from emitters.jangtq_prestack.read_config import added, claims, defects
    from emitters.jangtq_prestack.side_files import edited

    return Files(metadata=metadata, claims=claims, defects=defects, added=added, edited=edited)


FORMAT: Final[Format] = Format(
    spec=SPEC, codec=_codec, files=_files, review=REVIEW, methods={"rtn": Method()}
)
