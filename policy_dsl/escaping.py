r"""Text from anywhere, made safe for a terminal, for Markdown, and as the name of a file.

Escaping twice changes nothing: an escape can be seen, and backslashes stay as they are.
"""

import json
import re
import unicodedata
from collections.abc import Callable

# No message is made longer by what it quotes than people read.
LONGEST_VALUE = 2000

# Unicode says that these are seen, but they take no place or leave it empty.
_BLANK = (
    "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef"
)
# Marks over and under letters; piles of them would cover other lines.
_MARK = "[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]"
_HIDDEN = re.compile(f"[{_BLANK}]|(?<={_MARK}{{4}}){_MARK}")
# What bytes of a system's name become that it could not decode.
_BYTES = re.compile("[\udc80-\udcff]+")
_PICTURES = {**{chr(code): chr(0x2400 + code) for code in range(32)}, "\x7f": "\u2421"}
# Emphasis, code, links, images, cells; an underscore inside a word is only itself.
_MARKUP = re.compile(r"[\\|*`[]|(?<!\w)_|_(?!\w)")
# What makes a line a heading, a list, a quotation or a fence.
_START = re.compile(r"([0-9]{0,9})(#{1,6}(?= |$)|[-+.)](?= |$)|>|[-=~]{3})")
# What GitHub's and Azure's runners take for a command in the output of a program.
# Source: actions/runner, ActionCommand.TryParseV2 and TryParse; Azure, logging commands.
_COMMAND = re.compile(r"^ *:(?=:)|#(?=#(?:vso)?\[)", re.MULTILINE)
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", "@": "&#64;"})
# What file systems take, and of a policy's name what leaves room for the model's beside it.
LONGEST_FILE_NAME = 255
LONGEST_POLICY_NAME = 100
# Folders everywhere; Windows gives the other names to devices in every folder, whatever comes
# after a dot.
_DEVICE = r"con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]"
_SPECIAL = re.compile(rf"(?is)\.\.?|({_DEVICE})\s*(\..*)?")
_NOT_ON_WINDOWS = '<>:"|?*'


def is_visible(text: str) -> bool:
    """Whether every character is seen where it is: no control, no bidi mark, no line feed."""
    return text.isprintable() and (text.isascii() or not _HIDDEN.search(text))


def escaped(text: str, *, longest: int | None = None) -> str:
    r"""The text on one line, what cannot be seen as `\n`, `\x1b`, `\u202e`.

    Bytes of a file's name that are not UTF-8 become `\xff`. longest: characters before an ellipsis.
    """
    shown = _each(decoded(text if longest is None else text[: longest + 1]), _escape)
    return shown if longest is None or len(shown) <= longest else shown[:longest] + "…"


def shown(name: str, width: int = 160) -> str:
    """A name from a file as messages quote it: escaped, and cut after `width` characters."""
    return escaped(name, longest=width)


def quoted(value: object) -> str:
    """A value of a JSON document as messages quote it, in at most 40 characters."""
    # Nested values are named, not shown: printing them can exhaust the stack.
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return shown(json.dumps(value, ensure_ascii=False), 40)


def decoded(name: str) -> str:
    r"""The name of a file, with bytes that are not UTF-8 as `\xff`: JSON takes no others."""
    # A locale may have read UTF-8 as mere bytes.
    return _BYTES.sub(
        lambda raw: raw[0].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"),
        name,
    )


def escaped_lines(text: str, *, commands: bool = False) -> str:
    """The text with its line feeds, escaped; commands to runners too, unless `commands`."""
    lines = "\n".join(_each(line, _escape) for line in decoded(text).split("\n"))
    if commands:
        return lines
    return _COMMAND.sub(lambda found: f"{found[0][:-1]}\\x{ord(found[0][-1]):02x}", lines)


def escaped_json(text: str) -> str:
    r"""A JSON text of the same values, what cannot be seen as `\u202e`."""
    # In JSON's strings a line feed is escaped already: those here are of its layout.
    seen = "\n".join(_each(line, _json_escape) for line in text.split("\n"))
    return _COMMAND.sub(lambda found: found[0][:-1] + _json_escape(found[0][-1]), seen)


def replaced(line: str) -> str:
    """The line with a character that can be seen for each one that cannot."""
    return _each(line.replace("\t", " "), lambda char: _PICTURES.get(char, "\ufffd"))


def columns(text: str) -> int:
    """Columns of a terminal that the text takes: two for wide characters, none for marks."""
    if text.isascii():
        return len(text)
    seen = [char for char in text if unicodedata.category(char) not in ("Mn", "Me")]
    return len(seen) + sum(unicodedata.east_asian_width(char) in "WF" for char in seen)


def markdown(text: str, *, begins: bool = False) -> str:
    """The text as it reads in Markdown: no markup, link, image, mention or end of a cell.

    begins: whether a line begins with it, and could be a heading, a list or a fence.
    """
    shown = _MARKUP.sub(r"\\\g<0>", escaped(text).translate(_HTML))
    return _START.sub(r"\1\\\2", shown, count=1) if begins and _START.match(shown) else shown


def is_plain_name(name: str) -> bool:
    """Whether this is the name of a file in a folder, and no path or device on any system."""
    # A colon: a drive, or a stream beside the file's bytes.
    parted = set(name) & set("/\\:")
    return bool(name) and is_visible(name) and not parted and not _SPECIAL.fullmatch(name)


def name_defect(name: str, *, longest: int = LONGEST_FILE_NAME) -> str | None:
    """Why a name cannot be that of a file or folder; None if it can. longest: bytes in UTF-8."""
    odd = sorted(set(name) & set(_NOT_ON_WINDOWS))
    nbytes = len(name.encode("utf-8", "surrogatepass"))
    defects = {
        "it is a path, not a plain name": bool(set(name) & set("/\\")),
        "it begins with a dot, and such files are hidden": name.startswith("."),
        "it has spaces at an end or characters that cannot be seen": (
            not is_visible(name) or name != name.strip()
        ),
        "Windows has no files of that name": bool(_SPECIAL.fullmatch(name)) or name.endswith("."),
        f"it has {' '.join(odd)}, which names of files on Windows cannot have": bool(odd),
        f"it has {nbytes} bytes, more than {longest}": nbytes > longest,
    }
    return next((reason for reason, applies in defects.items() if applies), None)


def _each(text: str, escape: Callable[[str], str]) -> str:
    if is_visible(text):
        return text
    text = _HIDDEN.sub(lambda found: escape(found[0]), text)
    return "".join(char if char.isprintable() else escape(char) for char in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()


def _json_escape(char: str) -> str:
    return re.sub("....", r"\\u\g<0>", char.encode("utf-16-be", "surrogatepass").hex())
