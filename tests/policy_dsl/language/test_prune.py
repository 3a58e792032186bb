"""`prune experts …`: a count and a ranking, or the numbers of those that stay."""

from __future__ import annotations

import pytest

from policy_dsl.diagnostics import SourceText
from policy_dsl.language.load import parse_policy
from policy_dsl.language.print_policy import policy_digest, print_dsl, print_yaml
from policy_dsl.language.read_yaml import read_yaml
from policy_dsl.policy import LayerRange, Policy, Prune

KEPT = Prune(keep=(LayerRange(0, 5), LayerRange(7, 7)))


def read(text: str) -> Policy:
    name = "p.yaml" if text.startswith("transforms") else "p.qpol"
    return parse_policy(text, name)[0]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("prune experts to 6", Prune(to=6, by="reap")),
        ("prune experts to 6 by ean_sum", Prune(to=6, by="ean_sum")),
        ("transforms: [{prune: experts, to: 6, by: keep}]", Prune(to=6, by="keep")),
        ("prune experts keep 0-5,7", KEPT),
        ('transforms: ["prune experts keep 0-5,7"]', KEPT),
        ('transforms: [{prune: experts, keep: "0-5,7"}]', KEPT),
        ("transforms: [{prune: experts, keep: 3}]", Prune(keep=(LayerRange(3, 3),))),
    ],
)
def test_both_notations_say_it(text: str, meant: Prune) -> None:
    policy = read(text)
    assert policy.transforms == (meant,)
    for printed in (print_dsl(policy), print_yaml(policy)):
        assert read(printed) == policy


@pytest.mark.parametrize("text", ["7, 0..5", "0-3, 2-5, 7", "5,4,3,2,1,0,7,7"])
def test_the_same_experts_are_the_same_policy(text: str) -> None:
    one, other = read(f"prune experts keep {text}"), read("prune experts keep 0-5,7")
    assert policy_digest(one) == policy_digest(other)
    assert "prune experts keep 0-5,7\n" in print_dsl(one)
    assert one.transforms[0].count == 7


def test_variables_stay_as_they_are_written() -> None:
    for text in ("prune experts to ${n} by reap", "prune experts keep 0-${n}"):
        policy, _ = parse_policy(f"var n = 5\n{text}", "p.qpol")
        assert policy.transforms[0].count in (5, 6)
        assert text in print_dsl(policy)
        assert text in print_yaml(policy)
        assert read_yaml(SourceText("p", print_yaml(policy)), "p") == policy
