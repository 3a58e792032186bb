"""The codec of the format: rows of one matrix to blocks of a quant code, and back.

With AWQ, an importance matrix scales columns: one scale for gate and up of a layer's experts.
Source: Kaden-Schutt/hipfire, `calibration` module and MiniMax branch at 02786be.
"""

from collections.abc import Iterator
from pathlib import Path

from emitters.checkpoints import wrong_tensor
from emitters.hipfire_hfq.container import CODE_OF, SCALE
from emitters.hipfire_hfq.spec import AWQ, CODES, GATE_UP, SCALE_ROLE, awq_choices
from emitters.numerics import VALUE_TYPES, Array, hfq
from emitters.numerics.column_weights import ColumnScale, awq_scale, forms_of_scale, gate_up_sums
from emitters.numerics.rounding import first_nonfinite
from emitters.tensor_io.files import Source, file_facts
from policy_dsl import formats
from policy_dsl.diagnostics import Diagnostic, PolicyError
from policy_dsl.formats import Claims, Context, Parts, Slack, Statistics, Tensors
from policy_dsl.inventory import TensorInfo
from policy_dsl.plan import Module, Plan
from policy_dsl.sources.hfq_container import QUANT_CODES
from policy_dsl.treatments import Coded

# Read at once: large enough for the disk, small enough for any machine.
_MOST_NBYTES = 8 * 2**20
_HEADERS = {
    "line": "a finite scale above 0 and a finite smallest value",
    "scale": "a finite scale that is not negative",
    "levels": "{n} finite levels in ascending order",
}


def encode(values: Array, dtype: str, treatment: Coded) -> dict[str, Array]:
    """The blocks of rows, float32 values [rows, in]: weight, uint8 [blocks, bytes of a block].

    Raises: UnstorableError with the row of a block whose scale or levels overflow; ValueError
    for another scheme.
    """
    code = _code(treatment)
    blocks = hfq.encode_blocks(values.reshape(-1), code)
    at = hfq.first_bad_header(hfq.block_header(blocks, code), code)
    if at >= 0:
        raise formats.UnstorableError(at * QUANT_CODES[code].group // values.shape[-1])
    return {"weight": blocks}


def decode(parts: Parts, dtype: str, treatment: Coded, columns: int) -> Array:
    """float32 [rows, columns]: the weights that hipfire computes with, rotated back.

    Rows that only fill up the last block are at the end.
    Raises: ValueError for another scheme, or blocks that are not whole rows.
    """
    blocks, code = _blocks(parts, treatment)
    count = len(blocks) * QUANT_CODES[code].group // columns * columns
    return hfq.decode_blocks(blocks, code, count).reshape(-1, columns)


def beyond(values: Array, parts: Parts, dtype: str, treatment: Coded, slack: Slack) -> Array:
    """The values [rows, in] that rounding to nearest would not have given these codes."""
    blocks, code = _blocks(parts, treatment)
    return hfq.hfq_beyond(values.reshape(-1), blocks, code, slack).reshape(values.shape)


def value_defects(folder: Path, tensors: Tensors, claims: Claims) -> Iterator[Diagnostic]:
    """Tensors with blocks or values that no kernel computes with; all data is read in pieces.

    Raises: PolicyError if the file cannot be read any more.
    """
    source = Source(folder, file_facts(folder, {tensor.file or "" for tensor in tensors.values()}))
    for name, tensor in tensors.items():
        nbytes = QUANT_CODES[CODE_OF[tensor.dtype]].nbytes
        # 0 for codes whose blocks have no known size.
        step = _MOST_NBYTES // max(nbytes, 1) * nbytes
        starts = range(0, tensor.nbytes, step) if step else ()
        found = (_defect(source, tensor, start, step) for start in starts)
        if defect := next(filter(None, found), None):
            yield wrong_tensor(tensor.file or "", name, defect)


def _defect(source: Source, tensor: TensorInfo, start: int, most: int) -> str | None:
    """What is wrong with the first bad block or value of a piece; None if nothing is."""
    code, count = CODE_OF[tensor.dtype], min(most, tensor.nbytes - start)
    stored = source.read(tensor.file or "", tensor.start + start, count)
    blocks = stored.reshape(-1, QUANT_CODES[code].nbytes)
    first = start // blocks.shape[1]
    if tensor.dtype in VALUE_TYPES:
        values = stored.view(VALUE_TYPES[tensor.dtype].storage)
        if (at := first_nonfinite(values, tensor.dtype)) >= 0:
            return f"value {first + at} is not a finite number"
        if tensor.name.endswith(f".{SCALE}.weight") and not (values > 0).all():
            return f"value {first + int((values > 0).argmin())} is not above 0"
    elif QUANT_CODES[code].header:
        numbers = hfq.block_header(blocks, code)
        if (at := hfq.first_bad_header(numbers, code)) >= 0:
            held = ", ".join(f"{number:g}" for number in numbers[at].tolist())
            wanted = _HEADERS[QUANT_CODES[code].header].format(n=numbers.shape[1])
            return f"block {first + at} begins with {held}, and readers need {wanted}"
    return None


def _blocks(parts: Parts, treatment: Coded) -> tuple[Array, int]:
    """The blocks, uint8 [blocks, bytes of a block], and their quant code."""
    code = _code(treatment)
    return parts["weight"].reshape(-1, QUANT_CODES[code].nbytes), code


def _code(treatment: Coded) -> int:
    key = treatment.scheme, treatment.group_size
    if key not in CODES:
        raise ValueError(f"this format has no scheme {treatment}")
    return CODES[key]


def contents(plan: Plan, statistics: Statistics) -> dict[str, bytes]:
    """The stored scales of every layer that is coded with AWQ.

    Raises: PolicyError if the importance matrix is not one of this model.
    """
    scales = (module for module in plan.modules if module.role == SCALE_ROLE)
    return {
        module.tensors[0].name: _scale(plan, module, statistics).stored.tobytes()
        for module in scales
    }


def context(plan: Plan, module: Module, source: int, statistics: Statistics) -> Context:
    """What an expert's columns are multiplied by before they are coded."""
    return Context(encode, _scale(plan, module, statistics).applied)


def _scale(plan: Plan, module: Module, statistics: Statistics) -> ColumnScale:
    """The scale that gate and up of all experts of a module's layer share."""
    alpha, exact = awq_choices(plan.policy)

    def computed() -> Array:
        gate = statistics.of_layer(GATE_UP[0], module)
        try:
            up = statistics.of_layer(GATE_UP[1], module)
        except PolicyError as error:
            # Both have the same inputs: without up's, gate's count for both.
            if error.diagnostics[0].code != "missing-imatrix-entry":
                raise
            up = None
        return awq_scale(gate_up_sums(gate, up), alpha)

    return forms_of_scale(statistics.once((AWQ, module.layer), computed), exact=exact)


CODEC = formats.Codec(encode, decode, beyond, value_defects)
SOLVER = formats.Solver(context, contents)
