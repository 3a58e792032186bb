"""A written treatment made whole: the policy's defaults, then the target's table, fill gaps."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

from policy_dsl.diagnostics import Diagnostic, diagnostic, did_you_mean
from policy_dsl.formats import Format, FormatSpec, SchemeSpec
from policy_dsl.planning.decisions import Decision
from policy_dsl.policy import SCHEMES, WORDS, Defaults
from policy_dsl.roles.model import Model, ModelTensor
from policy_dsl.treatments import PLAIN_DTYPES, Action, Coded, Plain, Stored, Written, describe

_CALLED = {"experts": "experts", "embed": "embeddings", "matrix": "matrices"}
# Roles that fit into a suggestion.
_MOST_NAMED = 3


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

    None for keep, raw and drop: there the tensor decides.
    """
    if written.action == "cast":
        dtype = PLAIN_DTYPES[written.dtype or ""]
        if dtype in spec.plain_dtypes:
            return Plain(dtype)
        held, word = _listed(describe(Plain(one)) for one in spec.plain_dtypes), written.dtype
        return diagnostic("unsupported-dtype", target=spec.name, dtype=word, held=held)
    return _coded(written, tensor_class, defaults, spec) if written.action == "quantize" else None


def _coded(
    written: Written, tensor_class: str, defaults: Defaults, spec: FormatSpec
) -> Coded | Diagnostic:
    bits = written.bits or defaults.bits
    name = written.scheme or defaults.scheme or _scheme_by_table(bits, tensor_class, spec)
    if name is None:
        widths = _listed(sorted({width for _, width, _ in spec.fill if width is not None}))
        facts: dict[str, Any] = {"target": spec.name, "scheme": _CALLED[tensor_class]}
        return diagnostic("unsupported-bits", bits=bits, widths=widths, **facts)
    scheme = spec.scheme(name)
    # A scheme that this target lacks may well be another one's, which the finding then names.
    if scheme is None:
        return _foreign_scheme(name, spec)
    if not written.bits and len(scheme.bits) == 1:
        bits = scheme.bits[0]
    if bits is None:
        return diagnostic("missing-bits", scheme=name, widths=_listed(scheme.bits))
    coded = _gaps_filled(written, bits, defaults, scheme)
    return _checked(written, coded, scheme, spec)


def _scheme_by_table(bits: int | None, tensor_class: str, spec: FormatSpec) -> str | None:
    rows = (row for row in spec.fill if row[0] in (tensor_class, "any"))
    return next((scheme for _, width, scheme in rows if width in (bits, None)), None)


def _gaps_filled(written: Written, bits: int, defaults: Defaults, scheme: SchemeSpec) -> Coded:
    symmetric, sizes, symmetries = written.symmetric, scheme.group_sizes, scheme.symmetries
    if symmetric is None:
        wanted = defaults.symmetric
        symmetric = wanted if wanted in symmetries else symmetries[0]
    by_default = defaults.group_size if len(sizes) > 1 else None
    group_size = written.group_size or by_default or (sizes[0] if sizes else 0)
    method = defaults.method if defaults.method in scheme.methods else scheme.methods[0]
    return Coded(scheme.name, bits, group_size, bool(symmetric), written.method or method or "")


def _foreign_scheme(name: str, spec: FormatSpec) -> Diagnostic:
    homes = [target for target in SCHEMES if name in SCHEMES[target]]
    if not homes:
        meant = did_you_mean(name, WORDS.schemes)
        return diagnostic("unknown-scheme", suggestion=meant, scheme=name)
    notes = [f"{spec.name} has {_listed(scheme.name for scheme in spec.schemes)}"]
    facts: dict[str, Any] = {"scheme": name, "target": spec.name, "homes": " and ".join(homes)}
    return diagnostic("foreign-scheme", notes=notes, **facts)


def _checked(
    written: Written, coded: Coded, scheme: SchemeSpec, spec: FormatSpec
) -> Coded | Diagnostic:
    facts: dict[str, Any] = {"target": spec.name, "scheme": scheme.name}
    if coded.bits not in scheme.bits:
        return diagnostic("unsupported-bits", bits=coded.bits, widths=_listed(scheme.bits), **facts)
    if coded.group_size and coded.group_size not in scheme.group_sizes:
        facts |= {"sizes": _listed(scheme.group_sizes) or "no groups"}
        return diagnostic("unsupported-group-size", group_size=coded.group_size, **facts)
    if coded.method not in scheme.methods:
        methods = _listed(scheme.methods)
        return diagnostic("unsupported-method", method=coded.method, methods=methods, **facts)
    if written.symmetric is not None and len(scheme.symmetries) == 1:
        return diagnostic("no-symmetric-choice", **facts)
    return coded


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


class Unheld(NamedTuple):
    """What readers of a target have against tensors of some roles stored like that.

    cure: the treatment that they would take instead, empty if none is known.
    """

    target: str
    treatment: str
    reason: str
    cure: str

    def of(self, roles: Sequence[str]) -> Diagnostic:
        """The finding about tensors of these roles."""
        facts: dict[str, Any] = {**self._asdict(), "roles": ", ".join(roles)}
        cure = facts.pop("cure")
        if cure:
            few = f'write "{facts["roles"]}: {cure}" after it'
            cure = few if len(roles) <= _MOST_NAMED else f'"{cure}" would do for them'
        return diagnostic("unsupported-treatment", suggestion=cure or None, **facts)


class Settled(NamedTuple):
    """A whole treatment, the dtype of its values in the output, and what the rule did."""

    treatment: Stored
    dtype: str
    action: Action

    @property
    def text(self) -> str:
        """The treatment in words: `4bit affine g64`, `keep (bf16)`, `raw`, `f32`."""
        stored = describe(self.treatment)
        return {"keep": f"keep ({stored})", "raw": "raw"}.get(self.action, stored)


class Filling:
    """Decisions about one model's tensors made whole for one format."""

    def __init__(self, defaults: Defaults, model: Model, format: Format) -> None:
        self._defaults, self._model, self._format = defaults, model, format
        self._spec = format.spec
        self._schemes = {scheme.name: scheme for scheme in format.spec.schemes}
        self._known: dict[tuple[object, ...], Settled | Diagnostic | Unheld] = {}

    def settle(self, decision: Decision) -> Settled | Diagnostic | Unheld:
        """What is stored of a tensor, or what is wrong with it (without a span)."""
        tensor = decision.tensor
        # A hundred thousand tensors are of a handful of kinds, whatever their names.
        key = (
            *(id(decision.written), tensor.role, tensor.layer, tensor.expert is None, tensor.shape),
            *(tensor.source.dtype, tensor.scale is None, tensor.is_matrix, tensor.mxfp4),
        )
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._settle(decision.written, tensor)
        return known

    def _settle(self, written: Written, tensor: ModelTensor) -> Settled | Diagnostic | Unheld:
        stored = fill(written, role_class(tensor), self._defaults, self._spec)
        if isinstance(stored, Diagnostic):
            return stored
        text: str = written.action
        if stored is None:
            stored = Plain(tensor.source.dtype) if text == "raw" else self._kept(tensor)
        else:
            text = describe(stored)
        # What nobody quantizes is reported where it is tried.
        is_tried = isinstance(stored, Plain) or tensor.is_matrix
        if is_tried and (reason := self._refusal(tensor, stored)) is not None:
            return Unheld(self._spec.name, text, reason, self._cure(tensor, stored))
        if (defect := self._unusable(written, tensor, stored)) is not None:
            return defect
        if isinstance(stored, Plain):
            return Settled(stored, stored.dtype, written.action)
        dtype = self._schemes[stored.scheme].values or self._kept(tensor).dtype
        return Settled(stored, dtype, written.action)

    def _unusable(self, written: Written, tensor: ModelTensor, stored: Stored) -> Diagnostic | None:
        target, dtype = self._spec.name, tensor.source.dtype
        if written.action == "raw" and dtype not in self._spec.plain_dtypes:
            return diagnostic("raw-unreadable", target=target, dtype=dtype)
        if tensor.mxfp4:
            return diagnostic("unsupported-source-layout", target=target, role=tensor.role)
        if isinstance(stored, Plain):
            return None
        # The general reason first: what no format quantizes is not blamed on this one.
        if not tensor.is_matrix:
            return diagnostic("not-a-matrix", role=tensor.role, shape=list(tensor.shape))
        return self._split_group(tensor, stored)

    def _kept(self, tensor: ModelTensor) -> Plain:
        return Plain(self._spec.plain_dtype(tensor, self._model))

    def _refusal(self, tensor: ModelTensor, stored: Stored) -> str | None:
        return self._format.review.held(tensor, self._model, stored)

    def _cure(self, tensor: ModelTensor, stored: Stored) -> str:
        """A treatment that readers would take, as near to what was wanted as can be; else empty."""
        if isinstance(stored, Plain):
            return ""
        plainer = replace(stored, method=self._schemes[stored.scheme].methods[0])
        width = Written("quantize", bits=stored.bits)
        offers: dict[str, Any] = {
            describe(plainer): plainer,
            f"{stored.bits}bit": fill(width, role_class(tensor), Defaults(), self._spec),
            "keep": self._kept(tensor),
        }
        for word, other in offers.items():
            is_another = isinstance(other, Plain | Coded) and other != stored
            if is_another and self._refusal(tensor, other) is None:
                return word
        return ""

    def _split_group(self, tensor: ModelTensor, coded: Coded) -> Diagnostic | None:
        scheme, columns = self._schemes[coded.scheme], tensor.shape[-1]
        divided = prod(tensor.shape) if scheme.flat else columns
        if not coded.group_size or divided % coded.group_size == 0:
            return None
        sizes = [size for size in scheme.group_sizes if divided % size == 0]
        held = [n for n in sizes if self._refusal(tensor, replace(coded, group_size=n)) is None]
        cure = f"{' or '.join(f'g{size}' for size in held)} would"
        if not held:
            keep = ": `keep` it" if self._refusal(tensor, self._kept(tensor)) is None else ""
            cure = f"no group size of {coded.scheme} does{keep}"
        if tensor.whole:
            cure += f", also in a rule for {tensor.role} alone"
        facts: dict[str, Any] = {"group_size": coded.group_size, "columns": columns}
        return diagnostic("group-does-not-divide", suggestion=cure, **facts)
