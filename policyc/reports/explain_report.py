"""An Explanation as blocks and as the documented JSON document."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from policy_dsl.documents.reports import ExplainDocument, ExplainedTensor, MatchedRule
from policy_dsl.documents.values import entry_of
from policy_dsl.plan import OTHERWISE, Module, Plan, PlannedTensor
from policy_dsl.planning.explain import Explanation
from policy_dsl.planning.outline import source_dtypes, treatment_of
from policy_dsl.quantities import bits_per_weight, both_units, counted, layer_list
from policy_dsl.treatments import Coded
from policyc.reports.blocks import Block, Facts, Table

_OUTCOMES = {
    "decided": "decided",
    "lost": "lost: a later rule matches too",
    "without effect": "without effect: the target leaves it out",
    "guarded": "not applied: it does not name this role (guarded)",
}
# Programs find the same keys for a tensor that the bundle leaves out.
_NO_MODULE: dict[str, Any] = {
    **dict.fromkeys(("module", "treatment", "rule", "rule_at", "bpw")),
    "tensors": [],
    **dict.fromkeys(("nbytes", "parameters", "sources", "added"), 0),
}


def explain_document(explanation: Explanation, plan: Plan) -> ExplainDocument:
    """The explanation as JSON values."""
    subject, omission = explanation.subject, explanation.subject.omission
    module = subject.module
    described = subject.tensor or omission or module
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
        rules=[entry_of(MatchedRule, rule, rule=rule.place) for rule in explanation.rules],
        # Names, so that a script can go on with them.
        alike=[alike.name for alike in explanation.alike],
        **(_module_keys(module, plan) if module else _NO_MODULE),
    )


def _module_keys(module: Module, plan: Plan) -> dict[str, Any]:
    return {
        "module": module.name,
        "treatment": treatment_of(module),
        "rule": plan.rule_text(module),
        "rule_at": plan.rule_at(module),
        "tensors": [entry_of(ExplainedTensor, tensor) for tensor in module.tensors],
        "nbytes": module.nbytes,
        "parameters": module.parameters,
        "bpw": bits_per_weight(module.nbytes, module.parameters),
        "sources": len(module.sources),
        "added": module.added,
    }


def explain_blocks(explanation: Explanation, plan: Plan) -> list[Block]:
    """The explanation for people."""
    blocks: list[Block] = [Facts(tuple(_facts(explanation, plan)))]
    if explanation.rules:
        rows = tuple((rule.place, rule.text, _OUTCOMES[rule.outcome]) for rule in explanation.rules)
        blocks.append(
            Table(("rule", "text", "outcome"), rows, "Rules that match, the last one decides")
        )
    if explanation.subject.module is not None:
        blocks.append(_bytes_table(explanation.subject.module))
    return blocks


def _facts(explanation: Explanation, plan: Plan) -> Iterable[tuple[str, str]]:
    subject = explanation.subject
    module, omission = subject.module, subject.omission
    described = subject.tensor or omission
    yield "tensor", subject.name
    yield "policy", f"{plan.policy.name} for {plan.target} on {plan.model.id}"
    # Which expert it is in the source is nothing to rely on then.
    if plan.pruning and not plan.pruning.chosen:
        yield "pruned", plan.pruning.about
    if described is not None and described.role:
        yield "role", ", ".join([described.role, *_places(explanation, described.layer)])
    elif module is not None:
        yield "role", ", ".join([module.role, *_places(explanation, module.layer)])
    yield from _namesake(explanation)
    # Nothing is written for it, so there is nothing more to say.
    if module is None:
        yield "left out", omission.reason if omission else ""
        return
    yield "becomes", f"{module.name} ({_sources(module)})"
    yield "treatment", treatment_of(module)
    yield "decided by", _decided_by(explanation, plan.rule_text(module))
    # Embeddings and the head are in no layer.
    layers = [alike.layer for alike in explanation.alike if alike.layer is not None]
    where = f", layers {layer_list(layers)}" if layers else ""
    yield "alike", f"{counted(len(explanation.alike), 'module')}{where}"


def _namesake(explanation: Explanation) -> Iterable[tuple[str, str]]:
    if explanation.namesake is not None:
        old, new = explanation.namesake
        became = "which is pruned" if new is None else f"now expert {new}"
        yield "beware", f"the source's tensor of this name is of its expert {old}, {became}"


def _places(explanation: Explanation, layer: int | None) -> Iterable[str]:
    if layer is not None:
        yield f"layer {layer}"
    new, old = explanation.expert, explanation.source_expert
    if new is not None:
        yield f"expert {new}" if old is None else f"expert {new}, {old} in the source"
    elif old is not None:
        yield f"expert {old} of the source"


def _decided_by(explanation: Explanation, rule: str) -> str:
    if rule != OTHERWISE:
        return rule
    tensor = explanation.subject.tensor
    if not explanation.guarded or tensor is None:
        return f"{OTHERWISE}: no rule reaches it"
    return f"the guard: {tensor.role} is kept unless a rule names it"


def _sources(module: Module) -> str:
    dtypes = ", ".join(source_dtypes(module))
    shape = "x".join(str(size) for size in module.shape)
    if not module.sources:
        # Where experts are stored apart, one that only pads is a module of its own.
        about = ": an expert that only pads" if module.added else ""
        return f"{shape}, from no tensor of the source{about}"
    more = f", and {counted(module.added, 'expert')} that only pad" if module.added else ""
    return f"{shape} from {counted(len(module.sources), 'source tensor')} of {dtypes}{more}"


def _bytes_table(module: Module) -> Table:
    rows = [
        (
            _what(module, tensor),
            tensor.name,
            tensor.dtype,
            "x".join(map(str, tensor.shape)),
            f"{tensor.nbytes:,}",
        )
        for tensor in module.tensors
    ]
    bpw = bits_per_weight(module.nbytes, module.parameters) or 0
    total = f"{both_units(module.nbytes)}, {bpw:.3f} bpw of {module.parameters:,} parameters"
    # The breakdown must add up before the reader's eyes.
    rows.append(("total", total, "", "", f"{module.nbytes:,}"))
    columns = ("what", "tensor", "dtype", "shape", "bytes")
    return Table(columns, tuple(rows), "Bytes", right=("bytes",))


def _what(module: Module, tensor: PlannedTensor) -> str:
    quantized = isinstance(module.treatment, Coded)
    return {"weight": "codes" if quantized else "values"}.get(tensor.part, tensor.part)
