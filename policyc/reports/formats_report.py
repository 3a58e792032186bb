"""What targets can hold, and the catalog's models: blocks and the documented JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from policy_dsl.documents.json_schema import entry_of
from policy_dsl.documents.reports import (
    CatalogEntry,
    FormatEntry,
    FormatsDocument,
    ModelsDocument,
    SchemeEntry,
)
from policy_dsl.formats import Format, FormatSpec, MetadataValues, SchemeSpec
from policy_dsl.inventory import Inventory
from policy_dsl.planning.settings import used_settings, values_text
from policy_dsl.quantities import both_units
from policy_dsl.treatments import PLAIN_WORDS, WHOLE_ROW
from policyc.reports.blocks import Block, Facts, Items, Table

_FIRST = "the first is the default"
_TYPES = {bool: "boolean", str: "string"}


def formats_document(formats: Sequence[Format]) -> FormatsDocument:
    """The capabilities of targets as JSON values."""
    return {"schema_version": 1, "kind": "formats", "formats": [_format(one) for one in formats]}


def formats_blocks(formats: Sequence[Format]) -> list[Block]:
    """The capabilities of targets for people."""
    return [block for one in formats for block in _blocks(one)]


def models_document(models: Mapping[str, Inventory]) -> ModelsDocument:
    """The models of a catalog, by name, as JSON values."""
    return {
        "schema_version": 1,
        "kind": "models",
        "models": [
            entry_of(
                CatalogEntry,
                inventory,
                name=name,
                model_type=inventory.config.get("model_type"),
                tensors=len(inventory.tensors),
            )
            for name, inventory in models.items()
        ],
    }


def models_blocks(models: Mapping[str, Inventory]) -> list[Block]:
    """The models of a catalog for people."""
    rows = tuple(
        (
            name,
            inventory.id,
            str(inventory.config.get("model_type")),
            f"{len(inventory.tensors):,}",
            both_units(inventory.nbytes),
        )
        for name, inventory in models.items()
    )
    return [Table(("name", "model", "type", "tensors", "size"), rows, right=("tensors",))]


def _blocks(format: Format) -> Iterator[Block]:
    spec = format.spec
    yield Facts(tuple(_facts(spec)))
    yield _schemes(spec.schemes)
    fill = tuple(
        (kind, "any" if bits is None else str(bits), scheme) for kind, bits, scheme in spec.fill
    )
    yield Table(
        ("tensors", "bits", "scheme"),
        fill,
        "A width without a scheme is filled in by this table, the first match wins",
    )
    methods = [f"{name}: {_need(*needs)}" for name, needs in _methods(format).items()]
    yield Items(tuple(methods), "Methods, and what they take from a model's inputs")
    keys = [f"{key}: {values_text(values)}" for key, values in spec.metadata_keys.items()]
    if keys:
        yield Items(tuple(keys), "Keys of `metadata`, and their values")
    # A refusal without its reason would read like an oversight.
    refused = [f"{name}: {reason}" for name, reason in spec.all_families().items() if reason]
    if refused:
        yield Items(tuple(refused), "Families refused, and why")


def _facts(spec: FormatSpec) -> Iterator[tuple[str, str]]:
    yield "target", f"{spec.name}: {spec.about}"
    words = (PLAIN_WORDS.get(dtype, dtype) for dtype in spec.plain_dtypes)
    yield "plain dtypes", ", ".join(words)
    yield "fp8 rules", f"{', '.join(spec.fp8_rules)} ({_FIRST})"
    yield "families", ", ".join(name for name, reason in spec.all_families().items() if not reason)
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
    columns = ("scheme", "bits", "groups", "symmetry", "methods", "about")
    rows = tuple(
        (
            scheme.name,
            _listed(scheme.bits),
            _listed(tuple(_group(size) for size in scheme.group_sizes)),
            _listed(_symmetries(scheme)),
            _listed(scheme.methods),
            scheme.about,
        )
        for scheme in schemes
    )
    return Table(columns, rows, "Schemes, the first value of each is the default")


def _group(size: int) -> str:
    return f"{size} (a row)" if size == WHOLE_ROW else str(size)


def _symmetries(scheme: SchemeSpec) -> tuple[str, ...]:
    """The words that choose how zero is stored; none where there is no choice."""
    if len(scheme.symmetries) == 1:
        return ()
    return tuple("sym" if symmetric else "asym" for symmetric in scheme.symmetries)


def _methods(format: Format) -> dict[str, tuple[str | None, bool]]:
    """Method -> the statistics that it uses, and whether it cannot do without."""
    return {
        name: (method.needs or method.uses or None, bool(method.needs))
        for name, method in format.methods.items()
    }


def _need(statistics: str | None, needed: bool) -> str:
    if statistics is None:
        return "nothing"
    return f"needs {statistics}" if needed else f"{statistics}, if it is given"


def _shard_nbytes(spec: FormatSpec) -> int | None:
    return None if spec.container else getattr(spec.tensor_files, "nbytes", None)


def _format(format: Format) -> FormatEntry:
    spec = format.spec
    return entry_of(
        FormatEntry,
        spec,
        schemes=[
            entry_of(
                SchemeEntry,
                scheme,
                symmetric=scheme.symmetries[0] if len(scheme.symmetries) > 1 else None,
                symmetric_choices=list(_symmetries(scheme)),
            )
            for scheme in spec.schemes
        ],
        fill=[
            {"tensors": kind, "bits": bits, "scheme": scheme} for kind, bits, scheme in spec.fill
        ],
        methods=[
            {"name": name, "statistics": statistics, "needed": needed}
            for name, (statistics, needed) in _methods(format).items()
        ],
        families=[
            {"family": name, "supported": reason is None, "reason": reason}
            for name, reason in spec.all_families().items()
        ],
        runtimes=dict(spec.runtimes),
        shard_nbytes=_shard_nbytes(spec),
        layouts=list(spec.layouts),
        expert_multiples={family: padding.multiple for family, padding in spec.padding.items()},
        settings=list(used_settings(spec)),
        metadata={key: _values_schema(values) for key, values in spec.metadata_keys.items()},
    )


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
