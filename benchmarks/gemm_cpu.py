"""The CPU half of bench_gemm: low-bit products of this package against torch's, on weights that come from memory.

All contenders take turns, round by round, so that a machine that changes its speed does so for all of them; every call
reads the next of several weight copies, together more than twice the last-level cache. extra.share is the achieved part
of the read bandwidth, bytes of levels and scales over time, against loads and nothing else of the 8-bit weights in the
same round (name "read", huge pages); extra.over_int_mm, at many tokens, the speed over torch's `_int_mm` in the same
round. Both are medians over rounds. extra.rate counts two operations per product. For activations of 8 bits or less the
quantization of x is part of the call; its own time, with that of a call on 64 rows, is row "ours, quantize x". torch's
int8pack and _int_mm know one scale per row or none at all, and `_int_mm` gets quantized operands: both do less than the
others.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Recorder, Timing, gate, guarded, rotation, time_interleaved, time_rotated
from jointnas_kernels.latency.timing import cache_bytes
from jointnas_kernels.ops import LowbitWeight, lowbit_matmul, pack_weight
from jointnas_kernels.ops.core import cpu
from jointnas_kernels.ops.quant.spec import quantize_tokens

GROUP = 128
ROUNDS = {1: 40, 16: 15, 256: 8}  # about; by tokens
SECONDS = 2e-3  # of each contender per round, at least one call
Product = Callable[..., Tensor]  # (weight copy, x)


def read_bandwidth() -> Timing:
    """Bytes per second of loads alone, by all threads of torch."""
    size = max(512 << 20, 4 * cache_bytes(torch.device("cpu")))
    data = cpu.empty_like(torch.empty(()).expand(size // 4)).fill_(1.0)
    call = partial(cpu.call, "read", data, size)
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

    def ours(self, planes: bool = False) -> LowbitWeight:
        return LowbitWeight.pack(self.packed, self.scale, self.bits, GROUP, layout="cpu", planes=planes)

    def int4pack(self) -> tuple[Tensor, Tensor]:
        pairs = torch.stack((self.scale.t(), torch.zeros_like(self.scale.t())), -1).contiguous()
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(self.q.to(torch.int32) + 8, 1), pairs

    def int8pack(self) -> tuple[Tensor, Tensor]:
        return self.q.clone(), self.scale[:, 0].contiguous()


def ours(weight: LowbitWeight, x: Tensor, a_bits: int) -> Tensor:
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


@dataclass
class Contender:
    """One product on copies of its weights, and the dtype of its inputs."""

    name: str
    scheme: str
    sets: list[Any]
    call: Product
    nbytes: int
    dtype: torch.dtype = torch.bfloat16
    expected: Callable[[Tensor], Tensor] | None = None  # of the first 256 outputs
    position: int = 0
    samples: list[float] = field(default_factory=list)  # seconds per call, one per round

    def check(self, x: Tensor) -> dict[str, float]:
        if self.expected is None:
            return {}
        return {"error": gate(self.name, {"y": (self.call(self.sets[0], x)[:, :256], self.expected(x))}, 1e-2)}

    def turn(self, x: Tensor) -> None:
        times: list[float] = []
        while sum(times) < SECONDS:
            weight = self.sets[self.position % len(self.sets)]
            self.position += 1
            start = time.perf_counter()
            self.call(weight, x)
            times.append(time.perf_counter() - start)
        self.samples.append(statistics.median(times))


def read_weight(weight: LowbitWeight, x: Tensor) -> None:
    data = weight.tensors[0]
    cpu.call("read", data, data.numel() * 4)


class Bench:
    def __init__(self, rec: Recorder, args: argparse.Namespace) -> None:
        self.rec, self.rows, self.inputs = rec, args.rows, args.inputs
        self.contenders: list[Contender] = []

    def low_bits(self, bits: int) -> None:
        weights = Weights(self.rows, self.inputs, bits)
        sets = rotation(weights.ours, weights.nbytes, "cpu")
        if bits == 8:
            self.contenders.append(Contender("read", "w8", sets, read_weight, weights.nbytes))
        for a in (8, 16, *((2, 4) if bits < 8 else ())):
            self.ours(weights, a, "ours", sets)
        if bits < 8:
            sets = rotation(partial(weights.ours, True), weights.nbytes, "cpu")
            for a in (2, 4):
                self.ours(weights, a, "ours, popcount", sets)

    def ours(self, weights: Weights, a_bits: int, name: str, sets: list[Any]) -> None:
        call, expected = partial(ours, a_bits=a_bits), partial(weights.expected, a_bits=a_bits)
        scheme = f"w{weights.bits}a{a_bits}"
        self.contenders.append(Contender(name, scheme, sets, call, weights.nbytes, expected=expected))

    def torch_low_bits(self) -> None:
        for bits, name, make, call in (
            (4, "torch, int4pack", Weights.int4pack, int4pack),
            (8, "torch, int8pack", Weights.int8pack, int8pack),
        ):
            weights = Weights(self.rows, self.inputs, bits)
            sets = rotation(partial(copied, make(weights)), weights.nbytes, "cpu")
            expected = partial(weights.expected, a_bits=16) if bits == 4 else None
            self.contenders.append(Contender(name, f"w{bits}a16", sets, call, weights.nbytes, expected=expected))
            if bits == 8:
                self.contenders.append(
                    Contender("torch, _int_mm", "w8a8", sets, int_mm, weights.nbytes, dtype=torch.int8)
                )

    def dense(self, dtype: torch.dtype) -> None:
        nbytes = self.rows * self.inputs * dtype.itemsize
        sets = rotation(lambda: torch.randn(self.rows, self.inputs).to(dtype), nbytes, "cpu")
        self.contenders.append(Contender("torch", "16", sets, dense, nbytes, dtype=dtype))

    @torch.inference_mode()
    def measure(self, tokens: int) -> None:
        """All contenders at this number of tokens."""
        x = torch.randn(tokens, self.inputs)
        levels = torch.randint(-128, 128, (tokens, self.inputs), dtype=torch.int8)
        inputs = {torch.int8: levels, torch.bfloat16: x.bfloat16(), torch.float32: x}
        errors = []
        for one in self.contenders:
            one.samples.clear()
            errors.append(one.check(inputs[one.dtype]))
        for _ in range(next((n for limit, n in ROUNDS.items() if tokens <= limit), 4)):
            for one in self.contenders:
                one.turn(inputs[one.dtype])
        per_byte = {one.name: [s / one.nbytes for s in one.samples] for one in self.contenders if one.name == "read"}
        int_mm = [one.samples for one in self.contenders if one.name == "torch, _int_mm"]
        for one, extra in zip(self.contenders, errors, strict=True):
            found: dict[str, Any] = {"rate": 2 * tokens * self.rows * self.inputs / statistics.median(one.samples)}
            if "read" in per_byte:
                pairs = zip(per_byte["read"], one.samples, strict=True)
                found["share"] = statistics.median(r * one.nbytes / s for r, s in pairs)
            if int_mm and tokens > 16:
                found["over_int_mm"] = statistics.median(t / s for t, s in zip(int_mm[0], one.samples, strict=True))
            params = {"scheme": one.scheme, "m": tokens, "n": self.rows, "k": self.inputs, "dtype": str(one.dtype)[6:]}
            if one.name == "read":
                found = {"bandwidth": one.nbytes / statistics.median(one.samples)}
            self.rec.row(one.name, Timing.of(one.samples), extra=found | extra, **params)

    def quantization(self, tokens: int) -> None:
        """One block of rows: what is left is quantizing x and the call itself."""
        weights = Weights(64, self.inputs, 8)
        x = torch.randn(tokens, self.inputs).bfloat16()
        taken = time_rotated(partial(ours, x=x, a_bits=8), [weights.ours()], "cpu", calls=50)
        self.rec.row("ours, quantize x", taken, scheme="w8a8", m=tokens, n=self.rows, k=self.inputs, dtype="bfloat16")


def run(rec: Recorder, args: argparse.Namespace) -> None:
    bench = Bench(rec, args)
    ceilings = Recorder("ceilings", "cpu", rec.folder, rec.commit, rec.resume)
    ceilings.row("read", read_bandwidth(), "B/s")
    for bits in (8, 4, 2):
        guarded(f"ours w{bits}", partial(bench.low_bits, bits))
    guarded("torch, low bits", bench.torch_low_bits)
    for dtype in (torch.bfloat16, torch.float32):
        guarded(f"torch {dtype}", partial(bench.dense, dtype))
    for tokens in args.tokens:
        guarded(f"{tokens} tokens", partial(bench.measure, tokens))
        guarded("quantization", partial(bench.quantization, tokens))
    ceilings.row("read", read_bandwidth(), "B/s")  # did it drift?
