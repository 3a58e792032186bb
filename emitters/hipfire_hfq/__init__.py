"""HFQ containers for hipfire: one file, experts in blocks of 256 rotated values."""

from typing import Final

from emitters.hipfire_hfq.spec import AWQ, REVIEW, SPEC, added_scales, column_scale, remarks
from policy_dsl.formats import Codec, Files, Format, Method, Solver


def _codec() -> Codec:
    from emitters.hipfire_hfq.codec import CODEC

    return CODEC


def _files() -> Files:
    from emitters.hipfire_hfq.reader_checks import FILES

    return FILES


def _solver() -> Solver:
    from emitters.hipfire_hfq.codec import SOLVER

    return SOLVER


_SCALED = Method(
    needs="imatrix", added=added_scales, column_scale=column_scale, remarks=remarks, solver=_solver
)
FORMAT: Final[Format] = Format(
    spec=SPEC, codec=_codec, files=_files, review=REVIEW, methods={"rtn": Method(), AWQ: _SCALED}
)
