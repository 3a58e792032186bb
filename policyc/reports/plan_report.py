"""A plan for people, and why one of its tensors is treated as it is; of that, the JSON too."""

from collections.abc import Iterator, Sequence
from typing import Any

from policy_dsl.diagnostics import render
from policy_dsl.documents import entry_of
from policy_dsl.documents.reports import ExplainDocument, ExplainedTensor, MatchedRule
from policy_dsl.plan import OTHERWISE, Module, Plan, PlannedFile, coded_modules
from policy_dsl.planning.assertions import TestResult
from policy_dsl.planning.decisions import Explanation
from policy_dsl.planning.matching import is_guarded
from policy_dsl.planning.outline import Group, Outline, groups, outline, source_dtypes, treatment_of
from policy_dsl.quantities import bits_per_weight, both_units, column_unit, counted, layer_list
from policy_dsl.sources.checkpoint import listed
from policy_dsl.treatments import Coded
from policyc.reports import Block, Facts, Items, Rendered, Table, by_key, entries_of, sizes_text
from policyc.reports.inspect_report import group_cells

_OUTCOMES = {
    "decided": "decided",
    "lost": "lost: a later rule matches too",
    "without effect": "without effect: the target leaves it out",
    "guarded": "not applied: it does not name this role (guarded)",
}
# Programs find the same keys for a tensor that the bundle leaves out.
_NO_MODULE: dict[str, Any] = dict.fromkeys(("module", "treatment", "rule", "rule_at", "bpw"))
_NO_MODULE |= {"tensors": [], **dict.fromkeys(("nbytes", "parameters", "sources", "added"), 0)}


def plan_blocks(
    plan: Plan, tests: Sequence[TestResult] = (), *, tensors: bool = False
) -> list[Block]:
    """The plan for people; `tensors` lists every output tensor."""
    made = outline(plan)
    quantized = {treatment_of(module) for module, _ in coded_modules(plan.forms.examples)}
    packed: list[Group] = []
    plain: list[Group] = []
    for group in groups(made.modules):
        (packed if group.treatment in quantized else plain).append(group)
    # Two tables: what is quantized is the plan, what is not needs a reason.
    blocks: list[Block] = [
        Facts(list(_heading(plan))),
        _group_table("Quantized", packed, plan, made),
        _group_table("Not quantized", plain, plan, made),
        Facts([*_totals(plan, made), *_files(plan)], "Totals"),
        *(Items(lines, title) for title, lines in _lists(plan, tests).items() if lines),
    ]
    if plan.findings:
        blocks.append(Rendered([render(plan.findings)], "Findings"))
    if tensors:
        # Last: what people look for must not end up above thousands of lines.
        blocks.append(_tensor_table(plan))
    return [block for block in blocks if not isinstance(block, Table) or block.rows]


def _heading(plan: Plan) -> Iterator[tuple[str, str]]:
    model = plan.model
    yield "policy", f"{plan.policy.name} (digest {plan.policy_digest[:12]})"
    yield "target", plan.target
    experts = f", {counted(model.n_experts, 'expert')} a layer" if model.n_experts else ""
    layers = counted(model.n_layers, "layer")
    yield "model", f"{model.id} ({model.architecture.family}, {layers}{experts})"
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
    rows = []
    for group in chosen:
        share = f"{100 * group.nbytes / made.nbytes if made.nbytes else 0.0:.2f} %"
        reason = group.rule
        if reason == OTHERWISE:
            is_kept = group.role in guarded
            reason = "no rule names it (guarded)" if is_kept else f"no rule ({OTHERWISE})"
        rows.append((*group_cells(group, scale), share, f"{group.bpw or 0:.3f}", reason))
    columns = ("role", "layers", "treatment", *figures, "decided by")
    leaving = ("tensors", "parameters", "share", "decided by")
    return Table(columns, rows, title, right=figures, leaving=leaving)


def _totals(plan: Plan, made: Outline) -> Iterator[tuple[str, str]]:
    yield "tensors", f"{counted(made.tensors, 'tensor')}, {made.nbytes:,} bytes"
    before, after = plan.source_nbytes, made.nbytes
    change = ""
    if before:
        # Both in the same unit: mixed units would not compare.
        percent = 100 * (before - after) / before
        change = f", {abs(percent):.1f} % {'smaller' if percent >= 0 else 'larger'}"
    yield "size", f"{both_units(before)} -> {both_units(after)}{change}"
    meaning = f"8 x bytes of all output tensors / {made.parameters:,} parameters"
    shown = f"{made.bpw:.4f} bpw" if made.bpw is not None else "no parameters"
    yield "bits", f"{shown} ({meaning} of the logical model)"


def _files(plan: Plan) -> Iterator[tuple[str, str]]:
    shards, beside = plan.tensor_files, [file for file in plan.files if file.kind != "tensors"]
    count = counted(len(shards), "tensor file")
    if all(file.nbytes is not None for file in shards):
        yield "files", f"{count}, {_known_nbytes(shards):,} bytes with headers"
    else:
        least = sum(file.least for file in shards)
        size = f"{least:,} bytes = {both_units(least)}"
        yield "files", f"{count}, {size} with header and index, without its metadata"
    if names := ", ".join(file.name for file in beside if file.nbytes is not None):
        yield "beside", f"{_known_nbytes(beside):,} bytes in {names}"
    unknown = [file for file in plan.files if file.nbytes is None]
    for file in unknown:
        yield "not known", f"size of {file.name}: {file.reason}"
    if not unknown:
        yield "folder", both_units(_known_nbytes(plan.files))


def _known_nbytes(files: Sequence[PlannedFile]) -> int:
    return sum(file.nbytes or 0 for file in files)


def _lists(plan: Plan, tests: Sequence[TestResult]) -> dict[str, Sequence[str]]:
    # Readers that are built on each other refuse for one reason.
    refusals = by_key(plan.not_loaded, lambda refusal: refusal.reason)
    return {
        "Left out": list(_left_out(plan)),
        "Linked files": [f"{file} -> {target}" for file, target in plan.linked_files],
        "Needed before a build": plan.pending,
        "Readers that cannot load it": [
            f"{', '.join(refusal.reader for refusal in alike)}: {reason}"
            for reason, alike in refusals.items()
        ],
        "Tests": [
            f"{'passed' if test.passed else 'FAILED'}  {test.text}  (it is {test.found})"
            for test in tests
        ],
    }


def _left_out(plan: Plan) -> Iterator[str]:
    # A left-out MTP block has hundreds of tensors and one reason.
    tensors = by_key(plan.omitted, lambda omission: (omission.role, omission.reason))
    for (role, reason), omitted in tensors.items():
        nbytes = sum(omission.nbytes for omission in omitted)
        size = f"{counted(len(omitted), 'tensor')}, {both_units(nbytes)}"
        yield f"{role or 'no role'}: {size}, such as {omitted[0].tensor.name}: {reason}"
    for reason, files in by_key(plan.omitted_files, lambda file: file.reason).items():
        known = [file.nbytes for file in files if file.nbytes is not None]
        size = f" ({both_units(sum(known))})" if known else ""
        yield f"beside the weights, {listed([file.name for file in files])}{size}: {reason}"


def _tensor_table(plan: Plan) -> Table:
    rows = []
    for module in plan.modules:
        decided = treatment_of(module), plan.rule_of(module)[0]
        for one in module.tensors:
            figures = one.dtype, sizes_text(one.shape), f"{one.nbytes:,}"
            rows.append((one.name, *figures, *decided, one.file))
    leaving = ("file", "decided by", "treatment")
    columns = ("tensor", "dtype", "shape", "bytes", *reversed(leaving))
    return Table(columns, rows, "Tensors", right=("bytes",), leaving=leaving)


def explain_document(explanation: Explanation, plan: Plan) -> ExplainDocument:
    """The explanation as JSON values."""
    subject, omission = explanation.subject, explanation.subject.omission
    module = subject.module
    described = subject.tensor or omission or module
    of_module = _NO_MODULE
    if module is not None:
        rule, rule_at = plan.rule_of(module)
        of_module = {
            "module": module.name,
            "treatment": treatment_of(module),
            "rule": rule,
            "rule_at": rule_at,
            "tensors": entries_of(ExplainedTensor, module.tensors),
            "nbytes": module.nbytes,
            "parameters": module.parameters,
            "bpw": bits_per_weight(module.nbytes, module.parameters),
            "sources": len(module.sources),
            "added": module.added,
        }
    return entry_of(
        ExplainDocument,
        explanation,
        schema_version=1,
        kind="explain",
        policy={"name": plan.policy.name, "digest": plan.policy_digest},
        target=plan.target,
        model=plan.model.id,
        name=subject.name,
        role=described.role or None if described else None,
        layer=described.layer if described else None,
        namesake=explanation.namesake._asdict() if explanation.namesake else None,
        left_out=omission.reason if omission else None,
        rules=entries_of(MatchedRule, explanation.rules, rule="place"),
        # Names, so that a script can go on with them.
        alike=[alike.name for alike in explanation.alike],
        **of_module,
    )


def explain_blocks(explanation: Explanation, plan: Plan) -> list[Block]:
    """The explanation for people."""
    blocks: list[Block] = [Facts(list(_explain_facts(explanation, plan)))]
    if explanation.rules:
        rules = [(rule.place, rule.text, _OUTCOMES[rule.outcome]) for rule in explanation.rules]
        title = "Rules that match, the last one decides"
        blocks.append(Table(("rule", "text", "outcome"), rules, title))
    if (module := explanation.subject.module) is not None:
        codes = "codes" if isinstance(module.treatment, Coded) else "values"
        rows = []
        for one in module.tensors:
            part = codes if one.part == "weight" else one.part
            rows.append((part, one.name, one.dtype, sizes_text(one.shape), f"{one.nbytes:,}"))
        bpw = bits_per_weight(module.nbytes, module.parameters) or 0
        total = f"{both_units(module.nbytes)}, {bpw:.3f} bpw of {module.parameters:,} parameters"
        # The breakdown must add up before the reader's eyes.
        rows.append(("total", total, "", "", f"{module.nbytes:,}"))
        columns = ("what", "tensor", "dtype", "shape", "bytes")
        blocks.append(Table(columns, rows, "Bytes", right=("bytes",)))
    return blocks


def _explain_facts(explanation: Explanation, plan: Plan) -> Iterator[tuple[str, str]]:
    subject = explanation.subject
    module, omission = subject.module, subject.omission
    yield "tensor", subject.name
    yield "policy", f"{plan.policy.name} for {plan.target} on {plan.model.id}"
    # Which expert it is in the source is nothing to rely on then.
    if plan.pruning and not plan.pruning.chosen:
        yield "pruned", plan.pruning.about
    named = subject.tensor or omission
    if (described := named if named and named.role else module) is not None:
        yield "role", ", ".join([described.role, *_places(explanation, described.layer)])
    if explanation.namesake is not None:
        old, new = explanation.namesake
        became = "which is pruned" if new is None else f"now expert {new}"
        yield "beware", f"the source's tensor of this name is of its expert {old}, {became}"
    # Where nothing is written for it, there is nothing more to say.
    if module is None:
        yield "left out", omission.reason if omission else ""
    else:
        yield from _facts_of(explanation, plan, module)


def _facts_of(explanation: Explanation, plan: Plan, module: Module) -> Iterator[tuple[str, str]]:
    yield "becomes", f"{module.name} ({_sources(module)})"
    yield "treatment", treatment_of(module)
    rule, tensor = plan.rule_of(module)[0], explanation.subject.tensor
    if rule == OTHERWISE and explanation.guarded and tensor is not None:
        rule = f"the guard: {tensor.role} is kept unless a rule names it"
    elif rule == OTHERWISE:
        rule = f"{OTHERWISE}: no rule reaches it"
    yield "decided by", rule
    layers = layer_list(alike.layer for alike in explanation.alike if alike.layer is not None)
    # Embeddings and the head are in no layer.
    where = "" if layers == "-" else f", layers {layers}"
    yield "alike", f"{counted(len(explanation.alike), 'module')}{where}"


def _places(explanation: Explanation, layer: int | None) -> Iterator[str]:
    if layer is not None:
        yield f"layer {layer}"
    new, old = explanation.expert, explanation.source_expert
    if new is not None:
        yield f"expert {new}" if old is None else f"expert {new}, {old} in the source"
    elif old is not None:
        yield f"expert {old} of the source"


def _sources(module: Module) -> str:
    shape = sizes_text(module.shape)
    if not module.sources:
        # Where experts are stored apart, one that only pads is a module of its own.
        about = ": an expert that only pads" if module.added else ""
        return f"{shape}, from no tensor of the source{about}"
    more = f", and {counted(module.added, 'expert')} that only pad" if module.added else ""
    count, dtypes = counted(len(module.sources), "source tensor"), source_dtypes(module)
    return f"{shape} from {count} of {', '.join(dtypes)}{more}"
