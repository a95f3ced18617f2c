"""Low-bit GEMMs: microseconds per call against torch bf16 and, where installed, humming-kernels, gemlite and Marlin.

python -m benchmarks.bench_gemm [--rows 8192 --inputs 8192] [--tokens 1 16 64 512 4096] [--schemes w4a16 w2a8 ...]
                                [--sweep] [--contenders ours]

CUDA graphs of at least 10 calls that cycle over weight copies of more than twice the L2 together, so every call reads
cold weights; extra.share is the achieved part of --peak (bytes of weights, scales, activations and outputs over time).
Every contender is checked against the fp64 product of the dequantised weights before it is timed. For activations of
8 bits or less the quantization of x is part of the call (name "ours") or left out ("ours, quantized x"). Peers quantize
activations their own way (symmetric int8), so they are held to their own reference. On a CPU: benchmarks/gemm_cpu.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import gemm_cpu
from benchmarks.harness import Recorder, arguments, gate, guarded, rotation, time_rotated
from jointnas_kernels.latency import OpSpec, Target, Workload
from jointnas_kernels.latency.backends import Gemlite, Humming, Marlin
from jointnas_kernels.ops import LowbitWeight, lowbit_matmul
from jointnas_kernels.ops.lowbit import cuda as lowbit_cuda
from jointnas_kernels.ops.lowbit.choice import INT8_TOKENS, STREAM_TOKENS, STRIPE_TOKENS, chosen
from jointnas_kernels.ops.quant.spec import quantize_tokens

GROUP = 128
PEERS = (Humming(symmetric=True), Gemlite(), Marlin("vllm"), Marlin("gptqmodel"))
PEAK = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA A100-SXM4-80GB": 2.04e12}  # datasheet B/s
Product = Callable[..., Tensor]  # (weight copy, x)


def per_graph(tokens: int) -> int:
    """Calls per graph: starting a graph takes microseconds, which must not count against a 10 us kernel."""
    return 100 if tokens <= 64 else 10


def scheme_bits(scheme: str) -> tuple[int, int]:
    w, a = scheme.removeprefix("w").split("a")
    return int(w), int(a)


class Case:
    """One weight matrix in canonical form, and what every contender must compute with it."""

    def __init__(self, rows: int, inputs: int, bits: int, dtype: torch.dtype, device: str = "cuda") -> None:
        self.rows, self.inputs, self.bits, self.dtype = rows, inputs, bits, dtype
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        self.q = torch.randint(low, high + 1, (rows, inputs), dtype=torch.int8, device=device)
        scale = (torch.rand(rows, inputs // GROUP, device=device) * 0.01 + 0.005).to(dtype)
        self.weight = LowbitWeight.pack(self.q, scale, bits, GROUP, layout="storage")
        self.nbytes = self.q.numel() * bits // 8 + scale.numel() * 2
        self.dense = self.weight.dequantized(dtype=torch.float32)

    def reference(self, x: Tensor, a_bits: int, symmetric: bool = False) -> Tensor:
        if a_bits < 16:
            a, s, z = quantize_tokens(x, a_bits, symmetric)
            x = (a.double() - z.double()) * s.double()
        return x.double() @ self.dense.double().t()


def ours(case: Case, planes: bool = False) -> LowbitWeight:
    return case.weight.laid_out("cuda", planes)


def our_product(weight: LowbitWeight, x: Tensor, a_bits: int) -> Tensor:
    return lowbit_matmul(x, weight, a_bits)


def peer_product(layer: Any, x: Tensor) -> Tensor:
    return layer(x)


def allowed(a_bits: int, peer: bool) -> float:
    """Relative error a product may have. A peer rounds activations on a grid of its own (another rounding of the scale
    is enough to move the levels), so quantization noise itself, 1 % at 8 bits, parts it from the reference."""
    return 2e-2 if peer and a_bits < 16 else 1e-2


def contenders(case: Case, a_bits: int, peers: bool) -> dict[str, tuple[Callable[[], Any], Product, bool]]:
    """name: (make one weight copy, product, whether activations are quantized symmetrically); ours or the peers."""
    found: dict[str, tuple[Callable[[], Any], Product, bool]] = {}
    if not peers:
        found["ours"] = (partial(ours, case), partial(our_product, a_bits=a_bits), False)
        if case.bits < 8 and a_bits < 16:
            found["ours, bitplane"] = (partial(ours, case, True), partial(our_product, a_bits=a_bits), False)
        return found
    spec = OpSpec("linear", 1, case.rows, case.inputs, case.bits, a_bits, GROUP)
    target = Target(case.q.device, Workload("decode", dtype=str(case.dtype)[6:]), 1)
    for peer in PEERS:
        if peer.unsupported(spec, target) is None:
            found[peer.name] = (partial(peer.prepare, spec, target, case.weight), peer_product, True)
    return found


def measure(rec: Recorder, args: argparse.Namespace, case: Case, scheme: str, peers: bool) -> None:
    a_bits = scheme_bits(scheme)[1]
    shape: dict[str, Any] = {"scheme": scheme, "n": case.rows, "k": case.inputs, "dtype": str(case.dtype)[6:]}
    for name, (make, product, symmetric) in contenders(case, a_bits, peers).items():
        if peers and all(rec.has(name, m=tokens, **shape) for tokens in args.tokens):
            continue  # before their weights are packed and their kernels compiled
        try:
            weights = rotation(make, case.nbytes, "cuda")
        except Exception as error:
            print(f"FAILED {name} {scheme}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        planes = name == "ours, bitplane"
        for tokens in [t for t in args.tokens if not planes or t * a_bits <= 64]:  # 8 products of 8 columns
            x = torch.randn(tokens, case.inputs, device="cuda").to(case.dtype)
            reference = case.reference(x, a_bits, symmetric)
            calls: dict[str, Callable[[Any], Tensor]] = {name: partial(product, x=x)}
            if planes:
                a, s, z = lowbit_cuda.quantize_pack(x, a_bits, layout=3)
                calls[f"{name}, quantized x"] = partial(given, "bitplane", a, (s, z))
            elif not peers:
                calls |= variants(x, a_bits)
            for label, call in calls.items():
                one = partial(check_and_time, rec, args, case, scheme, label, call, weights, x, reference)
                if not rec.has(label, m=tokens, **shape):
                    guarded(f"{label} {scheme} m={tokens}", one)
        del weights
        torch.cuda.empty_cache()


def given(kernel: str, x: Tensor, activation: tuple[Tensor, Tensor] | None, weight: LowbitWeight) -> Tensor:
    return lowbit_cuda.multiply(kernel, x, weight, activation)


def variants(x: Tensor, a_bits: int) -> dict[str, Callable[[Any], Tensor]]:
    """Our paths that ``matmul`` chooses between, each on its own."""
    found: dict[str, Callable[[Any], Tensor]] = {}
    hopper = torch.cuda.get_device_capability() == (9, 0)
    if a_bits < 16:
        few = "stream" if x.shape[0] <= STREAM_TOKENS[a_bits] else "tile"
        kernels = {few: "ours, quantized x"}
        if hopper and x.shape[0] >= 64:
            kernels["wgmma"] = "ours, wgmma, quantized x"
        if hopper and x.shape[0] >= INT8_TOKENS:
            kernels["int8"] = "ours, int8, quantized x"
        for kernel, name in kernels.items():
            a, s, z = lowbit_cuda.quantize_pack(x, a_bits, layout=lowbit_cuda.ACT_LAYOUTS[kernel])
            found[name] = partial(given, kernel, a, (s, z))
    elif x.shape[0] >= 64:
        for kernel in (*(("stripe",) if x.shape[0] <= STRIPE_TOKENS else ()), *(("half",) if hopper else ()), "tile"):
            found[f"ours, {kernel}"] = partial(given, kernel, x, None)
        found["ours, dense"] = lambda w: x @ lowbit_cuda.dense(w).t()
    return found


def check_and_time(
    rec: Recorder,
    args: argparse.Namespace,
    case: Case,
    scheme: str,
    label: str,
    call: Callable[[Any], Tensor],
    weights: list[Any],
    x: Tensor,
    reference: Tensor,
) -> None:
    bound = allowed(scheme_bits(scheme)[1], label in {peer.name for peer in PEERS})
    error = gate(label, {"y": (call(weights[0]), reference)}, bound)
    tokens = x.shape[0]
    time = time_rotated(call, weights, "cuda", calls=per_graph(tokens))
    share = (case.nbytes + 2 * tokens * (case.inputs + case.rows)) / time.median / args.peak
    extra: dict[str, Any] = {"share": share, "error": error, "copies": len(weights)}
    if label == "ours":
        extra["kernel"] = chosen(tokens, weights[0], scheme_bits(scheme)[1])[0]
    rec.row(
        label,
        time,
        extra=extra,
        scheme=scheme,
        m=tokens,
        n=case.rows,
        k=case.inputs,
        dtype=str(case.dtype)[6:],
    )


def dense(rec: Recorder, args: argparse.Namespace, dtype: torch.dtype) -> None:
    nbytes = args.rows * args.inputs * 2
    weights = rotation(lambda: torch.randn(args.rows, args.inputs, device="cuda").to(dtype), nbytes, "cuda")
    for tokens in args.tokens:
        if rec.has("torch", scheme="16", m=tokens, n=args.rows, k=args.inputs, dtype=str(dtype)[6:]):
            continue
        x = torch.randn(tokens, args.inputs, device="cuda").to(dtype)
        time = time_rotated(partial(torch.nn.functional.linear, x), weights, "cuda", calls=per_graph(tokens))
        share = (nbytes + 2 * tokens * (args.inputs + args.rows)) / time.median / args.peak
        rec.row(
            "torch",
            time,
            extra={"share": share},
            scheme="16",
            m=tokens,
            n=args.rows,
            k=args.inputs,
            dtype=str(dtype)[6:],
        )


def dense8(rec: Recorder, args: argparse.Namespace, dtype: torch.dtype) -> None:
    """The library's 8-bit products on quantized operands, one scale for all: int8 to int32, and fp8 to ``dtype``."""
    rows, inputs = args.rows, args.inputs
    one = torch.ones((), device="cuda")

    def int8(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")

    def fp8(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").to(torch.float8_e4m3fn)

    def scaled(x: Tensor, w: Tensor) -> Tensor:
        return torch._scaled_mm(x, w.t(), one, one, out_dtype=dtype)

    kinds: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
        "torch, _int_mm": (int8, lambda x, w: torch._int_mm(x, w.t()))
    }
    if torch.cuda.get_device_capability() >= (8, 9):
        kinds["torch, _scaled_mm fp8"] = (fp8, scaled)
    for name, (draw, product) in kinds.items():
        weights = rotation(partial(draw, rows, inputs), rows * inputs, "cuda")
        for tokens in [t for t in args.tokens if t >= 64]:  # both want more than 16 tokens
            if rec.has(name, scheme="w8a8", m=tokens, n=rows, k=inputs, dtype=str(dtype)[6:]):
                continue
            time = time_rotated(partial(product, draw(tokens, inputs)), weights, "cuda", calls=per_graph(tokens))
            extra = {"rate": 2 * tokens * rows * inputs / time.median}
            rec.row(name, time, extra=extra, scheme="w8a8", m=tokens, n=rows, k=inputs, dtype=str(dtype)[6:])


def sweep(rec: Recorder, args: argparse.Namespace, case: Case, scheme: str) -> None:
    """Every plan of the streaming kernel (with and without early launch), beyond 16 tokens of the wgmma kernel too."""
    a_bits = scheme_bits(scheme)[1]
    weights = rotation(partial(ours, case), case.nbytes, "cuda")
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    for tokens in args.tokens:
        x = torch.randn(tokens, case.inputs, device="cuda").to(case.dtype)
        reference = case.reference(x, a_bits)
        shape = {"scheme": scheme, "m": tokens, "n": case.rows, "k": case.inputs}
        for (kernel, plan, early), call in planned(x, case, a_bits, sms).items():
            if rec.has("plan", **shape, kernel=kernel, plan=str(plan), early=early):
                continue
            try:
                error = gate("plan", {"y": (call(weights[0]), reference)}, 1e-2)
            except Exception as failure:
                print(f"FAILED {kernel} {plan} {scheme} m={tokens}: {failure}", flush=True)
                continue
            time = time_rotated(call, weights, "cuda", calls=per_graph(tokens))
            extra = {"share": case.nbytes / time.median / args.peak, "error": error}
            rec.row("plan", time, extra=extra, **shape, kernel=kernel, plan=str(plan), early=early)


def planned(x: Tensor, case: Case, a_bits: int, sms: int) -> dict[tuple[str, Any, bool], Callable[[Any], Tensor]]:
    """(kernel, plan, early): product, for every plan that fills at least half and at most two waves of the chip."""
    tokens = x.shape[0]
    activation = None
    operand = x
    if a_bits < 16:
        operand, s, z = lowbit_cuda.quantize_pack(x, a_bits)
        activation = (s, z)
    found: dict[tuple[str, Any, bool], Callable[[Any], Tensor]] = {}
    default = lowbit_cuda.stream_plan(tokens, case.rows, case.inputs, case.bits, a_bits, sms)
    for warp_rows in (1, 2, 4) if tokens <= 64 else ():
        for splits in (1, 2, 3, 4, 6, 8):
            plan = default._replace(warp_rows=warp_rows, splits=splits)
            if plan == default or sms // 2 < plan.blocks(tokens, case.rows) <= 2 * sms:
                for early in (False, True):
                    found["stream", plan, early] = partial(
                        lowbit_cuda.multiply, "stream", operand, activation=activation, plan=plan, early=early
                    )
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for tiles in (8, 16) if hopper and tokens > 16 else ():
        for splits in (1, 2, 3, 4):
            wide = lowbit_cuda.Plan(tiles, splits=splits)
            if splits == 1 or wide.blocks(tokens, case.rows) <= 2 * sms:
                wgmma_operand, wgmma_activation = x, None
                if a_bits < 16:
                    wgmma_operand, s, z = lowbit_cuda.quantize_pack(x, a_bits, layout=1)
                    wgmma_activation = (s, z)
                found["wgmma", wide, False] = partial(
                    lowbit_cuda.multiply, "wgmma", wgmma_operand, activation=wgmma_activation, plan=wide
                )
    return found


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--rows", type=int, help="default: 8192 on CUDA, 4096 on the CPU")
    parser.add_argument("--inputs", type=int, help="likewise")
    parser.add_argument("--tokens", type=int, nargs="+")
    schemes = ["w4a16", "w8a16", "w2a16", "w2a8", "w4a8", "w8a8", "w2a2", "w2a4", "w4a4"]
    parser.add_argument("--schemes", nargs="+", default=schemes)
    parser.add_argument("--dtype", default="bfloat16", choices=("float16", "bfloat16"))
    parser.add_argument("--sweep", action="store_true", help="time every plan of the kernels instead")
    parser.add_argument("--contenders", default="all", choices=("all", "ours", "peers"), help="peers compile for long")
    parser.add_argument("--no-peers", action="store_true", help="leave the peers out, whatever --contenders says")
    parser.add_argument("--peak", type=float, default=None, help="bytes per second that shares refer to")
    args = parser.parse_args(argv)
    rec = Recorder.of("gemm", args)
    if args.device != "cuda":
        args.rows, args.inputs, args.tokens = args.rows or 4096, args.inputs or 4096, args.tokens or [1, 16, 256]
        if args.tiny:
            args.rows, args.inputs, args.tokens = 256, 512, [1, 16]
        gemm_cpu.run(rec, args)
        return rec.rows
    args.rows, args.inputs = args.rows or 8192, args.inputs or 8192
    args.tokens = args.tokens or [1, 16, 64, 512, 4096]
    if args.tiny:
        args.rows, args.inputs, args.tokens = 256, 512, [1, 16]
    if args.peak is None:
        args.peak = PEAK.get(torch.cuda.get_device_name(), 1e12)
    dtype = getattr(torch, args.dtype)
    if args.sweep:
        for scheme in args.schemes:
            case = Case(args.rows, args.inputs, scheme_bits(scheme)[0], dtype)
            guarded(scheme, partial(sweep, rec, args, case, scheme))
        return rec.rows
    if args.contenders != "peers":
        guarded("torch", partial(dense, rec, args, dtype))
        guarded("torch, 8 bits", partial(dense8, rec, args, dtype))
    sides = {"all": (False, True), "ours": (False,), "peers": (True,)}[args.contenders]
    for peers in [side for side in sides if not (side and args.no_peers)]:
        for scheme in args.schemes:
            case = Case(args.rows, args.inputs, scheme_bits(scheme)[0], dtype)
            guarded(scheme, partial(measure, rec, args, case, scheme, peers))
    return rec.rows


if __name__ == "__main__":
    main()
