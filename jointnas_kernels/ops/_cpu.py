"""Calls of the compiled CPU kernels (csrc/cpu): torch tensors in and out.

One function per kernel: makes the arguments dense, allocates the results, passes pointers and sizes. Callers (the ops)
have checked shapes; dtypes are float32 or bfloat16, vectors float32. ``isa`` forces an instruction set (1 scalar,
2 AVX2, 3 AVX-512, 4 AVX-512 with the extension the kernel uses; 0 the best of this machine) and ``threads`` a thread
count (default: torch's); results do not depend on the thread count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels._ext import load
from jointnas_kernels.errors import JointNASError

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ISAS = ("auto", "scalar", "AVX2", "AVX-512", "AVX-512 with the kernel's extension")
_ERRORS = {1: "an argument it does not support", 2: "this processor lacks the instruction set", 3: "out of memory"}


def call(name: str, *args: Tensor | int | float | None, isa: int = 0, threads: int | None = None) -> None:
    """``_C.cpu_NAME(args..., threads, isa)`` with tensors as addresses (None: null)."""
    values = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in args]
    error = getattr(load(), f"cpu_{name}")(*values, threads or torch.get_num_threads(), isa)
    if error:
        raise JointNASError(f"CPU kernel {name!r} ({ISAS[isa]}) refused: {_ERRORS.get(error, f'error {error}')}")


def vector(tensor: Tensor) -> Tensor:
    """A dense float32 vector."""
    return tensor.detach().to(torch.float32).contiguous()


def mixed_weight(weight: Tensor, r: Tensor, c: Tensor, *, isa: int = 0, threads: int | None = None) -> Tensor:
    """weight [M, N] * r[M, 1] * c[N]."""
    w = weight.contiguous()
    out = torch.empty_like(w)
    call("mixed_weight", w, vector(r), vector(c), out, *w.shape, DTYPES[w.dtype], isa=isa, threads=threads)
    return out


def quant_lora_mix(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, probs: Tensor, clip: Tensor | None, scaling: float,
    bits: Sequence[int], group_size: int, *, isa: int = 0, threads: int | None = None,
) -> Tensor:
    """sum_p probs[p] Q_p(weight + scaling lora_b[p] lora_a[p]), as ops/quant_lora_mix.py defines it."""
    w = weight.contiguous()
    out = torch.empty_like(w)
    lora = torch.promote_types(lora_a.dtype, lora_b.dtype)
    lora = lora if lora in DTYPES else torch.float32
    a, b = lora_a.to(lora).contiguous(), lora_b.to(lora).contiguous()
    call(
        "quant_lora_mix", w, a, b, vector(probs), None if clip is None else vector(clip),
        torch.tensor(bits, dtype=torch.int32), out, *w.shape, len(bits), a.shape[1], group_size, float(scaling),
        DTYPES[w.dtype], DTYPES[lora], isa=isa, threads=threads,
    )
    return out
