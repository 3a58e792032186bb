"""What targets can hold, from their capability records: text, markdown, the JSON document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from policy_dsl.formats import FormatSpec, MetadataValues, SchemeSpec
from policy_dsl.planning.settings import used_settings, values_text
from policy_dsl.quantities import both_units
from policy_dsl.treatments import PLAIN_WORDS, WHOLE_ROW
from policyc.reports.report import Block, Column, Facts, Items, Table, render_markdown, render_text

_FIRST = "the first is the default"
_TYPES = {bool: "boolean", str: "string"}


def formats_text(specs: Sequence[FormatSpec], *, width: int | None = None) -> str:
    """The records as text."""
    return render_text([block for spec in specs for block in _blocks(spec)], width=width)


def formats_markdown(specs: Sequence[FormatSpec]) -> str:
    """The records as GitHub markdown."""
    return render_markdown([block for spec in specs for block in _blocks(spec)])


def formats_document(specs: Sequence[FormatSpec]) -> dict[str, Any]:
    """The records as JSON values."""
    return {"schema_version": 1, "kind": "formats", "formats": [_spec_json(spec) for spec in specs]}


def _blocks(spec: FormatSpec) -> Iterator[Block]:
    yield Facts(tuple(_facts(spec)))
    yield _schemes(spec.schemes)
    fill = tuple(
        (kind, "any" if bits is None else str(bits), scheme) for kind, bits, scheme in spec.fill
    )
    yield Table(
        tuple(map(Column, ("tensors", "bits", "scheme"))),
        fill,
        "A width without a scheme is filled in by this table, the first match wins",
    )
    methods = [f"{name}: {_told(*needs)}" for name, needs in _methods(spec).items()]
    yield Items(tuple(methods), "Methods, and what they take from a model's inputs")
    keys = [f"{key}: {values_text(values)}" for key, values in spec.metadata_keys.items()]
    if keys:
        yield Items(tuple(keys), "Keys of `metadata`, and their values")
    # A refusal without its reason would read like an oversight.
    refused = [f"{name}: {reason}" for name, reason in spec.families.items() if reason]
    if refused:
        yield Items(tuple(refused), "Families refused, and why")


def _facts(spec: FormatSpec) -> Iterator[tuple[str, str]]:
    yield "target", f"{spec.name}: {spec.about}"
    words = (PLAIN_WORDS.get(dtype, dtype) for dtype in spec.plain_dtypes)
    yield "plain dtypes", ", ".join(words)
    yield "fp8 rules", f"{', '.join(spec.fp8_rules)} ({_FIRST})"
    yield "families", ", ".join(name for name, reason in spec.families.items() if not reason)
    yield "readers", ", ".join(f"{name} ({about})" for name, about in spec.runtimes.items())
    shard = _shard_nbytes(spec)
    yield "tensors in", f"shards of {both_units(shard)}" if shard else "one file"
    yield "experts", _experts(spec)
    for family, padding in spec.padding.items():
        yield "added", f"experts of {family}, up to a multiple of {padding.multiple}"
    yield "settings", ", ".join(used_settings(spec)) or "none"


def _experts(spec: FormatSpec) -> str:
    if "output.layout" in spec.settings:
        return f"{', '.join(spec.layouts)} (`output layout`; {_FIRST})"
    return ", ".join(spec.layouts) or "stacked"


def _schemes(schemes: Sequence[SchemeSpec]) -> Table:
    columns = tuple(map(Column, ("scheme", "bits", "groups", "symmetry", "methods", "about")))
    rows = tuple(
        (
            one.name,
            _listed(one.bits),
            _listed(tuple(_group(size) for size in one.group_sizes)),
            _listed(_symmetries(one)),
            _listed(one.methods),
            one.about,
        )
        for one in schemes
    )
    return Table(columns, rows, "Schemes, the first value of each is the default")


def _group(size: int) -> str:
    return f"{size} (a row)" if size == WHOLE_ROW else str(size)


def _symmetries(scheme: SchemeSpec) -> tuple[str, ...]:
    """The words that choose how zero is stored; none where there is no choice."""
    if len(scheme.symmetries) == 1:
        return ()
    return tuple("sym" if symmetric else "asym" for symmetric in scheme.symmetries)


def _methods(spec: FormatSpec) -> dict[str, tuple[str | None, bool]]:
    """Method -> the statistics that it uses, and whether it cannot do without."""
    names = dict.fromkeys(method for scheme in spec.schemes for method in scheme.methods)
    optional = spec.optional_statistics
    return {
        name: (spec.statistics.get(name) or optional.get(name), name in spec.statistics)
        for name in names
    }


def _told(statistics: str | None, needed: bool) -> str:
    if statistics is None:
        return "nothing"
    return f"needs {statistics}" if needed else f"{statistics}, if it is given"


def _shard_nbytes(spec: FormatSpec) -> int | None:
    return None if spec.container else getattr(spec.tensor_files, "nbytes", None)


def _spec_json(spec: FormatSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "about": spec.about,
        "schemes": [_scheme_json(one) for one in spec.schemes],
        "fill": [
            {"tensors": kind, "bits": bits, "scheme": scheme} for kind, bits, scheme in spec.fill
        ],
        "methods": [
            {"name": name, "statistics": statistics, "needed": needed}
            for name, (statistics, needed) in _methods(spec).items()
        ],
        "plain_dtypes": list(spec.plain_dtypes),
        "fp8_rules": list(spec.fp8_rules),
        "families": [
            {"family": name, "supported": reason is None, "reason": reason}
            for name, reason in spec.families.items()
        ],
        "runtimes": dict(spec.runtimes),
        "shard_nbytes": _shard_nbytes(spec),
        "layouts": list(spec.layouts),
        "expert_multiples": {family: padding.multiple for family, padding in spec.padding.items()},
        "settings": list(used_settings(spec)),
        "metadata": {key: _values_schema(values) for key, values in spec.metadata_keys.items()},
    }


def _scheme_json(scheme: SchemeSpec) -> dict[str, Any]:
    return {
        "name": scheme.name,
        "bits": list(scheme.bits),
        "group_sizes": list(scheme.group_sizes),
        "methods": list(scheme.methods),
        "symmetric": scheme.symmetries[0] if len(scheme.symmetries) > 1 else None,
        "symmetric_choices": list(_symmetries(scheme)),
        "about": scheme.about,
    }


def _values_schema(values: MetadataValues) -> dict[str, Any]:
    """The values that a key of `metadata` takes, as a JSON Schema."""
    if isinstance(values, tuple):
        return {"enum": list(values)}
    if isinstance(values, Mapping):
        properties = {key: _values_schema(value) for key, value in values.items()}
        return {"type": "object", "properties": properties, "additionalProperties": False}
    return {"type": _TYPES[values]}


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values) or "-"
