"""The front end: policy texts and checkpoints to plans, without numpy and without formats."""

from functools import cache
from pathlib import Path
from typing import Any

# The folder of JSON Schemas, one for each kind of document.
DOCUMENT_SCHEMAS = Path(__file__).with_name("document_schemas")


def room(name: str) -> Path:
    """The folder of a data room: `_data/<name>` once installed, else that of the checkout."""
    package = Path(__file__).parent
    installed = package / "_data" / name
    return installed if installed.is_dir() else package.parent / name


@cache
def packaged_table(path: Path) -> dict[str, Any]:
    """What a YAML file of ours says."""
    # Many commands read none. libyaml reads all tables in 2 ms, pure Python in 12.
    import yaml  # noqa: PLC0415

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return dict(yaml.load(path.read_text(encoding="utf-8"), Loader=loader))


@cache
def version() -> str:
    """The version that is installed, or that of the checkout this runs from."""
    # Few commands ask, and these libraries take longer to load than some commands run.
    import tomllib  # noqa: PLC0415
    from importlib.metadata import PackageNotFoundError  # noqa: PLC0415
    from importlib.metadata import version as installed_version  # noqa: PLC0415

    try:
        return installed_version("policyc")
    except PackageNotFoundError:
        project = Path(__file__).parent.parent / "pyproject.toml"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
