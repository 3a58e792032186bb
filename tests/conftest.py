"""What tests share: patient examples, and inventories of tiny models.

The models are those of tests/golden/architectures, and changed ones; how they are recorded is in
test_architectures_transformers.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import Inventory, TensorInfo
from policy_dsl.roles.classify import classify
from tests.smoke import SMOKE

# A kernel may compile in the first example, and the machine may be busy: neither is a failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden" / "architectures"
SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I32": 4}


def pytest_ignore_collect(collection_path, config):
    """`-m smoke` does not even import the other tests."""
    is_test = collection_path.name.startswith("test_")
    others = is_test and collection_path.relative_to(TESTS).as_posix() not in SMOKE
    return True if others and config.option.markexpr == "smoke" else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks the smoke tests, before `-m` chooses."""
    for item in items:
        names = SMOKE.get(item.path.relative_to(TESTS).as_posix())
        chosen = names is not None and (
            not names or not {item.originalname, item.name}.isdisjoint(names)
        )
        if chosen and not item.get_closest_marker("slow"):
            item.add_marker("smoke")


def _tensor(name, shape, dtype="BF16"):
    return TensorInfo(name, dtype, tuple(shape), math.prod(shape) * SIZES[dtype])


def _inventory(config, *tensors):
    return Inventory("tiny", config, {each.name: each for each in tensors})


def _recorded(case, form="saved"):
    """The inventory of a recorded model, and the role of each of its tensors."""
    record = json.loads((GOLDEN / f"{case}.json").read_text())
    roles, tensors = {}, []
    for key, found in record.get(form, record["memory"]).items():
        pattern, shape = key.split(" ")
        role, _, places = found.partition(":")
        for numbers in places.split() or [""]:
            name = pattern
            for number in filter(None, numbers.split(".")):
                name = name.replace("#", number, 1)
            roles[name] = role
            tensors.append(_tensor(name, [int(n) for n in shape.split("x")]))
    return _inventory(record["config"], *tensors), roles


def _changed(case, *, without="", with_tensors=(), config=None):
    """A recorded inventory without the names that hold a text, with tensors and config keys."""
    found, _ = _recorded(case)
    kept = [t for t in found.tensors.values() if not without or without not in t.name]
    return _inventory({**found.config, **(config or {})}, *kept, *with_tensors)


def _codes(source):
    with pytest.raises(PolicyError) as caught:
        classify(source)
    return [found.code for found in caught.value.diagnostics]


def _message(source):
    with pytest.raises(PolicyError) as caught:
        classify(source)
    return str(caught.value)


def _mtp_block(prefix, case, layer):
    """The tensors of a model's block under another prefix."""
    own = f"layers.{layer}."
    found = _recorded(case)[0].tensors.values()
    return [
        each._replace(name=prefix + each.name.split(own)[1]) for each in found if own in each.name
    ]


def _packed_gpt_oss():
    """The recorded gpt-oss with its experts as published: blocks of MXFP4 and their scales."""
    packed = []
    for layer in range(3):
        for name, rows, columns in (("gate_up_proj", 256, 64), ("down_proj", 64, 128)):
            stem = f"model.layers.{layer}.mlp.experts.{name}"
            blocks = [4, rows, columns // 32]
            packed.append(_tensor(f"{stem}_blocks", [*blocks, 16], "U8"))
            packed.append(_tensor(f"{stem}_scales", blocks, "U8"))
            packed.append(_tensor(f"{stem}_bias", [4, rows]))
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    return _changed("gpt_oss", without="mlp.experts.", with_tensors=packed, config=config)


@pytest.fixture
def packed_gpt_oss():
    """An inventory with MXFP4 experts, rows of gate and up in turns."""
    return _packed_gpt_oss()


@pytest.fixture
def tensor():
    """(name, shape, dtype) -> TensorInfo."""
    return _tensor


@pytest.fixture
def inventory():
    """(config, *tensors) -> Inventory."""
    return _inventory


@pytest.fixture
def recorded():
    """(case, form) -> a recorded inventory and the role of each of its tensors."""
    return _recorded


@pytest.fixture
def changed():
    """(case, without=, with_tensors=, config=) -> a recorded inventory with a difference."""
    return _changed


@pytest.fixture
def codes():
    """(inventory) -> the codes of the diagnostics that refuse it."""
    return _codes


@pytest.fixture
def message():
    """(inventory) -> the text of the diagnostics that refuse it."""
    return _message


@pytest.fixture
def mtp_block():
    """(prefix, case, layer) -> the tensors of a recorded block under another prefix."""
    return _mtp_block
