"""This checkout against another one, CPU: op calls, kernels, block steps and GEMV, in turns.

    git worktree add ../before COMMIT          # and build its extension there
    python -m benchmarks.bench_against ../before [--rounds 15] [--only step gemv ...]

One worker process per checkout stays alive; they take turns case by case, so a machine that changes its speed does so
for both. What a kernel takes also depends on which pages its process got (1.8 or 6.5 ms for one mixed_weight of 4096^2,
in either checkout), which several processes even out. A row holds both medians over the rounds and their ratio, this
checkout over the other: at most 1.02 is "unchanged". Only names that are public in both are used. The rows are printed,
not recorded: they compare two trees on one afternoon, and nobody could repeat them from a results file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Case = tuple[str, int, Callable[[], Any]]  # name, calls per turn, one call
PANELS = ("calls", "kernels", "gemv", "step")


def forward_backward(fn: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    grad = torch.randn_like(fn(*leaves))
    return lambda: torch.autograd.grad(fn(*leaves), leaves, grad)


def op_cases(panel: str, rows: int, width: int, heads: int, dim: int, dtype: torch.dtype, calls: int) -> list[Case]:
    """Every fused op, forward and backward with all gradients."""
    from jointnas_kernels import ops

    def half(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    sizes, mask, probs = (width // 2, width), torch.rand(width), torch.tensor([0.4, 0.6])
    x, y, weight = half(rows, width), half(rows, width), half(width)
    q, k, table = half(1, rows, heads, dim), half(1, rows, 2, dim), torch.rand(1, rows, dim)
    out = max(64, width)
    base, a, b = half(out, width), torch.randn(16, width), torch.randn(out, 16)
    pairs = [torch.randn(2, 16, width), torch.randn(2, out, 16)]
    group = min(128, width)
    calls_of: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "channel_mask": (ops.channel_mask, [x, mask]),
        "masked_swiglu": (ops.masked_swiglu, [x, y, mask, mask.flip(0)]),
        "gated_residual": (ops.gated_residual, [x, y, mask]),
        "gated_residual, gate": (ops.gated_residual, [x, y, mask, torch.tensor(0.5), half(rows, width)]),
        "masked_rope": (
            lambda q, k, m, n: ops.masked_rope(q, k, table, table, m, n)[0], [q, k, torch.rand(heads, dim),
                                                                             torch.rand(2, dim)],
        ),
        "mixed_rmsnorm": (lambda x, p, m: ops.mixed_rmsnorm(x, weight, p, sizes, 1e-5, m), [x, probs, mask]),
        "mixed_rmsnorm, bits": (
            lambda x, p, m, r: ops.mixed_rmsnorm(x, weight, p, sizes, 1e-5, m, None, (4, 8), r),
            [x, probs, mask, probs],
        ),
        "head_rmsnorm": (
            lambda q, m, p: ops.head_rmsnorm(q, half(dim), m, p, (dim // 2, dim), 1e-5),
            [q, torch.rand(heads, dim), probs],
        ),
        "act_quant_mix": (lambda x, p, m: ops.act_quant_mix(x, (4, 8), p, mask=m), [x, probs, mask]),
        "fake_quant_weight": (lambda w: ops.fake_quant_weight(w, 4, group), [base]),
        "quant_lora_mix": (lambda a, b, p: ops.quant_lora_mix(base, a, b, 0.5, (4, 8), p, group), [*pairs, probs]),
        "quant_lora_linear": (
            lambda x, a, b, p: ops.quant_lora_linear(x, base, a, b, 0.5, (4, 8), p, group), [x, *pairs, probs],
        ),
        "mixed_linear": (lambda x, a, b: ops.mixed_linear(x, base, lora_a=a, lora_b=b, scaling=0.5), [x, a, b]),
        "mixed_linear_group": (
            lambda x, a, b: sum(ops.mixed_linear_group(x, [base, base], [a, a], [b, b], 0.5)), [x, a, b],
        ),
        "mixed_weight": (
            lambda p, r: ops.mixed_weight(base, p, sizes, r, (out // 2, out)), [probs, probs.clone()],
        ),
    }  # fmt: skip
    found: list[Case] = []
    for name, (fn, inputs) in calls_of.items():
        found += [(f"{panel}: {name}, forward", calls, lambda fn=fn, inputs=inputs: _no_grad(fn, inputs)),
                  (f"{panel}: {name}, forward + backward", calls, forward_backward(fn, inputs))]
    return found


@torch.no_grad()
def _no_grad(fn: Callable[..., Any], inputs: list[Tensor]) -> Any:
    return fn(*inputs)


def gemv_cases() -> list[Case]:
    """One token through packed linears, more weights than any cache holds."""
    from jointnas_kernels import ops
    from jointnas_kernels.nn import PackedLinear

    size, copies, found = 4096, 12, []
    for w_bits, a_bits in ((4, 8), (2, 8), (8, 8), (4, 16)):
        layers = []
        for _ in range(copies):
            q = torch.randint(-(1 << (w_bits - 1)), 1 << (w_bits - 1), (size, size), dtype=torch.int8)
            scale = torch.rand(size, size // 128).to(torch.bfloat16)
            layers.append(PackedLinear(ops.pack_weight(q, w_bits), scale, None, w_bits, a_bits))
        x = torch.randn(1, size).to(torch.bfloat16)

        def call(layers: list[Any] = layers, x: Tensor = x) -> None:
            for layer in layers:
                layer(x)

        found.append((f"gemv: W{w_bits}A{a_bits} {size}", 4, lambda call=call: _no_grad(call, [])))
    return found


def step_cases() -> list[Case]:
    """Weight and arch steps of one block of Llama-3.1-8B's shapes, 8 x 128 tokens in bf16, as in bench_step."""
    from benchmarks import models
    from benchmarks.bench_step import Bench

    args = argparse.Namespace(device="cpu", layers=1, tiny=False, dtype="bf16")
    bench = Bench.random(args)
    ids = models.random_tokens(bench.config, 8, 128, "cpu")
    found: list[Case] = []
    for space in ("llama3", "qllama3"):
        net = bench.supernet(space, torch.bfloat16)
        for mode in ("weight", "arch"):
            found.append((f"step: {space}, {mode}", 1, bench.supernet_step(net, mode, ids)))
    return found


def cases(panels: list[str]) -> list[Case]:
    """Those of the chosen panels, with the same random inputs in every checkout."""
    torch.manual_seed(0)
    found: list[Case] = []
    if "calls" in panels:
        found += op_cases("call", 2, 32, 4, 8, torch.float32, 200)
    if "kernels" in panels:
        found += op_cases("kernel", 1024, 4096, 32, 128, torch.bfloat16, 2)
    if "gemv" in panels:
        found += gemv_cases()
    if "step" in panels:
        found += step_cases()
    return found


def work(panels: list[str]) -> None:
    """A worker: names of its cases, then for each number read the seconds of one call of that case."""
    own = cases(panels)
    for _, _, call in own:
        call()
    print(json.dumps([name for name, _, _ in own]), flush=True)
    for line in sys.stdin:
        _, calls, call = own[int(line)]
        started = time.perf_counter()
        for _ in range(calls):
            call()
        print((time.perf_counter() - started) / calls, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="root of the other checkout")
    parser.add_argument("--rounds", type=int, default=15, help="of each pair of processes")
    parser.add_argument("--processes", type=int, default=1, help="pairs of processes, one after the other")
    parser.add_argument("--only", nargs="+", choices=PANELS, default=list(PANELS))
    args = parser.parse_args()
    here = Path(__file__).resolve().parent.parent
    for panel in args.only:
        samples: Samples = {}
        for _ in range(args.processes):
            compare(panel, (args.other.resolve(), here), args.rounds, samples)
        for name, (before, after) in samples.items():
            a, b = statistics.median(before), statistics.median(after)
            best = min(after) / min(before)
            print(f"{name:50s} {a * 1e6:12.1f} -> {b * 1e6:12.1f} us  {b / a:6.3f}  (fastest {best:.3f})", flush=True)


Samples = dict[str, tuple[list[float], list[float]]]


def compare(panel: str, trees: tuple[Path, Path], rounds: int, samples: Samples) -> None:
    """Rounds of one pair of processes, added to the samples of each case."""
    workers = []
    for tree in trees:
        path = os.pathsep.join((str(tree), str(tree / "python")))
        command = [sys.executable, str(Path(__file__).resolve()), "--work", panel]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        workers.append(subprocess.Popen(command, cwd=tree, env={**os.environ, "PYTHONPATH": path}, **pipes))
    names, _ = (json.loads(worker.stdout.readline()) for worker in workers)
    for turn in range(rounds):
        for index, name in enumerate(names):
            for of in (0, 1) if turn % 2 else (1, 0):
                workers[of].stdin.write(f"{index}\n")
                samples.setdefault(name, ([], []))[of].append(float(workers[of].stdout.readline()))
    for worker in workers:
        worker.stdin.close()
        worker.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
    else:
        main()
