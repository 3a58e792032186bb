"""GPTQ-packed linears, as vLLM, AutoRound and GPTQModel read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from emitters.gptq.review import REVIEW
from emitters.gptq.spec import RTN, SEARCHES, SPEC
from policy_dsl.diagnostics import Diagnostic
from policy_dsl.formats import Claim, Codec, FileContents, Files, Format, Method, Solver, Tensors


def _codec() -> Codec:
    from emitters.gptq.codec import beyond, decode, encode

    return Codec(encode, decode, beyond)


def _search() -> Solver:
    from emitters.gptq.codec import context

    return Solver(context)


def _files() -> Files:
    from emitters.gptq.config import metadata
    from emitters.gptq.read_config import claims, defects

    return Files(metadata=metadata, claims=claims, defects=defects, values=_values)


def _values(
    folder: Path, files: FileContents, tensors: Tensors, claims: Mapping[str, Claim]
) -> Iterator[Diagnostic]:
    # Plans need the files of a format, and nothing that computes.
    from emitters.gptq.codec import values

    return values(folder, tensors, claims)


FORMAT: Final[Format] = Format(
    spec=SPEC,
    codec=_codec,
    files=_files,
    review=REVIEW,
    methods={RTN: Method(), **dict.fromkeys(SEARCHES, Method(uses="imatrix", solver=_search))},
)
