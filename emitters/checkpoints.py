"""What formats of checkpoints share: JSON documents, the index of shards, reasons by layer."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import Diagnostic, diagnostic, fail
from policy_dsl.formats import Claim, FileContents, ForeignMetadataError, TensorForm
from policy_dsl.inventory import EXPERT_NAME
from policy_dsl.plan import Module, PlannedTensor
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.treatments import Stored, scheme_of

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
# What the source's own quantization was.
QUANTIZATIONS = ("quantization", "quantization_config", "compression_config")
QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_Key = TypeVar("_Key")
_as_json = json.encoder.encode_basestring_ascii


def document(files: FileContents, name: str) -> dict[str, Any]:
    """The JSON object of a metadata file. Raises: ForeignMetadataError if there is none."""
    if name not in files:
        raise ForeignMetadataError(f"it has no {name}")
    try:
        held = parse_json(files[name], what=name)
    except ValueError as error:
        raise ForeignMetadataError(str(error)) from None
    if not isinstance(held, dict):
        raise ForeignMetadataError(f"{name} is not a JSON object")
    return held


def text_of(files: FileContents, name: str) -> str | None:
    """The text of a file, None if it is not there. Raises: PolicyError unless it is UTF-8."""
    try:
        return files[name].decode() if name in files else None
    except UnicodeDecodeError:
        raise fail("unreadable-file", path=name, reason="it is not UTF-8 text") from None


def written(document: Mapping[str, Any], indent: int = 2) -> bytes:
    """A document as the bytes of its file."""
    if document.keys() != {"metadata", "weight_map"} or not document["weight_map"]:
        return json.dumps(document, indent=indent).encode()
    # An index has a hundred thousand names, and json is slow where it indents.
    text, pad = json.dumps({**document, "weight_map": {}}, indent=indent), " " * indent
    places = document["weight_map"].items()
    rows = ",\n".join([f"{pad * 2}{_as_json(name)}: {_as_json(file)}" for name, file in places])
    return f"{text.removesuffix('{}' + chr(10) + '}')}{{\n{rows}\n{pad}}}\n}}".encode()


def index(tensors: Iterable[PlannedTensor], **about: Any) -> dict[str, Any]:
    """The index of shards, tensors sorted by name. about: more about all of them."""
    places = {tensor.name: (tensor.file, tensor.nbytes) for tensor in tensors}
    total = sum(nbytes for _, nbytes in places.values())
    return {
        "metadata": {"total_size": total, **about},
        "weight_map": {name: places[name][0] for name in sorted(places)},
    }


def forms_of(tensors: Mapping[str, TensorForm]) -> dict[str, dict[str, TensorForm]]:
    """Tensors by their module: all of a name up to its last dot."""
    forms: dict[str, dict[str, TensorForm]] = defaultdict(dict)
    for name, form in tensors.items():
        path, _, part = name.rpartition(".")
        forms[path][part] = form
    return forms


def covering_most(modules: Iterable[Module], key: Callable[[Module], _Key | None]) -> _Key | None:
    """The key of most parameters, the first of equals; None if no module has one."""
    covered: Counter[_Key] = Counter()
    for module in modules:
        if (found := key(module)) is not None:
            covered[found] += module.parameters
    return covered.most_common(1)[0][0] if covered else None


def at_layers(reason: str, layers: Iterable[int | None]) -> str | None:
    """The reason with the layers that give it; None if there is no layer."""
    known = sorted(layer for layer in layers if layer is not None)
    if not known:
        return None
    more = f" and {len(known) - 1} more" if len(known) > 1 else ""
    return f"{reason} (layer {known[0]}{more})"


def uneven(reason: str, modules: Iterable[Module], key: Callable[[Module], Any]) -> str | None:
    """The reason with the layers in which modules have several keys; None if there are none."""
    layers: dict[int | None, set[Any]] = defaultdict(set)
    for module in modules:
        layers[module.layer].add(key(module))
    return at_layers(reason, (layer for layer, keys in layers.items() if len(keys) > 1))


def omission(tensor: ModelTensor, model: Model, reasons: Mapping[str, str]) -> str | None:
    """Why readers have no place for a tensor, else None. reasons: by component, or `lm_head`."""
    if tensor.left_out:
        return tensor.left_out
    if tensor.role == "lm_head" and model.tied:
        return f"tied: {reasons['lm_head']} embed_tokens"
    return reasons.get(tensor.component or "")


def unfit(tensor: ModelTensor, model: Model, stored: Stored, target: str) -> str | None:
    """Why the table of the family does not let readers have a role in this scheme, else None."""
    is_mtp = tensor.component == "mtp"
    for only in model.architecture.facts(target).get("only", ()):
        # MTP blocks are built like the model's own.
        words = [role.rpartition(".")[2] for role in only["roles"]] if is_mtp else []
        is_met = model.facts.satisfies(only.get("when", ""), tensor.layer)
        is_other = scheme_of(stored) not in only["schemes"]
        is_meant = tensor.namesake in only["roles"] or tensor.projection in words
        if is_meant and is_other and is_met:
            return str(only["reason"])
    return None


def wrong_metadata(file: str, reason: str, *, of: str = "") -> Diagnostic:
    """The finding that readers would misread a metadata file."""
    return diagnostic("bad-bundle-metadata", of=of, path=file, reason=reason)


def wrong_tensor(file: str, tensor: str, reason: str) -> Diagnostic:
    """The finding that readers would misread a tensor."""
    return diagnostic("bad-tensor-entry", file=file, tensor=tensor, reason=reason)


def uneven_experts(claims: Mapping[str, Claim], count: object) -> Iterator[Diagnostic]:
    """Experts that are apart, with other numbers than those a config of this count means."""
    held: dict[str, set[int]] = defaultdict(set)
    for name in claims:
        if match := EXPERT_NAME.fullmatch(name):
            held[f"{match[1]}.experts.*.{match[3]}"].add(int(match[2]))
    for path, numbers in held.items():
        if len(numbers) != count or numbers != set(range(len(numbers))):
            reason = f"it has {count!r} experts, {path} has {len(numbers)} others"
            yield wrong_metadata(CONFIG, reason, of=path)
