"""From what the user typed to a Plan: policy, overrides, source, target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from policy_dsl.diagnostics import PolicyError, diagnostic, fail
from policy_dsl.escaping import escaped
from policyc.cli.console import note

if TYPE_CHECKING:
    from policy_dsl.inventory import Inventory
    from policy_dsl.plan import Plan
    from policy_dsl.policy import Policy
    from policy_dsl.sources.saliency import Saliency


@dataclass(frozen=True)
class Request:
    """A policy with the choices that options made over its own."""

    policy: str
    model: str | None = None
    target: str | None = None
    overrides: Sequence[str] | None = None
    verbose: bool = False
    allow_requantize: bool = False
    imatrix: Path | None = None
    saliency: Path | None = None
    links: bool = True

    @property
    def statistics(self) -> dict[str, str]:
        """The files of statistics that options name."""
        named = {"imatrix": self.imatrix, "saliency": self.saliency}
        return {name: str(path) for name, path in named.items() if path is not None}


def parse_overrides(written: Sequence[str] | None) -> dict[str, str]:
    """`VAR=VALUE` arguments by name; what kind of value it is, the policy says.

    Raises: PolicyError (bad-argument) for each one without a name or `=`.
    """
    found: dict[str, str] = {}
    defects = []
    for each in written or ():
        # Values may hold "=" themselves.
        name, sign, value = each.partition("=")
        if not sign or not name.strip():
            reason = f'"{each}" is not VAR=VALUE'
            defects.append(diagnostic("bad-argument", option="--set", reason=reason))
        found[name.strip()] = value.strip()
    if defects:
        raise PolicyError(defects)
    return found


def load_policy(request: Request) -> Policy:
    """The policy with its overrides.

    Raises: PolicyError with every defect of its text.
    """
    from policy_dsl.language.load import load

    return load(request.policy, overrides=parse_overrides(request.overrides))


def open_model(request: Request, policy: Policy) -> Inventory:
    """The inventory of the model that is asked for, or else of the policy's own.

    Raises: PolicyError if there is none, or it has defects.
    """
    from policy_dsl.sources.reference import open_source

    # The option wins: a policy is often tried on another model than its own.
    reference = request.model or policy.model
    if reference is None:
        raise fail("no-model", policy=policy.name)
    inventory = open_source(reference, links=request.links)
    if request.verbose:
        for line in (f"source {inventory.id}", *inventory.notes):
            note(f"note: {escaped(line)}")
    return inventory


def make_plan(request: Request) -> tuple[Plan, Inventory]:
    """The complete plan, side files included, and the inventory it is for.

    Raises: PolicyError with every defect of policy, source, or their meeting.
    """
    # `check` uses this module too, and must not wait for what only builds need.
    from emitters import FORMATS
    from emitters.core.bundle import complete
    from emitters.core.statistics import with_statistics

    policy = load_policy(request)
    inventory = open_model(request, policy)
    plan = plan_for(
        policy,
        inventory,
        request.target,
        allow_requantize=request.allow_requantize,
        statistics=request.statistics,
    )
    return complete(with_statistics(plan), inventory, FORMATS[plan.target]), inventory


def plan_for(
    policy: Policy,
    inventory: Inventory,
    target: str | None,
    *,
    allow_requantize: bool = False,
    statistics: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of a policy for an inventory, with the files of tensors only.

    statistics: files to take instead of those that the policy names.
    Raises: PolicyError with every defect of their meeting, and of the file that ranks experts.
    """
    import emitters
    from policy_dsl.planning.resolve import resolve

    specs = emitters.specs()
    plan = resolve(
        policy,
        inventory,
        specs,
        target=target,
        allow_requantize=allow_requantize,
        statistics=statistics,
        saliency=_saliency_of(policy, statistics or {}),
    )
    # Warnings about the source belong to the plan that rests on it.
    return replace(plan, findings=(*inventory.findings, *plan.findings))


def _saliency_of(policy: Policy, statistics: Mapping[str, str]) -> Saliency | None:
    """What ranks the experts that the policy prunes; None if it needs none, or none is there.

    A file that the policy names may be missing: a plan needs none.
    Raises: PolicyError if the file cannot be read, or does not rank by what the policy says.
    """
    from policy_dsl.planning.statistics import SALIENCY, is_ranked, statistics_files
    from policy_dsl.sources.local_files import located
    from policy_dsl.sources.saliency import read_saliency

    if not is_ranked(policy):
        return None
    (ranking,) = (prune.by for prune in policy.transforms)
    for file in statistics_files([SALIENCY], policy, statistics):
        place = located(file.path, file.span)
        if file.span is not None and not place.exists():
            continue
        found = read_saliency(place, ranking, file.span)
        # Where it was found is this machine's business.
        return replace(found, path=file.path)
    return None
