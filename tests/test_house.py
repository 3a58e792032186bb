"""The house rules: who imports whom, and what stays out of which room."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

from tests.smoke import SMOKE

ROOT = Path(__file__).parent.parent
PACKAGES = ("policyc", "policy_dsl", "emitters")
FORMATS = "(formats)"
# The one table of the import order: a module imports from layers further down, and from its own
# layer what leads to no cycle; formats never import each other. `.cli` and the folders of
# emitters stand for all they hold; an unlisted folder of emitters is a format. A leading dot
# stands for `policy_dsl`.
LAYERS = (
    # the commands
    "policyc.cli policyc.__main__",
    # the public names
    "policyc policyc.workflow",
    # values shown as text or JSON
    "policyc.reports",
    # from a plan to a bundle and back
    "emitters emitters.core",
    FORMATS,
    "emitters.checkpoints",
    "emitters.numerics emitters.tensor_io",
    # from policy, inventory and format to a plan, and what can be asked of plans
    ".planning",
    # policy texts, read and printed
    ".language",
    # checkpoints, read from headers alone
    ".sources",
    # the values that flow, and names as roles
    ".formats .reader_config",
    ".plan",
    ".roles",
    ".policy .inventory .treatments .views",
    # what everything may use
    ".bounded_json .diagnostics .documents .escaping .linear_patterns"
    " .quantities .regular_files policy_dsl",
)
# Calls that open or parse a file -> the modules that may: those for files of strangers, and
# those that read what is packaged, or open what they write.
OPENERS: dict[str, tuple[str, ...]] = {
    "open": (
        *(".regular_files", "policyc.cli", "emitters.core.deleting", "emitters.core.build"),
        *("emitters.core.workspace", "emitters.tensor_io.files"),
    ),
    "read_bytes": ("emitters.numerics.jit",),
    "read_text": (*("policyc.cli.app", "policy_dsl", ".language.draft", ".language.parsing"),),
    "FileIO": (".regular_files",),
    "memmap": (),
    "fromfile": (),
    "loads": (
        *(".bounded_json", ".language.draft", ".language.read_dsl", "policy_dsl"),
        "emitters.core.record",
    ),
    "load": (),
    "raw_decode": (".bounded_json",),
    "model_validate_json": (),
}
# Names that other things have too.
NO_OPENERS = (
    "gzip.open",
    "self._lines.open",
    "lines.open",
    "load",
    "yaml.load",
    "read_text",
    "policyc.load",
)
# package -> the rooms that may import it
RESERVED: dict[str, tuple[str, ...]] = {
    "numpy": ("emitters", "policy_dsl.formats"),
    "numba": ("emitters.numerics",),
    "click": ("policyc.cli",),
    "rich": ("policyc.cli",),
    "re2": ("policy_dsl.linear_patterns",),
    "torch": (),
    "transformers": (),
    "mlx": (),
    "mlx_lm": (),
    "jang_tools": (),
    "auto_round": (),
    "gptqmodel": (),
}
SMALL = ["--model", "examples/tiny-minimax-m2"]
HEAVY = ("numpy", "numba", "torch")
BANNED_WORDS = ("process", "handle", "manager", "helper", "util", "data")
DATA_ROOMS = (
    *("grammar", "policies"),
    *("policy_dsl/architectures", "policy_dsl/catalog", "policy_dsl/document_schemas"),
    *("policy_dsl/findings", "policy_dsl/readers"),
)
NO_PACKAGES = ("tests", "docs", "grammar", "policies", "examples", "benchmarks")
# Written in halves, so that this file does not find itself.
# What slows readers down: "X is no Y" for "X is not a Y", and words that mean something else.
# What there is none of is plain English, and so is what is no longer so.
ACCENT = re.compile(
    r"(?<!there )\b(?:is|are) n[o] (?!longer\b)|\bt[o]ld\b|\bst[a]nds?\b|\bl[i]es\b", re.I
)
MACHINE_PATHS = re.compile("/(?:wo" + "rk|ro" + "ot|ho" + "me|Us" + "ers)/|[.][.]/sha" + "red")


PLACES = {
    word if word[0] != "." else f"policy_dsl{word}": number
    for number, line in enumerate(LAYERS)
    for word in line.split()
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}
SPECS = [module for module in MODULES if re.fullmatch(r"emitters\.\w+\.spec", module)]


def _place(module: str) -> tuple[int, str] | None:
    """The layer of a module and the room that put it there; None for one without a layer."""
    parts = module.split(".")
    rooms = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    for room in rooms:
        if room in PLACES and (room == module or room not in PACKAGES):
            return PLACES[room], room
    return (PLACES[FORMATS], rooms[-2]) if parts[0] == "emitters" else None


def _imported(module: str) -> Iterator[str]:
    """The dotted names that a module imports, those of our own modules in full."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base


def _is_under(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def test_every_module_has_a_layer() -> None:
    assert [module for module in MODULES if _place(module) is None] == []


def test_every_layer_has_its_modules() -> None:
    known = {place[1] for module in MODULES if (place := _place(module))}
    assert sorted(set(PLACES) - known - {FORMATS}) == []


def test_no_import_goes_back_or_sideways() -> None:
    wrong = []
    for module in MODULES:
        layer, room = _place(module) or (-1, "")
        for name in _imported(module):
            there = _place(name) if name in MODULES else None
            if there is None or there[0] > layer:
                continue
            neighbours = there[0] == layer and LAYERS[layer] != FORMATS
            if not neighbours and there[1] != room:
                wrong.append(f"{module} -> {name}")
    assert wrong == []


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: {name for name in _imported(module) if name in MODULES} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as cycle:
        pytest.fail(" -> ".join(cycle.args[1]))


def test_packages_stay_in_their_rooms() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in MODULES
        for name in _imported(module)
        for package, rooms in RESERVED.items()
        if _is_under(name, package) and not any(_is_under(module, room) for room in rooms)
    ]
    assert wrong == []


def test_dependencies_are_the_packages_that_are_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^\w.-]", need)[0] for need in project["dependencies"]}
    tops = {name.partition(".")[0] for module in MODULES for name in _imported(module)}
    imported = tops - {*PACKAGES} - sys.stdlib_module_names
    distributed = {"yaml": "PyYAML", "re2": "google-re2"}
    assert {distributed.get(name, name) for name in imported} == declared


@pytest.mark.parametrize(
    "statement",
    [
        "from policyc import Plan, PolicyError, build, diff, load, open_source, plan, verify",
        "import policyc.cli.app",
        *(f"import {spec}" for spec in SPECS),
    ],
)
def test_starting_loads_no_array_library(statement: str) -> None:
    program = f"import sys\n{statement}\nprint([n for n in {HEAVY} if n in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


@pytest.mark.parametrize(
    ("arguments", "kept_out"),
    [
        (["check", "jangtq_k", *SMALL], HEAVY),
        (["plan", "jangtq_k", *SMALL], ("numba", "torch")),
        (["explain", "config_i", "lm_head.weight", *SMALL], ("numba", "torch")),
    ],
)
def test_commands_that_read_no_weights_are_light(
    arguments: list[str], kept_out: tuple[str, ...]
) -> None:
    # How quick they are is measured in benchmarks/; what makes them slow is kept out here.
    command = f"from policyc.cli import main\nprint(main({arguments}))"
    program = f"import sys\n{command}\nprint([n for n in {kept_out} if n in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.stdout.splitlines()[-2:] == ["0", "[]"], run.stderr


def test_files_of_strangers_are_opened_and_parsed_in_one_place() -> None:
    wrong = []
    for module, tree in TREES.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            called = ast.unparse(call.func)
            rooms = OPENERS.get(called.rpartition(".")[2])
            if rooms is None or called in NO_OPENERS:
                continue
            full = {room if room[0] != "." else f"policy_dsl{room}" for room in rooms}
            # The name of a package means its own file alone.
            if module not in full and not any(
                _is_under(module, room) for room in full - {*PACKAGES}
            ):
                wrong.append(f"{module}:{call.lineno} {called}")
    assert wrong == []


def test_rooms_of_data_hold_no_code() -> None:
    found = [str(path) for room in DATA_ROOMS for path in (ROOT / room).rglob("*.py")]
    assert found == []


def test_only_code_rooms_are_packages() -> None:
    found = [str(path) for room in NO_PACKAGES for path in (ROOT / room).rglob("__init__.py")]
    assert found == []


def test_names_say_what_things_are() -> None:
    banned = {word + ending for word in BANNED_WORDS for ending in ("", "s", "r", "rs")}
    wrong = [
        f"{module}: {name}"
        for module, tree in TREES.items()
        for name in [module.rpartition(".")[2], *_defined_names(tree)]
        if banned.intersection(_words(name))
    ]
    assert wrong == []


def _defined_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def test_print_is_for_the_command_line_and_assert_for_tests() -> None:
    wrong = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            printed = isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
            bare = isinstance(node, ast.ExceptHandler) and node.type is None
            outside = not _is_under(module, "policyc.cli")
            if isinstance(node, ast.Assert) or bare or (printed and outside):
                wrong.append(f"{module}:{node.lineno} {ast.unparse(node)}")
    assert wrong == []


def test_repository_speaks_of_itself_alone() -> None:
    rooms = (".ci", *PACKAGES, *NO_PACKAGES)
    files = [*ROOT.glob("*.*"), *(path for room in rooms for path in (ROOT / room).rglob("*"))]
    texts = [path for path in files if path.suffix in (".py", ".md", ".toml", ".yaml", ".lark", "")]
    wrong = [
        f"{path.relative_to(ROOT)}: {found.group()}"
        for path in texts
        if path.is_file() and (found := MACHINE_PATHS.search(path.read_text(encoding="utf-8")))
    ]
    assert wrong == []


@pytest.mark.parametrize(("file", "names"), SMOKE.items())
def test_smoke_tests_are_there(file: str, names: tuple[str, ...]) -> None:
    text = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert [name for name in names if f"def {name.partition('[')[0]}(" not in text] == []


def test_messages_and_pages_are_plain_english() -> None:
    texts = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for room in ("docs", "policies", "grammar", *PACKAGES)
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".md", ".yaml", ".qpol", ".lark")
    }
    texts["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
    for module, tree in TREES.items():
        written = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        texts[module] = "\n".join(text for text in written if isinstance(text, str))
    wrong = [f"{at}: {found[0]}" for at, text in texts.items() for found in ACCENT.finditer(text)]
    assert wrong == []
