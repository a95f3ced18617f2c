"""Every fused op alone: achieved bytes per second against the copy of this machine, GEMM-like ones against its GEMM.

    python -m benchmarks.bench_kernels [--device cuda|cpu] [--tokens 1024,16384] [--only NAME,...] [--tiny]

Shapes are Llama-3.1-8B's. The byte count is the least the op could move: every input read once, every output written
once (weight step: masks and probabilities need no gradient; arch step: they do). ``share`` is that byte count over the
measured time, over the measured copy bandwidth. Backward time is forward+backward minus forward, each in a CUDA graph.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import models
from benchmarks.harness import (
    Recorder,
    Timing,
    arguments,
    ceilings,
    gate,
    graphed,
    guarded,
    rotation,
    time_interleaved,
    time_rotated,
)
from jointnas_kernels import ops
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.testing import tolerance

HIDDEN, HEADS, KV, HEAD_DIM, INTER = 4096, 32, 8, 128, 14336
HIDDEN_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
W_BITS, A_BITS = (2, 4, 8), (2, 4, 8, 16)
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One op at one shape. ``free``: inputs with a gradient in any step; ``arch``: with one in arch steps only."""

    name: str
    make: Callable[[], Inputs]
    call: Callable[[Inputs, str | None], Any]
    free: tuple[str, ...]
    arch: tuple[str, ...]
    read: int  # bytes of the large inputs, and so on; small vectors are not counted
    write: int
    back_weight: int  # bytes the backward of a weight step moves at least
    back_arch: int
    rounded: bool = False  # a quantizer: its levels depend on the storage dtype, so the reference runs in that dtype


def elementwise_cases(t: int, device: str, dtype: torch.dtype) -> list[Case]:
    """The ops that carry the width masks, and the activation quantizer, for ``t`` tokens."""
    e = torch.empty(0, dtype=dtype).element_size()
    hidden, inter, queries, keys = t * HIDDEN * e, t * INTER * e, t * HEADS * HEAD_DIM * e, t * KV * HEAD_DIM * e
    act = lambda *shape: torch.randn(*shape, device=device).to(dtype)  # noqa: E731
    mask = lambda n: torch.rand(n, device=device)  # noqa: E731
    prob = lambda n: torch.softmax(torch.randn(n, device=device), 0)  # noqa: E731
    seq = min(t, 128)
    angle = torch.rand(1, seq, HEAD_DIM // 2, device=device).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    rope = lambda: {  # noqa: E731
        **{"q": act(t // seq, seq, HEADS, HEAD_DIM), "k": act(t // seq, seq, KV, HEAD_DIM)},
        **{"q_mask": torch.rand(HEADS, HEAD_DIM, device=device), "k_mask": torch.rand(KV, HEAD_DIM, device=device)},
    }
    return [
        Case(
            "mixed_rmsnorm",
            lambda: {"x": act(t, HIDDEN), "w": mask(HIDDEN).to(dtype), "alpha": prob(8), "c": mask(HIDDEN)},
            lambda i, b: ops.mixed_rmsnorm(i["x"], i["w"], i["alpha"], HIDDEN_SIZES, 1e-5, i["c"], backend=b),
            ("x",),
            ("alpha", "c"),
            *(hidden, hidden, 3 * hidden, 3 * hidden),
        ),
        Case(
            "mixed_rmsnorm_quant",
            lambda: {
                **{"x": act(t, HIDDEN), "w": mask(HIDDEN).to(dtype), "alpha": prob(8), "c": mask(HIDDEN)},
                "probs": prob(4),
            },
            lambda i, b: ops.mixed_rmsnorm(
                i["x"], i["w"], i["alpha"], HIDDEN_SIZES, 1e-5, i["c"], b, A_BITS, i["probs"]
            ),
            ("x",),
            ("alpha", "c", "probs"),
            *(hidden, hidden, 3 * hidden, 3 * hidden),
            rounded=True,
        ),
        Case(
            "masked_rope",
            rope,
            lambda i, b: ops.masked_rope(i["q"], i["k"], cos, sin, i["q_mask"], i["k_mask"], backend=b),
            ("q", "k"),
            ("q_mask", "k_mask"),
            *(queries + keys, queries + keys, 2 * (queries + keys), 3 * (queries + keys)),
        ),
        Case(
            "masked_swiglu",
            lambda: {"gate": act(t, INTER), "up": act(t, INTER), "r": mask(INTER), "c": mask(INTER)},
            lambda i, b: ops.masked_swiglu(i["gate"], i["up"], i["r"], i["c"], backend=b),
            ("gate", "up"),
            ("r", "c"),
            *(2 * inter, inter, 5 * inter, 5 * inter),
        ),
        Case(
            "residual",
            lambda: {"h": act(t, HIDDEN), "y": act(t, HIDDEN), "mask": mask(HIDDEN)},
            lambda i, b: ops.gated_residual(i["h"], i["y"], i["mask"], backend=b),
            ("h", "y"),
            ("mask",),
            *(2 * hidden, hidden, 2 * hidden, 3 * hidden),
        ),
        Case(
            "gated_residual",
            lambda: {
                **{"h": act(t, HIDDEN), "y": act(t, HIDDEN), "x": act(t, HIDDEN)},
                **{"mask": mask(HIDDEN), "gate": torch.rand((), device=device)},
            },
            lambda i, b: ops.gated_residual(i["h"], i["y"], i["mask"], i["gate"], i["x"], backend=b),
            ("h", "y", "x"),
            ("mask", "gate"),
            *(3 * hidden, hidden, 4 * hidden, 7 * hidden),
        ),
        Case(
            "channel_mask",
            lambda: {"x": act(t, HIDDEN), "mask": mask(HIDDEN)},
            lambda i, b: ops.channel_mask(i["x"], i["mask"], backend=b),
            ("x",),
            ("mask",),
            *(hidden, hidden, 2 * hidden, 3 * hidden),
        ),
        Case(
            "act_quant_mix",
            lambda: {"x": act(t, HIDDEN), "probs": prob(4)},
            lambda i, b: ops.act_quant_mix(i["x"], A_BITS, i["probs"], backend=b),
            ("x",),
            ("probs",),
            *(hidden, hidden, 2 * hidden, 3 * hidden),
            rounded=True,
        ),
        Case(
            "act_quant_mix_wide",
            lambda: {"x": act(t, INTER), "probs": prob(4)},
            lambda i, b: ops.act_quant_mix(i["x"], A_BITS, i["probs"], backend=b),
            ("x",),
            ("probs",),
            *(inter, inter, 2 * inter, 3 * inter),
            rounded=True,
        ),
    ]


def _backward(
    case: Case, inputs: Inputs, wanted: tuple[str, ...], backend: str | None
) -> tuple[Any, tuple[Tensor, ...]]:
    out = case.call(inputs, backend)
    outs = out if isinstance(out, tuple) else (out,)
    return outs, torch.autograd.grad(outs, [inputs[w] for w in wanted], [inputs[f"grad{i}"] for i in range(len(outs))])


def _prepare(case: Case, wanted: tuple[str, ...], backend: str | None) -> Inputs:
    inputs = {k: v.requires_grad_(k in wanted) for k, v in case.make().items()}
    with torch.no_grad():
        out = case.call(inputs, backend)
    for i, o in enumerate(out if isinstance(out, tuple) else (out,)):
        inputs[f"grad{i}"] = torch.randn_like(o)  # in the layout of o, which attention's gradients have too
    return inputs


def check_case(case: Case, backend: str | None) -> float:
    """Values and gradients against the reference (fp64 where it may) on the same inputs; the largest error."""
    wanted = case.free + case.arch
    inputs = _prepare(case, wanted, backend)
    widen = (lambda v: v) if case.rounded else Tensor.double
    exact = {k: widen(v.detach()).requires_grad_(v.requires_grad) for k, v in inputs.items()}
    outs, grads = _backward(case, inputs, wanted, backend)
    ref_outs, ref_grads = _backward(case, exact, wanted, "reference")
    pairs = {f"output {i}": pair for i, pair in enumerate(zip(outs, ref_outs, strict=True))}
    pairs |= {f"gradient of {w}": pair for w, pair in zip(wanted, zip(grads, ref_grads, strict=True), strict=True)}
    return gate(case.name, pairs, 2 * tolerance(outs[0].dtype))


def run_case(rec: Recorder, case: Case, tokens: int, copy: float) -> None:
    """Gate, then forward and the backward of both kinds of step."""
    device, nbytes = rec.device, case.read + case.write
    error = check_case(case, None)
    with torch.no_grad():
        sets = rotation(lambda: _prepare(case, (), None), nbytes, device)
        forward = time_rotated(lambda i: case.call(i, None), sets, device)
    _bandwidth_row(rec, case.name, "forward", tokens, forward, nbytes, copy, error)

    def both(wanted: tuple[str, ...]) -> Timing:
        sets = rotation(lambda: _prepare(case, wanted, None), nbytes, device)
        return time_rotated(lambda i: _backward(case, i, wanted, None), sets, device)

    for step, wanted, least in (
        ("weight", case.free, case.back_weight),
        ("arch", case.free + case.arch, case.back_arch),
    ):
        back = _minus(both(wanted), forward)
        _bandwidth_row(rec, case.name, f"backward, {step} step", tokens, back, least, copy, error)


def _minus(whole: Timing, part: Timing) -> Timing:
    low = lambda t: max(1e-9, t - part.median)  # noqa: E731
    return Timing(low(whole.median), low(whole.p10), low(whole.p90), whole.n)


def _bandwidth_row(
    rec: Recorder, name: str, what: str, tokens: int, t: Timing, nbytes: int, copy: float, error: float
) -> None:
    rate = nbytes / t.median
    extra = {"bytes": nbytes, "rate": rate, "share": rate / copy, "error": error}
    rec.row(name, t, "s", extra, what=what, tokens=tokens)


# --- quant_lora_mix ---------------------------------------------------------------------------------------------------


def _mix_inputs(o: int, i: int, device: str, dtype: torch.dtype, rank: int = 32) -> Inputs:
    a = torch.randn(len(W_BITS), rank, i, device=device).to(dtype) * i**-0.5
    b = torch.randn(len(W_BITS), o, rank, device=device).to(dtype) * 0.02
    probs = torch.softmax(torch.randn(len(W_BITS), device=device), 0)
    clip = 0.6 + 0.4 * torch.rand(len(W_BITS), o, i // 128, device=device)
    return {"w": torch.randn(o, i, device=device).to(dtype) * 0.02, "a": a, "b": b, "probs": probs, "clip": clip}


def _mix(i: Inputs, backend: str | None) -> Tensor:
    return ops.quant_lora_mix(i["w"], i["a"], i["b"], 0.5, W_BITS, i["probs"], 128, i["clip"], backend=backend)


def plain_mix(w: Tensor, a: Tensor, b: Tensor, probs: Tensor) -> Tensor:
    """The same math in eager torch (clip ratio 1): what torch.compile gets."""
    merged = (w.float() + 0.5 * (b[p] @ a[p]).float() for p in range(len(W_BITS)))
    parts = [probs[p] * models.fake_quant(m, W_BITS[p], 128, w.dtype) for p, m in enumerate(merged)]
    return (parts[0] + parts[1] + parts[2]).to(w.dtype)


def run_mix(rec: Recorder, copy: float, dtype: torch.dtype, o: int, i: int, backend: str) -> None:
    """Forward: bytes of W, W~, the LoRA pairs and the clip ratios over copy bandwidth."""
    device = rec.device
    inputs = _mix_inputs(o, i, device, dtype)
    exact = _mix(inputs, "reference")
    nbytes = sum(t.numel() * t.element_size() for t in (*inputs.values(), exact))
    try:
        error = gate("quant_lora_mix", {backend: (_mix(inputs, backend), exact)}, 2e-2)
    except JointNASError as reason:
        print(f"quant_lora_mix {o}x{i} {backend}: not timed: {reason}", flush=True)
        return
    with torch.no_grad():
        t = time_rotated(
            lambda s: _mix(s, backend), rotation(lambda: _mix_inputs(o, i, device, dtype), nbytes, device), device
        )
    rate = nbytes / t.median
    extra = {"bytes": nbytes, "rate": rate, "share": rate / copy, "error": error}
    rec.row("quant_lora_mix", t, "s", extra, what="forward", shape=f"{o}x{i}", backend=backend)


def run_mix_peers(rec: Recorder, dtype: torch.dtype, o: int, i: int, compiled: bool) -> None:
    """Forward against eager torch and torch.compile of the same math, interleaved. Clip ratio 1 on all sides."""
    x = _mix_inputs(o, i, rec.device, dtype)
    arguments = (x["w"], x["a"], x["b"], x["probs"])
    ours = lambda: ops.quant_lora_mix(*arguments[:3], 0.5, W_BITS, x["probs"], 128)  # noqa: E731
    contenders: dict[str, Callable[[], Any]] = {"ours": ours, "eager": lambda: plain_mix(*arguments)}
    if compiled:
        fast = torch.compile(plain_mix, fullgraph=True, dynamic=False)
        contenders["torch.compile"] = lambda: fast(*arguments)
    with torch.no_grad():
        # eager torch rounds B A to bf16 before it is added, which moves some weights across a level
        error = gate("quant_lora_mix", {"eager torch": (ours(), plain_mix(*arguments))}, 5e-2)
        times = time_interleaved(contenders, 7 if rec.device == "cpu" else 30, 2, rec.device)
    for name, t in times.items():
        extra = {"ratio": t.median / times["ours"].median, "error": error}
        rec.row("quant_lora_mix_peers", t, "s", extra, contender=name, shape=f"{o}x{i}")


def run_mix_linear(rec: Recorder, tokens: int, dtype: torch.dtype, o: int, i: int, mode: str) -> None:
    """Backward of the fused layer: share of the time the library needs for the same GEMMs (dx; arch step: and dW)."""
    device = rec.device
    wanted = ("x", "a", "b") if mode == "weight" else ("x", "probs")

    def make() -> Inputs:
        inputs = _mix_inputs(o, i, device, dtype)
        inputs["x"] = torch.randn(tokens, i, device=device).to(dtype)
        inputs["grad"] = torch.randn(tokens, o, device=device).to(dtype)
        return {k: v.requires_grad_(k in wanted) for k, v in inputs.items()}

    def forward(s: Inputs) -> Tensor:
        pairs = (s["w"], s["a"], s["b"])
        return ops.quant_lora_linear(s["x"], *pairs, 0.5, W_BITS, s["probs"], 128, clip=s["clip"], mode=mode)

    def gemms(s: Inputs) -> Any:
        dx = s["grad"] @ s["w"]
        return (dx, s["grad"].t() @ s["x"]) if mode == "arch" else dx

    sets = [make() for _ in range(2)]
    with torch.no_grad():
        f = time_rotated(forward, sets, device)
        g = time_rotated(gemms, sets, device)
    b = time_rotated(lambda s: torch.autograd.grad(forward(s), [s[k] for k in wanted], s["grad"]), sets, device)
    back = _minus(b, f)
    extra = {"share": g.median / back.median, "gemms": g.median, "forward": f.median}
    rec.row("quant_lora_linear", back, "s", extra, what=f"backward, {mode} step", tokens=tokens, shape=f"{o}x{i}")


def run_linear(rec: Recorder, tokens: int, dtype: torch.dtype, o: int, i: int) -> None:
    """mixed_linear (masks folded elsewhere, LoRA rank 32) against the plain linear layer, interleaved."""
    x = torch.randn(tokens, i, device=rec.device).to(dtype).requires_grad_()
    w = (torch.randn(o, i, device=rec.device) * 0.02).to(dtype)
    a = (torch.randn(32, i, device=rec.device) * i**-0.5).to(dtype).requires_grad_()
    b = (torch.randn(o, 32, device=rec.device) * 0.02).to(dtype).requires_grad_()
    grad = torch.randn(tokens, o, device=rec.device).to(dtype)
    contenders: dict[str, Callable[[], Any]] = {
        "plain": lambda: torch.autograd.grad(F.linear(x, w), [x], grad),
        "mixed_linear": lambda: torch.autograd.grad(
            ops.mixed_linear(x, w, lora_a=a, lora_b=b, scaling=0.5), [x, a, b], grad
        ),
    }
    if rec.device == "cuda":
        contenders = {name: graphed(call) for name, call in contenders.items()}
    times = time_interleaved(contenders, 20 if rec.device == "cuda" else 5, 2, rec.device)
    for name, t in times.items():
        extra = {"ratio": t.median / times["plain"].median}
        rec.row("mixed_linear", t, "s", extra, contender=name, what="forward+backward", tokens=tokens, shape=f"{o}x{i}")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--tokens", default=None, help="comma-separated token counts")
    parser.add_argument("--only", default="", help="comma-separated op names")
    parser.add_argument("--no-compile", action="store_true", help="leave out the torch.compile contender")
    args = parser.parse_args(argv)
    default = "4" if args.tiny else "1024,16384" if args.device == "cuda" else "1024"
    counts = [int(t) for t in (args.tokens or default).split(",")]
    only = {name for name in args.only.split(",") if name}
    dtype = torch.bfloat16
    rec = Recorder.of("kernels", args)
    copy = 1e9 if args.tiny else ceilings(rec)["copy"]
    keep = lambda name: not only or name in only  # noqa: E731
    shapes = [(128, 256)] if args.tiny else [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)]
    for tokens in counts:
        for case in elementwise_cases(tokens, args.device, dtype):
            if keep(case.name) and not rec.has(case.name, what="backward, arch step", tokens=tokens):
                guarded(case.name, partial(run_case, rec, case, tokens, copy))
    for o, i in shapes:
        for backend in ("cpu",) if args.device == "cpu" else ("triton", "cuda"):
            if keep("quant_lora_mix") and not rec.has("quant_lora_mix", shape=f"{o}x{i}", backend=backend):
                guarded("quant_lora_mix", partial(run_mix, rec, copy, dtype, o, i, backend))
        for tokens in counts:
            if keep("quant_lora_linear"):
                for mode in ("weight", "arch"):
                    at = {"what": f"backward, {mode} step", "tokens": tokens, "shape": f"{o}x{i}"}
                    if not rec.has("quant_lora_linear", **at):
                        guarded("quant_lora_linear", partial(run_mix_linear, rec, tokens, dtype, o, i, mode))
            at = {"contender": "mixed_linear", "tokens": tokens, "shape": f"{o}x{i}"}
            if keep("mixed_linear") and not rec.has("mixed_linear", **at):
                guarded("mixed_linear", partial(run_linear, rec, tokens, dtype, o, i))
    if keep("peers") and not rec.has("quant_lora_mix_peers", contender="eager" if args.no_compile else "torch.compile"):
        guarded("peers", partial(run_mix_peers, rec, dtype, *shapes[0], compiled=not args.no_compile))
    return rec.rows


if __name__ == "__main__":
    main()
