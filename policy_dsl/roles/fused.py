"""A source tensor that holds the matrices of all experts, as one logical tensor for each."""

from __future__ import annotations

from collections.abc import Iterator

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.inventory import TensorInfo
from policy_dsl.roles.model import ModelTensor
from policy_dsl.roles.name_rules import Fusion, NameRule

# An MXFP4 block is 16 bytes of two 4-bit codes each.
_MXFP4_BLOCK = 32


def fused_defect(
    tensor: TensorInfo, fusion: Fusion, n_parts: int, n_experts: int
) -> Diagnostic | None:
    """What contradicts that it holds `n_parts` matrices of each expert; None if nothing."""
    axes = ["experts", *(("in", "out") if fusion.transposed else ("out", "in"))]
    if fusion.mxfp4:
        axes = ["experts", "out", "blocks of in", "bytes"]
    shape = dict(zip(axes, tensor.shape, strict=False))
    has_axes = len(tensor.shape) == len(axes) and all(tensor.shape)
    if has_axes and shape["experts"] == n_experts and shape["out"] % n_parts == 0:
        return None
    wanted = f"[{', '.join(axes)}] with {n_experts} experts, {n_parts} projections in `out`"
    return diagnostic("wrong-shape", name=tensor.name, shape=list(tensor.shape), wanted=wanted)


def defuse(
    tensor: TensorInfo, rule: NameRule, *, layer: int | None, scale: TensorInfo | None
) -> Iterator[ModelTensor]:
    """Every expert's matrices, expert by expert, of a tensor without `fused_defect`."""
    fusion = rule.fusion or Fusion()
    rows = tensor.shape[1]
    outs, ins = _matrix_shape(tensor, fusion)
    size = outs // len(rule.roles)
    firsts = range(len(rule.roles)) if fusion.interleaved else range(0, outs, size)
    for expert in range(tensor.shape[0]):
        for role, first in zip(rule.roles, firsts, strict=True):
            # Outputs are rows of the source, or its columns where it is transposed.
            row, column = (0, first) if fusion.transposed else (first, 0)
            yield ModelTensor(
                source=tensor,
                role=role.name,
                component=role.component,
                projection=role.projection,
                layer=layer,
                expert=expert,
                shape=(size, ins),
                first_row=expert * rows + row,
                transposed=fusion.transposed,
                scale=scale,
                row_step=len(rule.roles) if fusion.interleaved else 1,
                first_column=column,
                mxfp4=fusion.mxfp4,
            )


def _matrix_shape(tensor: TensorInfo, fusion: Fusion) -> tuple[int, int]:
    """Outputs and inputs of an expert, all projections together."""
    rows, columns = tensor.shape[1:3]
    if fusion.mxfp4:
        return rows, columns * _MXFP4_BLOCK
    return (columns, rows) if fusion.transposed else (rows, columns)
