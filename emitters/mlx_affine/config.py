"""`config.json` and the index of an MLX bundle, written from a plan and read back.

Source: mlx-lm 0.32.2, `save_config`, `save_model`, `get_total_parameters` and `load_model`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from emitters import checkpoints
from emitters.checkpoints import CONFIG, INDEX, QUANTIZATIONS, document, written
from emitters.mlx_affine.spec import AFFINE, AFFINE_PARTS, READER, SPEC, configured_dtype
from policy_dsl import formats
from policy_dsl.diagnostics import Diagnostic, diagnostic, fail
from policy_dsl.formats import Claim, Claims, FileContents, Forms, TensorForm, Tensors
from policy_dsl.plan import Module, Plan, coded_modules
from policy_dsl.reader_config import written_config
from policy_dsl.sources.checkpoint import finite
from policy_dsl.treatments import Coded, coded

# What the source's own quantization was, where it once was, and a tower that is left out.
_DROPPED = (*QUANTIZATIONS, "_name_or_path", "vision_config")
_NESTED = ("text_config", "llm_config")
# What mlx takes for a mode where nothing is given.
_USUAL = {one.name: {"group_size": one.group_sizes[0], "bits": one.bits[0]} for one in SPEC.schemes}
_USUAL[AFFINE] = {"group_size": 64, "bits": 4}


def metadata(plan: Plan) -> dict[str, bytes]:
    """`config.json`, the source's with sorted keys and what mlx-lm looks for, and the index."""
    source = written_config(plan, READER).items()
    config = {key: value for key, value in source if key not in _DROPPED}
    for key in _NESTED:
        if isinstance(config.get(key), Mapping):
            nested = config[key].items()
            config[key] = {name: value for name, value in nested if name not in QUANTIZATIONS}
    if quantization := _quantization(plan):
        # mlx-lm reads the first, other tools look for the second; both must say the same.
        config["quantization"] = config["quantization_config"] = quantization
    config = {key: finite(config[key]) for key in sorted(config)}
    # As mlx-lm counts them, of modules that have a weight: no router biases.
    leaves = {module.name for module in plan.modules if _is_weight(module)}
    held = ((one, {one.name, one.name.rpartition(".")[0]}) for one in plan.modules)
    total = sum(module.parameters for module, names in held if names & leaves)
    index = checkpoints.index(formats.in_order(plan.modules), total_parameters=total)
    return {CONFIG: written(config, 4), INDEX: written(index, 4)}


def claims(files: FileContents, forms: Forms) -> dict[str, Claim]:
    """What mlx-lm understands of these files: quantized module -> scheme, width, shape.

    The default is for modules that are named with `true`, or quantized and not named.
    Raises: ValueError if the config's `quantization` is not what mlx-lm reads; PolicyError if
    only the copy of it is there.
    """
    config = document(files, CONFIG)
    entries = config.get("quantization")
    if not entries:
        _check_copy(config.get("quantization_config"), forms)
        return {}
    if not isinstance(entries, dict):
        raise formats.ForeignMetadataError("its quantization is not an object")
    default = _treatment(entries)
    parts = set(AFFINE_PARTS if default.scheme == AFFINE else AFFINE_PARTS[:2])
    made, dtype = {}, configured_dtype(config)
    for name in {**forms, **entries}:
        entry, held = entries.get(name), forms.get(name, {})
        if isinstance(entry, dict):
            # It inherits nothing but the defaults of its mode; a null is no group size.
            usual = _USUAL.get(str(entry.get("mode", AFFINE)), _USUAL[AFFINE])
            given = {key: value for key, value in entry.items() if value is not None}
            made[name] = _claim(_treatment({**usual, **given}), held, dtype)
        elif entry is True or (name not in entries and parts <= held.keys()):
            made[name] = _claim(default, held, dtype)
    return made


def defects(
    folder: Path, files: FileContents, tensors: Tensors, claims: Claims
) -> Iterator[Diagnostic]:
    """A warning if the copy that other tools look at says something else than mlx-lm reads."""
    config = document(files, CONFIG)
    copy = config.get("quantization_config")
    if copy is not None and copy != config.get("quantization"):
        reason = "its quantization_config differs from its quantization, which mlx-lm reads"
        yield diagnostic("metadata-elsewhere", file=CONFIG, reason=reason)


def _check_copy(copy: Any, forms: Forms) -> None:
    """Raises: PolicyError if the bundle is one of MLX, and mlx-lm would not find out how."""
    described = isinstance(copy, Mapping) and "quant_method" not in copy and "bits" in copy
    if described and any({"weight", "scales"} <= parts.keys() for parts in forms.values()):
        reason = "it has a quantization_config without quant_method, and no quantization"
        cure = "copy its quantization_config to quantization, where mlx-lm looks"
        raise fail("bad-bundle-metadata", path=CONFIG, reason=reason, suggestion=cure)


def _claim(treatment: Coded, parts: Mapping[str, TensorForm], given: str | None) -> Claim:
    """The claim about a module of these parts; without a shape where one is missing."""
    codes, scales, dtype = parts.get("weight"), parts.get("scales"), given or "BF16"
    if codes is None or scales is None or not scales[1]:
        return Claim(treatment, (), dtype)
    shape = (*codes[1][:-1], scales[1][-1] * treatment.group_size)
    # The scales of floating-point modes are bytes and say nothing of the values, the config does.
    return Claim(treatment, shape, scales[0] if treatment.scheme == AFFINE else dtype)


def _quantization(plan: Plan) -> dict[str, Any]:
    """A whole entry for every quantized module, `false` for other matrices; else empty."""
    quantized = (module for module, _ in coded_modules(plan.modules))
    default = checkpoints.covering_most(quantized, lambda module: coded(module.treatment))
    if default is None:
        return {}
    # mlx-lm insists on a default, though no module is left to take it.
    described = _entry(default)
    for module in plan.modules:
        # Also those that equal the default: older releases guess nothing from shapes.
        if isinstance(module.treatment, Coded):
            described[module.name] = _entry(module.treatment)
        elif len(module.shape) > 1 and _is_weight(module):
            described[module.name] = False
    return described


def _entry(treatment: Coded) -> dict[str, Any]:
    return {"group_size": treatment.group_size, "bits": treatment.bits, "mode": treatment.scheme}


def _treatment(entry: Mapping[str, Any]) -> Coded:
    if not {"bits", "group_size"} <= entry.keys():
        raise formats.ForeignMetadataError("its quantization has no bits or no group_size")
    bits, group_size = entry["bits"], entry["group_size"]
    if type(bits) is not int or type(group_size) is not int:
        raise ValueError(f"bits {bits!r} and group_size {group_size!r} are not whole numbers")
    scheme = str(entry.get("mode", AFFINE))
    return Coded(scheme, bits, group_size, scheme != AFFINE, "")


def _is_weight(module: Module) -> bool:
    """Whether it is a module with a `.weight`, and not a tensor on its own."""
    return module.tensors[0].name != module.name


FILES = formats.Files(metadata=metadata, claims=claims, defects=defects)
