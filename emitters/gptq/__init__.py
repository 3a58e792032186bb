"""GPTQ-packed linears, as vLLM, AutoRound and GPTQModel read them."""

from __future__ import annotations

from typing import Any, Final

from emitters.gptq.spec import SPEC
from policy_dsl.formats import Codec, Files, Format
from policy_dsl.plan import Plan


def _codec() -> Codec:
    from emitters.gptq.encode import beyond, decode, encode

    return Codec(encode, decode, beyond)


def _files() -> Files:
    from emitters.gptq.metadata import claims, defects, metadata

    return Files(metadata=metadata, claims=claims, defects=defects)


def _prepare(plan: Plan, statistics: Any) -> Any:
    from emitters.gptq.statistics import prepare

    return prepare(plan, statistics)


FORMAT: Final[Format] = Format(spec=SPEC, codec=_codec, files=_files, prepare=_prepare)
