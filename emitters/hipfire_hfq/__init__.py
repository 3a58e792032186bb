"""HFQ containers for hipfire: one file, experts in blocks of 256 rotated values."""

from __future__ import annotations

from typing import Any, Final

from emitters.hipfire_hfq.spec import SPEC
from policy_dsl.formats import Codec, Files, Format
from policy_dsl.plan import Plan


def _codec() -> Codec:
    from emitters.hipfire_hfq.encode import beyond, decode, encode

    return Codec(encode, decode, beyond)


def _files() -> Files:
    from emitters.hipfire_hfq.metadata import claims, defects, metadata, preface

    return Files(metadata=metadata, claims=claims, defects=defects, preface=preface)


def _prepare(plan: Plan, statistics: Any) -> Any:
    from emitters.hipfire_hfq.statistics import prepare

    return prepare(plan, statistics)


FORMAT: Final[Format] = Format(spec=SPEC, codec=_codec, files=_files, prepare=_prepare)
