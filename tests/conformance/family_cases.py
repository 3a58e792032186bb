"""Small checkpoints of families as publishers write them, with what stock mlx-lm makes of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unpacked_cases import write_unpacked

from emitters import FORMATS
from policy_dsl.inventory import Inventory
from policy_dsl.language.load import parse_policy
from policy_dsl.plan import Plan
from policy_dsl.planning.resolve import resolve

GOLDEN = Path(__file__).parents[1] / "golden" / "families"
# What golden sources have not, and readers want beside weights.
TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny-minimax-m2"
CASES = sorted(path.name for path in GOLDEN.iterdir())
# Stock mlx-lm converts it, and cannot run it: the embedding must not be quantized there.
TIED = "llama4_text"
# Published in low bits, which no source of a plan may be yet: shown with the values of their codes.
PACKED = frozenset({"deepseek_v41", "kimi_k3"})
# Of a role whose others are coded: stock leaves them plain in layers with latent attention.
OF_LATENT_LAYERS = {"model.layers.2.attention.g_proj", "model.layers.3.attention.g_proj"}
# Small models have no groups of 64.
MLX_4BIT = (
    (Path(__file__).parents[2] / "policies" / "mlx_4bit.yaml")
    .read_text(encoding="utf-8")
    .replace("group_size: 64", "group_size: 32")
)


def source_of(case: str, folder: Path) -> Path:
    """The checkpoint of a case; one that is packed is unpacked into a folder below this one."""
    return write_unpacked(GOLDEN / case, folder / "unpacked") if case in PACKED else GOLDEN / case


def expected(case: str) -> dict[str, Any]:
    """What stock makes of a case: its tensors, its bundle, its config's `quantization`."""
    found: dict[str, Any] = json.loads((GOLDEN / case / "expected.json").read_text())
    if case == TIED:
        found["quantization"]["model.embed_tokens"] = False
    return found


def planned(source: Inventory, rules: str, file: str = "p.qpol") -> Plan:
    policy, _ = parse_policy(rules, file)
    return resolve(policy, source, FORMATS, target="mlx_affine")


def rules_for(source: Inventory, quantization: Mapping[str, Any]) -> str:
    """A policy that gives every module the treatment that stock's config names."""
    wanted: dict[str, dict[str, list[int | None]]] = defaultdict(lambda: defaultdict(list))
    for module in planned(source, "all: keep").modules:
        entry = quantization.get(module.name, False)
        treatment = f"{entry['bits']}bit g{entry['group_size']}" if entry else "keep"
        if treatment != "keep":
            wanted[module.role][treatment].append(module.layer)
    lines = ["all: keep"]
    for role, treatments in wanted.items():
        for treatment, layers in treatments.items():
            numbers = ",".join(map(str, layers))
            where = "" if None in layers else f" in layers {numbers}"
            lines.append(f"{role}{where}: {treatment}")
    return "; ".join(lines)
