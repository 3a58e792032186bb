"""JANGTQ bundles: experts rotated and coded by a Lloyd-Max codebook, the rest 8-bit affine."""

from __future__ import annotations

from typing import Final

from emitters.jangtq_prestack.readers import REVIEW
from emitters.jangtq_prestack.spec import SPEC
from policy_dsl.formats import Codec, Files, Format, Method


def _codec() -> Codec:
    from emitters.jangtq_prestack.encode import beyond, decode, encode

    return Codec(encode, decode, beyond)


def _files() -> Files:
    from emitters.jangtq_prestack.metadata import added, claims, defects, edited, metadata

    return Files(metadata=metadata, claims=claims, defects=defects, added=added, edited=edited)


FORMAT: Final[Format] = Format(
    spec=SPEC, codec=_codec, files=_files, review=REVIEW, methods={"rtn": Method()}
)
