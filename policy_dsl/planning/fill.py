"""A written treatment made whole: the policy's defaults, then the target's table, fill gaps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from policy_dsl.diagnostics import Diagnostic, diagnostic, did_you_mean
from policy_dsl.formats import FormatSpec, SchemeSpec
from policy_dsl.policy import Defaults
from policy_dsl.treatments import PLAIN_DTYPES, PLAIN_WORDS, Coded, Plain, Stored, Written
from policy_dsl.vocabulary import SCHEME_TARGETS

if TYPE_CHECKING:
    from policy_dsl.roles.model import Model, ModelTensor

_CALLED = {"experts": "experts", "embed": "embeddings", "matrix": "matrices"}


def role_class(tensor: ModelTensor) -> str:
    """The row of a target's table that a tensor belongs to: experts, embed, or matrix."""
    # Experts of MTP blocks are in another component.
    if tensor.component == "experts" or tensor.expert is not None:
        return "experts"
    return "embed" if tensor.namesake in ("embed", "lm_head") else "matrix"


def fill(
    written: Written, tensor_class: str, defaults: Defaults, spec: FormatSpec
) -> Stored | Diagnostic | None:
    """What is stored, or the defect that prevents it (without a span).

    None for keep, raw and drop: there the tensor decides, see `plain_of`.
    """
    if written.action == "cast":
        return _cast(PLAIN_DTYPES[written.dtype or ""], spec)
    if written.action != "quantize":
        return None
    bits = written.bits or defaults.bits
    name = written.scheme or defaults.scheme or _scheme_by_table(bits, tensor_class, spec)
    if name is None:
        return _no_scheme(bits, tensor_class, spec)
    scheme = spec.scheme(name)
    # A scheme that this target lacks may well be another one's, which the finding then names.
    if scheme is None:
        return _foreign_scheme(name, spec)
    if not written.bits and len(scheme.bits) == 1:
        bits = scheme.bits[0]
    if bits is None:
        return diagnostic("missing-bits", scheme=name, widths=_listed(scheme.bits))
    symmetric = _symmetric(scheme, defaults) if written.symmetric is None else written.symmetric
    group_size = written.group_size or _group_size(scheme, defaults)
    coded = Coded(name, bits, group_size, symmetric, written.method or _method(scheme, defaults))
    return _first_defect(written, coded, scheme, spec) or coded


def plain_of(written: Written, tensor: ModelTensor, model: Model, spec: FormatSpec) -> Plain:
    """What keep or raw stores of a tensor: the target's plain dtype for it, or its own."""
    return Plain(
        tensor.source.dtype if written.action == "raw" else spec.plain_dtype(tensor, model)
    )


def _cast(dtype: str, spec: FormatSpec) -> Plain | Diagnostic:
    if dtype in spec.plain_dtypes:
        return Plain(dtype)
    held = ", ".join(PLAIN_WORDS[dtype] for dtype in spec.plain_dtypes)
    return diagnostic("unsupported-dtype", target=spec.name, dtype=PLAIN_WORDS[dtype], held=held)


def _scheme_by_table(bits: int | None, tensor_class: str, spec: FormatSpec) -> str | None:
    for row_class, row_bits, scheme in spec.fill:
        if row_class in (tensor_class, "any") and row_bits in (bits, None):
            return scheme
    return None


def _no_scheme(bits: int | None, tensor_class: str, spec: FormatSpec) -> Diagnostic:
    widths = sorted({bits for _, bits, _ in spec.fill if bits is not None})
    return diagnostic(
        "unsupported-bits",
        target=spec.name,
        scheme=_CALLED[tensor_class],
        bits=bits,
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


def _group_size(scheme: SchemeSpec, defaults: Defaults) -> int:
    if len(scheme.group_sizes) > 1 and defaults.group_size is not None:
        return defaults.group_size
    return scheme.group_sizes[0] if scheme.group_sizes else 0


def _symmetric(scheme: SchemeSpec, defaults: Defaults) -> bool:
    wanted = defaults.symmetric
    return wanted if wanted in scheme.symmetries else scheme.symmetries[0]


def _method(scheme: SchemeSpec, defaults: Defaults) -> str:
    return defaults.method if defaults.method in scheme.methods else scheme.methods[0]


def _first_defect(
    written: Written, coded: Coded, scheme: SchemeSpec, spec: FormatSpec
) -> Diagnostic | None:
    facts: dict[str, Any] = {"target": spec.name, "scheme": scheme.name}
    if coded.bits not in scheme.bits:
        return diagnostic("unsupported-bits", bits=coded.bits, widths=_listed(scheme.bits), **facts)
    if coded.group_size and coded.group_size not in scheme.group_sizes:
        sizes = _listed(scheme.group_sizes) or "no groups"
        return diagnostic(
            "unsupported-group-size", group_size=coded.group_size, sizes=sizes, **facts
        )
    if coded.method not in scheme.methods:
        methods = _listed(scheme.methods)
        return diagnostic("unsupported-method", method=coded.method, methods=methods, **facts)
    if written.symmetric is not None and len(scheme.symmetries) == 1:
        return diagnostic("no-symmetric-choice", **facts)
    return None


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(str(value) for value in values)
