"""GPTQ-packed linears, as vLLM, AutoRound and GPTQModel read them."""

from typing import Final

from emitters.gptq.review import REVIEW
from emitters.gptq.spec import RTN, SEARCHES, SPEC
from policy_dsl.formats import Codec, Files, Format, Method, Solver


def _codec() -> Codec:
    from emitters.gptq.codec import beyond, decode, encode, value_defects

    return Codec(encode, decode, beyond, value_defects)


def _search() -> Solver:
    from emitters.gptq.codec import context

    return Solver(context)


def _files() -> Files:
    from emitters.gptq.config import metadata
    from emitters.gptq.read_config import claims, defects

    return Files(metadata=metadata, claims=claims, defects=defects)


FORMAT: Final[Format] = Format(
    spec=SPEC,
    codec=_codec,
    files=_files,
    review=REVIEW,
    methods={RTN: Method(), **dict.fromkeys(SEARCHES, Method(uses="imatrix", solver=_search))},
)
