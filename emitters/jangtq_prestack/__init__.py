"""JANGTQ bundles: MXTQ experts and MLX affine groups, as JANG's MLX runtimes load them."""

from typing import Final

from emitters.jangtq_prestack.review import REVIEW
from emitters.jangtq_prestack.spec import SPEC
from policy_dsl.formats import Codec, Files, Format, Method, ValueDefects


def _codec() -> Codec:
    from emitters.jangtq_prestack.codec import beyond, decode, encode

    return Codec(encode, decode, beyond)


def _files() -> Files:
    from emitters.jangtq_prestack.config import metadata
    from emitters.jangtq_prestack.read_config import added, claims, defects
    from emitters.jangtq_prestack.side_files import edited

    return Files(metadata=metadata, claims=claims, defects=defects, added=added, edited=edited)


def _value_defects() -> ValueDefects:
    from emitters.jangtq_prestack.side_files import value_defects

    return value_defects


FORMAT: Final[Format] = Format(
    spec=SPEC,
    value_defects=_value_defects,
    codec=_codec,
    files=_files,
    review=REVIEW,
    methods={"rtn": Method()},
)
