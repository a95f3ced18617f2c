"""Every op once, forward and backward, on small odd shapes: what the memory checker runs (no pytest, few allocations).

compute-sanitizer --tool memcheck python tests/gpu/every_op_once.py [op ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from jointnas_kernels import _ext, ops
from jointnas_kernels.runtime import kernels

BITS = (2, 4, 8)


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()


def unit(*shape: int) -> Tensor:
    return torch.rand(*shape, device="cuda").requires_grad_()


def backward(out: Tensor | tuple[Tensor, ...]) -> None:
    outputs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(outputs, [torch.randn_like(o) for o in outputs])


def mix_inputs(o: int, i: int, group: int) -> tuple[Tensor, ...]:
    weight = torch.randn(o, i, device="cuda").bfloat16()
    probs = torch.tensor([0.2, 0.3, 0.5], device="cuda").requires_grad_()
    clip = (0.5 + 0.5 * torch.rand(3, o, i // group, device="cuda")).requires_grad_()
    return weight, leaf(3, 5, i), leaf(3, o, 5), probs, clip


def quant_lora_mix() -> None:
    for o, i, group in ((17, 96, 32), (129, 384, 128)):
        w, a, b, probs, clip = mix_inputs(o, i, group)
        backward(ops.quant_lora_mix(w, a, b, 0.5, BITS, probs, group, clip, "clip", mode="full"))


def quant_lora_linear() -> None:
    for mode in ("weight", "arch", "full"):
        w, a, b, probs, clip = mix_inputs(33, 160, 32)
        backward(ops.quant_lora_linear(leaf(7, 160), w, a, b, 0.5, BITS, probs, 32, clip=clip, ste="clip", mode=mode))


def quant_lora_linear_group() -> None:
    for mode in ("weight", "arch"):
        layers = [mix_inputs(o, 1184, 32) for o in (33, 1100, 17)]
        parts = [[layer[i] for layer in layers] for i in range(3)]
        probs, clips = layers[0][3], [layer[4] for layer in layers]
        backward(*ops.quant_lora_linear_group(leaf(70, 1184), *parts, 0.5, BITS, probs, 32, clips, mode=mode))


def lowbit_linear() -> None:
    for w_bits in BITS:
        q = torch.randint(-(1 << (w_bits - 1)), 1 << (w_bits - 1), (33, 256), dtype=torch.int8, device="cuda")
        packed, scale = ops.pack_weight(q, w_bits), torch.rand(33, 2, device="cuda").bfloat16()
        for a_bits in (4, 16):
            for tokens in (3, 70):
                x = torch.randn(tokens, 256, device="cuda").bfloat16()
                for backend in ("triton", "cuda") if _ext.available() and _ext.load().has_cuda else ("triton",):
                    ops.lowbit_linear(x, packed, scale, w_bits, a_bits, 128, backend=backend)


def lowbit_kernels() -> None:
    from jointnas_kernels.ops.lowbit import check as lowbit_check

    if not (_ext.available() and _ext.load().has_cuda):
        return
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for kernel in lowbit_check.KERNELS if hopper else ("bitplane",):
        result = lowbit_check.differences(kernel, 4, torch.bfloat16, torch.device("cuda"))
        assert not result, f"{kernel}: {result}"


def decode_step() -> None:
    """Its kernels (jointnas_kernels/runtime), of two blocks."""
    for count, dim in ((1, 12), (5, 96)):
        caches = [torch.zeros(2, 2, 9, dim, device="cuda").bfloat16() for _ in range(6)]
        where = torch.tensor([3, 9, *(t.data_ptr() for t in caches)], device="cuda")
        qkv = torch.randn(2 * count, 10 * dim, device="cuda").bfloat16().split((6 * dim, 2 * dim, 2 * dim), 1)
        weight, positions = torch.rand(dim, device="cuda").bfloat16(), torch.arange(2 * count, device="cuda") % 9
        heads = kernels.Heads(*qkv, weight, weight, where, positions, 1, 2, dim, 1e-5)
        if count > 1:
            kernels.rotate(heads, 2)
        else:
            for parts in (1, 4):
                kernels.attend(heads, torch.tensor([0, 2], device="cuda"), 3, 0.3, parts)
    x, y = (torch.randn(3, 129, device="cuda").bfloat16() for _ in range(2))
    kernels.add_norm(x, y, y[0], 1e-5)
    kernels.swiglu(x, y)


def mixed_weight() -> None:
    for impl in ("factored", "masks", "loop"):
        backward(ops.mixed_weight(leaf(37, 65), unit(2), (17, 65), unit(2), (9, 37), impl))


def masked_rope() -> None:
    q, k, table = leaf(2, 5, 4, 6), leaf(2, 5, 2, 6), torch.rand(1, 5, 6, device="cuda").bfloat16()
    backward(ops.masked_rope(q, k, table, table, unit(4, 6), unit(2, 6)))
    backward(ops.masked_rope(q, k, table, table, unit(4, 6), unit(2, 6), None, leaf(2, 5, 2, 6)))


CASES: dict[str, Callable[[], None]] = {
    "channel_mask": lambda: backward(ops.channel_mask(leaf(7, 129), unit(129))),
    "masked_swiglu": lambda: backward(ops.masked_swiglu(leaf(7, 129), leaf(7, 129), unit(129), unit(129))),
    "masked_swiglu_quant": lambda: backward(
        ops.masked_swiglu(
            leaf(7, 129), leaf(7, 129), unit(129), unit(129), act_bits=(2, 4, 8, 16), act_probs=unit(4)
        )
    ),
    "residual_rmsnorm": lambda: backward(
        ops.residual_rmsnorm(
            leaf(7, 129), leaf(7, 129), torch.rand(129, device="cuda"), unit(3), (32, 100, 129), 1e-5, unit(129),
            act_bits=(2, 4, 8, 16), act_probs=unit(4),
        )
    ),
    "gated_residual": lambda: backward(
        ops.gated_residual(
            leaf(7, 129), leaf(7, 129), unit(129), torch.rand((), device="cuda").requires_grad_(), leaf(7, 129)
        )
    ),
    "mixed_rmsnorm": lambda: backward(
        ops.mixed_rmsnorm(leaf(7, 129), leaf(129), unit(3), (32, 100, 129), 1e-5, unit(129))
    ),
    "mixed_rmsnorm_quant": lambda: backward(
        ops.mixed_rmsnorm(
            leaf(7, 129), leaf(129), unit(3), (32, 100, 129), 1e-5, unit(129), act_bits=(2, 4, 8, 16), act_probs=unit(4)
        )
    ),
    "head_rmsnorm": lambda: backward(
        ops.head_rmsnorm(leaf(7, 3, 12), torch.rand(12, device="cuda"), unit(3, 12), unit(2), (4, 12), 1e-5)
    ),
    "masked_rope": masked_rope,
    "mixed_weight": mixed_weight,
    "mixed_linear": lambda: backward(
        ops.mixed_linear(leaf(7, 33), leaf(65, 33), unit(33), unit(65), leaf(4, 33), leaf(65, 4), 0.5)
    ),
    "act_quant_mix": lambda: backward(ops.act_quant_mix(leaf(7, 129), (2, 4, 8, 16), unit(4))),
    "fake_quant_weight": lambda: backward(ops.fake_quant_weight(leaf(17, 96), 4, 32)),
    "quant_lora_mix": quant_lora_mix,
    "quant_lora_linear": quant_lora_linear,
    "quant_lora_linear_group": quant_lora_linear_group,
    "lowbit_linear": lowbit_linear,
    "lowbit_kernels": lowbit_kernels,
    "decode_step": decode_step,
}


def main() -> int:
    failed = 0
    for name in sys.argv[1:] or CASES:
        try:
            CASES[name]()
            torch.cuda.synchronize()
            print(f"{name}: ran", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
