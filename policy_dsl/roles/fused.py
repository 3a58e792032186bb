"""A source tensor that holds the matrices of all experts, as one logical tensor for each."""

from __future__ import annotations

from collections.abc import Iterator

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.inventory import TensorInfo
from policy_dsl.roles.model import ModelTensor
from policy_dsl.roles.name_rules import Fusion, NameRule
from policy_dsl.views import Alternate, Expert, Operation, Slice, Transposed

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
    outs, ins = _matrix_shape(tensor, fusion)
    n_parts = len(rule.roles)
    size = outs // n_parts
    parts: list[Operation] = [Slice(part * size, size) for part in range(n_parts)]
    if fusion.interleaved:
        parts = [Alternate(part, n_parts) for part in range(n_parts)]
    axes = (Transposed(),) if fusion.transposed else ()
    for expert in range(tensor.shape[0]):
        for role, part in zip(rule.roles, parts, strict=True):
            yield ModelTensor(
                source=tensor,
                role=role.name,
                component=role.component,
                projection=role.projection,
                layer=layer,
                expert=expert,
                shape=(size, ins),
                scale=scale,
                operations=(Expert(expert), *axes, *((part,) if n_parts > 1 else ())),
                mxfp4=fusion.mxfp4,
            )


def _matrix_shape(tensor: TensorInfo, fusion: Fusion) -> tuple[int, int]:
    """Outputs and inputs of an expert, all projections together."""
    rows, columns = tensor.shape[1:3]
    if fusion.mxfp4:
        return rows, columns * _MXFP4_BLOCK
    return (columns, rows) if fusion.transposed else (rows, columns)
