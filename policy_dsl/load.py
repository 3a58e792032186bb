"""A policy by path or bundled name -> Policy, with `extends` and variables resolved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from policy_dsl.diagnostics import PolicyError, SourceText, Span, diagnostic, did_you_mean, fail
from policy_dsl.draft import plain_scalar
from policy_dsl.fragments import Scalar
from policy_dsl.merge_policies import merge
from policy_dsl.policy import Policy
from policy_dsl.read_dsl import read_dsl
from policy_dsl.read_yaml import read_yaml
from policy_dsl.resources import room
from policy_dsl.source_text import MAX_BYTES

Reader = Callable[[SourceText, str, Mapping[str, Scalar] | None], Policy]
READERS: Mapping[str, Reader] = {".yaml": read_yaml, ".yml": read_yaml, ".qpol": read_dsl}
# Bases of bases multiply; more than this many are an accident or an attack.
_MAX_BASES = 200


def load(reference: str | Path, *, overrides: Mapping[str, str] | None = None) -> Policy:
    """The policy of a file, or the bundled one of that name, merged with all that it extends.

    overrides: values for its variables, as `--set` gives them.
    Raises: PolicyError with every defect of the texts, of `extends` and of the overrides.
    """
    chain = list(_Bases().collect(_find(reference), ()))
    values = _values(chain, overrides or {})
    return merge([base.reread(values) for base in chain])


def read_policy(path: Path) -> Policy:
    """The policy of one file as it is written: `extends` not followed.

    Raises: PolicyError if the file cannot be read or has defects.
    """
    return _read(path, read_source(path), None)


def bundled_names() -> tuple[str, ...]:
    """Names of the bundled policies."""
    folder = room("policies")
    return tuple(sorted(path.stem for path in folder.iterdir() if path.suffix in READERS))


def read_source(path: Path) -> SourceText:
    """The text of a policy file.

    Raises: PolicyError if it cannot be read, is not UTF-8 or larger than 1 MiB.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as failure:
        reason = (failure.strerror or str(failure)).lower()
        raise fail("unreadable-file", path=path, reason=reason) from None
    if len(content) > MAX_BYTES:
        raise fail("too-large", path=path, size=max(size, len(content)), limit=MAX_BYTES)
    try:
        return SourceText(str(path), content.decode("utf-8-sig"))
    except UnicodeDecodeError as failure:
        byte = f"0x{content[failure.start]:02x}"
        raise fail("not-utf8", path=path, byte=byte, offset=failure.start) from None


@dataclass(frozen=True)
class _Base:
    """A policy of the chain, read with its own variables' defaults."""

    path: Path
    source: SourceText
    policy: Policy

    def reread(self, values: Mapping[str, Scalar]) -> Policy:
        """The policy with these values where its own differ."""
        own = dict(self.policy.vars)
        wanted = {name: values[name] for name in own}
        return self.policy if wanted == own else _read(self.path, self.source, wanted)


class _Bases:
    """Follows `extends`, depth first, so that what is extended comes first."""

    def __init__(self) -> None:
        self._visits = 0

    def collect(self, path: Path, chain: tuple[Path, ...]) -> Iterator[_Base]:
        self._visits += 1
        source = read_source(path)
        policy = _read(path, source, None)
        spans = dict(policy.key_spans)
        here = (*chain, path.resolve())
        for name in policy.extends:
            span = spans.get(f"extends.{name}")
            base = _find(name, folder=path.parent, span=span)
            self._refuse(base, here, span)
            yield from self.collect(base, here)
        yield _Base(path, source, policy)

    def _refuse(self, base: Path, chain: tuple[Path, ...], span: Span | None) -> None:
        if base.resolve() in chain:
            start = chain.index(base.resolve())
            names = [path.name for path in (*chain[start:], base)]
            raise fail("cyclic-extends", span, chain=" -> ".join(names))
        if self._visits >= _MAX_BASES:
            raise fail("nested-too-deeply", span, limit=_MAX_BASES)


def _find(
    reference: str | Path, *, folder: Path | None = None, span: Span | None = None
) -> Path:
    path = Path(reference)
    named = isinstance(reference, str) and path.name == reference
    if named and path.suffix not in READERS:
        for suffix in READERS:
            bundled = room("policies") / f"{reference}{suffix}"
            if bundled.is_file():
                return bundled
        if folder is not None or not path.exists():
            cure = did_you_mean(str(reference), bundled_names())
            raise fail("unknown-policy", span, suggestion=cure, name=reference)
    found = path if folder is None else folder / path
    if not found.is_file():
        reason = "it is a folder" if found.is_dir() else "there is no such file"
        if not found.exists() or found.is_dir():
            raise fail("unreadable-file", span, path=found, reason=reason)
    return found


def _read(path: Path, source: SourceText, values: Mapping[str, Scalar] | None) -> Policy:
    reader = READERS.get(path.suffix)
    if reader is None:
        raise fail("unknown-suffix", path=path)
    return reader(source, path.stem, values)


def _values(chain: list[_Base], overrides: Mapping[str, str]) -> dict[str, Scalar]:
    values: dict[str, Scalar] = {}
    findings = []
    for base in chain:
        spans = dict(base.policy.key_spans)
        for name, value in base.policy.vars:
            if not _fits(value, values.get(name, value)):
                facts = {"name": name, "expected": _kind(values[name]), "written": value}
                span = spans.get(f"vars.{name}")
                findings.append(diagnostic("wrong-variable-type", span, **facts))
            values[name] = value
    for name, text in overrides.items():
        if name not in values:
            cure = did_you_mean(name, values)
            findings.append(diagnostic("unknown-variable", suggestion=cure, name=name))
            continue
        given = text if isinstance(values[name], str) else plain_scalar(text)
        if not _fits(given, values[name]):
            facts = {"name": name, "expected": _kind(values[name]), "written": text}
            findings.append(diagnostic("wrong-variable-type", **facts))
        values[name] = given
    if findings:
        raise PolicyError(findings)
    return values


def _fits(value: Scalar, default: Scalar) -> bool:
    wanted = (int, float) if isinstance(default, float) else type(default)
    return isinstance(value, wanted)


def _kind(value: Scalar) -> str:
    return {int: "a whole number", float: "a number"}.get(type(value), "a text")
