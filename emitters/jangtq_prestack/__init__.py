"""JANGTQ bundles: MXTQ experts and MLX affine groups, as JANG's MLX runtimes load them."""

from functools import partial
from pkgutil import resolve_name
from typing import Final

from emitters.jangtq_prestack.review import REVIEW
from emitters.jangtq_prestack.spec import SPEC
from policy_dsl.formats import Format, Method

FORMAT: Final = Format(
    spec=SPEC,
    codec=partial(resolve_name, f"{__name__}.codec:CODEC"),
    files=partial(resolve_name, f"{__name__}.config:FILES"),
    review=REVIEW,
    methods={"rtn": Method()},
)
