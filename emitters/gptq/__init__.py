"""GPTQ-packed linears, as vLLM, AutoRound and GPTQModel read them."""

from __future__ import annotations

from typing import Final

from emitters.gptq.readers import REVIEW
from emitters.gptq.schemes import SEARCHES
from emitters.gptq.spec import SPEC
from policy_dsl.formats import Codec, Files, Format, Method, Solver


def _codec() -> Codec:
    from emitters.gptq.encode import beyond, decode, encode

    return Codec(encode, decode, beyond)


def _files() -> Files:
    from emitters.gptq.metadata import claims, defects, metadata

    return Files(metadata=metadata, claims=claims, defects=defects)


def _search() -> Solver:
    from emitters.gptq.statistics import context

    return Solver(context)


FORMAT: Final[Format] = Format(
    spec=SPEC,
    codec=_codec,
    files=_files,
    review=REVIEW,
    methods={"rtn": Method(), **dict.fromkeys(SEARCHES, Method(uses="imatrix", solver=_search))},
)
