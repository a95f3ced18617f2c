"""lowbit_matmul: the product of reference.py with a LowbitWeight; lowbit_linear: the same from the storage layout.

Inference only: no gradients. From the storage layout the CPU kernels lay out each block on the way, which costs a
second pass over the weights, and ``backend="cuda"`` lays out everything on every call, which is meant for tests:
whoever multiplies the same weight again and again keeps a LowbitWeight.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from jointnas_kernels.ops.core import cpu
from jointnas_kernels.ops.core import cuda as calls
from jointnas_kernels.ops.core.backends import resolve
from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import bad, rows, without_autocast
from jointnas_kernels.ops.lowbit import blocks, cuda, portable, tiles
from jointnas_kernels.ops.lowbit.choice import NAME, chosen
from jointnas_kernels.ops.lowbit.pack import check_bits
from jointnas_kernels.ops.lowbit.reference import reference
from jointnas_kernels.ops.lowbit.weight import LowbitWeight
from jointnas_kernels.ops.quant.spec import PACKED_ACT_BITS


def _reference(
    x: Tensor, tensors: Sequence[Tensor], layout: str, planes: bool, outputs: int, inputs: int, w_bits: int,
    group_size: int, a_bits: int, symmetric: bool,
) -> Tensor:  # fmt: skip
    weight = LowbitWeight(tensors, layout, planes, outputs, inputs, w_bits, group_size)
    with without_autocast(x):
        return reference(x, *weight.unpack(), w_bits, a_bits, group_size, symmetric)


def _triton(x: Tensor, tensors: Sequence[Tensor], *values: Any) -> Tensor:
    *_, outputs, _, w_bits, group_size, a_bits, symmetric = values
    packed, scale = (t.contiguous() for t in tensors)
    y = portable.run(rows(x), packed, scale, w_bits, a_bits, group_size, symmetric)
    return y.view(*x.shape[:-1], outputs)


def _cpu(x: Tensor, *rest: Any) -> Tensor:
    tensors, layout, planes, outputs, inputs, w_bits, group_size, a_bits, symmetric = rest
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)  # a microsecond less than torch.empty
    count, dtype = x.numel() // inputs, cpu.DTYPES[x.dtype]
    if layout == "storage":
        packed, scale = tensors[0].contiguous(), blocks.dense_scale(tensors[1])
        cpu.call("lowbit_linear", x, packed, scale, y, count, outputs, inputs, w_bits, a_bits, group_size,
                 blocks.stored_group(group_size, w_bits), symmetric, dtype, cpu.DTYPES[scale.dtype])
    else:
        data = tensors[0]
        shape = data.shape
        stored = inputs // shape[1]
        bf16 = shape[2] == 1 + stored * w_bits // 32
        cpu.call("lowbit_matmul", x, data, y, count, outputs, inputs, w_bits, a_bits, stored, symmetric, planes, dtype,
                 bf16)
    return y


def _cuda(x: Tensor, *rest: Any) -> Tensor:
    *fields, a_bits, symmetric = rest
    weight = LowbitWeight(*fields)
    weight = weight.laid_out("cuda", weight.planes)
    if x.dtype != weight.tensors[1].dtype:
        raise bad(NAME, f"x is {x.dtype} but the weights' scales are {weight.tensors[1].dtype}")
    flat = calls.aligned(x if x.dim() == 2 else x.reshape(-1, weight.inputs))
    kernel, plan = chosen(flat.shape[0], weight, a_bits)
    y = cuda.product(kernel, flat, weight, a_bits, symmetric, plan)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.outputs)


def _choose(x: Tensor, *rest: Any) -> str:
    """The kernels of the weight's layout; from the storage layout the first that take it, in its dtypes, as it is."""
    tensors, layout, _, _, _, w_bits, group_size, _, _, backend = rest
    available: Sequence[str] = (layout, "reference")
    if layout == "storage":
        cuda_fits = group_size == tiles.INPUTS and x.dtype in calls.DTYPES and x.dtype == tensors[1].dtype
        available = (
            *(("cuda",) if cuda_fits or backend == "cuda" else ()), "triton",
            *(("cpu",) if group_size % (32 // w_bits) == 0 or backend == "cpu" else ()), "reference",
        )  # fmt: skip
    elif backend in (None, layout):
        if x.numel() and (x.is_cuda if layout == "cuda" else x.is_cpu and x.dtype in cpu.DTYPES):
            return layout  # the short way
        if x.device.type != layout:
            backend = layout  # moved elsewhere: an error that says so
    chosen = resolve(NAME, backend, x, available)
    return chosen if x.numel() else "reference"


_op = Op(NAME, {"cuda": _cuda, "triton": _triton, "cpu": _cpu, "reference": _reference}, choose=_choose)


def lowbit_matmul(
    x: Tensor, weight: LowbitWeight, a_bits: int = 16, symmetric: bool = False, backend: str | None = None
) -> Tensor:
    """y = x_hat @ (q * scale)^T, x_hat being x with every token quantized to ``a_bits``.

    Args:
        x: [..., I], any floating dtype; on CUDA that of the scales.
        weight: [O, I], laid out by `LowbitWeight.pack`.
        a_bits: 2, 4, 8, or 16: x is not quantized. Weights of bit-planes take 2 and 4 (on CUDA also 8).
        symmetric: quantize without zero point.
        backend: None: the kernels of the weight's layout where they can run on x; "reference"; for a weight in the
            storage layout also "triton", "cpu" or "cuda".

    Returns:
        [..., O] in x's dtype. Sums of levels are exact, the rest is computed in fp32 (fp64 for fp64). No gradients.

    Raises:
        JointNASError: bits, shapes or devices that do not fit, or a backend that cannot run.
    """
    bits = (2, 4) if weight.planes and weight.layout == "cpu" else PACKED_ACT_BITS
    if a_bits not in bits:
        check_bits(a_bits, bits, f"{NAME}: a_bits")
    first = weight.tensors[0]
    if x.shape[-1] != weight.inputs:
        raise bad(NAME, f"x has {x.shape[-1]} inputs, the weight {weight.inputs} inputs; x is {tuple(x.shape)}")
    if x.device != first.device:
        raise bad(NAME, f"x is on {x.device} and the weight, in layout {weight.layout!r}, on {first.device}")
    return _op(x, *weight, a_bits, symmetric, backend)


def lowbit_linear(
    x: Tensor, packed: Tensor, scale: Tensor, w_bits: int, a_bits: int, group_size: int, backend: str | None = "auto",
    symmetric: bool = False,
) -> Tensor:  # fmt: skip
    """`lowbit_matmul` on weights as a checkpoint stores them.

    Args:
        x: [..., I], any floating dtype.
        packed: int32 [O, I*w_bits/32], from `pack_weight`.
        scale: [O, I/group_size], any floating dtype.
        w_bits: 2, 4 or 8.
        a_bits: 2, 4, 8 or 16.
        group_size: inputs that share a scale; divides I.
        backend: "cuda" (groups of 128, float16 or bfloat16), "triton", "cpu", "reference"; "auto": the first that can.
        symmetric: quantize x without zero point.

    Returns:
        [..., O] in x's dtype.

    Raises:
        JointNASError: bits, shapes or devices that do not fit, or a backend that cannot run.
    """
    return lowbit_matmul(x, LowbitWeight.stored(packed, scale, w_bits, group_size), a_bits, symmetric, backend)
