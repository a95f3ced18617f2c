"""CUDA side of lowbit_linear: weights tiled once, plans, launches (csrc/cuda/lowbit_*.cu).

``CudaWeight.build(packed, scale, bits)`` lays the weights out for the kernels (ops/pack.py: tile_weight); ``matmul``
runs them. Groups of 128 inputs, fp16 or bf16. ``lowbit_linear(backend="cuda")`` builds the layout on every call and is
meant for tests; a runtime keeps the ``CudaWeight``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from jointnas_kernels import _ext
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.core.dispatch import custom_op
from jointnas_kernels.ops.lowbit.pack import TILE_INPUTS, tile_planes, tile_scale, tile_weight, unpack_weight

DTYPES = {torch.float16: 0, torch.bfloat16: 1}
STRIP_ROWS = 64  # rows of one warp
# Most tokens the streaming kernel takes. W4A16, 8192 x 8192, H200, microseconds at 64 tokens: stream 36, wgmma 47,
# tile 62, the library's GEMM on dequantised weights 84; at 512: wgmma 149, dense 130. 32 tokens more cost stream 18.
STREAM_TOKENS = {16: 128, 8: 32, 4: 32, 2: 32}
LOCKS = 4096  # strips of rows x blocks of tokens that may be split along the inputs
BLOCK_ROWS = 128  # of the tiled, wgmma and int8 kernels
INT8_TOKENS = 128  # quantized activations: from here on the warp-specialised kernel, where it is verified
PLANE_BITS = (2, 4, 8)  # activations of the bit-plane kernel
LAYOUTS = {"stream": 0, "tile": 0, "wgmma": 1, "int8": 2, "bitplane": 3}  # of quantized activations


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """How lowbit_stream splits the work: 8-token tiles per pass, 64-row strips per block, blocks along the inputs."""

    token_tiles: int
    warp_rows: int
    splits: int

    def blocks(self, tokens: int, rows: int) -> int:
        return -(-rows // (STRIP_ROWS * self.warp_rows)) * self.splits * -(-tokens // (8 * self.token_tiles))


def stream_plan(tokens: int, rows: int, inputs: int, bits: int, sms: int) -> StreamPlan:
    """One wave of blocks: as few strips per block as fit the chip at once, then as many splits as are left over."""
    token_tiles = 1 if tokens <= 8 else 2 if tokens <= 16 else 4
    block_warps = 8 if bits == 8 or token_tiles > 1 else 16  # as in lowbit_stream.cu
    passes = -(-tokens // (8 * token_tiles))
    strips = -(-rows // STRIP_ROWS)
    warp_rows = next((w for w in (1, 2, 4, 8) if -(-strips // w) * passes <= sms), 8)
    row_blocks = -(-strips // warp_rows) * passes
    # a split is worth its reduction only while every warp still gets a group
    most = max(1, inputs // TILE_INPUTS // (block_warps // warp_rows))
    return StreamPlan(token_tiles, warp_rows, max(1, min(sms // row_blocks, most)))


@dataclasses.dataclass(frozen=True)
class TilePlan:
    """How lowbit_tile splits the work: 8-token tiles per block (8 or 16), blocks along the inputs."""

    token_tiles: int
    splits: int


def tile_plan(tokens: int, rows: int, inputs: int, sms: int) -> TilePlan:
    """64-token blocks until 128-token blocks fill the chip; splits only while they fit one wave."""
    row_blocks = -(-rows // BLOCK_ROWS)
    token_tiles = 16 if row_blocks * -(-tokens // 128) >= sms else 8
    blocks = row_blocks * -(-tokens // (8 * token_tiles))
    return TilePlan(token_tiles, max(1, min(sms // blocks, inputs // TILE_INPUTS // 4)))


@dataclasses.dataclass(frozen=True)
class Int8Plan:
    """How lowbit_int8 splits the work: 8-token tiles per block (16 or 32), blocks that share their tokens (1 or 2)."""

    token_tiles: int
    cluster: int

    def blocks(self, tokens: int, rows: int) -> int:
        return -(-rows // (BLOCK_ROWS * self.cluster)) * self.cluster * -(-tokens // (8 * self.token_tiles))


def int8_plan(tokens: int, rows: int, sms: int) -> Int8Plan:
    """256-token blocks read a third less than 128-token blocks, so those must save more than a tenth in whole waves."""
    cluster = 2 if rows > BLOCK_ROWS else 1
    wide, narrow = Int8Plan(32, cluster), Int8Plan(16, cluster)
    return wide if 2 * -(-wide.blocks(tokens, rows) // sms) <= 1.1 * -(-narrow.blocks(tokens, rows) // sms) else narrow


@dataclasses.dataclass(frozen=True)
class CudaWeight:
    """Weights in the kernels' layout. One instance must not be used on two streams at once (``locks``)."""

    weight: Tensor  # int32 [tiles, groups, bits/2, 32, 4]
    scale: Tensor  # [groups, 16 * tiles]
    locks: Tensor  # int32, zero between launches
    row_sum: Tensor  # fp32 [O]: sums of q * scale over the inputs
    bits: int
    rows: int
    inputs: int
    planes: bool = False  # laid out for bitplane, and only for it

    @staticmethod
    def build(packed: Tensor, scale: Tensor, bits: int, planes: bool = False) -> CudaWeight:
        """Tile ``packed`` int32 [O, I*bits/32] and ``scale`` [O, I/128] (fp16 or bf16); ``planes``: for
        :func:`bitplane`."""
        if scale.dtype not in DTYPES:
            raise JointNASError(f"the CUDA kernels take float16 or bfloat16 scales, got {scale.dtype}")
        rows, inputs = packed.shape[0], packed.shape[1] * 32 // bits
        if scale.shape != (rows, inputs // TILE_INPUTS) or inputs % TILE_INPUTS:
            raise JointNASError(
                f"the CUDA kernels take groups of {TILE_INPUTS} inputs; got weights {(rows, inputs)} with scales "
                f"{tuple(scale.shape)}"
            )
        q = unpack_weight(packed, bits, (rows, inputs)).view(rows, -1, TILE_INPUTS)
        row_sum = (q.sum(2, dtype=torch.int32) * scale.double()).sum(1).float()
        tiled = tile_planes(packed, bits) if planes else tile_weight(packed, bits)
        tiled_scale = tile_scale(scale)
        # last: a kernel launched early may run beside this one, but no longer beside those that wrote the weights
        locks = torch.zeros(LOCKS, dtype=torch.int32, device=packed.device)
        return CudaWeight(tiled, tiled_scale, locks, row_sum, bits, rows, inputs, planes)

    @property
    def bytes(self) -> int:
        """What one product has to read of the weights."""
        return self.weight.numel() * 4 + self.scale.numel() * self.scale.element_size()


def current_stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def multiprocessors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def quantize_pack(x: Tensor, bits: int, symmetric: bool = False, layout: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, I] to (a int8 [M, I], scale fp32 [M], zero int32 [M]); ``layout`` 1 is the order :func:`wgmma` reads, 2
    that of :func:`int8` (a [8 * ceil(M/8), I]), 3 the bit-planes of :func:`bitplane` (a [M, I * bits / 8])."""
    tokens, inputs = x.shape
    shape = {2: (-(-tokens // 8) * 8, inputs), 3: (tokens, inputs // 8 * bits)}.get(layout, (tokens, inputs))
    a = torch.empty(shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    zero = torch.empty(tokens, dtype=torch.int32, device=x.device)
    code = _ext.load(cuda=True).act_quant_pack(x.data_ptr(), a.data_ptr(), scale.data_ptr(), zero.data_ptr(), tokens,
                                               inputs, bits, int(symmetric), layout, DTYPES[x.dtype], current_stream(x))
    _ext.check(code, "act_quant_pack")
    return a, scale, zero


def run(kernel: str, x: Tensor, weight: CudaWeight, activation: tuple[Tensor, Tensor] | None, token_tiles: int,
        warp_rows: int, splits: int, early: bool, a_bits: int = 16, cluster: int = 1) -> Tensor:
    """Launch one of the ``lowbit_*`` kernels: y [M, O]."""
    tokens = x.shape[0] if activation is None else activation[0].numel()
    y = torch.empty(tokens, weight.rows, dtype=weight.scale.dtype, device=x.device)
    partial = torch.empty(splits, tokens, weight.rows, dtype=torch.float32, device=x.device) if splits > 1 else None
    act_scale, act_zero = activation if activation is not None else (None, None)
    row_sum = weight.row_sum if kernel in ("lowbit_wgmma", "lowbit_bitplane", "lowbit_int8") else None
    pointers = [0 if t is None else t.data_ptr()
                for t in (weight.weight, weight.scale, x, act_scale, act_zero, row_sum, y, partial, weight.locks)]
    code = getattr(_ext.load(cuda=True), kernel)(
        *pointers, tokens, weight.rows, weight.inputs, weight.bits, DTYPES[weight.scale.dtype], token_tiles, warp_rows,
        splits, int(early), a_bits, cluster, current_stream(x))
    _ext.check(code, kernel)
    return y


def stream(x: Tensor, weight: CudaWeight, activation: tuple[Tensor, Tensor] | None = None,
           plan: StreamPlan | None = None, early: bool = True) -> Tensor:
    """y [M, O] for few tokens. ``activation``: (scale, zero) of an ``x`` from :func:`quantize_pack`.

    ``early`` lets the kernel fetch weights before the previous kernel has ended (sm_90); it must not have written them.
    """
    p = plan or stream_plan(x.shape[0], weight.rows, weight.inputs, weight.bits, multiprocessors(x))
    return run("lowbit_stream", x, weight, activation, p.token_tiles, p.warp_rows, p.splits, early)


def bitplane(a: Tensor, weight: CudaWeight, activation: tuple[Tensor, Tensor], a_bits: int,
             plan: StreamPlan | None = None, early: bool = True) -> Tensor:
    """y [M, O] for few tokens on bit-planes: ``a`` from ``quantize_pack(..., layout=3)``, a weight built for planes."""
    columns = a.shape[0] * a_bits
    p = plan or stream_plan(columns, weight.rows, weight.inputs, weight.bits, multiprocessors(a))
    return run("lowbit_bitplane", a, weight, activation, p.token_tiles, p.warp_rows, p.splits, early, a_bits)


def tile(x: Tensor, weight: CudaWeight, activation: tuple[Tensor, Tensor] | None = None,
         plan: TilePlan | None = None) -> Tensor:
    """y [M, O] for many tokens."""
    p = plan or tile_plan(x.shape[0], weight.rows, weight.inputs, multiprocessors(x))
    return run("lowbit_tile", x, weight, activation, p.token_tiles, 1, p.splits, False)


def wgmma(x: Tensor, weight: CudaWeight, activation: tuple[Tensor, Tensor] | None = None,
          plan: TilePlan | None = None) -> Tensor:
    """y [M, O] for many tokens on sm_90a; a quantized ``x`` comes from ``quantize_pack(..., layout=1)``."""
    p = plan or tile_plan(x.shape[0], weight.rows, weight.inputs, multiprocessors(x))
    if activation is None:
        ordered = torch.empty_like(x)
        code = _ext.load(cuda=True).token_layout(x.data_ptr(), ordered.data_ptr(), *x.shape, current_stream(x))
        _ext.check(code, "token_layout")
        x = ordered
    return run("lowbit_wgmma", x, weight, activation, p.token_tiles, 1, p.splits, False)


def int8(a: Tensor, weight: CudaWeight, activation: tuple[Tensor, Tensor], plan: Int8Plan | None = None) -> Tensor:
    """y [M, O] for many quantized tokens on sm_90a: ``a`` from ``quantize_pack(..., layout=2)``."""
    p = plan or int8_plan(activation[0].numel(), weight.rows, multiprocessors(a))
    return run("lowbit_int8", a, weight, activation, p.token_tiles, 1, 1, False, cluster=p.cluster)


def dense(weight: CudaWeight) -> Tensor:
    """q * scale as [O, I], rounded once to the scales' dtype."""
    out = torch.empty(weight.rows, weight.inputs, dtype=weight.scale.dtype, device=weight.scale.device)
    code = _ext.load(cuda=True).lowbit_dequant(
        weight.weight.data_ptr(), weight.scale.data_ptr(), out.data_ptr(), weight.rows, weight.inputs, weight.bits,
        DTYPES[weight.scale.dtype], current_stream(out))
    _ext.check(code, "lowbit_dequant")
    return out


def choose(tokens: int, weight: CudaWeight, a_bits: int, device: torch.device) -> str:
    """Which kernel multiplies ``tokens`` tokens of ``a_bits`` bits; one tied to a GPU generation only once verified."""
    from jointnas_kernels.ops.lowbit.check import verified

    if weight.planes:
        if a_bits not in PLANE_BITS:
            raise JointNASError(f"bit-plane weights take activations of {PLANE_BITS} bits, got {a_bits}")
        return "bitplane"
    if tokens <= STREAM_TOKENS[a_bits]:
        return "stream"
    if a_bits == 16:
        return "dense"
    sms = multiprocessors(weight.weight)
    fills = Int8Plan(16, 2).blocks(tokens, weight.rows) >= sms // 2  # it cannot split along the inputs
    if tokens >= INT8_TOKENS and fills and verified("int8", weight.bits, weight.scale.dtype, device):
        return "int8"
    return "wgmma" if verified("wgmma", weight.bits, weight.scale.dtype, device) else "tile"


def matmul(x: Tensor, weight: CudaWeight, a_bits: int = 16, symmetric: bool = False) -> Tensor:
    """y = x_hat @ (q * scale)^T for x [..., I] in the scales' dtype."""
    if x.dtype != weight.scale.dtype:
        raise JointNASError(f"x is {x.dtype} but the weights' scales are {weight.scale.dtype}")
    flat = x.reshape(-1, weight.inputs).contiguous()
    if flat.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], weight.rows)
    chosen = choose(flat.shape[0], weight, a_bits, flat.device)
    kernels: dict[str, Callable[..., Tensor]] = {"stream": stream, "tile": tile, "wgmma": wgmma}
    if chosen == "dense":
        y = flat @ dense(weight).t()
    elif a_bits == 16:
        y = kernels[chosen](flat, weight)
    else:
        a, scale, zero = quantize_pack(flat, a_bits, symmetric, LAYOUTS[chosen])
        if chosen == "bitplane":
            y = bitplane(a, weight, (scale, zero), a_bits)
        elif chosen == "int8":
            y = int8(a, weight, (scale, zero))
        else:
            y = kernels[chosen](a, weight, (scale, zero))
    return y.view(*x.shape[:-1], weight.rows)


# ---- registration: a tiled weight as plain tensors, for modules that torch.compile traces ----


@custom_op(
    "lowbit_cuda",
    "(Tensor x, Tensor weight, Tensor scale, Tensor locks, Tensor row_sum, int bits, int a_bits, bool symmetric)"
    " -> Tensor",
)
def _packed_matmul(x: Tensor, weight: Tensor, scale: Tensor, locks: Tensor, row_sum: Tensor, bits: int, a_bits: int,
                   symmetric: bool) -> Tensor:
    rows, inputs = row_sum.shape[0], scale.shape[0] * TILE_INPUTS
    return matmul(x, CudaWeight(weight, scale, locks, row_sum, bits, rows, inputs), a_bits, symmetric)


@_packed_matmul.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, locks: Tensor, row_sum: Tensor, bits: int, a_bits: int,
      symmetric: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], row_sum.shape[0]))


def packed_matmul(x: Tensor, weight: Tensor, scale: Tensor, locks: Tensor, row_sum: Tensor, bits: int, a_bits: int = 16,
                  symmetric: bool = False) -> Tensor:
    """:func:`matmul` with the fields of a :class:`CudaWeight`."""
    return _packed_matmul(x, weight, scale, locks, row_sum, bits, a_bits, symmetric)
