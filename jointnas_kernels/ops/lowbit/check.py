"""Whether a CUDA low-bit kernel computes the reference on this very device: asked before it is chosen automatically.

Some kernels use instructions of one GPU generation only (wgmma, clusters, bulk copies, b1 products). Each proves itself
once per process, device, weight width and type on a small random problem; a kernel that fails or cannot be launched is
left out from then on, and ``report`` says so. A check takes milliseconds, synchronises, and so cannot run while a CUDA
graph is being captured: whoever may be captured first calls `prepare` (as packed layers do) or runs once eagerly.
"""

import math

import torch

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.core import cuda as calls
from jointnas_kernels.ops.core.cuda import DTYPES
from jointnas_kernels.ops.lowbit import cuda
from jointnas_kernels.ops.lowbit.cuda import Plan
from jointnas_kernels.ops.lowbit.reference import product
from jointnas_kernels.ops.lowbit.weight import LowbitWeight
from jointnas_kernels.ops.quant.spec import level_range

KERNELS = {"int8": (2, 4, 8), "wgmma": (2, 4, 8), "half": (2, 4, 8), "bitplane": (2, 4)}  # weight bits
CASES = {  # tokens, bits of activations, plan
    "bitplane": ((5, 4, None), (17, 2, None)),
    "int8": ((133, 8, Plan(16, cluster=2)), (300, 4, Plan(32, cluster=4))),
    "wgmma": ((133, 8, Plan(8, splits=2)), (300, 4, Plan(16, splits=2))),
    "half": (
        (13, 16, Plan(2, splits=3, cluster=2)), (61, 16, Plan(8, splits=2, cluster=4)), (133, 16, Plan(4)),
        (133, 16, Plan(16, splits=2, cluster=2)), (300, 16, Plan(32, cluster=2)),
    ),
}  # fmt: skip
ROWS, INPUTS = 200, 1152  # rows off every tile, more groups than any pipeline has stages
STAYING = ("int8",)  # kernels whose blocks stay: so many rows and tokens that some compute more than one part of y
Key = tuple[str, int, torch.dtype, torch.device]
_results: dict[Key, str] = {}  # "" or what went wrong; results of checks, not state of a device


def differences(kernel: str, bits: int, dtype: torch.dtype, device: torch.device) -> str:
    """Run ``kernel`` beside the fp64 reference: "" if they agree, else where they do not."""
    generator = torch.Generator(device).manual_seed(bits)
    low, high = level_range(bits)
    # blocks each way beside the two that there are; together more than multiprocessors
    more = math.isqrt(calls.multiprocessors(torch.empty(0, device=device))) - 1 if kernel in STAYING else 0
    rows = ROWS + cuda.BLOCK_STRIPS * cuda.STRIP_ROWS * more
    q = torch.randint(low, high + 1, (rows, INPUTS), device=device, generator=generator)
    scale = (torch.rand(rows, INPUTS // 128, device=device, generator=generator) + 0.5).to(dtype)
    weight = LowbitWeight.pack(q, scale, bits, 128, layout="cuda", planes=kernel == "bitplane")
    for tokens, a_bits, plan in CASES[kernel]:
        if plan:
            tokens += 8 * plan.token_tiles * more
        x = (torch.randn(tokens, INPUTS, device=device, generator=generator) + 0.5).to(dtype)
        expected = product(x, *weight.unpack(), bits, a_bits, 128, False, torch.float64)
        activation = None
        if a_bits < 16:
            x, *activation = cuda.quantize_pack(x, a_bits, layout=cuda.ACT_LAYOUTS[kernel])
        y = cuda.multiply(kernel, x, weight, activation, plan)
        wrong = mismatches(y, expected)
        if wrong:
            return f"{wrong} of {y.numel()} outputs are wrong ({tokens} tokens, A{a_bits})"
    return ""


def mismatches(y: torch.Tensor, expected: torch.Tensor, noise: float = 1e-4) -> int:
    """How many elements are not within one rounding of the output (bf16: 2^-9) and the noise of fp32 sums, of which
    ``noise`` is the share of the largest expected value."""
    close = (y.double() - expected.double()).abs() <= 2**-8 * expected.abs() + noise * expected.abs().max()
    return int((~close).sum())


def capturing(device: torch.device) -> bool:
    """Whether work on ``device`` is being captured in a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def verified(kernel: str, bits: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ``kernel``, one of KERNELS, may be used for weights of ``bits`` bits on ``device``.

    Raises:
        JointNASError: it was not checked before a capture that goes on.
    """
    key = (kernel, bits, dtype, device)
    if key not in _results:
        if capturing(device):  # another kernel in its place would stay in the graph for good
            raise JointNASError(f"the {kernel!r} kernel for W{bits} in {dtype} was not checked on {device} yet, which "
                                "is impossible while a CUDA graph is captured: run the product once before the capture")
        try:
            _results[key] = differences(kernel, bits, dtype, device)
        except JointNASError as error:  # did not launch
            _results[key] = str(error)
    return not _results[key]


def prepare(weight: LowbitWeight) -> None:
    """Check the kernels that are chosen for products with this weight only once they are verified."""
    if weight.layout == "cuda" and not weight.planes:
        for kernel in ("int8", "wgmma", "half"):
            verified(kernel, weight.w_bits, weight.tensors[1].dtype, weight.tensors[1].device)


def report(device: torch.device) -> dict[str, str]:
    """Check every kernel on ``device``: "W4 int8 bfloat16" -> "verified" or the reason why it is not used."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # as tensors name it
    lines = {}
    for kernel, bits, dtype in ((k, b, d) for k, widths in KERNELS.items() for b in widths for d in DTYPES):
        reason = "" if verified(kernel, bits, dtype, device) else _results[(kernel, bits, dtype, device)]
        lines[f"W{bits} {kernel} {str(dtype)[6:]}"] = reason or "verified"
    return lines
