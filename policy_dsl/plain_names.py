"""Names that become those of files and folders: plain names, never paths."""

from __future__ import annotations

import re

from policy_dsl.escaping import is_visible

# What file systems take, and of a policy's name what leaves room for the model's beside it.
LONGEST_FILE_NAME = 255
LONGEST_POLICY_NAME = 100
# Windows gives these names to devices in every folder, whatever comes after a dot.
_DEVICES = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])\s*(\..*)?",
    re.IGNORECASE | re.DOTALL,
)
_NOT_ON_WINDOWS = '<>:"|?*'


def is_plain_name(name: str) -> bool:
    """Whether this is the name of a file in a folder, and no path or device on any system."""
    # A colon: a drive, or a stream beside the file's bytes.
    parted = set(name) & set("/\\:")
    return bool(name) and is_visible(name) and not parted and not is_special_name(name)


def is_special_name(name: str) -> bool:
    """Whether a system has this name for a folder or a device of its own."""
    return name in (".", "..") or _DEVICES.fullmatch(name) is not None


def name_defect(name: str, *, longest: int = LONGEST_FILE_NAME) -> str | None:
    """Why a name cannot be that of a file or folder, in words; None if it can.

    longest: bytes that it may have in UTF-8.
    """
    odd = sorted(set(name) & set(_NOT_ON_WINDOWS))
    nbytes = len(name.encode("utf-8", "surrogatepass"))
    defects = {
        "it is a path, not a plain name": bool(set(name) & set("/\\")),
        "it begins with a dot, and such files are hidden": name.startswith("."),
        "it has spaces at an end or characters that cannot be seen": (
            not is_visible(name) or name != name.strip()
        ),
        "Windows has no files of that name": is_special_name(name) or name.endswith("."),
        f"it has {' '.join(odd)}, which names of files on Windows cannot have": bool(odd),
        f"it has {nbytes} bytes, more than {longest}": nbytes > longest,
    }
    return next((reason for reason, applies in defects.items() if applies), None)
