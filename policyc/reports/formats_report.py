"""What targets can hold, and the catalog's models: blocks and the documented JSON."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from policy_dsl.documents import entry_of
from policy_dsl.documents import reports as documents
from policy_dsl.formats import Format, FormatSpec, MetadataValues, SchemeSpec, Shards
from policy_dsl.inventory import Inventory
from policy_dsl.planning.lint import used_settings, values_text
from policy_dsl.quantities import both_units
from policy_dsl.roles.architecture import Architecture, architecture, families
from policy_dsl.treatments import PLAIN_WORDS, WHOLE_ROW
from policyc.reports import Block, Facts, Items, Table, by_key

_FIRST = "the first is the default"
_ROW = {WHOLE_ROW: f"{WHOLE_ROW} (a row)"}
_TYPES = {bool: "boolean", str: "string"}


def formats_document(formats: Sequence[Format]) -> documents.FormatsDocument:
    """The capabilities of targets as JSON values."""
    return {"schema_version": 1, "kind": "formats", "formats": list(map(_entry, formats))}


def formats_blocks(formats: Sequence[Format]) -> list[Block]:
    """The capabilities of targets for people."""
    return [block for each in formats for block in _blocks(each.spec, _entry(each))]


def models_document(
    models: Mapping[str, Inventory], formats: Sequence[Format]
) -> documents.ModelsDocument:
    """The models of a catalog, by name, and what targets make of each family, as JSON values."""
    entries = [
        entry_of(
            documents.CatalogEntry,
            inventory,
            name=name,
            model_type=inventory.config.get("model_type"),
            tensors=len(inventory.tensors),
        )
        for name, inventory in models.items()
    ]
    known = [_family(each.spec, architecture(family)) for family in families() for each in formats]
    return {"schema_version": 1, "kind": "models", "models": entries, "families": known}


def models_blocks(models: Mapping[str, Inventory], formats: Sequence[Format]) -> list[Block]:
    """The models of a catalog, and what targets make of each family, for people."""
    document, rows = models_document(models, formats), []
    for model in document["models"]:
        sizes = f"{model['tensors']:,}", both_units(model["nbytes"])
        rows.append((model["name"], model["id"], str(model["model_type"]), *sizes))
    columns = "name", "model", "type", "tensors", "size"
    catalog = Table(columns, rows, "Models that are planned at once", right=("tensors",))
    return [catalog, *_families(document["families"])]


def _family(spec: FormatSpec, table: Architecture) -> documents.FamilyEntry:
    reason = spec.refusal(table)
    unread = table.facts(spec.name).get("unread", {})
    # Bundles without that component are read.
    ruled_out = () if "with" in unread else unread.get("by", ())
    return {
        "family": table.family,
        "model_types": list(table.model_types),
        "target": spec.name,
        "supported": reason is None,
        "reason": reason,
        "readers": [] if reason else [name for name in spec.runtimes if name not in ruled_out],
    }


def _families(entries: Sequence[documents.FamilyEntry]) -> Iterator[Block]:
    rows = []
    for family, by_target in by_key(entries, lambda entry: entry["family"]).items():
        cells = ["yes" if entry["supported"] else "no" for entry in by_target]
        rows.append((family, ", ".join(by_target[0]["model_types"]), *cells))
    targets = by_key(entries, lambda entry: entry["target"])
    title = "Families, and the targets that build bundles of them"
    yield Table(("family", "types", *targets), rows, title, leaving=("types",))
    for target, of_target in targets.items():
        refused = by_key(of_target, lambda entry: entry["reason"])
        built = by_key(of_target, lambda entry: ", ".join(entry["readers"]))
        lines = {
            f"{target} does not build, and why": _with_families(refused),
            f"{target}: readers, if a policy suits": _with_families(built),
        }
        yield from (Items(items, title) for title, items in lines.items() if items)


def _with_families(groups: Mapping[Any, Sequence[documents.FamilyEntry]]) -> list[str]:
    return [
        f"{said}: {', '.join(entry['family'] for entry in entries)}"
        for said, entries in groups.items()
        if said
    ]


def _entry(format: Format) -> documents.FormatEntry:
    spec = format.spec
    methods = [
        {"name": name, "statistics": by.needs or by.uses or None, "needed": bool(by.needs)}
        for name, by in format.methods.items()
    ]
    return entry_of(
        documents.FormatEntry,
        spec,
        schemes=list(map(_scheme, spec.schemes)),
        fill=[dict(zip(("tensors", "bits", "scheme"), row, strict=True)) for row in spec.fill],
        methods=methods,
        families=[_family(spec, architecture(family)) for family in families()],
        runtimes=dict(spec.runtimes),
        shard_nbytes=spec.tensor_files.nbytes if isinstance(spec.tensor_files, Shards) else None,
        layouts=list(spec.layouts),
        expert_multiples={family: padding.multiple for family, padding in spec.padding.items()},
        settings=list(used_settings(spec)),
        metadata={key: _values_schema(values) for key, values in spec.metadata_keys.items()},
    )


def _scheme(scheme: SchemeSpec) -> documents.SchemeEntry:
    has_choice = len(scheme.symmetries) > 1
    words = ["sym" if symmetric else "asym" for symmetric in scheme.symmetries]
    return entry_of(
        documents.SchemeEntry,
        scheme,
        symmetric=scheme.symmetries[0] if has_choice else None,
        symmetric_choices=words if has_choice else [],
    )


def _blocks(spec: FormatSpec, entry: documents.FormatEntry) -> Iterator[Block]:
    yield Facts(list(_facts(spec, entry)))
    rows = []
    for scheme in entry["schemes"]:
        groups = [_ROW.get(size, size) for size in scheme["group_sizes"]]
        lists = (scheme["bits"], groups, scheme["symmetric_choices"], scheme["methods"])
        cells = (", ".join(map(str, values)) or "-" for values in lists)
        rows.append((scheme["name"], *cells, scheme["about"]))
    columns = ("scheme", "bits", "groups", "symmetry", "methods", "about")
    yield Table(columns, rows, "Schemes, the first value of each is the default")
    title = "A width without a scheme is filled in by this table, the first match wins"
    fill = [(row["tensors"], str(row["bits"] or "any"), row["scheme"]) for row in entry["fill"]]
    yield Table(("tensors", "bits", "scheme"), fill, title)
    lines = {
        "Methods, and what they take from a model's inputs": list(map(_need, entry["methods"])),
        "Keys of `metadata`, and their values": [
            f"{key}: {values_text(values)}" for key, values in spec.metadata_keys.items()
        ],
        # A refusal without its reason would read like an oversight.
        "Families refused, and why": [
            f"{row['family']}: {row['reason']}" for row in entry["families"] if row["reason"]
        ],
    }
    yield from (Items(items, title) for title, items in lines.items() if items)


def _facts(spec: FormatSpec, entry: documents.FormatEntry) -> Iterator[tuple[str, str]]:
    yield "target", f"{spec.name}: {spec.about}"
    yield "plain dtypes", ", ".join(PLAIN_WORDS.get(dtype, dtype) for dtype in spec.plain_dtypes)
    yield "fp8 rules", f"{', '.join(spec.fp8_rules)} ({_FIRST})"
    yield "families", ", ".join(row["family"] for row in entry["families"] if row["supported"])
    yield "readers", ", ".join(f"{name} ({about})" for name, about in spec.runtimes.items())
    shard = entry["shard_nbytes"]
    yield "tensors in", f"shards of {both_units(shard)}" if shard else "one file"
    choice = f" (`output layout`; {_FIRST})" if "output.layout" in spec.settings else ""
    yield "experts", (", ".join(spec.layouts) or "stacked") + choice
    for family, multiple in entry["expert_multiples"].items():
        yield "added", f"experts of {family}, up to a multiple of {multiple}"
    yield "settings", ", ".join(entry["settings"]) or "none"


def _need(method: documents.MethodEntry) -> str:
    statistics = method["statistics"] or "nothing"
    if method["statistics"]:
        statistics = f"needs {statistics}" if method["needed"] else f"{statistics}, if it is given"
    return f"{method['name']}: {statistics}"


def _values_schema(values: MetadataValues) -> dict[str, Any]:
    """The values that a key of `metadata` takes, as a JSON Schema."""
    if isinstance(values, tuple):
        return {"enum": list(values)}
    if isinstance(values, Mapping):
        properties = {key: _values_schema(value) for key, value in values.items()}
        return {"type": "object", "properties": properties, "additionalProperties": False}
    return {"type": _TYPES[values]}
