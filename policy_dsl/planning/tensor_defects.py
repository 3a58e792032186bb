"""What is wrong with tensors, gathered: thousands of them have one rule and one defect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.planning.decisions import Decision
from policy_dsl.planning.matching import is_guarded
from policy_dsl.policy import Policy

# Roles that fit into a suggestion.
_MOST_NAMED = 3


class Refusal(NamedTuple):
    """What readers of a target have against tensors of some roles stored like that.

    cure: the treatment that they would take instead, empty if none is known.
    """

    target: str
    treatment: str
    reason: str
    cure: str

    def of(self, roles: Sequence[str]) -> Diagnostic:
        """The finding about tensors of these roles."""
        named = ", ".join(roles)
        cure = f'write "{named}: {self.cure}" after it'
        if len(roles) > _MOST_NAMED:
            cure = f'"{self.cure}" would do for them'
        return diagnostic(
            "unsupported-treatment",
            suggestion=cure if self.cure else None,
            target=self.target,
            roles=named,
            treatment=self.treatment,
            reason=self.reason,
        )


@dataclass
class _Defect:
    """A finding of several tensors of one rule, with the roles and names of all of them."""

    decision: Decision
    found: Diagnostic | Refusal
    roles: dict[str, None] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)


class TensorDefects:
    """Findings about tensors, one a rule and defect, with a count and an example."""

    def __init__(self, policy: Policy) -> None:
        self._otherwise = dict(policy.key_spans).get("defaults.otherwise")
        self._seen: dict[tuple[int | None, Diagnostic | Refusal], _Defect] = {}

    def add(
        self,
        decision: Decision,
        found: Diagnostic | Refusal,
        *,
        what: str = "tensor",
        name: str = "",
    ) -> None:
        """Take what is wrong with a decision, or with the stack `name` that it begins."""
        # One finding for a rule, not one for each of its 15,000 experts.
        one = self._seen.setdefault((decision.decided_by, found), _Defect(decision, found))
        one.roles[decision.tensor.role] = None
        one.names.append(f"{what} {name or decision.tensor.source.name}")

    def findings(self) -> list[Diagnostic]:
        """One finding for each rule and defect, at the treatment that is to blame."""
        return [self._placed(one) for one in self._seen.values()]

    def _placed(self, one: _Defect) -> Diagnostic:
        decision, found, names = one.decision, one.found, one.names
        if isinstance(found, Refusal):
            found = found.of(list(one.roles))
        span = None if is_guarded(decision.tensor) else self._otherwise
        if decision.rule is not None:
            rule = decision.rule.rule
            # The selector was right if it got here: the caret belongs under the treatment.
            span = rule.treatment_span or rule.span
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return replace(found, span=span, notes=(*found.notes, f"{names[0]}{more}"))
