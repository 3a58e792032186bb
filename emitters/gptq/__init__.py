"""GPTQ-packed linears, as vLLM, AutoRound and GPTQModel read them."""

from typing import Final

from emitters.gptq.review import REVIEW
from emitters.gptq.spec import RTN, SEARCHES, SPEC
from policy_dsl.formats import Codec, Files, Format, Method, Solver


def _codec() -> Codec:
    from emitters.gptq.codec import CODEC

    return CODEC


def _files() -> Files:
    from emitters.gptq.read_config import FILES

    return FILES


def _solver() -> Solver:
    from emitters.gptq.codec import SOLVER

    return SOLVER


_SEARCH = Method(uses="imatrix", solver=_solver)
FORMAT: Final[Format] = Format(
    spec=SPEC,
    codec=_codec,
    files=_files,
    review=REVIEW,
    methods={RTN: Method(), **dict.fromkeys(SEARCHES, _SEARCH)},
)
