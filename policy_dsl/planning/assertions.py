"""The policy's own tests against its plan: what was asked, what was found, whether it holds."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import eq, ge, gt, le, lt

from policy_dsl.diagnostics import Diagnostic, PolicyError, Span, diagnostic, errors, fail
from policy_dsl.plan import Module, Plan
from policy_dsl.planning.matching import nodes
from policy_dsl.planning.outline import bits_of, treatment_of
from policy_dsl.planning.reach import Reach
from policy_dsl.policy import Assertion, Middle, Rule, Selector
from policy_dsl.quantities import bits_per_weight, both_units
from policy_dsl.treatments import KEEP, PLAIN_DTYPES, Plain, Written, has_symmetry_choice

_Relation = Callable[[float, float], bool]
_RELATIONS: Mapping[str, _Relation] = {"<=": le, "<": lt, ">=": ge, ">": gt, "==": eq}
_BPW_DIGITS = 4


@dataclass(frozen=True, slots=True)
class TestResult:
    """A test of the policy: its text, what the plan has, and whether that is enough."""

    __test__ = False  # pytest would collect the class by its name

    text: str
    found: str
    passed: bool
    span: Span | None = None


def run_tests(plan: Plan) -> tuple[TestResult, ...]:
    """The policy's tests, each with what the plan has; `size` is that of all output tensors.

    Raises: PolicyError if a test's selector has a defect or matches no tensor of the plan.
    """
    results, defects = _run_all(plan)
    if defects:
        raise PolicyError(defects)
    return tuple(results)


def findings_of_tests(plan: Plan) -> list[Diagnostic]:
    """What is wrong with the policy's tests: those that cannot be run, and those that fail."""
    results, defects = _run_all(plan)
    return [*defects, *failures(results)]


def failures(results: Iterable[TestResult]) -> list[Diagnostic]:
    """The tests that fail, as diagnostics."""
    return [
        diagnostic("test-failed", result.span, test=result.text, found=result.found)
        for result in results
        if not result.passed
    ]


def _run_all(plan: Plan) -> tuple[list[TestResult], list[Diagnostic]]:
    results: list[TestResult] = []
    defects: list[Diagnostic] = []
    chosen = _Chosen(plan)
    for assertion in plan.policy.tests:
        try:
            found, passed = _outcome(assertion, chosen.modules(assertion))
            results.append(TestResult(assertion.text, found, passed, assertion.span))
        except PolicyError as error:
            defects += error.diagnostics
    return results, defects


class _Chosen:
    """The modules of a plan that tests are about."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._reach = Reach(plan.policy.rules, plan.model, cure=None)
        self._known: dict[Selector | None, tuple[Module, ...]] = {None: plan.modules}

    def modules(self, assertion: Assertion) -> tuple[Module, ...]:
        """The modules that hold a tensor which the assertion's selector means.

        Raises: PolicyError if there are none, or the selector is wrong.
        """
        selector, span, plan = assertion.selector, assertion.span, self._plan
        if selector is not None and selector not in self._known:
            meant = self._meant(Rule(selector, KEEP, span=span, selector_span=span))
            tensors = [plan.model.tensors[at] for at in meant]
            places = {at for one in tensors for at in self._holding[one.role, one.source.name]}
            # A test that measures nothing would pass for ever.
            if not places:
                raise fail("test-without-tensors", span, test=assertion.text)
            self._known[selector] = tuple(plan.modules[at] for at in sorted(places))
        return self._known[selector]

    def _meant(self, rule: Rule) -> frozenset[int]:
        reach, plan = self._reach, self._plan
        if Middle() in nodes(rule.selector):
            # It is what all boundaries of the policy leave, those beside it too.
            reach = Reach((*plan.policy.rules, rule), plan.model, cure=None)
        findings = [*reach.defects(rule), *reach.unmatched(rule)]
        findings += [] if errors(findings) else reach.idle(rule)
        if findings:
            raise PolicyError(findings)
        return reach.meaning(rule.selector).matched

    @cached_property
    def _holding(self) -> Mapping[tuple[str, str], Sequence[int]]:
        found: dict[tuple[str, str], list[int]] = defaultdict(list)
        for at, module in enumerate(self._plan.modules):
            for rows in module.sources:
                found[module.role, rows.tensor.name].append(at)
        return found


def _outcome(assertion: Assertion, modules: Sequence[Module]) -> tuple[str, bool]:
    """What the modules have of what a test asks, and whether it passes."""
    wanted = assertion.value
    if isinstance(wanted, Written):
        treatments = ", ".join(sorted({treatment_of(module) for module in modules}))
        return treatments, all(_agrees(module, wanted) for module in modules)
    holds, nbytes = _RELATIONS[assertion.relation], sum(module.nbytes for module in modules)
    if assertion.measure == "size":
        return _size(nbytes, wanted, assertion.relation)
    if assertion.measure == "bpw":
        bits = bits_per_weight(nbytes, sum(module.parameters for module in modules))
        # Compared as it is shown: what a report prints can be asked for.
        shown = f"{bits or 0:.{_BPW_DIGITS}f}"
        return shown, holds(float(shown), wanted)
    widths = sorted({float(bits_of(module)) for module in modules})
    asked = {"min_bits": widths[:1], "max_bits": widths[-1:]}.get(assertion.measure, widths)
    return ", ".join(f"{bits:g}" for bits in asked), all(holds(bits, wanted) for bits in asked)


def _size(nbytes: int, wanted: float, relation: str) -> tuple[str, bool]:
    passed = _RELATIONS[relation](nbytes, wanted)
    both, other = both_units(nbytes), both_units(int(wanted))
    if set(both.split(" = ")).isdisjoint(other.split(" = ")):
        return both, passed
    # A budget counts bytes, of which the two units show too few to say what is wrong.
    passed = passed or relation == "=="
    return both if passed else f"{nbytes:,} bytes", passed


def _agrees(module: Module, wanted: Written) -> bool:
    """Whether the module has everything that `wanted` says; what it leaves out is free."""
    stored = module.treatment
    if module.written != wanted.action:
        return False
    if isinstance(stored, Plain):
        return wanted.dtype is None or PLAIN_DTYPES[wanted.dtype] == stored.dtype
    if wanted.symmetric is not None and not has_symmetry_choice(stored.scheme):
        return False
    said = ("scheme", "bits", "group_size", "symmetric", "method")
    return all(getattr(wanted, name) in (None, getattr(stored, name)) for name in said)
