"""MLX affine and floating-point groups, as stock mlx-lm loads them."""

from functools import partial
from pkgutil import resolve_name
from typing import Final

from emitters.mlx_affine.spec import REVIEW, SPEC
from policy_dsl.formats import Format, Method

FORMAT: Final = Format(
    spec=SPEC,
    codec=partial(resolve_name, f"{__name__}.codec:CODEC"),
    files=partial(resolve_name, f"{__name__}.config:FILES"),
    review=REVIEW,
    methods={"rtn": Method()},
)
