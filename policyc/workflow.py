"""From a policy to a plan, a bundle, a verdict, a comparison: the calls of Python programs.

The command line calls the same ones. Libraries load when a step needs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from policy_dsl.diagnostics import fail

if TYPE_CHECKING:
    from emitters.core.build import BuildReport, Progress
    from emitters.core.verify import VerifyReport
    from policy_dsl.inventory import Inventory
    from policy_dsl.plan import Plan
    from policy_dsl.planning.outline import Outline, PlanDiff
    from policy_dsl.policy import Policy, Values
    from policy_dsl.sources.saliency import Saliency


def plan(
    policy: str | Path | Policy,
    *,
    model: str | Path | Inventory | None = None,
    target: str | None = None,
    variables: Values | None = None,
    statistics: Mapping[str, str] | None = None,
    allow_requantize: bool = False,
    links: bool = True,
) -> Plan:
    """The complete plan of a policy, a file or the name of a bundled one.

    model: a folder, a recorded headers file, a hub id or a catalog name, instead of the policy's
    own. target: one of its targets, if it has several. variables: values in place of its own.
    statistics: `imatrix` or `saliency` -> the file to take instead of the one that it names.
    allow_requantize: the source may be quantized already. links: its weights may be links.
    Raises: PolicyError with every defect of policy, source, or their meeting.
    """
    from emitters.core.statistics import with_statistics
    from policy_dsl.language.load import load

    if isinstance(policy, str | Path):
        policy = load(policy, variables)
    inventory = open_model(policy, model, links=links)
    made = plan_for(policy, inventory, target, statistics, allow_requantize=allow_requantize)
    return with_statistics(made)


def open_model(
    policy: Policy,
    model: str | Path | Inventory | None = None,
    *,
    links: bool = True,
    online: bool = True,
) -> Inventory:
    """The inventory of a model, else of the policy's own. online: the hub may be asked.

    Raises: PolicyError, of the code `needs-the-hub` where only the hub has it.
    """
    from policy_dsl.sources.reference import open_source

    reference = model or policy.model
    if reference is None:
        raise fail("no-model", policy=policy.name)
    if not isinstance(reference, str | Path):
        return reference
    return open_source(reference, links=links, online=online)


def plan_for(
    policy: Policy,
    inventory: Inventory,
    target: str | None = None,
    statistics: Mapping[str, str] | None = None,
    *,
    allow_requantize: bool = False,
    files: bool = True,
) -> Plan:
    """The plan of a policy for an inventory.

    statistics: files to take instead of those that the policy names. files: as of `resolve`.
    Raises: PolicyError with every defect of their meeting, and of the file that ranks experts.
    """
    import emitters
    from policy_dsl.planning.resolve import resolve

    return resolve(
        *(policy, inventory, emitters.FORMATS),
        target=target,
        allow_requantize=allow_requantize,
        statistics=statistics,
        saliency=_saliency_of(policy, statistics or {}),
        files=files,
    )


def build(
    plan: Plan,
    *,
    out: str | Path,
    jobs: int | None = None,
    force: bool = False,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Write the bundle of a plan to the folder `out`; an interrupted build is resumed.

    plan: as `plan` gives it. jobs: threads, by default one for each core. force: replace a
    bundle that is already there. max_memory: bytes that the program may take.
    Raises: PolicyError if something is in the way.
    """
    from emitters.core.build import build as write

    return write(plan, out=out, jobs=jobs, force=force, max_memory=max_memory, progress=progress)


def verify(
    bundle: str | Path,
    *,
    source: str | Path | Inventory | None = None,
    jobs: int | None = None,
    links: bool = True,
) -> VerifyReport:
    """What is right and wrong with a bundle, and with `source` how far it is from that.

    jobs: threads, by default one for each core. links: whether weights may be links.
    Raises: PolicyError if this is not a bundle, or the source has defects.
    """
    from emitters.core.build import available_cores
    from emitters.core.verify import verify_bundle
    from policy_dsl.sources.reference import open_source

    # Opened first: a wrong source should not cost the hashing of a large bundle.
    if isinstance(source, str | Path):
        source = open_source(source, links=links)
    return verify_bundle(Path(bundle), source, jobs=jobs or available_cores(), links=links)


def diff(before: str | Path | Plan | Outline, after: str | Path | Plan | Outline) -> PlanDiff:
    """What changes from one plan, saved plan, bundle or policy to another."""
    from policy_dsl.planning.outline import diff as compared

    return compared(outline_of(before), outline_of(after))


def outline_of(side: str | Path | Plan | Outline, *, links: bool = True) -> Outline:
    """What can be compared of a plan, a saved plan's file, a bundle's folder, or a policy.

    Raises: PolicyError if it is none of them, or has defects.
    """
    from policy_dsl.planning.outline import Outline, outline

    if isinstance(side, Outline):
        return side
    if not isinstance(side, str | Path):
        return outline(side)
    path = Path(side)
    if path.is_dir():
        from emitters.core.bundle_reading import bundle_outline

        return bundle_outline(path, links=links)
    if path.suffix == ".json":
        from policyc.reports.plan_json import read_saved_plan

        return read_saved_plan(path)
    return outline(plan(side, links=links))


def _saliency_of(policy: Policy, statistics: Mapping[str, str]) -> Saliency | None:
    """What ranks the experts that the policy prunes; None if it needs none, or none is there.

    Raises: PolicyError if the file cannot be read, or does not rank by what the policy says.
    """
    from policy_dsl.planning.resolve import SALIENCY, is_ranked, statistics_files
    from policy_dsl.sources.local_files import located
    from policy_dsl.sources.saliency import read_saliency

    if not is_ranked(policy):
        return None
    (ranking,) = (prune.by for prune in policy.transforms)
    for file in statistics_files([SALIENCY], policy, statistics):
        place = located(file.path, file.span)
        if file.span is None or place.exists():
            # Where it was found is this machine's business.
            return replace(read_saliency(place, ranking, file.span), path=file.path)
    return None
