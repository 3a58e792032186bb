"""Heads of their own in models whose config says that the embedding is the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.plan import Plan
from policy_dsl.planning.decisions import Decision
from policy_dsl.planning.left_out import names_it
from policy_dsl.quantities import both_units
from policy_dsl.roles.config_facts import TIED, rewritten
from policy_dsl.roles.model import Model


def with_own_head(model: Model, made: Sequence[Decision]) -> Model:
    """The model, not tied any more if a rule names a head of its own, to store it."""
    heads = [one for one in made if one.tensor.role == "lm_head"] if model.tied else []
    names = frozenset(one.tensor.source.name for one in heads)
    kept = any(
        one.rule is not None
        and one.written.action != "drop"
        and names_it(one.rule, one.tensor, names, model)
        for one in heads
    )
    return untied(model) if kept else model


def untied(model: Model) -> Model:
    """The model with a head of its own, as config.json then has to say."""
    # Wherever the source says it, else at the top.
    config = rewritten(model.config, lambda key, value: False if key == TIED else value)
    config |= {} if model.facts.is_given(TIED) else {TIED: False}
    return replace(model, tied=False, facts=replace(model.facts, config=config))


def head_remarks(model: Model, source: Model) -> tuple[tuple[str, str], ...]:
    """What a plan says about a model that is tied in its source and not in the bundle."""
    if model.tied == source.tied:
        return ()
    return (("head", f"stored beside the embedding, so config.json says {TIED}: false"),)


def head_findings(plan: Plan) -> list[Diagnostic]:
    """The warning about a head that is left out because the model is tied, with its bytes."""
    return [
        diagnostic(
            "tied-head-left-out",
            suggestion=f'write "{omission.role}: keep" to store it, or "{omission.role}: drop"',
            name=omission.tensor.name,
            nbytes=both_units(omission.nbytes),
            embedding=omission.equals,
        )
        for omission in plan.omitted
        if omission.equals
    ]
