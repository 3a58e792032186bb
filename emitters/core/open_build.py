"""The beginning of a build: what it is a build of, fresh shards or those of an earlier run."""

from __future__ import annotations

from typing import Any

from emitters.core.journal import Identity, Journal
from emitters.core.preconditions import ensure_room
from emitters.core.run_unit import Work
from emitters.core.workspace import Workspace
from emitters.tensor_io.read import Source
from emitters.tensor_io.shards import create_file, flush
from policy_dsl import version
from policy_dsl.diagnostics import PolicyError, fail
from policy_dsl.formats import Container
from policy_dsl.plan import Plan, PlannedTensor
from policy_dsl.planning.bundle_files import preface
from policy_dsl.planning.layout import header_bytes

_CURE = "--force starts over, and so does deleting that folder"
# What an identity's parts are called in messages; the first that differs is named.
_PARTS = {
    "policyc": "version of policyc",
    "source": "source, or of another state of it",
    "policy": "policy",
    "statistics": "file of statistics",
    "plan": "plan",
}


def identity_of(plan: Plan, source: Source) -> Identity:
    """What must be the same for a build to be resumed.

    Version, source, policy, files of statistics and plan.
    """
    files: dict[str, Any] = {name: list(facts) for name, facts in source.facts.items()}
    return {
        "policyc": version(),
        "source": {"digest": plan.source_digest, "files": files},
        "policy": plan.policy_digest,
        # Not their names: a file that was moved is the same.
        "statistics": {file.name: file.sha256 for file in plan.statistics},
        "plan": plan.digest,
    }


def open_journal(
    workspace: Workspace, plan: Plan, work: Work, identity: Identity, *, force: bool
) -> Journal:
    """The journal to resume, and the shards that it speaks of, new or from an earlier run.

    Raises: PolicyError if the unfinished build there is another one or damaged, some of it is
    done, and `force` does not allow to throw it away; or if the disk has no room.
    """
    resumed = Journal.resume(workspace.journal)
    if resumed is not None:
        journal, found = resumed
        refusal = _refusal(workspace, plan, found, identity)
        if refusal is None:
            ensure_room(plan, workspace.bundle)
            return journal
        # Where nothing is done yet, nothing is lost.
        if journal.done and not force:
            raise refusal
    # Without a journal nothing says what a file holds: whatever is there is of no use.
    workspace.clear(file.name for file in plan.files)
    ensure_room(plan, workspace.bundle)
    _create_files(workspace, plan, work)
    return Journal.create(workspace.journal, identity)


def _refusal(
    workspace: Workspace, plan: Plan, found: Identity, wanted: Identity
) -> PolicyError | None:
    """Why the unfinished build cannot be resumed, else None."""
    root = str(workspace.root)
    for part, called in _PARTS.items():
        if found.get(part) != wanted[part]:
            return fail("other-build", path=root, what=called, suggestion=_CURE)
    for file in plan.tensor_files:
        path = workspace.bundle / file.name
        if not path.is_file() or path.stat().st_size != file.nbytes:
            reason = f"{file.name} is not there, or is not as long as it was"
            return fail("damaged-partial", path=root, reason=reason, suggestion=_CURE)
    return None


def _create_files(workspace: Workspace, plan: Plan, work: Work) -> None:
    """Every tensor file at its full length with its header, on the disk when this returns."""
    files = work.format.spec.tensor_files
    held: dict[str, list[PlannedTensor]] = {file.name: [] for file in plan.tensor_files}
    for module in plan.modules:
        for tensor in module.tensors:
            held[tensor.file].append(tensor)
    for file in plan.tensor_files:
        path = workspace.bundle / file.name
        if isinstance(files, Container):
            header = preface(plan, work.format, work.source.whole(work.format.spec.embedded_files))
        else:
            header = header_bytes(held[file.name], files.metadata)
        create_file(path, header, held[file.name], file.nbytes or 0)
        flush(path)
    # The journal comes next, and speaks of files that must be there after a crash.
    flush(workspace.bundle)
    flush(workspace.root)
    flush(workspace.root.parent)
