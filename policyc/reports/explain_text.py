"""An Explanation as text, markdown, and the documented JSON document."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from policy_dsl.plan import Module, Plan, PlannedTensor
from policy_dsl.planning.explain import Explanation
from policy_dsl.planning.outline import OTHERWISE, source_dtypes, treatment_of
from policy_dsl.quantities import bits_per_weight, both_units, counted, layer_list
from policy_dsl.treatments import Coded
from policyc.reports.report import Block, Column, Facts, Table, render_markdown, render_text

_OUTCOMES = {
    "decided": "decided",
    "lost": "lost: a later rule matches too",
    "without effect": "without effect: the target leaves it out",
    "guarded": "not applied: it does not name this role (guarded)",
}
# Programs find the same keys for a tensor that the bundle leaves out.
_NO_MODULE: dict[str, Any] = {
    **dict.fromkeys(("module", "treatment", "rule", "bpw")),
    "tensors": [],
    **dict.fromkeys(("nbytes", "parameters", "sources", "added"), 0),
}


def explain_text(found: Explanation, plan: Plan, *, width: int | None = None) -> str:
    """The explanation as text."""
    return render_text(_blocks(found, plan), width=width)


def explain_markdown(found: Explanation, plan: Plan) -> str:
    """The explanation as GitHub markdown."""
    return render_markdown(_blocks(found, plan))


def explain_document(found: Explanation, plan: Plan) -> dict[str, Any]:
    """The explanation as JSON values."""
    subject, module = found.subject, found.subject.module
    omission = subject.omission
    told = subject.tensor or omission or module
    return {
        "schema_version": 1,
        "kind": "explain",
        "policy": {"name": plan.policy.name, "digest": plan.policy_digest},
        "target": plan.target,
        "model": plan.model.id,
        "name": subject.name,
        "role": told.role or None if told else None,
        "layer": told.layer if told else None,
        "expert": found.expert,
        "source_expert": found.source_expert,
        "namesake": found.namesake._asdict() if found.namesake else None,
        "left_out": omission.reason if omission else None,
        "guarded": found.guarded,
        "rules": [
            {"rule": rule.place, "text": rule.text, "outcome": rule.outcome} for rule in found.rules
        ],
        # Names, so that a script can go on with them.
        "alike": [one.name for one in found.alike],
        **(_module(module) if module else _NO_MODULE),
    }


def _module(module: Module) -> dict[str, Any]:
    return {
        "module": module.name,
        "treatment": treatment_of(module),
        "rule": module.rule,
        "tensors": [_tensor(one) for one in module.tensors],
        "nbytes": module.nbytes,
        "parameters": module.parameters,
        "bpw": bits_per_weight(module.nbytes, module.parameters),
        "sources": len(module.sources),
        "added": module.added,
    }


def _blocks(found: Explanation, plan: Plan) -> list[Block]:
    blocks: list[Block] = [Facts(tuple(_facts(found, plan)))]
    if found.rules:
        columns = (Column("rule"), Column("text"), Column("outcome"))
        rows = tuple((rule.place, rule.text, _OUTCOMES[rule.outcome]) for rule in found.rules)
        blocks.append(Table(columns, rows, "Rules that match, the last one decides"))
    if found.subject.module is not None:
        blocks.append(_bytes_table(found.subject.module))
    return blocks


def _facts(found: Explanation, plan: Plan) -> Iterable[tuple[str, str]]:
    subject, module, omission = found.subject, found.subject.module, found.subject.omission
    told = subject.tensor or omission
    yield "tensor", subject.name
    yield "policy", f"{plan.policy.name} for {plan.target} on {plan.model.id}"
    # Which expert it is in the source is nothing to rely on then.
    if plan.pruning and not plan.pruning.chosen:
        yield "pruned", plan.pruning.about
    if told is not None and told.role:
        yield "role", ", ".join([told.role, *_places(found, told.layer)])
    elif module is not None:
        yield "role", ", ".join([module.role, *_places(found, module.layer)])
    yield from _namesake(found)
    # Nothing is written for it, so there is nothing more to tell.
    if module is None:
        yield "left out", omission.reason if omission else ""
        return
    yield "becomes", f"{module.name} ({_sources(module)})"
    yield "treatment", treatment_of(module)
    yield "decided by", _decided_by(found, module)
    # Embeddings and the head stand in no layer.
    layers = [one.layer for one in found.alike if one.layer is not None]
    where = f", layers {layer_list(layers)}" if layers else ""
    yield "alike", f"{counted(len(found.alike), 'module')}{where}"


def _namesake(found: Explanation) -> Iterable[tuple[str, str]]:
    if found.namesake is not None:
        old, new = found.namesake
        became = "which is pruned" if new is None else f"now expert {new}"
        yield "beware", f"the source's tensor of this name is of its expert {old}, {became}"


def _places(found: Explanation, layer: int | None) -> Iterable[str]:
    if layer is not None:
        yield f"layer {layer}"
    new, old = found.expert, found.source_expert
    if new is not None:
        yield f"expert {new}" if old is None else f"expert {new}, {old} in the source"
    elif old is not None:
        yield f"expert {old} of the source"


def _decided_by(found: Explanation, module: Module) -> str:
    if module.rule != OTHERWISE:
        return module.rule
    if not found.guarded:
        return f"{OTHERWISE}: no rule reaches it"
    role = found.subject.tensor.role if found.subject.tensor else module.role
    return f"the guard: {role} is kept unless a rule names it"


def _sources(module: Module) -> str:
    dtypes = ", ".join(source_dtypes(module))
    shape = "x".join(str(size) for size in module.shape)
    if not module.sources:
        # Where experts lie apart, one that only pads is a module of its own.
        about = ": an expert that only pads" if module.added else ""
        return f"{shape}, from no tensor of the source{about}"
    more = f", and {counted(module.added, 'expert')} that only pad" if module.added else ""
    return f"{shape} from {counted(len(module.sources), 'source tensor')} of {dtypes}{more}"


def _bytes_table(module: Module) -> Table:
    columns = (
        Column("what"),
        Column("tensor"),
        Column("dtype"),
        Column("shape"),
        Column("bytes", right=True),
    )
    rows = [
        (_what(module, one), one.name, one.dtype, "x".join(map(str, one.shape)), f"{one.nbytes:,}")
        for one in module.tensors
    ]
    bpw = bits_per_weight(module.nbytes, module.parameters) or 0
    total = f"{both_units(module.nbytes)}, {bpw:.3f} bpw of {module.parameters:,} parameters"
    # The breakdown must add up before the reader's eyes.
    rows.append(("total", total, "", "", f"{module.nbytes:,}"))
    return Table(columns, tuple(rows), "Bytes")


def _what(module: Module, tensor: PlannedTensor) -> str:
    quantized = isinstance(module.treatment, Coded)
    return {"weight": "codes" if quantized else "values"}.get(tensor.part, tensor.part)


def _tensor(tensor: PlannedTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "part": tensor.part,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "nbytes": tensor.nbytes,
        "file": tensor.file,
        "start": tensor.start,
    }
