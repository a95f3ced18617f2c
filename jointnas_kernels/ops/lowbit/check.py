"""Whether a CUDA low-bit kernel computes the reference on this very device: asked before it is chosen automatically.

Some kernels use instructions of one GPU generation only (wgmma, clusters, bulk copies, b1 products). Each proves itself
once per process, device, weight width and type on a small random problem; a kernel that fails or cannot be launched is
left out from then on, and ``report`` says so. A check takes milliseconds, synchronises, and so never runs while a CUDA
graph is being captured: an unchecked kernel is then not chosen.
"""

from __future__ import annotations

import torch

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.lowbit import cuda as lowbit_cuda
from jointnas_kernels.ops.lowbit.cuda import CudaWeight, Int8Plan, TilePlan
from jointnas_kernels.ops.lowbit.pack import pack_weight
from jointnas_kernels.ops.quant.spec import quantize_tokens

KERNELS = {"int8": (2, 4, 8), "wgmma": (2, 4, 8), "bitplane": (2, 4)}  # weight bits
ROWS, INPUTS = 200, 1152  # rows off every tile, more groups than any pipeline has stages
Key = tuple[str, int, torch.dtype, torch.device]
_results: dict[Key, str] = {}  # "" or what went wrong; results of checks, not state of a device


def differences(kernel: str, bits: int, dtype: torch.dtype, device: torch.device) -> str:
    """Run ``kernel`` beside the fp64 reference: "" if they agree, else where they do not."""
    from jointnas_kernels.ops.lowbit.linear import dequantize

    generator = torch.Generator(device).manual_seed(bits)
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (ROWS, INPUTS), device=device, generator=generator)
    scale = (torch.rand(ROWS, INPUTS // 128, device=device, generator=generator) + 0.5).to(dtype)
    packed = pack_weight(q.to(torch.int8), bits)
    weight = CudaWeight.build(packed, scale, bits, planes=kernel == "bitplane")
    dense = dequantize(packed, scale, bits, 128, torch.float64)
    cases = {
        "bitplane": ((5, 4, 0), (17, 2, 0)),
        "int8": ((133, 8, 16), (300, 4, 32)),
        "wgmma": ((133, 8, 8), (300, 4, 16), (133, 16, 8), (300, 16, 16)),
    }
    for tokens, a_bits, tiles in cases[kernel]:
        x = (torch.randn(tokens, INPUTS, device=device, generator=generator) + 0.5).to(dtype)
        operand, activation, exact = x, None, x.double()
        if a_bits < 16:
            a, s, z = quantize_tokens(x, a_bits)
            exact = (a.double() - z.double()) * s.double()
            operand, *parts = lowbit_cuda.quantize_pack(x, a_bits, layout=lowbit_cuda.LAYOUTS[kernel])
            activation = (parts[0], parts[1])
        expected = exact @ dense.t()
        if kernel == "wgmma":
            y = lowbit_cuda.wgmma(operand, weight, activation, TilePlan(tiles, 2))
        else:
            assert activation is not None
            if kernel == "int8":
                y = lowbit_cuda.int8(operand, weight, activation, Int8Plan(tiles, 2))
            else:
                y = lowbit_cuda.bitplane(operand, weight, activation, a_bits)
        # every element within one rounding of the output (bf16: 2^-9) and fp32 noise of the sums
        wrong = ~((y.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-4 * expected.abs().max())
        if wrong.any():
            return f"{int(wrong.sum())} of {wrong.numel()} outputs are wrong ({tokens} tokens, A{a_bits})"
    return ""


def verified(kernel: str, bits: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ``kernel`` ("int8", "wgmma" or "bitplane") may be used for weights of ``bits`` bits on ``device``."""
    key = (kernel, bits, dtype, device)
    if key not in _results:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        try:
            _results[key] = differences(kernel, bits, dtype, device)
        except JointNASError as error:  # did not launch
            _results[key] = str(error)
    return not _results[key]


def report(device: torch.device) -> dict[str, str]:
    """Check every kernel on ``device``: "W4 int8 bfloat16" -> "verified" or the reason why it is not used."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # as tensors name it
    lines = {}
    for kernel, bits, dtype in ((k, b, d) for k, widths in KERNELS.items() for b in widths for d in lowbit_cuda.DTYPES):
        reason = "" if verified(kernel, bits, dtype, device) else _results[(kernel, bits, dtype, device)]
        lines[f"W{bits} {kernel} {str(dtype)[6:]}"] = reason or "verified"
    return lines
