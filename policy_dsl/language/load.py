"""A policy by path or bundled name -> Policy, with `extends` and variables resolved."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from policy_dsl import diagnostics, room
from policy_dsl.diagnostics import SourceText, Span, diagnostic, did_you_mean, fail
from policy_dsl.escaping import decoded
from policy_dsl.language.parsing import MAX_BYTES, ensure_short, plain_scalar
from policy_dsl.language.read_dsl import read_dsl
from policy_dsl.language.read_yaml import looks_like_yaml, read_yaml
from policy_dsl.policy import KEYS, WORDS, Key, Policy, Scalar, Values, Words, given
from policy_dsl.regular_files import is_passed, read_first, why_not_regular

Form = Literal["yaml", "dsl"]
_FORMS: Mapping[str, Form] = {".yaml": "yaml", ".yml": "yaml", ".qpol": "dsl"}
_READERS = {"yaml": read_yaml, "dsl": read_dsl}
# Bases of bases multiply; more than this many are an accident or an attack.
_MAX_BASES = 200
_SUFFIX_CURE = "rename it to .yaml or .yml for YAML, or .qpol for DSL"
_NAME_CURE = "give a .yaml or .qpol file, or a bundled policy such as config_i"
_STDIN = {"-": "/dev/stdin"}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


def load(policy: str | Path, variables: Values | None = None, *, words: Words = WORDS) -> Policy:
    """The policy of a file, or the bundled one of that name, merged with all that it extends.

    variables: values in place of its own; texts, as `--set` gives them, are read as the
    type of the variable's default. words: the targets, schemes and methods that there are.
    Raises: PolicyError with every defect of the texts, of `extends` and of the variables.
    """
    chain = list(_chain(_find(policy), (), [], words))
    # Variables are settled over the whole chain before any text is read for good: a base may
    # use one whose value the policy that extends it has set.
    values = _final_values([read for _, read in chain], variables or {})
    policies = []
    for source, read in chain:
        wanted = {name: values[name] for name, _ in read.vars}
        policies.append(read)
        if wanted != dict(read.vars):
            policies[-1], _ = parse_policy(source.text, source.name, wanted, words=words)
    # The last gives the name; comments of several would be about different texts.
    merged = reduce(_extended, policies)
    comments = () if len(policies) > 1 else merged.comments
    return replace(merged, extends=(), cleared=(), comments=comments)


def parse_policy(
    text: str, name: str, values: Values | None = None, *, words: Words = WORDS
) -> tuple[Policy, Form]:
    """The policy that a text says, `extends` not followed, and the notation it is in.

    name: its path; a name without a known suffix leaves the notation to the text itself.
    values: replace the defaults of its variables.
    Raises: PolicyError with every defect of the text.
    """
    source, path = SourceText(name, text), Path(name)
    form = _FORMS.get(path.suffix)
    called = decoded(path.stem) if form else "policy"
    form = form or ("yaml" if looks_like_yaml(source) else "dsl")
    return _READERS[form](source, called, values, words=words), form


def bundled_names() -> tuple[str, ...]:
    """Names of the bundled policies."""
    folder = room("policies")
    return tuple(sorted(path.stem for path in folder.iterdir() if path.suffix in _FORMS))


def read_source(path: Path, *, given: bool = True) -> SourceText:
    """The text of a policy file. given: on the command line, where it may be a pipe.

    Raises: PolicyError if it cannot be read, is not UTF-8 or larger than 1 MiB, or if it is a
    link to a file that is not called as policies are.
    """
    target = Path(os.path.realpath(path))
    # Errors show lines: a link among policies must not show those of a password.
    if path.suffix in _FORMS and target.suffix not in _FORMS:
        raise fail("unknown-suffix", path=target, suggestion=f"{path} is a link to it")
    return source_of(path, read_first(path, MAX_BYTES + 1, given=given))


def source_of(path: Path, content: bytes) -> SourceText:
    """The first bytes of a policy as its text. content: one byte more than a policy may have.

    Raises: PolicyError if it is larger than 1 MiB or not UTF-8.
    """
    if len(content) > MAX_BYTES:
        raise fail("too-large", path=path, limit=f"{MAX_BYTES:,}")
    try:
        return SourceText(decoded(str(path)), content.decode("utf-8-sig"))
    except UnicodeDecodeError as failure:
        byte = f"0x{content[failure.start]:02x}"
        raise fail("not-utf8", path=path, byte=byte, offset=failure.start) from None


def _chain(
    path: Path, before: tuple[Path, ...], read: list[SourceText], words: Words
) -> Iterator[tuple[SourceText, Policy]]:
    """The policies, with the defaults of their own variables; what is extended comes first."""
    read.append(read_source(path, given=not before))
    source = read[-1]
    # All of them together: each takes the time that it takes alone.
    ensure_short(source.name, *(each.text for each in read))
    if path.suffix not in _FORMS and not is_passed(path):
        raise fail("unknown-suffix", path=path, suggestion=_SUFFIX_CURE)
    policy, _ = parse_policy(source.text, source.name, words=words)
    # Resolved paths: a cycle through a symbolic link is one too.
    here = (*before, path.resolve())
    for name in policy.extends:
        span = policy.key_spans.get(f"extends.{name}")
        base = _find(name, folder=Path() if is_passed(path) else path.parent, span=span)
        if base.resolve() in here:
            names = [each.name for each in (*here[here.index(base.resolve()) :], base)]
            raise fail("cyclic-extends", span, chain=" -> ".join(names))
        if len(read) >= _MAX_BASES:
            raise fail("nested-too-deeply", span, limit=_MAX_BASES)
        yield from _chain(base, here, read, words)
    yield source, policy


def _find(reference: str | Path, *, folder: Path | None = None, span: Span | None = None) -> Path:
    """The file that a reference means. folder: of the policy that extends it."""
    path = Path(_STDIN.get(str(reference), reference) if folder is None else reference)
    # A bundled name wins over a file of that name without suffix, so that it means the same
    # in every folder.
    if isinstance(reference, str) and path.name == reference and path.suffix not in _FORMS:
        if bundled := _with_suffix(room("policies") / reference):
            return bundled
        if folder is not None or not os.path.exists(path):
            here = _with_suffix((folder or Path()) / reference)
            cure = f'did you mean "{here.name}"?' if here else None
            cure = cure or did_you_mean(reference, bundled_names())
            raise fail("unknown-policy", span, suggestion=cure or _NAME_CURE, name=reference)
    path = (folder or Path()) / path
    cure, reason = None, None
    if not os.path.exists(path):
        cure, reason = _cure(path), "there is no such file"
    elif path.is_dir():
        cure, reason = "a policy is a file; checkpoints go with --model", "it is a folder"
    # What the shell passes can be given, not extended.
    elif folder is not None:
        reason = why_not_regular(path.stat().st_mode)
    if reason:
        raise fail("unreadable-file", span, suggestion=cure, path=path, reason=reason)
    return path


def _cure(path: Path) -> str | None:
    """What may have been meant by a path that is not there."""
    # Paths of the documentation's examples exist in a checkout only.
    if path.suffix in _FORMS and path.stem in bundled_names():
        return f'"{path.stem}" is a bundled policy; write it without folder and suffix'
    # A policy of that name may be there in the other notation.
    other = _with_suffix(path.with_suffix("")) if path.suffix in _FORMS else None
    return f'did you mean "{other}"?' if other else None


def _with_suffix(path: Path) -> Path | None:
    """The file of that name with one of the suffixes of policies, if it is there."""
    # `Path.exists` raises for a name that is too long for the system.
    names = (path.with_name(f"{path.name}{suffix}") for suffix in _FORMS)
    return next(filter(os.path.exists, names), None)


def _final_values(policies: list[Policy], overrides: Values) -> dict[str, Scalar]:
    """The value of every variable: a later policy's default wins, an override over all."""
    values: dict[str, Scalar] = {}
    findings: list[diagnostics.Diagnostic] = []

    def take(name: str, value: Scalar, written: Scalar, span: Span | None = None) -> None:
        default = values.get(name, value)
        # A truth value is an int to Python, and not a number to anybody else.
        if type(value) not in ((int, float) if isinstance(default, float) else (type(default),)):
            kind = _KINDS.get(type(default), "a text")
            code = "wrong-variable-type"
            findings.append(diagnostic(code, span, name=name, expected=kind, written=written))
        values[name] = value

    for policy in policies:
        for name, value in policy.vars:
            take(name, value, value, policy.key_spans.get(f"vars.{name}"))
    for name, written in overrides.items():
        if name not in values:
            cure = did_you_mean(name, values)
            findings.append(diagnostic("unknown-variable", suggestion=cure, name=name))
        elif isinstance(values[name], str):
            take(name, str(written), written)
        else:
            take(name, plain_scalar(written) if isinstance(written, str) else written, written)
    if findings:
        raise diagnostics.PolicyError(findings)
    return values


def _extended(base: Policy, child: Policy) -> Policy:
    """What both say; of what the child clears or gives anew, nothing of the base stays."""
    cleared: dict[str, Any] = {key: getattr(Policy(name=""), key) for key in child.cleared}
    base = replace(base, **cleared)
    said = {key.name: _both(key, getattr(base, key.name), getattr(child, key.name)) for key in KEYS}
    anew = (key.name for key in KEYS if key.merge == "last" and key.kind != "text")
    gone = {*child.cleared, *(name for name in anew if getattr(child, name))}
    if child.targets:
        ruled = {rule.target for rule in base.rules}
        more = (target for target in base.targets if target in ruled)
        said["targets"] = tuple(dict.fromkeys((*child.targets, *more)))
    # Rules of one target follow those of all targets, and the base's come first.
    order = [None, *said["targets"]]
    said["rules"] = tuple(sorted(said["rules"], key=lambda rule: order.index(rule.target)))
    for paths in ("key_spans", "templates"):
        said[paths] = {}
        for path, value in getattr(base, paths).items():
            # How one policy writes its targets says nothing about those of another.
            if re.split(r"[\[.]", path)[0] not in gone and not path.startswith("targets["):
                said[paths][path] = value
        for path, value in getattr(child, paths).items():
            number = re.fullmatch(r"tests\[(\d+)\]", path)
            said[paths][f"tests[{int(number[1]) + len(base.tests)}]" if number else path] = value
    return replace(child, **said)


def _both(key: Key, before: Any, said: Any) -> Any:
    if key.kind == "fields":
        return replace(before, **given(said))
    if key.merge == "join":
        return tuple({**dict(before), **dict(said)}.items())
    if key.merge == "all" or key.kind == "rules":
        return (*before, *said)
    return said if key.merge == "own" else said or before
