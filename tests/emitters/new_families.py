"""Families that nobody has heard of: their tables beside those of all others, and their bundles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from policy_dsl.roles import architecture
from policyc.cli import main


@contextmanager
def known(
    folder: Path,
    name: str,
    table: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
) -> Iterator[Path]:
    """A checkpoint below a folder, while the table of its family is there."""
    tables, source = folder / "architectures", folder / "source"
    shutil.copytree(architecture.TABLES, tables)
    (tables / f"{name}.yaml").write_text(table)
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), source / "model.safetensors")
    cached = (architecture.families, architecture.model_types, architecture.architecture)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architecture, "TABLES", tables)
        for one in cached:
            one.cache_clear()
        yield source
    for one in cached:
        one.cache_clear()


def built(source: Path, target: str, rules: str) -> Path:
    """The bundle of a policy, planned, built and compared with its source."""
    policy, out = source.parent / "policy.qpol", source.parent / target
    policy.write_text(f"target {target}\ndefault group_size 32\n{rules}\n")
    assert main(["plan", str(policy), "--model", str(source)]) == 0
    assert main(["build", str(policy), "--model", str(source), "-o", str(out), "-q"]) == 0
    assert main(["verify", str(out), "--source", str(source), "-q"]) == 0
    return out
