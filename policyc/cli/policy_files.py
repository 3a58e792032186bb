"""Which files of a folder are policies."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from policy_dsl.language.parsing import MAX_BYTES
from policy_dsl.regular_files import read_first

_DSL, _YAML = ".qpol", (".yaml", ".yml")
# A key that policies have and hardly another YAML file has, at the start of a line. Found by its
# text, so that a policy with a syntax error is reported, not passed over.
_KEY = re.compile(rb"""^["']?(rules|targets?|extends)["']?[ \t]*:""", re.MULTILINE)


class PolicyFiles(NamedTuple):
    """Policies, as `load` takes them, and how many other YAML files the folders hold."""

    policies: list[str]
    n_others: int


def policies_in(paths: Sequence[str]) -> PolicyFiles:
    """The policies that paths name: themselves, and those in folders, in natural order.

    In folders, hidden ones are left out, and links that lead out of them.
    Raises: PolicyError if a file cannot be read.
    """
    policies: dict[str, None] = {}
    n_others = 0
    for path in paths:
        if not os.path.isdir(path):
            policies[path] = None
            continue
        for file in _files_below(path):
            if is_policy(Path(file)):
                policies[file] = None
            else:
                n_others += 1
    return PolicyFiles(list(policies), n_others)


def is_policy(path: Path) -> bool:
    """Whether a file that is called as policies are is one. Raises: PolicyError if unreadable."""
    return path.suffix == _DSL or bool(_KEY.search(read_first(path, MAX_BYTES)))


def _files_below(folder: str) -> Iterator[str]:
    root = os.path.realpath(folder)
    for place, folders, files in os.walk(folder):
        # An environment's packages have YAML files of their own.
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and not os.path.exists(os.path.join(place, name, "pyvenv.cfg"))
        )
        for name in sorted(files):
            file = os.path.normpath(os.path.join(place, name))
            is_inside = os.path.realpath(file).startswith(os.path.join(root, ""))
            if name.endswith((_DSL, *_YAML)) and not name.startswith(".") and is_inside:
                yield file
