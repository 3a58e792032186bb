"""GPTQ-packed linears, as vLLM, AutoRound and GPTQModel read them."""

from functools import partial
from pkgutil import resolve_name
from typing import Final

from emitters.gptq.review import REVIEW
from emitters.gptq.spec import RTN, SEARCHES, SPEC
from policy_dsl.formats import Format, Method

_SEARCH = Method(uses="imatrix", solver=partial(resolve_name, f"{__name__}.codec:SOLVER"))
FORMAT: Final = Format(
    spec=SPEC,
    codec=partial(resolve_name, f"{__name__}.codec:CODEC"),
    files=partial(resolve_name, f"{__name__}.read_config:FILES"),
    review=REVIEW,
    methods={RTN: Method(), **dict.fromkeys(SEARCHES, _SEARCH)},
)
