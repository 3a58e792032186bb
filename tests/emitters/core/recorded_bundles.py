"""What is recorded of the bundles of the embedded model; see tests/golden/embedded/README.md.

`python tests/emitters/core/recorded_bundles.py BUNDLE…` records them by their folders' names.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from small_checkpoints import stored

from policy_dsl.sources.reference import open_source

RECORDED = Path(__file__).parents[2] / "golden" / "embedded"
TEXTS = ("config.json", "jang_config.json", "quantization_config.json", "quantize_config.json")


def tensor_digests(bundle: Path) -> dict[str, str]:
    """The SHA-256 of every tensor of a bundle."""
    return {
        name: hashlib.sha256(content).hexdigest()
        for name, (_, _, content) in sorted(stored(bundle).items())
    }


def metadata_texts(bundle: Path) -> dict[str, str]:
    """The text of every file that says how a bundle is quantized; what a container embeds."""
    texts = {name: (bundle / name) for name in TEXTS}
    found = {name: path.read_text("utf-8") for name, path in texts.items() if path.exists()}
    if not found:
        config = open_source(str(bundle)).config
        found["embedded_config.json"] = json.dumps(config, indent=2) + "\n"
    return found


def recorded_digests(policy: str) -> dict[str, str]:
    """The recorded digests of a policy's bundle."""
    digests: dict[str, str] = json.loads((RECORDED / policy / "tensors.json").read_text())
    return digests


def recorded_texts(policy: str) -> dict[str, str]:
    """The recorded texts of a policy's bundle."""
    files = (RECORDED / policy).glob("*.json")
    return {path.name: path.read_text("utf-8") for path in files if path.name != "tensors.json"}


def record(bundle: Path) -> None:
    """Write down what a bundle holds."""
    folder = RECORDED / bundle.name
    folder.mkdir(parents=True, exist_ok=True)
    digests = json.dumps(tensor_digests(bundle), separators=(",\n", ":"))
    (folder / "tensors.json").write_text(digests + "\n")
    for name, text in metadata_texts(bundle).items():
        (folder / name).write_text(text, "utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        record(Path(name))
