"""Options that several commands have, each in one place, and the request that they make up."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from policy_dsl.diagnostics import PolicyError, diagnostic
from policy_dsl.escaping import escaped
from policyc import workflow
from policyc.cli.console import guarded, note

if TYPE_CHECKING:
    from policy_dsl.inventory import Inventory
    from policy_dsl.plan import Plan
    from policy_dsl.policy import Policy


def given_text(word: str) -> str:
    """The word of an option or argument.

    Raises: typer.BadParameter for an empty one.
    """
    # What an unset variable of the shell leaves; as a path it would mean the current folder.
    if not word:
        raise typer.BadParameter("it is empty; is a variable of the shell not set?")
    return word


def given_path(word: str) -> Path:
    """The path that an option or argument names.

    Raises: typer.BadParameter for an empty one.
    """
    return Path(given_text(word))


def argument(metavar: str | None, about: str, parser: Callable[[str], Any] = given_text) -> Any:
    """An argument that is not empty."""
    return typer.Argument(metavar=metavar, help=about, parser=parser)


def text_option(name: str, metavar: str, about: str) -> Any:
    """An option with a text that is not empty."""
    return typer.Option(name, metavar=metavar, help=about, parser=given_text)


def path_option(*names: str, about: str, metavar: str = "FILE") -> Any:
    """An option with a path that is not empty."""
    return typer.Option(*names, metavar=metavar, help=about, parser=given_path)


# Closed sets, so that a typo is a usage error before any work.
ReportFormat = Literal["text", "json", "markdown"]
FindingsFormat = Literal["text", "json", "github", "sarif"]
PlainFormat = Literal["text", "json"]

AnyReport = Annotated[ReportFormat, typer.Option("--format", help="Form of the result.")]
AnyFindings = Annotated[FindingsFormat, typer.Option("--format", help="Form of the findings.")]
TextOrJson = Annotated[PlainFormat, typer.Option("--format", help="Form of the result.")]
FailOnWarn = Annotated[bool, typer.Option("--fail-on-warn", help="Treat warnings as errors.")]
NoLinks = Annotated[
    bool,
    typer.Option("--no-links", help="Refuse weights that are links out of the model's folder."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", "-j", min=1, max=256, help="Threads; as many as cores if not given."),
]


@dataclass(frozen=True)
class Request:
    """A policy with the choices that options made over its own."""

    policy: Annotated[str, argument("POLICY", "Policy file, or the name of a bundled policy.")]
    model: Annotated[
        str | None,
        text_option(
            "--model",
            "PATH|HUB_ID|CATALOG",
            "Checkpoint to use instead of the policy's own: a folder, a recorded headers file, "
            "org/name on the hub, or a catalog name.",
        ),
    ] = None
    target: Annotated[
        str | None, text_option("--target", "TARGET", "Bundle format, if the policy has several.")
    ] = None
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="VAR=VALUE", help="Set a variable of the policy. Repeatable."
        ),
    ] = None
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Take a source that is already quantized.")
    ] = False
    imatrix: Annotated[
        Path | None,
        path_option(
            "--imatrix", about="Importance matrix of llama.cpp; overrides the policy's own."
        ),
    ] = None
    saliency: Annotated[
        Path | None,
        path_option("--saliency", about="Ranking of the experts; overrides the policy's own."),
    ] = None
    no_links: NoLinks = False
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say where things come from.")
    ] = False

    @property
    def statistics(self) -> dict[str, str]:
        """The files of statistics that options name."""
        named = {"imatrix": self.imatrix, "saliency": self.saliency}
        return {name: str(path) for name, path in named.items() if path is not None}

    def read_policy(self) -> Policy:
        """The policy with its overrides."""
        return workflow.load(self.policy, parse_overrides(self.overrides))

    def open_model(self, policy: Policy) -> Inventory:
        """The inventory of the model that is asked for, or else of the policy's own."""
        inventory = workflow.open_model(policy, self.model, links=not self.no_links)
        if self.verbose:
            for line in (f"source {inventory.id}", *inventory.notes):
                note(f"note: {escaped(line)}")
        return inventory

    def plan(self) -> Plan:
        """The complete plan."""
        policy = self.read_policy()
        return workflow.plan(
            policy,
            model=self.open_model(policy),
            target=self.target,
            statistics=self.statistics,
            allow_requantize=self.allow_requantize,
        )


def parse_overrides(written: list[str] | None) -> dict[str, str]:
    """`VAR=VALUE` arguments by name; the policy says what kind of value it is.

    Raises: PolicyError (bad-argument) for each one without a name or `=`.
    """
    values: dict[str, str] = {}
    defects = []
    for argument in written or ():
        # Values may hold "=" themselves.
        name, sign, value = argument.partition("=")
        if not sign or not name.strip():
            reason = f'"{argument}" is not VAR=VALUE'
            defects.append(diagnostic("bad-argument", option="--set", reason=reason))
        values[name.strip()] = value.strip()
    if defects:
        raise PolicyError(defects)
    return values


def requesting(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command, whose first parameter is a Request, its options.

    left_out: fields of the request for which it has no option. Defects are shown as `guarded` does.
    """
    shared = _parameters(Request, {field.name for field in fields(Request)} - {*left_out})

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        own = _parameters(command, set(inspect.signature(command).parameters) - {"request"})

        @functools.wraps(command)
        def run(**given: Any) -> None:
            request = Request(**{"policy": "", **{name: given.pop(name) for name in shared}})
            command(request, **given)

        parameters = {**shared, **own}
        # typer reads both to make the options.
        run.__annotations__ = {name: each.annotation for name, each in parameters.items()}
        signature = inspect.Signature(list(parameters.values()))
        run.__signature__ = signature  # type: ignore[attr-defined]
        return guarded(run)

    return decorated


def _parameters(owner: Callable[..., Any], names: set[str]) -> Mapping[str, inspect.Parameter]:
    """The parameters of these names, in order, with their annotations evaluated."""
    hints = get_type_hints(owner, include_extras=True)
    return {
        name: parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[name])
        for name, parameter in inspect.signature(owner).parameters.items()
        if name in names
    }
