"""Decisions -> output modules: treatments filled in, tensors grouped to stacks of experts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.formats import Format
from policy_dsl.plan import Module, Omission
from policy_dsl.planning.decisions import Decision
from policy_dsl.planning.fill import fill, plain_of, role_class
from policy_dsl.planning.stacks import Settled, Stacking
from policy_dsl.planning.tensor_defects import Refusal, TensorDefects
from policy_dsl.policy import Defaults, Policy
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.treatments import KEEP, Coded, Plain, Stored, Written, describe


@dataclass
class Lowered:
    """What lowering yields: modules without places, omissions, findings."""

    modules: list[Module] = field(default_factory=list)
    omitted: list[Omission] = field(default_factory=list)
    findings: list[Diagnostic] = field(default_factory=list)


def lower(made: Iterable[Decision], model: Model, policy: Policy, format: Format) -> Lowered:
    """The modules of the output in natural order of their names, not placed yet."""
    lowered = Lowered()
    defects = TensorDefects(policy)
    stacks: dict[str, list[Settled]] = {}
    broken: set[str] = set()
    filled: dict[tuple[Written, str], Stored | Diagnostic | None] = {}
    for decision in made:
        tensor = decision.tensor
        reason = _omission(decision, model, format)
        if reason is not None:
            lowered.omitted.append(_left_out(decision, reason, model))
            continue
        # A hundred thousand tensors have a handful of treatments: each is filled in once.
        key = (decision.written, role_class(tensor))
        if key not in filled:
            filled[key] = fill(decision.written, key[1], policy.defaults, format.spec)
        settled = _settle(decision, filled[key], model, format)
        path = format.spec.module_path(tensor, model)
        if isinstance(settled, Settled):
            stacks.setdefault(path, []).append(settled)
        else:
            defects.add(decision, settled)
            broken.add(path)
    stacking = Stacking.of(policy, model, format.spec)
    for path, stack in stacks.items():
        # The others of a stack would only be found to be too few.
        if path in broken:
            continue
        found = stacking.modules(path, stack)
        if isinstance(found, Diagnostic):
            defects.add(stack[0].decision, found, what="stack", name=path)
        else:
            lowered.modules += found
    for method in format.methods.values():
        lowered.modules += method.added(lowered.modules) if method.added else ()
    # Sorted, so that the bundle does not depend on the order of the source's shards.
    lowered.modules.sort(key=lambda module: natural_key(module.name))
    lowered.findings = defects.findings()
    return lowered


def natural_key(name: str) -> list[tuple[int, str, str]]:
    """A sort key in which layers.2 precedes layers.10."""
    # Compared as texts: a name may hold more digits than Python makes a number of.
    return [
        (len(piece.lstrip("0")), piece.lstrip("0"), piece) if at % 2 else (0, "", piece)
        for at, piece in enumerate(re.split(r"([0-9]+)", name))
    ]


def _left_out(decision: Decision, reason: str, model: Model) -> Omission:
    tensor, embedding = decision.tensor, model.embedding
    omission = Omission(tensor.source, tensor.role, tensor.layer, reason)
    # Whoever drops a head knows of it; else readers must get its values from the embedding.
    if tensor.role != "lm_head" or decision.written.action == "drop" or embedding is None:
        return omission
    return replace(omission, equals=embedding.source.name)


def _omission(decision: Decision, model: Model, format: Format) -> str | None:
    # The author's own decision is the better reason where the format would drop it too.
    if decision.written.action == "drop":
        return f"dropped by {decision.origin}"
    return format.review.left_out(decision.tensor, model)


def _settle(
    decision: Decision, filled: Stored | Diagnostic | None, model: Model, format: Format
) -> Settled | Diagnostic | Refusal:
    tensor = decision.tensor
    if isinstance(filled, Diagnostic):
        return filled
    stored = filled or plain_of(decision.written, tensor, model, format.spec)
    defect = _refused(decision, stored, model, format) or _unusable(decision, format)
    if defect is not None:
        return defect
    if isinstance(stored, Plain):
        return Settled(tensor, decision, stored, stored.dtype)
    scheme = format.spec.scheme(stored.scheme)
    values = (scheme.values if scheme else None) or format.spec.plain_dtype(tensor, model)
    found = _not_quantizable(tensor, stored, model, format)
    return found or Settled(tensor, decision, stored, values)


def _refused(decision: Decision, stored: Stored, model: Model, format: Format) -> Refusal | None:
    """What readers of the format have against a tensor stored like that, if anything."""
    tensor, action = decision.tensor, decision.written.action
    # What nobody quantizes is said where it is tried.
    if isinstance(stored, Coded) and not tensor.is_matrix:
        return None
    reason = format.review.held(tensor, model, stored)
    if reason is None:
        return None
    text = action if action in ("keep", "raw") else describe(stored)
    return Refusal(format.spec.name, text, reason, _cure(tensor, stored, model, format))


def _cure(tensor: ModelTensor, stored: Stored, model: Model, format: Format) -> str:
    """A treatment that readers would take, as near to what was wanted as can be; else empty."""
    if isinstance(stored, Plain):
        return ""
    scheme = format.spec.scheme(stored.scheme)
    plainer = replace(stored, method=scheme.methods[0]) if scheme else stored
    width = Written("quantize", bits=stored.bits)
    by_table = fill(width, role_class(tensor), Defaults(), format.spec)
    kept = plain_of(KEEP, tensor, model, format.spec)
    for word, other in (
        (describe(plainer), plainer),
        (f"{stored.bits}bit", by_table),
        ("keep", kept),
    ):
        if other is None or isinstance(other, Diagnostic) or other == stored:
            continue
        if format.review.held(tensor, model, other) is None:
            return word
    return ""


def _unusable(decision: Decision, format: Format) -> Diagnostic | None:
    """What keeps the source's bytes from being read as rows of the output, if anything."""
    tensor = decision.tensor
    dtype = tensor.source.dtype
    if decision.written.action == "raw" and dtype not in format.spec.plain_dtypes:
        return diagnostic("raw-unreadable", target=format.spec.name, dtype=dtype)
    # Raw bytes too: the bundle names a tensor as if its rows were in order.
    if not tensor.is_rows_of_source:
        return diagnostic("unsupported-source-layout", target=format.spec.name, role=tensor.role)
    return None


def _not_quantizable(
    tensor: ModelTensor, coded: Coded, model: Model, format: Format
) -> Diagnostic | None:
    # The general reason first: what no format quantizes is not blamed on this one.
    if not tensor.is_matrix:
        return diagnostic("not-a-matrix", role=tensor.role, shape=list(tensor.shape))
    scheme = format.spec.scheme(coded.scheme)
    flat, sizes = (scheme.flat, scheme.group_sizes) if scheme else (False, ())
    group, columns = coded.group_size, tensor.shape[-1]
    divided = prod(tensor.shape) if flat else columns
    if not group or divided % group == 0:
        return None
    fitting = [
        f"g{size}"
        for size in sizes
        if divided % size == 0
        and format.review.held(tensor, model, replace(coded, group_size=size)) is None
    ]
    cure = f"{' or '.join(fitting)} would"
    if not fitting:
        kept = format.review.held(tensor, model, plain_of(KEEP, tensor, model, format.spec)) is None
        cure = f"no group size of {coded.scheme} does{': `keep` it' if kept else ''}"
    return diagnostic("group-does-not-divide", suggestion=cure, group_size=group, columns=columns)
