"""HFQ containers for hipfire: one file, experts in blocks of 256 rotated values."""

from __future__ import annotations

from typing import Final

from emitters.hipfire_hfq.constraints import REVIEW
from emitters.hipfire_hfq.names import column_scale
from emitters.hipfire_hfq.spec import SPEC
from emitters.hipfire_hfq.tiers import added_scales, remarks
from policy_dsl.formats import Codec, Files, Format, Method, Solver


def _codec() -> Codec:
    from emitters.hipfire_hfq.encode import beyond, decode, encode

    return Codec(encode, decode, beyond)


def _files() -> Files:
    from emitters.hipfire_hfq.metadata import claims, defects, metadata, preface

    return Files(metadata=metadata, claims=claims, defects=defects, preface=preface)


def _awq() -> Solver:
    from emitters.hipfire_hfq.statistics import contents, context

    return Solver(context, contents)


FORMAT: Final[Format] = Format(
    spec=SPEC,
    codec=_codec,
    files=_files,
    review=REVIEW,
    methods={
        "rtn": Method(),
        "awq": Method(
            needs="imatrix",
            added=added_scales,
            column_scale=column_scale,
            remarks=remarks,
            solver=_awq,
        ),
    },
)
