"""HFQ containers for hipfire: one file, experts in blocks of 256 rotated values."""

from typing import Final

from emitters.hipfire_hfq.spec import AWQ, REVIEW, SPEC, added_scales, column_scale, remarks
from policy_dsl.formats import Codec, Files, Format, Method, Solver


def _codec() -> Codec:
    from emitters.hipfire_hfq.codec import beyond, decode, encode, value_defects

    return Codec(encode, decode, beyond, value_defects)


def _awq() -> Solver:
    from emitters.hipfire_hfq.codec import contents, context

    return Solver(context, contents)


def _files() -> Files:
    # All that a loader reads is in the one file.
    from emitters.hipfire_hfq.reader_checks import claims, defects

    return Files(metadata=lambda plan: {}, claims=claims, defects=defects)


_SCALED = Method(
    needs="imatrix", added=added_scales, column_scale=column_scale, remarks=remarks, solver=_awq
)


FORMAT: Final[Format] = Format(
    spec=SPEC, codec=_codec, files=_files, review=REVIEW, methods={"rtn": Method(), AWQ: _SCALED}
)
