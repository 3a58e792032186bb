"""Options that several commands have, each in one place, and the request that they make up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import policyc
from policy_dsl.diagnostics import PolicyError, diagnostic
from policy_dsl.escaping import escaped
from policyc import workflow
from policyc.cli.console import note

if TYPE_CHECKING:
    from policy_dsl.inventory import Inventory
    from policy_dsl.plan import Plan
    from policy_dsl.policy import Policy

Command = Callable[..., None]


def given_text(word: str) -> str:
    """The word of an option or argument. Raises: click.BadParameter for an empty one."""
    # What an unset variable of the shell leaves; as a path it would mean the current folder.
    if not word:
        raise click.BadParameter("it is empty; is a variable of the shell not set?")
    return word


def given_path(word: str) -> Path:
    """The path that an option or argument names. Raises: click.BadParameter for an empty one."""
    return Path(given_text(word))


def choice(name: str, *words: str, help: str = "Form of the result.") -> Callable[..., Any]:
    """An option that takes one of a few words, the first if it is not given."""
    # Closed sets, so that a typo is a usage error before any work.
    form = click.Choice(words)
    return click.option(name, type=form, default=words[0], show_default=True, help=help)


argument = partial(click.argument, type=given_text)
words = partial(argument, nargs=-1, required=True)
text_option = partial(click.option, type=given_text)
path_option = partial(click.option, type=given_path, metavar="FILE")
flag = partial(click.option, is_flag=True)


def codes(name: str, *, help: str) -> Callable[..., Any]:
    """An option that takes codes of findings, several times."""
    return text_option(name, metavar="CODE", multiple=True, callback=_known_codes, help=help)


def _known_codes(_: click.Context, _option: click.Parameter, given: Sequence[str]) -> Sequence[str]:
    from policy_dsl.diagnostics import catalogue, did_you_mean

    for code in given:
        if code not in catalogue():
            cure = did_you_mean(code, catalogue()) or "docs/errors.md lists them"
            raise click.BadParameter(f'there is no code "{code}"; {cure}')
    return given


any_report = choice("--format", "text", "json", "markdown")
fail_on_warn = flag("--fail-on-warn", help="Treat warnings as errors.")
no_links = flag("--no-links", help="Refuse weights that are links out of the model's folder.")
quiet = flag("--quiet", "-q", help="Only errors on stderr.")
jobs = click.option(
    *("--jobs", "-j"), type=click.IntRange(1, 256), help="Threads; as many as cores if not given."
)


@dataclass(frozen=True)
class Request:
    """A policy with the choices that options made over its own."""

    policy: str = ""
    model: str | None = None
    target: str | None = None
    overrides: tuple[str, ...] = ()
    allow_requantize: bool = False
    imatrix: Path | None = None
    saliency: Path | None = None
    no_links: bool = False
    verbose: bool = False

    @property
    def statistics(self) -> dict[str, str]:
        """The files of statistics that options name."""
        named = {"imatrix": self.imatrix, "saliency": self.saliency}
        return {name: str(path) for name, path in named.items() if path is not None}

    def read_policy(self) -> Policy:
        """The policy with its overrides."""
        return policyc.load(self.policy, parse_overrides(self.overrides))

    def open_model(self, policy: Policy, *, online: bool = True) -> Inventory:
        """The inventory of the model that is asked for, or else of the policy's own."""
        links = not self.no_links
        inventory = workflow.open_model(policy, self.model, links=links, online=online)
        if self.verbose:
            for line in (f"source {inventory.id}", *inventory.notes):
                note(f"note: {escaped(line)}")
        return inventory

    def plan(self, policy: Policy | None = None) -> Plan:
        """The complete plan, of a policy that is read already or of its own."""
        policy = policy or self.read_policy()
        return workflow.plan(
            policy,
            model=self.open_model(policy),
            target=self.target,
            statistics=self.statistics,
            allow_requantize=self.allow_requantize,
        )


_REQUESTS: dict[str, Callable[[Command], Command]] = {
    "policy": argument("policy", help="Policy file, or the name of a bundled policy."),
    "model": text_option(
        "--model",
        metavar="PATH|HUB_ID|CATALOG",
        help="Checkpoint to use instead of the policy's own: a folder, a recorded headers file, "
        "org/name on the hub, or a catalog name.",
    ),
    "target": text_option(
        "--target", metavar="TARGET", help="Bundle format, if the policy has several."
    ),
    "overrides": click.option(
        *("--set", "overrides"),
        metavar="VAR=VALUE",
        multiple=True,
        help="Set a variable of the policy. Repeatable.",
    ),
    "allow_requantize": flag("--allow-requantize", help="Take a source that is already quantized."),
    "imatrix": path_option(
        "--imatrix", help="Importance matrix of llama.cpp; overrides the policy's own."
    ),
    "saliency": path_option(
        "--saliency", help="Ranking of the experts; overrides the policy's own."
    ),
    "no_links": no_links,
    "verbose": flag("--verbose", "-v", help="Say where things come from."),
}


def requesting(*left_out: str) -> Callable[[Command], Command]:
    """A decorator that gives a command, whose first parameter is a Request, its options.

    left_out: fields of the request for which it has no option.
    """
    options = {name: option for name, option in _REQUESTS.items() if name not in left_out}

    def decorated(command: Command) -> Command:
        @wraps(command)
        def run(**given: Any) -> None:
            request = Request(**{name: given.pop(name) for name in options})
            command(request, **given)

        # The last one applied is the first that help shows.
        for option in reversed(options.values()):
            option(run)
        return run

    return decorated


def parse_overrides(written: tuple[str, ...]) -> dict[str, str]:
    """`VAR=VALUE` arguments by name; the policy says what kind of value it is.

    Raises: PolicyError (bad-argument) for each one without a name or `=`.
    """
    if wrong := [word for word in written if "=" not in word or word.lstrip().startswith("=")]:
        reasons = (f'"{word}" is not VAR=VALUE' for word in wrong)
        raise PolicyError(diagnostic("bad-argument", option="--set", reason=why) for why in reasons)
    # Values may hold "=" themselves.
    pairs = (word.split("=", 1) for word in written)
    return {name.strip(): value.strip() for name, value in pairs}
