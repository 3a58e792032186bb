"""The policy's own tests against its plan: what was asked, what was found, whether it holds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields

from policy_dsl.diagnostics import Diagnostic, PolicyError, Span, diagnostic, errors
from policy_dsl.inventory import DTYPE_BITS
from policy_dsl.plan import Module, Plan
from policy_dsl.planning.matching import CompiledRule, compile_rule
from policy_dsl.planning.outline import treatment_of
from policy_dsl.planning.selector_parts import SelectorParts
from policy_dsl.policy import Assertion, Rule, Treatment
from policy_dsl.units import bits_per_weight, both_units

_RELATIONS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
}

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
    return results


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


def _run_all(plan: Plan) -> tuple[tuple[TestResult, ...], list[Diagnostic]]:
    results: list[TestResult] = []
    defects: list[Diagnostic] = []
    for assertion in plan.policy.tests:
        try:
            results.append(_run(assertion, plan))
        except PolicyError as error:
            defects += error.diagnostics
    return tuple(results), defects


def _run(assertion: Assertion, plan: Plan) -> TestResult:
    modules = plan.modules if assertion.selector is None else _selected(assertion, plan)
    if isinstance(assertion.value, Treatment):
        wanted = assertion.value
        found = ", ".join(sorted({treatment_of(module) for module in modules}))
        passed = all(_agrees(module.treatment, wanted) for module in modules)
        return TestResult(assertion.text, found, passed, assertion.span)
    values = _measure(assertion.measure, modules)
    relation = _RELATIONS[assertion.relation]
    passed = all(relation(value, assertion.value) for value in values)
    shown = _shown(assertion.measure, values)
    if assertion.measure == "size" and _reads_as(values[0], assertion.value):
        # A budget counts bytes, of which the two units show too few to say what is wrong.
        passed, exact = passed or assertion.relation == "==", f"{values[0]:,.0f} bytes"
        shown = shown if passed else exact
    return TestResult(assertion.text, shown, passed, assertion.span)


def _selected(assertion: Assertion, plan: Plan) -> tuple[Module, ...]:
    """The modules that hold a tensor which the assertion's selector means."""
    compiled = _compile(assertion, plan)
    wanted = _matching_tensors(compiled, plan)
    modules = tuple(
        module
        for module in plan.modules
        if any((module.role, rows.tensor.name) in wanted for rows in module.sources)
    )
    # A test that measures nothing would pass for ever.
    if not modules:
        raise PolicyError(
            [diagnostic("test-without-tensors", assertion.span, test=assertion.text)]
        )
    return modules


def _compile(assertion: Assertion, plan: Plan) -> CompiledRule:
    if assertion.selector is None:
        raise TypeError("an assertion about the whole plan has nothing to compile")
    probe = Rule(
        assertion.selector, Treatment("keep"), span=assertion.span, selector_span=assertion.span
    )
    compiled = compile_rule(probe, plan.policy, plan.model)
    parts = SelectorParts(plan.model, cure=None)
    findings = [*compiled.findings, *parts.unmatched(compiled)]
    findings += [] if errors(findings) else parts.idle(compiled)
    if findings:
        raise PolicyError(findings)
    return compiled


def _matching_tensors(compiled: CompiledRule, plan: Plan) -> set[tuple[str, str]]:
    """(role, source name) of every tensor of the model that the selector means."""
    # A hundred thousand experts share a few hundred answers.
    known: dict[tuple[str, int | None], bool] = {}
    found = set()
    for tensor in plan.model.tensors:
        kind = (tensor.role, tensor.layer)
        if compiled.reads_names or kind not in known:
            known[kind] = compiled.predicate(tensor)[0]
        if known[kind]:
            found.add((tensor.role, tensor.source.name))
    return found


def _agrees(treatment: Treatment, wanted: Treatment) -> bool:
    """Whether the treatment has everything that `wanted` says; what it leaves out is free."""
    said = {field.name: getattr(wanted, field.name) for field in fields(wanted)}
    return all(
        value is None or getattr(treatment, name) == value for name, value in said.items()
    )


def _measure(measure: str, modules: Iterable[Module]) -> list[float]:
    chosen = list(modules)
    nbytes = sum(module.nbytes for module in chosen)
    if measure == "size":
        return [nbytes]
    if measure == "bpw":
        bits = bits_per_weight(nbytes, sum(m.parameters for m in chosen))
        # Compared as it is shown: what a report prints can be asked for.
        return [round(bits or 0.0, _BPW_DIGITS)]
    widths = sorted({_bits(module) for module in chosen})
    return {"min_bits": widths[:1], "max_bits": widths[-1:]}.get(measure, widths)


def _bits(module: Module) -> float:
    quantized = module.treatment.action == "quantize" and module.treatment.bits
    # A kept tensor counts with the width of its dtype.
    return float(quantized or DTYPE_BITS[module.dtype])


def _reads_as(size: float, wanted: float) -> bool:
    """Whether two sizes are shown alike, in GB or in GiB."""
    shown = (set(both_units(int(nbytes)).split(" = ")) for nbytes in (size, wanted))
    return bool(set.intersection(*shown))


def _shown(measure: str, values: list[float]) -> str:
    if measure == "size":
        return both_units(int(values[0]))
    if measure == "bpw":
        return f"{values[0]:.{_BPW_DIGITS}f}"
    return ", ".join(f"{value:g}" for value in values)
