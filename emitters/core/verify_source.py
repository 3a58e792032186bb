"""Whether a bundle's values are those of its source, and how far they are from it.

Of what rounding to nearest made, every value has a bound. A bundle without a record does not say
what chose its codes: if the codes of most of its rows are all nearest ones, rounding did. Else a
solver may have, and each matrix as a whole must be near its source.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice
from math import prod

from emitters.core.bundle_reading import Bundle
from emitters.core.decoding import AGAIN, EQUAL, NEAREST, RowsCheck, Tally
from emitters.core.matching import Piece, fits, match, other_experts, pieces_of, with_added
from emitters.core.preconditions import as_in_bundle, differing_heads
from emitters.core.record import BundleModule
from emitters.numerics import VALUE_TYPES
from emitters.numerics.reach import Sums
from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.inventory import Inventory, source_digest
from policy_dsl.planning.outline import stored_as
from policy_dsl.planning.pruning import pruned
from policy_dsl.quantities import counted, first_few
from policy_dsl.roles.classify import ModelTensor, classify
from policy_dsl.treatments import Coded, coded, describe

_Stacks = Mapping[str, tuple[ModelTensor, ...]]
_SHOWN = 3
# How a matrix is judged whose codes a solver chose.
WHOLE = "as a whole"
# Bits -> largest relative error and smallest cosine of a matrix that a solver coded: half again
# as much as GPTQ was seen to lose of heavy-tailed weights with correlated inputs.
SOLVED: Mapping[int, tuple[float, float]] = {
    8: (0.1, 0.99),
    6: (0.25, 0.97),
    5: (0.4, 0.92),
    4: (0.7, 0.8),
    3: (1.2, 0.5),
    2: (2.0, 0.25),
    1: (2.0, 0.2),
}
# Nothing is coded so badly; values of another matrix come to less in all but tiny ones.
LEAST_COSINE = 0.1
_EXACT: Mapping[str, str] = {EQUAL: "values-differ", AGAIN: "codes-differ"}


@dataclass(frozen=True, slots=True)
class ModuleError:
    """The error of one module against its source. wrong: values that are not what they must be."""

    module: str
    role: str
    treatment: str
    sums: Sums
    judged_by: str
    wrong: int


@dataclass(frozen=True, slots=True)
class Compared:
    """A compared matrix or plain tensor. way: how it is judged; is_added: of an added expert."""

    name: str
    module: BundleModule
    way: str
    tally: Tally
    is_added: bool = False

    @property
    def bounds(self) -> tuple[float, float]:
        """Largest relative error and smallest cosine, if a solver coded it."""
        bits = coded(self.module.treatment).bits
        return SOLVED[max(width for width in SOLVED if width <= bits)]


def compare(
    bundle: Bundle, source: Inventory, *, jobs: int
) -> tuple[tuple[ModuleError, ...], tuple[Diagnostic, ...]]:
    """The error of every module, and all that is wrong with values or cannot be compared.

    Errors are against the source's exact values: FP8 codes times scales in float32.
    Raises: PolicyError if the source has no readable weights, or names without roles.
    """
    record, model, findings = bundle.record, classify(source), []
    pruning = record.pruning if record else None
    reason = other_experts(bundle, model, pruning)
    # Every module of experts would say so, and none of them why.
    if reason is not None:
        return (), (diagnostic("not-comparable", reason=reason),)
    model, _ = pruned(model, pruning)
    bundle = with_added(bundle, model)
    model, left_out = as_in_bundle(model, bundle)
    heads = differing_heads(source, model, left_out)
    check, stacks = RowsCheck(bundle, source, model), match(bundle, model)
    if record and record.source_digest != source_digest(source):
        findings.append(diagnostic("other-source", recorded=record.source, given=source.id))
    comparable, unmatched = _matched(bundle, stacks)
    findings += [*unmatched, *heads]
    padding = [module for module in bundle.modules if _only_added(module)]
    pieces = chain.from_iterable(
        pieces_of(module, stacks.get(module.name, ()), check.decoder.block_rows)
        for module in (*comparable, *padding)
    )
    compared = []
    # Rows of experts that were added are judged apart from those that have a source.
    tallies = groupby(_tallies(pieces, check, jobs), lambda one: (one[0].name, one[0].view is None))
    for (name, is_added), parts in tallies:
        compared_pieces, of_pieces = zip(*parts, strict=True)
        module, tally = compared_pieces[0].whole, sum(of_pieces, Tally())
        compared.append(Compared(name, module, check.way(module), tally, is_added))
    compared, wrong = _judged(compared)
    names, each = {one.name for one in comparable}, groupby(compared, lambda one: one.module.name)
    errors = [_error([*alike], stacks[name][0].role) for name, alike in each if name in names]
    return tuple(errors), (*findings, *wrong)


def _tallies(pieces: Iterator[Piece], check: RowsCheck, jobs: int) -> Iterator[tuple[Piece, Tally]]:
    """All pieces with their tallies, in order; by `jobs` threads, few results ahead."""
    with ThreadPoolExecutor(jobs, "compare") as workers:
        begun = ((piece, workers.submit(check.tally, piece)) for piece in pieces)
        running = deque(islice(begun, 4 * jobs))
        while running:
            piece, tally = running.popleft()
            yield piece, tally.result()
            running.extend(islice(begun, 1))


def _error(compared: Sequence[Compared], role: str) -> ModuleError:
    """The error of a module, all its matrices added up."""
    module, tally = compared[0].module, sum((one.tally for one in compared), Tally())
    treatment = stored_as(module.treatment, next(iter(module.tensors.values())).dtype)
    return ModuleError(module.name, role, treatment, tally.sums, compared[0].way, tally.wrong)


def _matched(bundle: Bundle, stacks: _Stacks) -> tuple[list[BundleModule], list[Diagnostic]]:
    """The modules that can be compared, and a finding for each kind of those that cannot."""
    findings, names = [], {module.name for module in bundle.modules}
    # What the policy dropped on purpose is not missing.
    dropped = bundle.record.omitted if bundle.record else {}
    lacking = (stack for path, stack in stacks.items() if path not in names)
    sources = (tensor.source.name for stack in lacking for tensor in stack)
    lost = dict.fromkeys(name for name in sources if name not in dropped)
    if lost:
        tensors, shown = counted(len(lost), "tensor"), first_few(lost, _SHOWN)
        findings.append(diagnostic("source-tensors-missing", tensors=tensors, names=shown))
    # Scales of columns have no source, nor has an expert that was added.
    scales = {module.name for module in bundle.scales.values()}
    comparable: list[BundleModule] = []
    unknown, unread = "the source has no {}", "{} cannot be decoded here"
    other = "the shapes of {} are not those of the source's tensors"
    odd: dict[str, list[str]] = {unknown: [], other: [], unread: []}
    for module in bundle.modules:
        stack, held = stacks.get(module.name), module.tensors.values()
        foreign = [tensor.dtype for tensor in held if tensor.dtype not in VALUE_TYPES]
        kind, shown = "", module.name
        if not stack:
            kind = unknown
        elif not fits(module, stack):
            kind, shown = other, f"{shown} {list(module.shape)}"
        elif foreign and not isinstance(module.treatment, Coded):
            kind, shown = unread, f"{shown} ({foreign[0]})"
        else:
            comparable.append(module)
        if kind and module.name not in scales and not _only_added(module):
            odd[kind].append(shown)
    reasons = [reason.format(first_few(shown, _SHOWN)) for reason, shown in odd.items() if shown]
    if reasons:
        findings.append(diagnostic("not-comparable", reason="; ".join(reasons)))
    return comparable, findings


def _only_added(module: BundleModule) -> bool:
    return bool(module.added) and module.added == module.shape[0]


def _judged(compared: Sequence[Compared]) -> tuple[list[Compared], list[Diagnostic]]:
    """The same with how each is judged in the end, and a finding for each kind of defect."""
    rounded = sum((one.tally for one in compared if one.way == NEAREST), Tally())
    # A solver chose codes if not even half of the rows have only nearest ones.
    if 2 * rounded.sound < rounded.rows:
        compared = [replace(one, way=WHOLE) if one.way == NEAREST else one for one in compared]
    kinds: dict[str, list[Compared]] = defaultdict(list)
    for one in compared:
        if code := _defect(one):
            kinds[code].append(one)
    findings = []
    for code, found in kinds.items():
        notes = [_example(code, one) for one in found[:_SHOWN]]
        notes += [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        values = counted(sum(one.tally.wrong for one in found), "value")
        modules = counted(len(found), "tensor or matrix", "tensors or matrices")
        findings.append(diagnostic(code, notes=notes, values=values, modules=modules))
    bad = [one for one in compared if one.tally.sums.not_finite]
    if bad:
        names = first_few((one.name for one in bad), _SHOWN)
        values = counted(sum(one.tally.sums.not_finite for one in bad), "value")
        findings.append(diagnostic("non-finite-decoded", tensor=names, values=values))
    return [*compared], findings


def _defect(one: Compared) -> str | None:
    """The code of what is wrong with a matrix, or None."""
    sums = one.tally.sums
    if sums.nothing_left:
        return "nothing-left"
    exact = "added-not-zero" if one.is_added else _EXACT.get(one.way)
    if exact is not None:
        return exact if one.tally.wrong else None
    cosine, relative = sums.cosine, sums.relative
    if cosine is None or relative is None:
        # A source of zeros, and something decoded, or neither.
        return "unlike-source" if sums.decoded else None
    if cosine < LEAST_COSINE:
        return "unlike-source"
    if one.way == NEAREST:
        return "codes-not-nearest" if one.tally.wrong else None
    largest, least = one.bounds
    return "unlike-source" if relative > largest or cosine < least else None


def _example(code: str, one: Compared) -> str:
    """What is wrong with a matrix: its figures, or the first wrong value and how many it has."""
    tally, sums = one.tally, one.tally.sums
    if code in ("nothing-left", "unlike-source"):
        known = sums.relative, sums.cosine
        relative, cosine = ("-" if figure is None else f"{figure:.4f}" for figure in known)
        text = f"{one.name}: relative error {relative}, cosine {cosine}"
        if one.way != WHOLE or sums.nothing_left:
            return text
        bounds = "at most {}, and at least {}".format(*one.bounds)
        return f"{text}; {describe(one.module.treatment)} has {bounds}"
    row, column = tally.at or (0, 0)
    # The name has the number of the matrix; rows are counted through all of the module.
    row %= max(1, prod(one.module.shape[-2:-1]))
    source = f", of {tally.source}" if tally.source else ""
    added = "; this expert was added and must decode to zeros" if code == "added-not-zero" else ""
    values = counted(tally.wrong, "value")
    return f"{one.name}: {values}, the first at row {row}, column {column}{source}{added}"
