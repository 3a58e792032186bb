"""A written treatment made whole: the policy's defaults, then the target's table, fill gaps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from policy_dsl.diagnostics import Diagnostic, diagnostic, did_you_mean
from policy_dsl.formats import FormatSpec, SchemeSpec
from policy_dsl.policy import PLAIN_DTYPES, Defaults, Treatment
from policy_dsl.roles.classify import ModelTensor
from policy_dsl.vocabulary import SCHEME_TARGETS

_CALLED = {"experts": "experts", "embed": "embeddings", "matrix": "matrices"}
PLAIN_WORDS = {dtype: word for word, dtype in PLAIN_DTYPES.items()}


def role_class(tensor: ModelTensor) -> str:
    """The row of a target's table that a tensor belongs to: experts, embed, or matrix."""
    # Experts of MTP blocks are in another component.
    if tensor.component == "experts" or tensor.expert is not None:
        return "experts"
    return "embed" if tensor.namesake in ("embed", "lm_head") else "matrix"


def fill(
    written: Treatment, tensor_class: str, defaults: Defaults, spec: FormatSpec
) -> Treatment | Diagnostic:
    """The treatment with every parameter set, or the defect that prevents it (without a span).

    keep and raw come back as they are: their dtype depends on the tensor.
    """
    if written.action == "cast":
        return _cast(written, spec)
    if written.action != "quantize":
        return written
    name = (
        written.scheme or defaults.scheme or _scheme_by_table(written, tensor_class, defaults, spec)
    )
    if name is None:
        return _no_scheme(written, tensor_class, defaults, spec)
    scheme = spec.scheme(name)
    # No scheme of this target: it may well be another one's, which the finding then names.
    if scheme is None:
        return _foreign_scheme(name, spec)
    bits = written.bits or (scheme.bits[0] if len(scheme.bits) == 1 else defaults.bits)
    if bits is None:
        return diagnostic("missing-bits", scheme=name, widths=_listed(scheme.bits))
    filled = _filled(replace(written, scheme=name, bits=bits), scheme, defaults)
    return _first_defect(filled, scheme, spec) or filled


def describe(treatment: Treatment) -> str:
    """The treatment in the language's own words, such as `4bit affine g64`."""
    if treatment.action == "quantize":
        return " ".join(word for word in _words(treatment) if word)
    if treatment.action == "cast":
        return treatment.dtype or ""
    return f"{treatment.action} ({treatment.dtype})" if treatment.dtype else treatment.action


def _words(treatment: Treatment) -> tuple[str, ...]:
    """The words of a quantizing treatment, empty for what goes without saying."""
    named = treatment.method not in (None, "rtn")
    return (
        f"{treatment.bits}bit" if treatment.bits else "",
        treatment.scheme or "",
        f"g{treatment.group_size}" if treatment.group_size else "",
        {True: "sym", False: "asym", None: ""}[treatment.symmetric],
        f"by {treatment.method}" if named else "",
    )


def _filled(written: Treatment, scheme: SchemeSpec, defaults: Defaults) -> Treatment:
    """The treatment with the parameters that its scheme has, beyond the width."""
    symmetric = written.symmetric
    return replace(
        written,
        group_size=written.group_size or _group_size(scheme, defaults),
        # `asym` is a written choice too: only None is a gap.
        symmetric=_symmetric(scheme, defaults) if symmetric is None else symmetric,
        method=written.method or _method(scheme, defaults),
    )


def _cast(written: Treatment, spec: FormatSpec) -> Treatment | Diagnostic:
    if PLAIN_DTYPES[written.dtype or ""] in spec.plain_dtypes:
        return written
    held = ", ".join(PLAIN_WORDS[dtype] for dtype in spec.plain_dtypes)
    return diagnostic("unsupported-dtype", target=spec.name, dtype=written.dtype, held=held)


def _scheme_by_table(
    written: Treatment, tensor_class: str, defaults: Defaults, spec: FormatSpec
) -> str | None:
    bits = written.bits or defaults.bits
    for row_class, row_bits, scheme in spec.fill:
        if row_class in (tensor_class, "any") and row_bits in (bits, None):
            return scheme
    return None


def _no_scheme(
    written: Treatment, tensor_class: str, defaults: Defaults, spec: FormatSpec
) -> Diagnostic:
    widths = sorted({bits for _, bits, _ in spec.fill if bits is not None})
    return diagnostic(
        "unsupported-bits",
        target=spec.name,
        scheme=_CALLED[tensor_class],
        bits=written.bits or defaults.bits,
        widths=_listed(tuple(widths)),
    )


def _foreign_scheme(name: str, spec: FormatSpec) -> Diagnostic:
    homes = SCHEME_TARGETS.get(name, ())
    held = _listed(tuple(scheme.name for scheme in spec.schemes))
    if not homes:
        meant = did_you_mean(name, SCHEME_TARGETS)
        return diagnostic("unknown-scheme", suggestion=meant, scheme=name)
    return diagnostic(
        "foreign-scheme",
        scheme=name,
        target=spec.name,
        homes=" and ".join(homes),
        notes=[f"{spec.name} has {held}"],
    )


def _group_size(scheme: SchemeSpec, defaults: Defaults) -> int | None:
    if len(scheme.group_sizes) > 1 and defaults.group_size is not None:
        return defaults.group_size
    return scheme.group_sizes[0] if scheme.group_sizes else None


def _symmetric(scheme: SchemeSpec, defaults: Defaults) -> bool | None:
    if scheme.symmetric is None:
        return None
    return scheme.symmetric if defaults.symmetric is None else defaults.symmetric


def _method(scheme: SchemeSpec, defaults: Defaults) -> str:
    return defaults.method if defaults.method in scheme.methods else scheme.methods[0]


def _first_defect(filled: Treatment, scheme: SchemeSpec, spec: FormatSpec) -> Diagnostic | None:
    facts: dict[str, Any] = {"target": spec.name, "scheme": scheme.name}
    if filled.bits not in scheme.bits:
        return diagnostic(
            "unsupported-bits", bits=filled.bits, widths=_listed(scheme.bits), **facts
        )
    if filled.group_size is not None and filled.group_size not in scheme.group_sizes:
        sizes = _listed(scheme.group_sizes) or "no groups"
        return diagnostic(
            "unsupported-group-size", group_size=filled.group_size, sizes=sizes, **facts
        )
    if filled.method not in scheme.methods:
        methods = _listed(scheme.methods)
        return diagnostic("unsupported-method", method=filled.method, methods=methods, **facts)
    if filled.symmetric is not None and scheme.symmetric is None:
        return diagnostic("no-symmetric-choice", **facts)
    return None


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(str(value) for value in values)
