"""GPTQ-packed linears, as vLLM, AutoRound and GPTQModel read them."""

from typing import Final

from emitters.gptq.review import REVIEW
from emitters.gptq.spec import RTN, SEARCHES, SPEC
from policy_dsl.formats import Codec, Files, Format, Method, Solver, ValueDefects


def _codec() -> Codec:
    from emitters.gptq.codec import beyond, decode, encode

    return Codec(encode, decode, beyond)


def _search() -> Solver:
    from emitters.gptq.codec import context

    return Solver(context)


def _files() -> Files:
    from emitters.gptq.config import metadata
    from emitters.gptq.read_config import claims, defects

    return Files(metadata=metadata, claims=claims, defects=defects)


def _value_defects() -> ValueDefects:
    from emitters.gptq.codec import value_defects

    return value_defects


FORMAT: Final[Format] = Format(
    spec=SPEC,
    codec=_codec,
    files=_files,
    value_defects=_value_defects,
    review=REVIEW,
    methods={RTN: Method(), **dict.fromkeys(SEARCHES, Method(uses="imatrix", solver=_search))},
)
