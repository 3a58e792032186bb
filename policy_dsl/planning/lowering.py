"""Decisions -> output modules: treatments filled in, tensors grouped to stacks of experts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.formats import FormatSpec
from policy_dsl.plan import Module, Omission
from policy_dsl.planning.decisions import Decision
from policy_dsl.planning.fill import PLAIN_WORDS, describe, fill, role_class
from policy_dsl.planning.matching import is_guarded
from policy_dsl.planning.stacks import Settled, Stacking
from policy_dsl.policy import PLAIN_DTYPES, Policy, Treatment
from policy_dsl.roles.classify import Model, ModelTensor


@dataclass
class Lowered:
    """What lowering yields: modules without places, omissions, findings."""

    modules: list[Module] = field(default_factory=list)
    omitted: list[Omission] = field(default_factory=list)
    findings: list[Diagnostic] = field(default_factory=list)


def lower(
    made: Iterable[Decision], model: Model, policy: Policy, spec: FormatSpec
) -> Lowered:
    """The modules of the output in natural order of their names, not placed yet."""
    lowered = Lowered()
    defects = _Defects(policy)
    stacks: dict[str, list[Settled]] = {}
    broken: set[str] = set()
    filled: dict[tuple[Treatment, str], Treatment | Diagnostic] = {}
    for decision in made:
        tensor = decision.tensor
        reason = _omission(decision, model, spec)
        if reason is not None:
            lowered.omitted.append(Omission(tensor.source, tensor.role, tensor.layer, reason))
            continue
        # A hundred thousand tensors have a handful of treatments: each is filled in once.
        key = (decision.written, role_class(tensor))
        if key not in filled:
            filled[key] = fill(decision.written, key[1], policy.defaults, spec)
        whole = filled[key]
        if not isinstance(whole, Diagnostic):
            whole = _refused(tensor, whole, model, spec) or whole
        settled = _settle(decision, whole, model, spec)
        path = spec.module_path(tensor, model)
        if isinstance(settled, Diagnostic):
            defects.add(decision, settled)
            broken.add(path)
        else:
            stacks.setdefault(path, []).append(settled)
    stacking = Stacking.of(policy, model, spec)
    for path, stack in stacks.items():
        # The others of a stack would only be found to be too few.
        if path in broken:
            continue
        found = stacking.modules(path, stack)
        if isinstance(found, Diagnostic):
            defects.add(stack[0].decision, found, what="stack", name=path)
        else:
            lowered.modules += found
    if spec.companions is not None:
        lowered.modules += spec.companions(lowered.modules)
    # Sorted, so that the bundle does not depend on the order of the source's shards.
    lowered.modules.sort(key=lambda module: natural_key(module.name))
    lowered.findings = defects.findings()
    return lowered


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """A sort key in which layers.2 precedes layers.10."""
    pieces = re.split(r"(\d+)", name)
    return [(piece.isdigit(), int(piece) if piece.isdigit() else 0, piece) for piece in pieces]


class _Defects:
    """Findings about tensors, one a rule and code, with a count and an example."""

    def __init__(self, policy: Policy) -> None:
        self._otherwise = dict(policy.key_spans).get("defaults.otherwise")
        self._seen: dict[tuple[int, str, str], tuple[Decision, Diagnostic, list[str]]] = {}

    def add(
        self, decision: Decision, found: Diagnostic, *, what: str = "tensor", name: str = ""
    ) -> None:
        # One finding for a rule, not one for each of its 15,000 experts.
        key = (id(decision.rule), found.code, found.message)
        entry = self._seen.setdefault(key, (decision, found, []))
        entry[2].append(f"{what} {name or decision.tensor.source.name}")

    def findings(self) -> list[Diagnostic]:
        return [self._placed(*entry) for entry in self._seen.values()]

    def _placed(self, decision: Decision, found: Diagnostic, names: list[str]) -> Diagnostic:
        span = None if is_guarded(decision.tensor) else self._otherwise
        if decision.rule is not None:
            rule = decision.rule.rule
            # The selector was right if it got here: the caret belongs under the treatment.
            span = rule.treatment_span or rule.span
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return replace(found, span=span, notes=(*found.notes, f"{names[0]}{more}"))


def _omission(decision: Decision, model: Model, spec: FormatSpec) -> str | None:
    # The author's own decision is the better reason where the format would drop it too.
    if decision.written.action == "drop":
        return f"dropped by {decision.origin}"
    return spec.omission(decision.tensor, model)


def _settle(
    decision: Decision, filled: Treatment | Diagnostic, model: Model, spec: FormatSpec
) -> Settled | Diagnostic:
    tensor = decision.tensor
    if isinstance(filled, Diagnostic):
        return filled
    unusable = _unusable(tensor, filled, spec)
    if unusable is not None:
        return unusable
    if filled.action == "raw":
        return Settled(tensor, decision, filled, tensor.source.dtype)
    if filled.action == "cast":
        return Settled(tensor, decision, filled, PLAIN_DTYPES[filled.dtype or ""])
    plain = spec.plain_dtype(tensor, model)
    if filled.action == "keep":
        word = PLAIN_WORDS.get(plain, plain)
        return Settled(tensor, decision, replace(filled, dtype=word), plain)
    scheme = spec.scheme(filled.scheme or "")
    values = (scheme.values if scheme else None) or plain
    found = _not_quantizable(tensor, filled, model, spec)
    return found or Settled(tensor, decision, filled, values)


def _refused(
    tensor: ModelTensor, filled: Treatment, model: Model, spec: FormatSpec
) -> Diagnostic | None:
    """What readers of the format have against a tensor stored like that, if anything."""
    # What nobody quantizes is said where it is tried.
    if filled.action == "quantize" and not tensor.is_matrix:
        return None
    reason = spec.unsupported(tensor, model, filled)
    if reason is None:
        return None
    return diagnostic(
        "unsupported-treatment",
        target=spec.name,
        role=tensor.role,
        treatment=describe(filled),
        reason=reason,
    )


def _unusable(
    tensor: ModelTensor, filled: Treatment, spec: FormatSpec
) -> Diagnostic | None:
    """What keeps the source's bytes from being read as rows of the output, if anything."""
    dtype = tensor.source.dtype
    if filled.action == "raw" and dtype not in spec.plain_dtypes:
        return diagnostic("raw-unreadable", target=spec.name, dtype=dtype)
    # Raw bytes too: the bundle names a tensor as if its rows were in order.
    if not tensor.is_rows_of_source:
        return diagnostic("unsupported-source-layout", target=spec.name, role=tensor.role)
    return None


def _not_quantizable(
    tensor: ModelTensor, filled: Treatment, model: Model, spec: FormatSpec
) -> Diagnostic | None:
    # The general reason first: what no format quantizes is not blamed on this one.
    if not tensor.is_matrix:
        return diagnostic("not-a-matrix", role=tensor.role, shape=list(tensor.shape))
    scheme = spec.scheme(filled.scheme or "")
    flat, sizes = (scheme.flat, scheme.group_sizes) if scheme else (False, ())
    group, columns = filled.group_size, tensor.shape[-1]
    divided = prod(tensor.shape) if flat else columns
    if not group or divided % group == 0:
        return None
    others = [replace(filled, group_size=size) for size in sizes if divided % size == 0]
    fitting = [
        f"g{other.group_size}" for other in others if not _refused(tensor, other, model, spec)
    ]
    cure = f"{' or '.join(fitting)} would"
    if not fitting:
        kept = _refused(tensor, Treatment("keep"), model, spec) is None
        cure = f"no group size of {filled.scheme} does{': `keep` it' if kept else ''}"
    return diagnostic(
        "group-does-not-divide", suggestion=cure, group_size=group, columns=columns
    )
