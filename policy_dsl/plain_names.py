"""Names that become those of files and folders: plain names, never paths."""

from __future__ import annotations

# What file systems take, and of a policy's name what leaves room for the model's beside it.
LONGEST_FILE_NAME = 255
LONGEST_POLICY_NAME = 100


def name_defect(name: str, *, longest: int = LONGEST_FILE_NAME) -> str | None:
    """Why a name cannot be that of a file or folder, as `it …`; None if it can.

    longest: bytes that it may have in UTF-8.
    """
    if "/" in name or "\\" in name:
        return "it is a path, not a plain name"
    if name.startswith("."):
        return "it begins with a dot, and such files are hidden"
    if not name.isprintable() or name != name.strip():
        return "it has spaces at an end or characters that cannot be seen"
    nbytes = len(name.encode())
    return f"it has {nbytes} bytes, more than {longest}" if nbytes > longest else None
