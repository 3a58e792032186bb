"""Every tensor of the models that transformers builds and saves has the role of its module.

What a tensor is for is read off the module that owns it, not off our tables. The outcome is
recorded in tests/golden/architectures, which the fast tests read; to record it again:
POLICYC_RECORD=1 pytest -m slow tests/policy_dsl/roles/test_architectures_transformers.py
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest

from policy_dsl.inventory import Inventory, TensorInfo
from policy_dsl.roles.classify import classify

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
GOLDEN = Path(__file__).parents[2] / "golden" / "architectures"
CASES = sorted(GOLDEN.glob("*.json"))
# Layers whose state is an average of what came before.
LINEAR = ("GatedDeltaNet", "Mamba", "ShortConv")
# What some classes call their linears.
WORDS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
WORDS |= {"input_linear": "gate_up_proj", "output_linear": "down_proj"}
VISION = ("Vision", "Siglip", "MultiModalProject", "MultimodalProject", "PatchMerger")


def build(config):
    """The model with random values in every tensor, no two alike."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**config)
    multimodal = hasattr(config, "vision_config")
    auto = "AutoModelForImageTextToText" if multimodal else "AutoModelForCausalLM"
    model = getattr(transformers, auto).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for tensor in {id(t): t for t in model.state_dict().values()}.values():
            tensor.copy_(torch.rand_like(tensor))
    return model


def role_by_module(model, name):
    """What the module that owns a tensor uses it for; `a+b` of a fused one."""
    path, _, leaf = name.rpartition(".")
    modules = [model]
    for part in path.split("."):
        modules.append(getattr(modules[-1], part))
    owner, classes = modules[-1], [type(module).__name__ for module in modules]
    attribute = path.rpartition(".")[2]

    def within(*words):
        # Jamba names the layer after what is in it, beside other blocks.
        own = [each for each in classes[1:] if "DecoderLayer" not in each]
        return any(word in each for word in words for each in own)

    if within(*VISION):
        return "vision"
    if path == "lm_head" and leaf == "bias":
        return "bias"
    if path == "lm_head" or isinstance(owner, torch.nn.Embedding):
        return "lm_head" if path == "lm_head" else "embed"
    if "Norm" in classes[-1]:
        return "norm"
    if isinstance(owner, torch.nn.Conv1d):
        return "bias" if leaf == "bias" else "conv"
    if "Experts" in classes[-1]:
        fused = {"gate_up_proj": "experts.gate_proj+experts.up_proj"}
        return "bias" if leaf.endswith("_bias") else fused.get(leaf, f"experts.{leaf}")
    if any("Router" in one for one in classes[-2:]) or leaf in (
        "e_score_correction_bias",
        "expert_bias",
    ):
        return "router" if leaf == "weight" else "router_bias"
    if isinstance(owner, torch.nn.Linear):
        if leaf == "bias":
            return "bias"
        return linear_role(attribute, modules, within)
    return "ssm" if within(*LINEAR, "DeltaAttention") else "sinks"


def linear_role(attribute, modules, within):
    """The role of a linear layer, by the blocks around it."""
    if attribute == "shared_expert_gate":
        return attribute
    if within(*LINEAR):
        return f"linear_attention.{attribute}"
    if within("Attention"):
        return f"attention.{'o_proj' if attribute == 'out_proj' else attribute}"
    beside_experts = any(
        getattr(modules[-3], word, None) for word in ("experts", "block_sparse_moe")
    )
    return f"{'shared_experts' if beside_experts else 'mlp'}.{WORDS.get(attribute, attribute)}"


def logical(memory, roles):
    """(role, values) of the model in memory, halves of fused experts apart."""
    for name, tensor in memory.items():
        parts = roles[name].split("+")
        if parts[0].startswith("experts."):
            size = tensor.shape[1] // len(parts)
            for values in tensor:
                yield from zip(parts, values.split(size), strict=True)
        else:
            yield roles[name], tensor


def saved_roles(model, saved):
    """The role of each saved tensor; a renamed one is found again by its values."""
    memory = model.state_dict()
    roles = {name: role_by_module(model, name) for name in memory}
    whole = ((roles[name], tensor) for name, tensor in memory.items())
    known = [*logical(memory, roles), *whole]
    for name in saved.keys() - memory.keys():
        alike = {
            role
            for role, values in known
            if values.shape == saved[name].shape and torch.equal(values, saved[name])
        }
        # A tied head is the embedding under a second name.
        [roles[name]] = alike - {"lm_head"} if "embed" in alike else alike
    return roles


def save(model, folder):
    """The tensors of the saved model, read by safetensors."""
    model.save_pretrained(folder)
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(safetensors.load_file(path))
    return tensors


def grouped(tensors, roles):
    """`name with # for numbers, shape` -> `role: the numbers of every such name`."""
    groups = {}
    for name, tensor in tensors.items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
        numbers = [int(number) for number in re.findall(r"(?<=\.)\d+(?=\.)", name)]
        key = f"{pattern} {'x'.join(map(str, tensor.shape))}"
        groups.setdefault((key, roles[name]), []).append(numbers)
    return {
        key: f"{role}: {' '.join('.'.join(map(str, each)) for each in sorted(numbers))}"
        for (key, role), numbers in sorted(groups.items())
    }


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_recorded_names_are_those_of_transformers(path, tmp_path):
    recorded = json.loads(path.read_text())
    model = build(recorded["config"])
    memory = model.state_dict()
    found = recorded | {"made_with": f"transformers {transformers.__version__}"}
    found["memory"] = grouped(memory, {name: role_by_module(model, name) for name in memory})
    if "not_saved" not in recorded:
        saved = save(model, tmp_path)
        found["saved"] = grouped(saved, saved_roles(model, saved))
    if os.environ.get("POLICYC_RECORD"):
        path.write_text(json.dumps(found, indent=1) + "\n")
    again = json.loads(path.read_text())
    # Which version wrote the record does not matter, only whether it would write the same.
    assert found | {"made_with": again["made_with"]} == again


def read(config, tensors):
    """The tensors' roles, by our tables."""
    found = {
        name: TensorInfo(name, "F32", tuple(tensor.shape), 4 * tensor.numel())
        for name, tensor in tensors.items()
    }
    return classify(Inventory("tiny", config, found))


def values_of(tensor, source):
    """The [out, in] values of a logical tensor, where its view says they are."""
    values, view = source.reshape(-1, source.shape[-1]), tensor.view
    assert view.shape == tensor.shape
    ((rows, columns, transposed),) = view.rectangles(0, view.n_rows)
    values = values[rows.start : rows.stop : rows.step]
    values = values[:, columns.start : columns.stop : columns.step]
    return values.T if transposed else values


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_model_on_the_meta_device_is_classified(path):
    config = json.loads(path.read_text())["config"]
    with torch.device("meta"):
        model = build(config)
    tensors = model.state_dict()
    found = read(config, tensors)
    assert {tensor.source.name for tensor in found.tensors} == set(tensors)
    elements = sum(math.prod(tensor.shape) for tensor in found.tensors)
    assert elements == sum(tensor.numel() for tensor in tensors.values())
    for tensor in found.tensors:
        expected = role_by_module(model, tensor.source.name).split("+")
        assert tensor.component == "vision" if expected == ["vision"] else tensor.role in expected


SAVED = [path for path in CASES if '"saved"' in path.read_text()]


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_fused_experts_hold_the_values_of_single_ones(path, tmp_path):
    config = json.loads(path.read_text())["config"]
    model = build(config)
    memory, saved = model.state_dict(), save(model, tmp_path)
    single = {
        (tensor.role, tensor.layer, tensor.expert): values_of(tensor, saved[tensor.source.name])
        for tensor in read(config, saved).tensors
        if tensor.component == "experts"
    }
    for tensor in read(config, memory).tensors:
        if tensor.component == "experts":
            values = values_of(tensor, memory[tensor.source.name])
            assert torch.equal(values, single.pop((tensor.role, tensor.layer, tensor.expert)))
    assert not single


def test_a_closed_gate_of_gpt_oss_closes_the_expert():
    config = json.loads((GOLDEN / "gpt_oss.json").read_text())["config"]
    model = build(config)
    memory = model.state_dict()
    for tensor in read(config, memory).tensors:
        if tensor.role == "experts.gate_proj":
            values_of(tensor, memory[tensor.source.name]).zero_()
    experts = model.model.layers[1].mlp.experts
    inputs = torch.rand(1, config["hidden_size"])
    for weight in experts.gate_up_proj:
        assert torch.count_nonzero(weight)
        assert not torch.count_nonzero(experts._apply_gate(inputs @ weight))
