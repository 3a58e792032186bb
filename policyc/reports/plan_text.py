"""A plan for people: what every role gets, what it costs, what is kept or left out, and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from policy_dsl.diagnostics import render
from policy_dsl.plan import OTHERWISE, Omission, OmittedFile, Plan, PlannedFile
from policy_dsl.planning.assertions import TestResult
from policy_dsl.planning.matching import is_guarded
from policy_dsl.planning.outline import Group, Outline, groups, outline, treatment_of
from policy_dsl.quantities import both_units, column_unit, counted
from policy_dsl.sources.checkpoint import listed
from policy_dsl.treatments import Coded
from policyc.reports.blocks import Block, Facts, Items, Rendered, Table, by_key
from policyc.reports.outline_report import group_cells


def size_change(before: int, after: int) -> str:
    """`230.12 GB = 214.32 GiB -> 92.87 GB = 86.49 GiB, 59.6 % smaller`."""
    change = f"{both_units(before)} -> {both_units(after)}"
    if not before:
        return change
    # Both in the same unit: mixed units would not compare.
    percent = 100 * (before - after) / before
    return f"{change}, {abs(percent):.1f} % {'smaller' if percent >= 0 else 'larger'}"


def plan_blocks(
    plan: Plan, tests: Sequence[TestResult] = (), *, tensors: bool = False
) -> list[Block]:
    """The plan for people; `tensors` lists every output tensor."""
    made = outline(plan)
    blocks: list[Block] = [
        Facts(tuple(_heading(plan))),
        *_group_tables(plan, made),
        Facts(tuple(_totals(plan, made)), title="Totals"),
        *_lists(plan, tests),
    ]
    if tensors:
        # Last: what people look for must not end up above thousands of lines.
        blocks.append(_tensor_table(plan))
    return [block for block in blocks if not isinstance(block, Table) or block.rows]


def _group_tables(plan: Plan, made: Outline) -> tuple[Table, Table]:
    quantized = {module.name for module in plan.modules if isinstance(module.treatment, Coded)}
    # Two tables: what is quantized is the plan, what is not needs a reason.
    labels = {module.treatment for module in made.modules if module.name in quantized}
    packed = [group for group in groups(made.modules) if group.treatment in labels]
    plain = [group for group in groups(made.modules) if group.treatment not in labels]
    return (
        _group_table("Quantized", packed, plan, made),
        _group_table("Not quantized", plain, plan, made),
    )


def _lists(plan: Plan, tests: Sequence[TestResult]) -> list[Block]:
    lines = {
        "Left out": (*_omissions(plan.omitted), *_omitted_files(plan.omitted_files)),
        "Linked files": tuple(f"{file} -> {target}" for file, target in plan.linked_files),
        "Needed before a build": plan.pending,
        "Readers that cannot load it": tuple(_refusals(plan)),
        "Tests": tuple(
            f"{'passed' if test.passed else 'FAILED'}  {test.text}  (it is {test.found})"
            for test in tests
        ),
    }
    lists: list[Block] = [Items(found, title=title) for title, found in lines.items() if found]
    if plan.findings:
        lists.append(Rendered((render(plan.findings),), "Findings"))
    return lists


def _refusals(plan: Plan) -> Iterable[str]:
    # Readers that are built on each other refuse for one reason.
    for reason, alike in by_key(plan.refusals, lambda refusal: refusal.reason).items():
        yield f"{', '.join(refusal.reader for refusal in alike)}: {reason}"


def _heading(plan: Plan) -> Iterable[tuple[str, str]]:
    model = plan.model
    yield "policy", f"{plan.policy.name} (digest {plan.policy_digest[:12]})"
    yield "target", plan.target
    counts = [model.architecture.family, counted(model.n_layers, "layer")]
    if model.n_experts:
        counts.append(f"{counted(model.n_experts, 'expert')} a layer")
    yield "model", f"{model.id} ({', '.join(counts)})"
    if plan.pruning:
        yield "pruned", plan.pruning.about
    if plan.fp8_rule:
        yield "fp8", f"dequantized by rule {plan.fp8_rule}"
    yield from plan.remarks
    for file in plan.statistics:
        yield file.name, file.path


def _group_table(title: str, chosen: Sequence[Group], plan: Plan, made: Outline) -> Table:
    # One unit for all rows, so that sizes can be compared by eye.
    word, scale = column_unit(made.nbytes)
    guarded = {tensor.role for tensor in plan.model.tensors if is_guarded(tensor)}
    figures = ("tensors", "parameters", word, "share", "bpw")
    rows = tuple(
        (
            *group_cells(group, scale),
            f"{100 * group.nbytes / made.nbytes if made.nbytes else 0.0:.2f} %",
            f"{group.bpw or 0:.3f}",
            _reason(group, guarded),
        )
        for group in chosen
    )
    columns = ("role", "layers", "treatment", *figures, "decided by")
    leaving = ("tensors", "parameters", "share", "decided by")
    return Table(columns, rows, title, right=figures, leaving=leaving)


def _reason(group: Group, guarded: Iterable[str]) -> str:
    if group.rule != OTHERWISE:
        return group.rule
    return "no rule names it (guarded)" if group.role in guarded else f"no rule ({OTHERWISE})"


def _totals(plan: Plan, made: Outline) -> Iterable[tuple[str, str]]:
    yield "tensors", f"{counted(made.tensors, 'tensor')}, {made.nbytes:,} bytes"
    yield "size", size_change(plan.source_nbytes, made.nbytes)
    meaning = f"8 x bytes of all output tensors / {made.parameters:,} parameters"
    shown = f"{made.bpw:.4f} bpw" if made.bpw is not None else "no parameters"
    yield "bits", f"{shown} ({meaning} of the logical model)"
    yield from _files(plan.files)


def _files(files: Sequence[PlannedFile]) -> Iterable[tuple[str, str]]:
    shards = [file for file in files if file.kind == "tensors"]
    count = counted(len(shards), "tensor file")
    if all(file.nbytes is not None for file in shards):
        yield "files", f"{count}, {_known_nbytes(shards):,} bytes with headers"
    else:
        least = sum(file.least for file in shards)
        size = f"{least:,} bytes = {both_units(least)}"
        yield "files", f"{count}, {size} with header and index, without its metadata"
    beside = [file for file in files if file.kind != "tensors" and file.nbytes is not None]
    if beside:
        names = ", ".join(file.name for file in beside)
        yield "beside", f"{_known_nbytes(beside):,} bytes in {names}"
    unknown = [file for file in files if file.nbytes is None]
    for file in unknown:
        yield "not known", f"size of {file.name}: {file.reason}"
    if not unknown:
        yield "folder", both_units(_known_nbytes(files))


def _known_nbytes(files: Sequence[PlannedFile]) -> int:
    return sum(file.nbytes or 0 for file in files)


def _omissions(omitted: Sequence[Omission]) -> Iterable[str]:
    # A left-out MTP block has hundreds of tensors and one reason.
    alike = by_key(omitted, lambda omission: (omission.role, omission.reason))
    for (role, reason), members in alike.items():
        nbytes = sum(member.nbytes for member in members)
        size = f"{counted(len(members), 'tensor')}, {both_units(nbytes)}"
        yield f"{role or 'no role'}: {size}, such as {members[0].tensor.name}: {reason}"


def _omitted_files(omitted: Sequence[OmittedFile]) -> Iterable[str]:
    for reason, members in by_key(omitted, lambda file: file.reason).items():
        nbytes = [file.nbytes for file in members if file.nbytes is not None]
        size = f" ({both_units(sum(nbytes))})" if nbytes else ""
        names = listed([file.name for file in members])
        yield f"beside the weights, {names}{size}: {reason}"


def _tensor_table(plan: Plan) -> Table:
    rows = tuple(
        (
            tensor.name,
            tensor.dtype,
            "x".join(str(size) for size in tensor.shape),
            f"{tensor.nbytes:,}",
            treatment_of(module),
            plan.rule_text(module),
            tensor.file,
        )
        for module in plan.modules
        for tensor in module.tensors
    )
    leaving = ("file", "decided by", "treatment")
    columns = ("tensor", "dtype", "shape", "bytes", *reversed(leaving))
    return Table(columns, rows, "Tensors", right=("bytes",), leaving=leaving)
