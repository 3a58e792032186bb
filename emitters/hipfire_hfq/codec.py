"""The codec of the format: rows of one matrix to blocks of a quant code, and back.

With AWQ, an importance matrix scales columns: one scale for gate and up of a layer's experts.
Source: Kaden-Schutt/hipfire, `calibration` module and MiniMax branch at 02786be.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from emitters.checkpoints import wrong_tensor
from emitters.hipfire_hfq.container import CODE_OF, SCALE
from emitters.hipfire_hfq.spec import AWQ, CODES, GATE_UP, awq_choices, column_scale
from emitters.numerics import VALUE_TYPES, Array, hfq
from emitters.numerics.column_weights import ColumnScale, awq_scale, forms_of_scale, gate_up_sums
from emitters.numerics.rounding import first_nonfinite
from emitters.tensor_io.files import Source, file_facts
from policy_dsl.diagnostics import Diagnostic, PolicyError
from policy_dsl.formats import Claim, Context, Parts, Slack, Statistics, Tensors, UnstorableError
from policy_dsl.inventory import TensorInfo
from policy_dsl.plan import Module, Plan, coded_modules
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
        raise UnstorableError(at * QUANT_CODES[code].group // values.shape[-1])
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


def value_defects(
    folder: Path, tensors: Tensors, claims: Mapping[str, Claim]
) -> Iterator[Diagnostic]:
    """Tensors with blocks or values that no kernel computes with; all data is read in pieces.

    Raises: PolicyError if the file cannot be read any more.
    """
    source = Source(folder, file_facts(folder, {tensor.file or "" for tensor in tensors.values()}))
    for name, tensor in tensors.items():
        if (defect := _first_defect(source, tensor)) is not None:
            yield wrong_tensor(tensor.file or "", name, defect)


def _first_defect(source: Source, tensor: TensorInfo) -> str | None:
    """What is wrong with a tensor's first bad block or value; None if nothing is."""
    code = CODE_OF.get(tensor.dtype)
    nbytes = 0 if code is None else QUANT_CODES[code].nbytes
    if code is None or not nbytes:
        return None
    step = _MOST_NBYTES // nbytes * nbytes
    for start in range(0, tensor.nbytes, step):
        count = min(step, tensor.nbytes - start)
        stored = source.read(tensor.file or "", tensor.start + start, count)
        defect = None
        if tensor.dtype in VALUE_TYPES:
            defect = _value_defect(stored, tensor, start // nbytes)
        elif QUANT_CODES[code].header:
            defect = _block_defect(stored.reshape(-1, nbytes), code, start // nbytes)
        if defect is not None:
            return defect
    return None


def _value_defect(stored: Array, tensor: TensorInfo, first: int) -> str | None:
    values = stored.view(VALUE_TYPES[tensor.dtype].storage)
    at = first_nonfinite(values, tensor.dtype)
    if at >= 0:
        return f"value {first + at} is not a finite number"
    if tensor.name.endswith(f".{SCALE}.weight") and not (values > 0).all():
        return f"value {first + int((values > 0).argmin())} is not above 0"
    return None


def _block_defect(blocks: Array, code: int, first: int) -> str | None:
    numbers = hfq.block_header(blocks, code)
    at = hfq.first_bad_header(numbers, code)
    if at < 0:
        return None
    held = ", ".join(f"{number:g}" for number in numbers[at].tolist())
    wanted = _HEADERS[QUANT_CODES[code].header].format(n=numbers.shape[1])
    return f"block {first + at} begins with {held}, and readers need {wanted}"


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
    scaled = {
        name: module
        for module, coded in coded_modules(plan.modules)
        if coded.method == AWQ and (name := column_scale(module.name)) is not None
    }
    return {
        f"{name}.weight": _scale(plan, module, statistics).stored.tobytes()
        for name, module in scaled.items()
    }


def context(plan: Plan, module: Module, source: int, statistics: Statistics) -> Context:
    """What an expert's columns are multiplied by before they are coded."""
    return Context(encode, _scale(plan, module, statistics).applied)


def _scale(plan: Plan, module: Module, statistics: Statistics) -> ColumnScale:
    """The scale that gate and up of all experts of a module's layer share."""
    alpha, exact = awq_choices(plan.policy)

    def computed() -> Array:
        gate = statistics.of_layer(GATE_UP[0], module).sums
        try:
            up = statistics.of_layer(GATE_UP[1], module).sums
        except PolicyError as error:
            # Both have the same inputs: without up's, gate's count for both.
            if error.diagnostics[0].code != "missing-imatrix-entry":
                raise
            up = None
        return awq_scale(gate_up_sums(gate, up), alpha)

    return forms_of_scale(statistics.once((AWQ, module.layer), computed), exact=exact)
