"""What a build needs to know about the model's inputs, and which files say it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.formats import FormatSpec
from policy_dsl.plan import Module, StatisticsFile
from policy_dsl.policy import Policy

# Statistic -> how to get one.
_SOURCES = {
    "imatrix": "an importance matrix: run llama.cpp's llama-imatrix on the model, and give the "
    "file with --imatrix or `calibration imatrix`",
}


def needs(modules: Iterable[Module], spec: FormatSpec) -> dict[str, str]:
    """The statistics that the methods of these modules need, and how to get each."""
    methods = {module.treatment.method or "" for module in modules}
    names = sorted({spec.statistics[one] for one in methods if one in spec.statistics})
    return {name: _SOURCES[name] for name in names}


def statistics_files(
    names: Iterable[str], policy: Policy, given: Mapping[str, str]
) -> tuple[StatisticsFile, ...]:
    """The files of these statistics: what is given for a name, else what the policy says."""
    written, spans = dict(policy.calibration), dict(policy.key_spans)
    found = []
    for name in names:
        if name in given:
            found.append(StatisticsFile(name, given[name]))
        elif written.get(name) is not None:
            span = spans.get(f"calibration.{name}")
            found.append(StatisticsFile(name, str(written[name]), span))
    return tuple(found)


def unused_statistics(
    needed: Collection[str], policy: Policy, spec: FormatSpec, given: Mapping[str, str]
) -> list[Diagnostic]:
    """A warning for each file that no method of the plan needs."""
    written, spans = dict(policy.calibration), dict(policy.key_spans)
    # Of a policy, only what the target may use: the rest is an unused setting.
    said = {
        name: str(written[name])
        for name in spec.statistics.values()
        if f"calibration.{name}" in spec.settings and written.get(name) is not None
    }
    return [
        diagnostic(
            "unused-statistics",
            None if name in given else spans.get(f"calibration.{name}"),
            name=name,
            path=path,
        )
        for name, path in sorted((said | dict(given)).items())
        if name not in needed
    ]
