"""What a build may know about the model's inputs, and which files say it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.formats import Format
from policy_dsl.plan import Module, StatisticsFile, coded_modules
from policy_dsl.policy import Policy
from policy_dsl.sources.saliency import Saliency

SALIENCY = "saliency"
# Statistic -> how to get one.
_SOURCES = {
    "imatrix": "an importance matrix: run llama.cpp's llama-imatrix on the model, and give the "
    "file with --imatrix or `calibration imatrix`",
    SALIENCY: "a ranking of the experts, of which the first in each layer stand in: run REAP's "
    "observer on the model, and give what it finds with --saliency or `calibration saliency`, "
    "or list those that stay with `prune experts keep …`",
}


@dataclass(frozen=True, slots=True)
class PlanStatistics:
    """The files that a plan's methods use, how to get those that they lack, and findings.

    Only what a method cannot do without is pending.
    """

    files: tuple[StatisticsFile, ...]
    pending: tuple[str, ...]
    findings: tuple[Diagnostic, ...]


def statistics_of(
    modules: Sequence[Module],
    policy: Policy,
    format: Format,
    given: Mapping[str, str],
    saliency: Saliency | None,
) -> PlanStatistics:
    """What these modules and the policy use, of what is given by name or the policy names.

    saliency: what was read of the file of that name.
    """
    methods = {coded.method for _, coded in coded_modules(modules)}
    known = {name: method for name, method in format.methods.items() if name in methods}
    needed = {method.needs for method in known.values() if method.needs}
    users: dict[str, set[str]] = {}
    for name, method in known.items():
        for statistic in filter(None, (method.needs, method.uses)):
            users.setdefault(statistic, set()).add(name)
    used = set(users)
    files = tuple(
        replace(file, methods=frozenset(users[file.name]))
        for file in statistics_files(sorted(used), policy, given)
    )
    if is_ranked(policy):
        needed, used = needed | {SALIENCY}, used | {SALIENCY}
        read = saliency
        files += (StatisticsFile(SALIENCY, read.path, read.span, read.sha256),) if read else ()
    missing = needed - {file.name for file in files}
    return PlanStatistics(
        files,
        pending=tuple(_cure(name, policy) for name in sorted(missing)),
        findings=tuple(_unused(used, policy, format, given)),
    )


def _cure(name: str, policy: Policy) -> str:
    """How to get a statistic that is not there."""
    named = dict(policy.calibration)[name]
    absent = f" ({named}, which the policy names, is not here)" if named else ""
    return f"{_SOURCES[name]}{absent}"


def is_ranked(policy: Policy) -> bool:
    """Whether a saliency says which experts the policy keeps."""
    return any(prune.by for prune in policy.transforms)


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


def _unused(
    used: Collection[str], policy: Policy, format: Format, given: Mapping[str, str]
) -> Iterator[Diagnostic]:
    """A warning for each file that no method of the plan uses."""
    written, spans = dict(policy.calibration), dict(policy.key_spans)
    known = {name for one in format.methods.values() for name in (one.needs, one.uses) if name}
    # Of a policy, only what the target may use: the rest is an unused setting.
    usable = [name for name in known if f"calibration.{name}" in format.spec.settings]
    said = {
        name: str(written[name]) for name in (*usable, SALIENCY) if written.get(name) is not None
    }
    for name, path in sorted((said | dict(given)).items()):
        if name not in used:
            span = None if name in given else spans.get(f"calibration.{name}")
            yield diagnostic("unused-statistics", span, name=name, path=path)
