"""What was found about policies, as text and as a document."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from policy_dsl.diagnostics import SEVERITIES, Diagnostic, count_text, render
from policy_dsl.documents import entry_of
from policy_dsl.documents.reports import AgainstEntry, CheckDocument, CheckedPolicy
from policy_dsl.escaping import escaped
from policy_dsl.quantities import counted
from policyc.reports import finding_json


@dataclass
class Checked:
    """The findings about one policy.

    against: the models and targets that it was planned for. alone: why only its text was looked
    at, empty if it was planned.
    """

    policy: str
    name: str | None = None
    against: list[AgainstEntry] = field(default_factory=list)
    alone: str = ""
    findings: tuple[Diagnostic, ...] = ()


def summary(checked: Sequence[Checked], n_others: int) -> str:
    """One line: `3 policies, 1 error, 2 warnings; 2 other YAML files not read`."""
    findings = [finding for each in checked for finding in each.findings]
    policies = "1 policy" if len(checked) == 1 else f"{len(checked):,} policies"
    others = f"; {counted(n_others, 'other YAML file')} not read" if n_others else ""
    return f"{policies}, {count_text(findings)}{others}"


def check_text(checked: Sequence[Checked], n_others: int) -> str:
    """The findings about each policy, what it was checked against, and a summary."""
    return "".join(_text(checked)) + f"{summary(checked, n_others)}\n"


def _text(checked: Sequence[Checked]) -> Iterator[str]:
    for each in checked:
        if each.findings:
            yield render(each.findings) + "\n\n"
        against = " and ".join(f"{escaped(at['model'])} as {at['target']}" for at in each.against)
        place = f" (against {against})" if against else ""
        place = f" (its text alone: {escaped(each.alone)})" if each.alone else place
        yield f"{escaped(each.policy)}: {count_text(each.findings)}{place}\n"


def check_document(checked: Sequence[Checked], n_others: int) -> CheckDocument:
    """What `policyc check --format json` prints."""
    findings = [finding for each in checked for finding in each.findings]
    counts = {word: sum(one.severity == word for one in findings) for word in SEVERITIES}
    return {
        "schema_version": 1,
        "kind": "check",
        "policies": [
            entry_of(CheckedPolicy, each, findings=list(map(finding_json, each.findings)))
            for each in checked
        ],
        "errors": counts["error"],
        "warnings": counts["warning"],
        "notes": counts["note"],
        "other_files": n_others,
    }
