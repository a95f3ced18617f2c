"""The CPU half of bench_gemm: low-bit products of this package against torch's, on weights that come from memory.

Every call reads the next of several weight copies, together more than twice the last-level cache. extra.share is the
achieved part of the read bandwidth of the same run (row "read" of topic ceilings: all threads, nothing but loads, huge
pages): bytes of levels and scales over time. extra.rate counts two operations per product. For activations of 8 bits or
less the quantization of x is part of the call; its own time, with that of a call on 64 rows, is row "ours, quantize x".
torch's int8pack and _int_mm know one scale per row or none at all, and `_int_mm` gets quantized operands: both do less
than the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Recorder, Timing, gate, guarded, rotation, time_interleaved, time_rotated
from jointnas_kernels._ext import load
from jointnas_kernels.latency.timing import cache_bytes
from jointnas_kernels.ops import _cpu, lowbit_matmul, lowbit_pack, pack_weight
from jointnas_kernels.ops.lowbit_linear import quantize_tokens

GROUP = 128
CALLS = {1: 96, 16: 24, 256: 6}  # about; by tokens
Product = Callable[..., Tensor]  # (weight copy, x)


def read_bandwidth() -> Timing:
    """Bytes per second of loads alone, by all threads of torch."""
    size = max(512 << 20, 4 * cache_bytes(torch.device("cpu")))
    data = _cpu.empty_like(torch.empty(()).expand(size // 4)).fill_(1.0)
    call = partial(load().cpu_read, data.data_ptr(), size, torch.get_num_threads(), 0)
    times = time_interleaved({"read": call}, rounds=9)["read"]
    return Timing(size / times.median, size / times.p90, size / times.p10, times.n)


class Weights:
    """One matrix of integers; every contender packs it its own way."""

    def __init__(self, rows: int, inputs: int, bits: int) -> None:
        self.rows, self.inputs, self.bits = rows, inputs, bits
        self.q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, inputs), dtype=torch.int8)
        self.packed = pack_weight(self.q, bits)
        self.scale = (torch.rand(rows, inputs // GROUP) * 0.01 + 0.005).bfloat16()
        self.nbytes = self.packed.numel() * 4 + self.scale.numel() * 2

    def expected(self, x: Tensor, a_bits: int) -> Tensor:
        """The first 256 outputs in fp64."""
        dense = self.q[:256].double() * self.scale[:256].double().repeat_interleave(GROUP, 1)
        if a_bits < 16:
            a, s, z = quantize_tokens(x, a_bits)
            return ((a.double() - z.double()) * s.double()) @ dense.t()
        return x.double() @ dense.t()

    def ours(self, planes: bool = False) -> Any:
        return lowbit_pack(self.packed, self.scale, self.bits, GROUP, planes)

    def int4pack(self) -> tuple[Tensor, Tensor]:
        pairs = torch.stack((self.scale.t(), torch.zeros_like(self.scale.t())), -1).contiguous()
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(self.q.to(torch.int32) + 8, 1), pairs

    def int8pack(self) -> tuple[Tensor, Tensor]:
        return self.q.clone(), self.scale[:, 0].contiguous()


def ours(weight: Any, x: Tensor, a_bits: int) -> Tensor:
    return lowbit_matmul(x, weight, a_bits)


def int4pack(weight: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight[0], GROUP, weight[1])


def int8pack(weight: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    return torch.ops.aten._weight_int8pack_mm(x, *weight)


def int_mm(weight: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    return torch._int_mm(x, weight[0].t())


def dense(weight: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


def copied(weight: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return weight[0].clone(), weight[1].clone()


class Bench:
    def __init__(self, rec: Recorder, args: argparse.Namespace) -> None:
        self.rec, self.rows, self.inputs, self.tokens = rec, args.rows, args.inputs, args.tokens
        self.read = read_bandwidth()
        self.ceiling(self.read)

    def ceiling(self, read: Timing) -> None:
        Recorder("ceilings", "cpu", self.rec.folder, self.rec.commit).row("read", read, "B/s")

    def time(
        self,
        name: str,
        scheme: str,
        sets: list[Any],
        call: Product,
        x: Tensor,
        nbytes: int,
        extra: dict[str, Any] | None = None,
    ) -> None:
        tokens = x.shape[0]
        calls = next((n for limit, n in CALLS.items() if tokens <= limit), 4)
        used = sets if tokens <= 16 else sets[:2]  # many tokens: bound by arithmetic
        with torch.inference_mode():
            time = time_rotated(partial(call, x=x), used, "cpu", calls=calls)
        found = {
            "share": nbytes / time.median / self.read.median,
            "rate": 2 * tokens * self.rows * self.inputs / time.median,
            **(extra or {}),
        }
        self.rec.row(
            name, time, extra=found, scheme=scheme, m=tokens, n=self.rows, k=self.inputs, dtype=str(x.dtype)[6:]
        )

    def low_bits(self, bits: int, a_bits: list[int], planes: bool) -> None:
        weights = Weights(self.rows, self.inputs, bits)
        sets = rotation(partial(weights.ours, planes), weights.nbytes, "cpu")
        for tokens in self.tokens:
            x = torch.randn(tokens, self.inputs).bfloat16()
            for a in a_bits:
                error = gate("ours", {"y": (ours(sets[0], x, a)[:, :256], weights.expected(x, a))}, 1e-2)
                self.time(
                    "ours, popcount" if planes else "ours",
                    f"w{bits}a{a}",
                    sets,
                    partial(ours, a_bits=a),
                    x,
                    weights.nbytes,
                    {"error": error},
                )

    def torch_low_bits(self) -> None:
        for bits, name, make, call in (
            (4, "torch, int4pack", Weights.int4pack, int4pack),
            (8, "torch, int8pack", Weights.int8pack, int8pack),
        ):
            weights = Weights(self.rows, self.inputs, bits)
            one = make(weights)
            sets = rotation(partial(copied, one), weights.nbytes, "cpu")
            for tokens in self.tokens:
                x = torch.randn(tokens, self.inputs).bfloat16()
                if bits == 4:
                    gate(name, {"y": (call(one, x)[:, :256], weights.expected(x, 16))}, 1e-2)
                self.time(name, f"w{bits}a16", sets, call, x, weights.nbytes)
                if bits == 8:
                    levels = torch.randint(-128, 128, (tokens, self.inputs), dtype=torch.int8)
                    self.time("torch, _int_mm", "w8a8", sets, int_mm, levels, weights.nbytes)

    def dense(self, dtype: torch.dtype) -> None:
        nbytes = self.rows * self.inputs * dtype.itemsize
        sets = rotation(lambda: torch.randn(self.rows, self.inputs).to(dtype), nbytes, "cpu")
        for tokens in self.tokens:
            self.time("torch", "16", sets, dense, torch.randn(tokens, self.inputs).to(dtype), nbytes)

    def quantization(self) -> None:
        """One row of a weight block: what is left is quantizing x and the call itself."""
        weights = Weights(64, self.inputs, 8)
        for tokens in self.tokens:
            x = torch.randn(tokens, self.inputs).bfloat16()
            time = time_rotated(partial(ours, x=x, a_bits=8), [weights.ours()], "cpu", calls=50)
            self.rec.row(
                "ours, quantize x", time, scheme="w8a8", m=tokens, n=self.rows, k=self.inputs, dtype="bfloat16"
            )


def run(rec: Recorder, args: argparse.Namespace) -> None:
    bench = Bench(rec, args)
    for bits in (8, 4, 2):
        guarded(f"ours w{bits}", partial(bench.low_bits, bits, [8, 16], False))
    for bits in (2, 4):
        guarded(f"popcount w{bits}", partial(bench.low_bits, bits, [2, 4], True))
        guarded(f"ours w{bits}", partial(bench.low_bits, bits, [2, 4], False))
    guarded("quantization", bench.quantization)
    guarded("torch, low bits", bench.torch_low_bits)
    for dtype in (torch.bfloat16, torch.float32):
        guarded(f"torch {dtype}", partial(bench.dense, dtype))
    bench.ceiling(read_bandwidth())  # did it drift?
