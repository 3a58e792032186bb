"""HFQ containers for hipfire: one file, experts in blocks of 256 rotated values."""

from functools import partial
from pkgutil import resolve_name
from typing import Final

from emitters.hipfire_hfq.spec import AWQ, REVIEW, SPEC, added_scales, column_scale, remarks
from policy_dsl.formats import Format, Method

_SCALED = Method(
    needs="imatrix",
    added=added_scales,
    column_scale=column_scale,
    remarks=remarks,
    solver=partial(resolve_name, f"{__name__}.codec:SOLVER"),
)
FORMAT: Final = Format(
    spec=SPEC,
    codec=partial(resolve_name, f"{__name__}.codec:CODEC"),
    files=partial(resolve_name, f"{__name__}.reader_checks:FILES"),
    review=REVIEW,
    methods={"rtn": Method(), AWQ: _SCALED},
)
