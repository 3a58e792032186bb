"""What a policy says beside its rules, held against what its target uses and allows."""

from __future__ import annotations

from collections.abc import Iterator

from policy_dsl.diagnostics import Diagnostic, diagnostic, did_you_mean
from policy_dsl.formats import FormatSpec
from policy_dsl.policy import Policy

# Readers take files with such endings for something else.
_TAKEN_ENDINGS = (".safetensors", ".json", ".py")
_LONGEST_NAME = 255
_CALLED = {bool: "true or false", str: "a text", dict: "a mapping"}


def setting_findings(policy: Policy, spec: FormatSpec) -> list[Diagnostic]:
    """Readers that the target does not know, settings that it does not use, values it lacks."""
    return [
        *_readers(policy, spec),
        *_unused(policy, spec),
        *_layout(policy, spec),
        *_file_name(policy, spec),
        *_metadata(policy, spec),
    ]


def _readers(policy: Policy, spec: FormatSpec) -> Iterator[Diagnostic]:
    spans = dict(policy.key_spans)
    for runtime in policy.runtimes:
        if runtime not in spec.runtimes:
            yield diagnostic(
                "unknown-runtime",
                spans.get(f"runtimes.{runtime}"),
                suggestion=did_you_mean(runtime, spec.runtimes),
                target=spec.name,
                runtime=runtime,
                known=", ".join(spec.runtimes),
            )


def _unused(policy: Policy, spec: FormatSpec) -> Iterator[Diagnostic]:
    """Settings that this target does not use, unless they may be for another one."""
    if len(policy.targets) > 1:
        return
    written = [f"output.{key}" for key, value in policy.output if value is not None]
    written += [f"calibration.{key}" for key, value in policy.calibration if value is not None]
    written += [f"metadata.{key}" for key, _ in policy.metadata]
    used = {*spec.settings, *(f"metadata.{key}" for key in spec.metadata_keys)}
    spans = dict(policy.key_spans)
    for key in written:
        if key not in used:
            yield diagnostic(
                "unused-setting",
                spans.get(key) or spans.get(key.partition(".")[0]),
                suggestion=did_you_mean(key, used),
                setting=key,
                target=spec.name,
            )


def _layout(policy: Policy, spec: FormatSpec) -> Iterator[Diagnostic]:
    layout = policy.output.layout
    # A target without layouts does not use the setting, which is another finding.
    if layout is None or layout in spec.layouts or not spec.layouts:
        return
    spans = dict(policy.key_spans)
    yield diagnostic(
        "unknown-layout",
        spans.get("output.layout") or spans.get("output"),
        suggestion=did_you_mean(layout, spec.layouts),
        target=spec.name,
        layout=layout,
        known=", ".join(spec.layouts),
    )


def _file_name(policy: Policy, spec: FormatSpec) -> Iterator[Diagnostic]:
    name = policy.output.file_name
    # A target with files of fixed names does not use the setting, which is another finding.
    if name is None or spec.container is None:
        return
    reason = None
    if "/" in name or "\\" in name:
        reason = "it is a path, and the file lies in the bundle's folder"
    elif name.startswith("."):
        reason = "it begins with a dot, and such files are hidden"
    elif not name.isprintable() or name != name.strip():
        reason = "it holds something that cannot be seen"
    elif len(name.encode()) > _LONGEST_NAME:
        reason = f"it has more than {_LONGEST_NAME} bytes"
    elif name.casefold().endswith(_TAKEN_ENDINGS):
        # Disks that ignore case would take it for the record.
        reason = f"files that end in {', '.join(_TAKEN_ENDINGS)} are something else"
    if reason is not None:
        span = dict(policy.key_spans).get("output.file_name")
        shown = name if name.isprintable() else ascii(name)[1:-1]
        yield diagnostic("bad-file-name", span, name=shown, reason=reason)


def _metadata(policy: Policy, spec: FormatSpec) -> Iterator[Diagnostic]:
    spans = dict(policy.key_spans)
    for key, value in policy.metadata:
        allowed = spec.metadata_keys.get(key)
        if allowed is None or _is_allowed(value, allowed):
            continue
        words = allowed if isinstance(allowed, tuple) else (_CALLED[allowed],)
        yield diagnostic(
            "bad-metadata-value",
            spans.get(f"metadata.{key}") or spans.get("metadata"),
            suggestion=did_you_mean(str(value), words),
            key=key,
            value=value,
            wanted=", ".join(words),
        )


def _is_allowed(value: object, allowed: type | tuple[str, ...]) -> bool:
    # A boolean is an int to Python, and no number to anybody else.
    return value in allowed if isinstance(allowed, tuple) else type(value) is allowed
