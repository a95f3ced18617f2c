"""Tokens as csrc/cuda/act_quant_pack.cu writes them, against torch: every level, scale and zero point."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from jointnas_kernels.ops.lowbit import cuda
from jointnas_kernels.ops.quant.spec import quantize_tokens
from jointnas_kernels.testing import poisoned

LAYOUTS = ["stream", "wgmma", "int8", "bitplane"]


def levels(a: Tensor, layout: str, tokens: int, inputs: int, bits: int) -> Tensor:
    """The levels [tokens, inputs] in ``a``. In a group input 32i + 8t + 4s + 2h + e is byte 32t + 8i + 4s + 2e + h, or
    for wgmma 32i + 16s + 4t + 2e + h; for int8 chunks of 16 bytes are swizzled too; bits of a plane are in order."""
    groups = inputs // 128
    if layout == "bitplane":
        bytes_ = a.view(torch.uint8).reshape(tokens, groups, bits, 16, 1).int()
        planes = (bytes_ >> torch.arange(8, device=a.device) & 1).reshape(tokens, groups, bits, 128)
        weights = torch.tensor([*(1 << b for b in range(bits - 1)), -(1 << (bits - 1))], device=a.device)
        return (planes * weights[:, None]).sum(2).reshape(tokens, inputs).to(torch.int8)
    if layout == "stream":
        return a.view(tokens, groups, 4, 4, 2, 2, 2).permute(0, 1, 3, 2, 4, 6, 5).reshape(tokens, inputs)  # t i s e h
    if layout == "int8":
        eights = a.view(groups, -1, 8, 8, 16)
        row = torch.arange(8, device=a.device)
        chunks = eights[:, :, row[:, None], row[None, :] ^ row[:, None]]  # [group, eight, token, chunk, 16]
        a = chunks.permute(1, 2, 0, 3, 4).reshape(-1, inputs)[:tokens]
    return a.reshape(tokens, groups, 4, 2, 4, 2, 2).permute(0, 1, 2, 4, 3, 6, 5).reshape(tokens, inputs)  # i s t e h


def check(x: Tensor, bits: int, symmetric: bool, layout: str) -> None:
    with poisoned():
        a, scale, zero = cuda.quantize_pack(x, bits, symmetric, cuda.ACT_LAYOUTS[layout])
    expected, s, z = quantize_tokens(x, bits, symmetric)
    found = levels(a, layout, *x.shape, bits)
    wrong = (found != expected).nonzero()
    what = f"A{bits} {x.dtype} {layout} {'symmetric' if symmetric else 'asymmetric'}"
    assert not len(wrong), f"{what}: {len(wrong)} levels, first {wrong[0].tolist()} of {tuple(x.shape)}"
    assert torch.equal(scale, s.flatten().float()), f"{what}: scales"
    assert torch.equal(zero, z.flatten().int()), f"{what}: zero points"


def rows(dtype: torch.dtype, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Shapes for all of a kernel's loops (several pieces per thread, half warps, rows longer than what is kept), and
    tokens of zeros, of one sign, and of the type's smallest and largest numbers."""
    for tokens, inputs in ((1, 128), (5, 4224), (3, 8192), (2, 8320), (129, 384), (130, 2176)):
        x = torch.randn(tokens, inputs, device=device) * 3 + torch.randn(tokens, 1, device=device)
        x[0] = 0
        x[-1, :64] = x[-1, :64].abs() * 8
        yield x.to(dtype)
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps  # the least subnormal number
    for sign in (1, -1):
        exponents = torch.arange(260.0 if dtype == torch.bfloat16 else 40.0, device=device)[:, None].double()
        x = (torch.rand(len(exponents), 128, device=device) - 0.3).double() * smallest * 2.0**exponents
        yield (sign * x).clamp(info.min / 2, info.max / 2).to(dtype)


def every_half(dtype: torch.dtype, count: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Rows of every number of ``dtype`` from ``least`` to ``most``, in all proportions and magnitudes."""
    bits = torch.arange(-(1 << 15), 1 << 15, device=device).to(torch.int16)
    numbers = bits.view(dtype)
    numbers = numbers[numbers.isfinite()]
    for _ in range(count):
        most, least = numbers[torch.randint(len(numbers), (2,), device=device)].abs()
        least = least if torch.rand(()) < 0.3 else most * torch.rand((), device=device).to(dtype)
        row = numbers[(numbers >= -least / 2) & (numbers <= most / 2)]
        yield torch.cat([row, row.new_zeros(-len(row) % 128)])[None]
