"""What policies cost the embedded model: logits and perplexity beside those of its source.

    python benchmarks/quality.py config_i mlx_4bit mine.yaml [--tokens 24576]

Each policy's bundle of examples/tiny-minimax-m2 is built, every module decoded by its format's
own decoder, and the values put into transformers' MiniMaxM2, which computes in float32 on CPU.
So all targets are measured alike, and only weights: not what a reader's kernels round.

The text is what the model was not trained on (examples/tiny-minimax-m2-data), windows of 256
positions; fewer tokens are windows evenly spread over it. The source counts with its exact
values, FP8 codes times scales, and all its experts. The same numbers come out of every run.

size, bpw     all tensors of the bundle, and their bits for each parameter of the model
weight error  |W - D| / |W| over all quantized tensors together, as `verify --source` has it
cosine        of the logits with the source's, each position's, their mean
KL            divergence from the source's distribution of the next token, mean, in nats
perplexity    exp of the mean cross entropy of the next token
change        of the perplexity, and its standard error over the windows: less than about two of
              these are chance; KL tells smaller differences apart

Needs torch and transformers (`pip install -e ".[conformance]" torch`).
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, prod
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, installed or not

import numpy as np  # noqa: E402 - the line above must come first
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from emitters.core.build import available_cores, build  # noqa: E402
from emitters.core.bundle_reading import Bundle, open_bundle  # noqa: E402
from emitters.core.decoding import Decoder, source_reader  # noqa: E402
from emitters.core.matching import match  # noqa: E402
from emitters.core.verify_source import compare  # noqa: E402
from emitters.numerics.reach import Sums  # noqa: E402
from emitters.tensor_io.view_rows import Cast  # noqa: E402
from policy_dsl.diagnostics import errors, render  # noqa: E402
from policy_dsl.inventory import Inventory  # noqa: E402
from policy_dsl.quantities import bits_per_weight  # noqa: E402
from policy_dsl.roles.classify import Model, ModelTensor, classify  # noqa: E402
from policy_dsl.sources.reference import open_source  # noqa: E402
from policy_dsl.treatments import Coded  # noqa: E402
from policy_dsl.views import stacked  # noqa: E402
from policyc import Plan, PolicyError, load  # noqa: E402
from policyc import reports as report  # noqa: E402
from policyc.workflow import plan_for  # noqa: E402

SOURCE = ROOT / "examples" / "tiny-minimax-m2"
TOKENS = ROOT / "examples" / "tiny-minimax-m2-data" / "tokens.safetensors"
BATCH = 16
COLUMNS = ("policy", "target", "size", "bpw", "weight error")
COLUMNS += ("cosine", "KL", "perplexity", "change")

# float32 values by the names of the source's tensors.
Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Likeness:
    """How far logits are from the source's; losses: float64 [windows], mean cross entropy."""

    cosine: float
    divergence: float
    losses: torch.Tensor

    @property
    def perplexity(self) -> float:
        """Over all windows."""
        return exp(self.losses.mean().item())


@dataclass(frozen=True)
class Figures:
    """A line of the table.

    parameters: of the model, pruned where the policy says so; absent: its tensors that the
    bundle does not hold; added_nbytes: of experts that only the bundle has.
    """

    name: str
    target: str
    nbytes: int
    parameters: int
    weight_error: float | None
    likeness: Likeness
    absent: tuple[str, ...] = ()
    added_nbytes: int = 0


def called(tensor: ModelTensor) -> str:
    """The name of a tensor in its model, where experts may have been pruned."""
    return re.sub(r"(?<=\.experts\.)\d+", str(tensor.expert), tensor.source.name)


def source_tensors(inventory: Inventory, model: Model) -> Tensors:
    """Every tensor of the source's model, dequantized."""
    reader, found = source_reader(inventory, model), {}
    for tensor in model.tensors:
        rows = reader.rows(tensor.view, 0, prod(tensor.shape[:-1]), Cast("F32"))
        found[called(tensor)] = rows.reshape(tensor.shape)
    return found


def decoded_tensors(bundle: Bundle, model: Model) -> Tensors:
    """Every tensor of the model that the bundle holds, as the bundle's readers see it."""
    decoder, stacks = Decoder(bundle), match(bundle, model)
    found = {}
    for module in bundle.modules:
        # Added experts stand for nothing in the source, and are never chosen.
        stack = stacks.get(module.name, ())
        placed = stacked(tensor.view for tensor in stack)
        for tensor, (_, first, count) in zip(stack, placed, strict=True):
            rows = decoder.rows(module, first, count)[:, : tensor.shape[-1]]
            found[called(tensor)] = rows.reshape(tensor.shape)
    return found


def weight_error(bundle: Bundle, source: Inventory) -> float | None:
    """The relative Frobenius error of all quantized modules; None if there are none.

    Raises: PolicyError if a module cannot be compared, so that nothing is left out unseen.
    """
    found, findings = compare(bundle, source, jobs=available_cores())
    if errors(findings):
        raise PolicyError(findings)
    quantized = {one.name for one in bundle.modules if isinstance(one.treatment, Coded)}
    return sum((one.sums for one in found if one.module in quantized), Sums()).relative


def evaluation_windows(tokens: int) -> torch.Tensor:
    """int64 [windows, 257]: at least so many positions, as far as the text goes."""
    windows = load_file(TOKENS)["evaluation"].long()
    total, length = len(windows), windows.shape[1] - 1
    # A standard error needs two.
    count = min(total, max(2, -(-tokens // length)))
    # Neighbours are of one module of the library; evenly spread, all have their share.
    return windows[torch.arange(count) * total // count]


def logits_of(tensors: Tensors, n_experts: int, windows: torch.Tensor) -> list[torch.Tensor]:
    """float32 [BATCH, positions, vocabulary] for each batch of windows."""
    config = transformers.AutoConfig.from_pretrained(SOURCE)
    del config.quantization_config
    config.num_local_experts = n_experts
    model, loaded = transformers.MiniMaxM2ForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict={name: torch.from_numpy(values) for name, values in tensors.items()},
        dtype=torch.float32,
        experts_implementation="eager",
        output_loading_info=True,
    )
    if wrong := {what: names for what, names in loaded.items() if names}:
        raise SystemExit(f"transformers {transformers.__version__} does not take it: {wrong}")
    model.eval()
    with torch.inference_mode():
        return [model(batch[:, :-1], use_cache=False).logits for batch in windows.split(BATCH)]


def likeness(
    found: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor], windows: torch.Tensor
) -> Likeness:
    """Logits against the source's and against the text."""
    cosines, divergences, losses = [], [], []
    for single, single_wanted, batch in zip(found, wanted, windows.split(BATCH), strict=True):
        # Sums of float32 over a vocabulary would show in the last digits.
        logits, exact = single.double(), single_wanted.double()
        cosines.append(torch.cosine_similarity(logits, exact, dim=-1))
        log, log_exact = logits.log_softmax(-1), exact.log_softmax(-1)
        divergences.append((log_exact.exp() * (log_exact - log)).sum(-1))
        losses.append(-log.gather(-1, batch[:, 1:, None]).squeeze(-1).mean(-1))
    cosine, divergence = torch.cat(cosines).mean(), torch.cat(divergences).mean()
    return Likeness(cosine.item(), divergence.item(), torch.cat(losses))


def measure(
    plans: Iterable[Plan], inventory: Inventory, windows: torch.Tensor
) -> Iterator[Figures]:
    """Of the source, then of the bundle of each plan."""
    whole = classify(inventory)
    exact = source_tensors(inventory, whole)
    wanted = logits_of(exact, whole.n_experts, windows)
    as_is = likeness(wanted, wanted, windows)
    yield Figures("(source)", "-", inventory.nbytes, parameters_of(whole), None, as_is)
    for plan in plans:
        exact = source_tensors(inventory, plan.model)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "bundle"
            build(plan, inventory, out=out)
            bundle = open_bundle(out)
            error = weight_error(bundle, inventory)
            decoded = decoded_tensors(bundle, plan.model)
        logits = logits_of({**exact, **decoded}, plan.model.n_experts, windows)
        yield Figures(
            plan.policy.name,
            plan.target,
            bundle.inventory.nbytes,
            parameters_of(plan.model),
            error,
            likeness(logits, wanted, windows),
            tuple(sorted(exact.keys() - decoded.keys())),
            sum(one.nbytes * one.added // one.shape[0] for one in bundle.modules if one.added),
        )


def parameters_of(model: Model) -> int:
    """Values of all tensors."""
    return sum(prod(tensor.shape) for tensor in model.tensors)


def cells(figures: Figures, as_is: Likeness) -> tuple[str, ...]:
    """A line of the table. as_is: of the source."""
    found, error = figures.likeness, figures.weight_error
    change = found.perplexity / as_is.perplexity - 1
    # Of pairs: how hard the windows are is the same for both.
    chance = (found.losses - as_is.losses).std() / len(as_is.losses) ** 0.5
    return (
        figures.name,
        figures.target,
        f"{figures.nbytes / 1e6:.3f} MB",
        f"{bits_per_weight(figures.nbytes, figures.parameters):.3f}",
        "-" if error is None else f"{error:.5f}",
        f"{found.cosine:.6f}",
        f"{found.divergence:.6f}",
        f"{found.perplexity:.4f}",
        f"{change:+.2%} ± {100 * chance:.2f}",
    )


def notes_on(figures: Figures) -> Iterator[str]:
    """What the line of a bundle does not show."""
    if figures.absent:
        absent = ", ".join(figures.absent)
        yield f"{figures.name} holds no {absent}: the source's own counted"
    if figures.added_nbytes:
        size = f"{figures.added_nbytes / 1e6:.3f} MB"
        yield f"{figures.name}: {size} of its size are experts that only the target wants"


def shown(found: Sequence[Figures], positions: int) -> list[report.Block]:
    """What was measured and how, a line for each policy, and what must be known of some."""
    facts = (
        ("model", f"{SOURCE.name}, {found[0].parameters:,} parameters"),
        ("text", f"{positions:,} positions that it was not trained on"),
        ("with", f"torch {torch.__version__}, transformers {transformers.__version__}"),
    )
    rows = tuple(cells(figures, found[0].likeness) for figures in found)
    notes = tuple(note for figures in found for note in notes_on(figures))
    blocks: list[report.Block] = [
        report.Facts(facts),
        report.Table(COLUMNS, rows, right=COLUMNS[2:]),
    ]
    return [*blocks, report.Items(notes)] if notes else blocks


def main() -> None:
    """Plan all policies, so that a mistake is told at once; build, measure, print, delete."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policies", nargs="+", metavar="POLICY", help="paths or bundled names")
    parser.add_argument(
        "--tokens", type=int, default=24576, help="positions to evaluate; by default all"
    )
    parser.add_argument("--format", choices=("text", "markdown"), default="text")
    options = parser.parse_args()
    if options.tokens < 1:
        parser.error("--tokens must be positive")
    transformers.utils.logging.disable_progress_bar()
    # The same sums on any number of cores, and no waiting for each other on busy ones.
    torch.set_num_threads(1)
    try:
        inventory = open_source(str(SOURCE))
        plans = [plan_for(load(name), inventory, None) for name in options.policies]
        windows = evaluation_windows(options.tokens)
        found = list(measure(plans, inventory, windows))
    except PolicyError as error:
        raise SystemExit(render(error.diagnostics)) from None
    blocks = shown(found, windows[:, 1:].numel())
    as_text = report.render_markdown if options.format == "markdown" else report.render_text
    print(as_text(blocks), end="")


if __name__ == "__main__":
    main()
