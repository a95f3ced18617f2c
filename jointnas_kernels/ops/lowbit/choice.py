"""Which CUDA kernel multiplies, and by which plan: rules of thumb, unless the device was measured
(`jointnas_kernels.tuned`); and all that could be measured."""

import functools
from typing import NamedTuple

import torch

from jointnas_kernels import tuned
from jointnas_kernels.ops.core import cuda as calls
from jointnas_kernels.ops.core.tensors import bad
from jointnas_kernels.ops.lowbit import check, cuda
from jointnas_kernels.ops.lowbit.cuda import STRIP_ROWS, Plan
from jointnas_kernels.ops.lowbit.tiles import INPUTS, LOCKS
from jointnas_kernels.ops.lowbit.weight import LowbitWeight
from jointnas_kernels.tuned import Shape

NAME = "lowbit_matmul"
STREAM_TOKENS = {16: 16, 8: 32, 4: 32, 2: 32}  # most that the streaming kernel takes
# 16-bit activations: most that the stripe kernel takes. Not measured; predicted at least 28 µs for 64 tokens of W4A16,
# 8192 x 8192, on an A100, where the library's GEMM on dequantised weights moves 300 MB, 178 µs.
STRIPE_TOKENS = 128
INT8_TOKENS = 128  # quantized activations: from here on the warp-specialised kernel, where it is verified
# 16-bit activations: the warp-specialised kernel takes these where it is verified. Not measured; predicted at least
# 9 µs for 64 tokens of W4A16, 8192 x 8192, 72 for 512. At 4096 dequantising first costs 5 % of the time.
HALF_TOKENS = range(33, 2048)
PLANE_BITS = (2, 4, 8)  # activations of the bit-plane kernel

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)  # that are measured
PASSES = 16  # of the streaming kernels: they read activations again for every 64 rows, and only a few columns at a time
STRIPE_PASSES = 4
WAVES = 4  # of split blocks: a split is there to fill the chip


class Candidate(NamedTuple):
    """A kernel with a plan of it; "dense" has none."""

    kernel: str
    plan: Plan | None

    def __str__(self) -> str:
        return self.kernel if self.plan is None else f"{self.kernel} {'/'.join(map(str, self.plan))}"


def kernel_for(tokens: int, weight: LowbitWeight, a_bits: int) -> str:
    """The kernel by rules of thumb; one tied to a GPU generation only once it is verified."""
    if weight.planes:
        if a_bits not in PLANE_BITS:
            raise bad(NAME, f"bit-plane weights take activations of {PLANE_BITS} bits, got {a_bits}")
        return "bitplane"
    key = weight.w_bits, weight.tensors[1].dtype, weight.tensors[1].device
    if a_bits == 16 and tokens in HALF_TOKENS and check.verified("half", *key):
        return "half"
    if tokens <= STREAM_TOKENS[a_bits]:
        return "stream"
    if a_bits == 16:
        return "stripe" if tokens <= STRIPE_TOKENS else "dense"
    fills = 2 * Plan(16, cluster=2).blocks(tokens, weight.outputs) >= calls.multiprocessors(weight.tensors[1])
    if tokens >= INT8_TOKENS and fills and check.verified("int8", *key):  # it cannot split along the inputs
        return "int8"
    return "wgmma" if check.verified("wgmma", *key) else "tile"


def usual(tokens: int, weight: LowbitWeight, a_bits: int) -> Candidate:
    """Kernel and plan by rules of thumb."""
    kernel = kernel_for(tokens, weight, a_bits)
    if kernel == "dense":
        return Candidate(kernel, None)
    sms = calls.multiprocessors(weight.tensors[1])
    return Candidate(kernel, cuda.usual_plan(kernel, tokens, weight.outputs, weight.inputs, weight.w_bits, a_bits, sms))


@functools.lru_cache(maxsize=4096)
def shape_of(w_bits: int, a_bits: int, outputs: int, inputs: int, dtype: torch.dtype, planes: bool = False) -> Shape:
    """What plans are found by."""
    levels = a_bits if planes or a_bits == 16 else 8
    return Shape(w_bits, levels, outputs, inputs, str(dtype).removeprefix("torch."), planes)


def chosen(tokens: int, weight: LowbitWeight, a_bits: int) -> tuple[str, Plan | None]:
    """Kernel and plan (None: the kernel's usual one): as measured on this device, otherwise by rules of thumb."""
    scale = weight.tensors[1]
    plans = tuned.plans(scale.device)
    if plans is not None:
        shape = shape_of(weight.w_bits, a_bits, weight.outputs, weight.inputs, scale.dtype, weight.planes)
        row = plans.find(tokens, shape)
        if row is not None and row.kernel is not None and runs(row.kernel, weight):
            return row.kernel, None if row.plan is None else Plan(*row.plan)
    return kernel_for(tokens, weight, a_bits), None


def runs(kernel: str, weight: LowbitWeight) -> bool:
    """Whether a kernel takes this weight here, and computes the reference if it is tied to a GPU generation."""
    if (kernel == "bitplane") != weight.planes:
        return False
    scale = weight.tensors[1]
    return kernel not in ("int8", "wgmma", "half") or check.verified(kernel, weight.w_bits, scale.dtype, scale.device)


def candidates(tokens: int, shape: Shape, sms: int) -> list[Candidate]:
    """Kernels and plans that may multiply a weight of this shape with so many tokens: all that the kernels take, but
    for those that launch more blocks or passes than could be of use."""
    found = [*_streams(tokens, shape, sms)]
    if not shape.planes:
        for kernel in ("tile", *(("wgmma",) if shape.a_bits < 16 else ())):
            found += [Candidate(kernel, p) for tiles in (8, 16) for p in _split(Plan(tiles), tokens, shape, sms)]
        if shape.a_bits == 16:
            found += [Candidate("dense", None), *_stripes(tokens, shape, sms)]
            for tiles in (2, 4, 8, 16, 32):
                if (tiles > 2 and tokens <= 4 * tiles) or (tiles < 16 and tokens > 16 * tiles):
                    continue  # half would be enough, or three passes
                for n in (2, 4) if tiles > 2 else (2,):
                    plan = Plan(tiles, cluster=n)
                    one_wave = min(shape.inputs // INPUTS, sms // plan.blocks(tokens, shape.outputs))  # an SM has one
                    found += [Candidate("half", p) for p in _split(plan, tokens, shape, sms, one_wave)]
        else:
            found += [Candidate("int8", Plan(tiles, cluster=n)) for tiles in (16, 32) for n in (1, 2, 4)]
    return found


def _stripes(tokens: int, shape: Shape, sms: int) -> list[Candidate]:
    found = []
    for tiles in (4, 8):
        passes = -(-tokens // (8 * tiles))
        if passes > STRIPE_PASSES or (tiles > 4 and tokens <= 4 * tiles):  # half of it would be enough
            continue
        plan = cuda.stripe_plan(tokens, shape.outputs, shape.inputs, sms, tiles)
        most = max(1, min(sms // passes, cuda.stripe_steps(shape.outputs, shape.inputs)))
        found += [Candidate("stripe", plan._replace(splits=n)) for n in sorted({plan.splits, most, -(-most // 2)})]
    return found


def _streams(tokens: int, shape: Shape, sms: int) -> list[Candidate]:
    kernel, columns = ("bitplane", tokens * shape.a_bits) if shape.planes else ("stream", tokens)
    strips, groups, found = -(-shape.outputs // STRIP_ROWS), shape.inputs // INPUTS, []
    for tiles in (1, 2) if shape.a_bits == 16 else (1, 2, 4):
        if -(-columns // (8 * tiles)) > PASSES or (tiles > 1 and columns <= 4 * tiles):  # half of it would be enough
            continue
        for warp_rows in (1, 2, 4, 8):
            if warp_rows > 1 and warp_rows // 2 >= strips:
                continue
            # a split is worth its reduction only while every warp still gets a group
            most = groups * warp_rows // cuda.stream_warps(kernel, shape.w_bits, tiles)
            found += [Candidate(kernel, p) for p in _split(Plan(tiles, warp_rows), columns, shape, sms, most)]
    return found


def _split(plan: Plan, columns: int, shape: Shape, sms: int, most: int | None = None) -> list[Plan]:
    """The plan, and splits of it."""
    most = shape.inputs // INPUTS if most is None else most
    blocks = plan.blocks(columns, shape.outputs)
    return [
        plan._replace(splits=n) for n in SPLITS
        if n == 1 or (n <= most and blocks <= LOCKS and blocks * n <= WAVES * sms)
    ]  # fmt: skip
