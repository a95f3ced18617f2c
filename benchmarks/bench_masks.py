"""The paper's Fig. 3: time and memory of a search iteration over growing search spaces, by how weights are mixed.

    python -m benchmarks.bench_masks [--device cuda|cpu] [--layers N] [--scale S] [--spaces 1,2,...]

One iteration is one weight step plus one arch step (forward, loss, backward; no optimizer), batch 8 x 128 tokens, on
Llama-3.1-8B's shapes with random weights: the full model on a GPU, one block on a CPU, where a short probe decides on
dtype, tokens (probe.py) and by how much the widths of model and spaces are divided. A row is written as soon as it is
measured; stored masks that do not fit into memory are left out. Contenders (see models.py): loop
(as the paper words the original), loop-best (improved), masks (the paper's Eq. 9 as worded), gemv and shared (the best
stored-mask implementations found), ours (the supernet of this package), and plain PEFT LoRA, whose iteration is two
LoRA steps. ``memory`` is what a contender keeps beyond the model and its LoRA (stored masks) plus its peak in a step
beyond the LoRA step's peak.

Before timing, loop, masks and gemv must agree with the factored form, in loss and gradients, on a small model in fp32.
"""

from __future__ import annotations

import argparse
import math
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import models, probe
from benchmarks.harness import Recorder, Timing, arguments, free, gate, guarded, peak_memory, time_interleaved
from jointnas_kernels import hf
from jointnas_kernels.progress import Progress
from jointnas_kernels.space import SearchSpace

# growing parts of Llama3Space; the fourth is the whole of it (15,360 candidates with 32 depths), the fifth goes beyond
SPACES: list[dict[str, tuple[int, ...]]] = [
    {"hidden": (2048, 4096), "heads": (32,), "head_dim": (128,), "intermediate": (8192, 14336)},
    {"hidden": (1024, 2048, 4096), "heads": (16, 32), "head_dim": (64, 128), "intermediate": (8192, 14336)},
    {
        **{"hidden": (256, 512, 1024, 2048, 4096), "heads": (16, 32), "head_dim": (32, 64, 128)},
        "intermediate": (8192, 12288, 14336),
    },
    {
        **{"hidden": tuple(2**i for i in range(5, 13)), "heads": (8, 16, 32), "head_dim": (8, 16, 32, 64, 128)},
        "intermediate": (4096, 8192, 12288, 14336),
    },
    {
        **{"hidden": (64, 128, 256, 768, *range(512, 4097, 512)), "heads": (8, 16, 32)},
        **{"head_dim": (8, 16, 32, 64, 128), "intermediate": tuple(range(2048, 14337, 2048))},
    },
]
TINY: list[dict[str, tuple[int, ...]]] = [
    {"hidden": (128, 256), "heads": (4,), "head_dim": (64,), "intermediate": (256, 512)},
    {"hidden": (64, 128, 256), "heads": (2, 4), "head_dim": (32, 64), "intermediate": (128, 256, 512)},
]
SCALES = (1, 2, 4)
LONGEST = 15.0  # seconds of an iteration of the loops at the largest space
PASSES = 12  # over a weight's bytes for one pair of choices: slice, scale, pad and add, and back
ROUNDS = {"own": 10, "peer": 3}
PEERS = ("loop", "loop-best", "masks", "gemv", "shared")
Step = Callable[[], Any]


def candidates(space: dict[str, tuple[int, ...]], depths: int) -> int:
    return math.prod(len(v) for v in space.values()) * depths


def scaled(space: dict[str, tuple[int, ...]], scale: int) -> dict[str, tuple[int, ...]]:
    """A space of the model whose widths are divided; as many candidates."""
    return {key: sizes if key == "heads" else tuple(size // scale for size in sizes) for key, sizes in space.items()}


def pair_bytes(config: Any, space: dict[str, tuple[int, ...]], itemsize: int, shapes: bool = False) -> int:
    """Bytes of all pairs of choices of one block's linears, each as large as its weight; or of every ``shape`` once."""
    axes = models.axes(config, space, "cpu")
    linears = sorted(set(models.AXES.values())) if shapes else list(models.AXES.values())
    found = ((axes[out], axes[inner]) for out, inner in linears)
    return sum(len(a.sizes) * len(b.sizes) * a.full * b.full * itemsize for a, b in found)


def loop_seconds(config: Any, space: dict[str, tuple[int, ...]], itemsize: int, rate: float) -> float:
    """About what an iteration of the loops takes that moves bytes at this rate: weight and LoRA product, both steps."""
    return 4 * PASSES * pair_bytes(config, space, itemsize) * config.num_hidden_layers / rate


def free_memory(device: str) -> int:
    """Bytes that can be taken now."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 1 << 62


def check_variants() -> None:
    """loop = masks = gemv = shared = factored on a small model in fp32, loss and all gradients."""
    config = models.llama_tiny(layers=2)
    base = models.build_llama(config, "cpu", torch.float32)
    ids = models.random_tokens(config, 2, 16, "cpu")

    def result(variant: str) -> Tensor:
        torch.manual_seed(0)
        net = models.PlainSupernet(base, TINY[-1], variant)
        found = []
        for mode in ("weight", "arch"):
            parameters = net.mode(mode)
            loss = net(ids)
            found += [loss.detach().view(1), *(g.flatten() for g in torch.autograd.grad(loss, parameters))]
        return torch.cat(found)

    exact = result("factored")
    for variant in PEERS:
        gate(variant, {"loss and gradients": (result(variant), exact)}, 1e-4)


def backward_step(loss: Callable[[], Tensor], parameters: list[Any]) -> Step:
    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        loss().backward()

    return step


class Masks:
    """Everything the contenders share."""

    def __init__(self, args: argparse.Namespace, rec: Recorder) -> None:
        self.args, self.rec, self.device = args, rec, args.device
        layers = args.layers or (32 if args.device == "cuda" else 1)
        vocab = 128256 if args.device == "cuda" else 256
        if args.tiny:
            args.batch, args.tokens, args.scale = 2, 16, 1
        # the stored masks of the fifth space need 25 GB
        chosen = (args.spaces or ("4,1,2,3,5" if args.device == "cuda" else "4,1,2,3")).split(",")
        spaces = TINY if args.tiny else [SPACES[int(n) - 1] for n in chosen]
        dtype = probe.plan(args, 1).dtype  # of so few weights no shape is too large
        largest, slow = max(spaces, key=lambda s: candidates(s, 1)), 0.0
        if self.device == "cpu" and not args.tiny:
            rate, scales = probe.copy_rate(), SCALES if args.scale is None else (args.scale,)
            configs = {s: models.llama_8b(layers, vocab, s) for s in scales}
            found = {s: loop_seconds(c, scaled(largest, s), dtype.itemsize, rate) for s, c in configs.items()}
            args.scale = next((s for s in scales if found[s] <= LONGEST), scales[-1])
            slow = found[args.scale]
        self.scale = args.scale or 1
        self.config = models.llama_tiny() if args.tiny else models.llama_8b(layers, vocab, self.scale)
        self.spaces = [scaled(space, self.scale) for space in spaces]
        plan = probe.plan(args, models.linear_weights(self.config))
        self.dtype = dtype
        shape = f"{str(dtype).removeprefix('torch.')}, {plan.batch} x {plan.tokens} tokens"
        names = [*self.own, *args.variants.split(",")]
        each = (2 + ROUNDS["peer"]) * (slow / 3 + 4 * plan.seconds)  # loops at the largest space; others are faster
        probe.announce(
            f"masks: {len(spaces)} spaces, {', '.join(names)}; {shape}, widths divided by {self.scale}",
            len(spaces) * len(names) * each if slow else 0.0,
        )
        self.base = models.build_llama(self.config, self.device, self.dtype)
        self.ids = models.random_tokens(self.config, plan.batch, plan.tokens, self.device)
        lora: Any = models.peft_lora(
            models.build_llama(self.config, self.device, self.dtype, like=self.base), 0.0, False
        )
        parameters = [p for p in lora.parameters() if p.requires_grad]
        self.lora = backward_step(lambda: lora(input_ids=self.ids, labels=self.ids).loss, parameters)
        self.lora()
        self.lora_peak = peak_memory(self.lora, self.device)

    @property
    def own(self) -> list[str]:
        """This package's contenders."""
        return ["ours", "ours, graph"] if self.device == "cuda" else ["ours"]

    def contender(self, name: str, space: dict[str, tuple[int, ...]]) -> tuple[dict[str, Step], int]:
        """{mode: step} and the bytes it keeps beyond the model and LoRA."""
        if name.startswith("ours"):
            depths = tuple(range(1, self.config.num_hidden_layers + 1))
            model = models.build_llama(self.config, self.device, self.dtype, like=self.base)
            net = hf.convert(model, SearchSpace.from_dict({"blocks": depths, **space}), lora_dtype=self.dtype)
            with torch.no_grad():
                net.arch.logits["blocks"][-1] = 60.0  # every draw keeps all blocks
            if name == "ours, graph":
                net.capture(*self.ids.shape)

            def loss(mode: str) -> Tensor:
                net.mode(mode)
                net.draw()
                return net(self.ids, labels=self.ids).loss

            owned = {"weight": net.mode("weight").lora_parameters(), "arch": net.arch_parameters()}
            return {m: backward_step(lambda m=m: loss(m), p) for m, p in owned.items()}, 0  # type: ignore[misc]
        plain = models.PlainSupernet(self.base, space, name)
        steps = {}
        for mode in ("weight", "arch"):

            def switched(mode: str = mode) -> Tensor:
                plain.mode(mode)
                return plain(self.ids)

            steps[mode] = backward_step(switched, plain.mode(mode))
        return steps, plain.stored_bytes()

    def space(self, space: dict[str, tuple[int, ...]]) -> None:
        """All contenders at one space. The slow ones get fewer rounds; each is timed beside LoRA and ours."""
        count = candidates(space, 32 if not self.args.tiny else 2)
        for name in [*self.own, *self.args.variants.split(",")]:
            if self.rec.has(name, candidates=count):
                continue
            wanted, there = self.stored_bytes(name, space), free_memory(self.device)
            if wanted > there:
                print(f"LEFT OUT {name} at {count} candidates: {wanted / 1e9:.0f} GB of {there / 1e9:.0f}", flush=True)
                continue
            try:
                self.run(name, space, count, ROUNDS["own" if name in self.own else "peer"])
            except (torch.OutOfMemoryError, RuntimeError):
                print(f"FAILED {name} at {count} candidates", flush=True)
                traceback.print_exc(limit=3)
            free(self.device)

    def stored_bytes(self, name: str, space: dict[str, tuple[int, ...]]) -> int:
        """What the masks of a contender take, with the temporary of the one that is worded so."""
        if name not in ("masks", "gemv", "shared"):
            return 0
        item = self.dtype.itemsize
        kept = pair_bytes(self.config, space, 1 if name == "masks" else item, shapes=True)
        return kept + (pair_bytes(self.config, space, item, shapes=True) // 2 if name == "masks" else 0)

    def run(self, name: str, space: dict[str, tuple[int, ...]], count: int, rounds: int) -> None:
        steps, stored = self.contender(name, space)
        peaks = {}
        first = Progress(f"{name}, {count} candidates: first steps", len(steps))
        for mode, step in steps.items():
            step()
            peaks[mode] = peak_memory(step, self.device)
            first.step()
        first.close()
        contenders = {"PEFT LoRA": self.lora, **steps}
        what = f"{name}, {count} candidates"
        rounds = 2 if self.args.tiny else rounds
        times = time_interleaved(contenders, rounds, 0, self.device, self.args.budget, what, least=1)
        lora = times["PEFT LoRA"]
        whole = Timing(
            *(getattr(times["weight"], k) + getattr(times["arch"], k) for k in ("median", "p10", "p90", "n"))
        )
        peak = max(peaks.values())
        extra = {
            "weight": times["weight"].median,
            "arch": times["arch"].median,
            "lora": 2 * lora.median,
            "ratio": whole.median / (2 * lora.median),
            "stored": stored,
            "peak": peak,
            "memory": stored + max(0, peak - self.lora_peak),
            "lora_peak": self.lora_peak,
        }
        shape = {"layers": self.config.num_hidden_layers, "batch": self.ids.shape[0], "tokens": self.ids.shape[1]}
        dtype = str(self.dtype).removeprefix("torch.")
        shape |= {"scale": self.scale} if self.scale > 1 else {}
        self.rec.row(name, whole, "s", extra, candidates=count, dtype=dtype, **shape)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--layers", type=int, default=None, help="blocks (default: 32 on a GPU, 1 on a CPU)")
    probe.options(parser)
    parser.add_argument("--scale", type=int, default=None, choices=SCALES, help="divides all widths; CPU: as fits")
    parser.add_argument("--spaces", default=None, help="which of the growing spaces, in this order (CPU: all but 5)")
    parser.add_argument("--variants", default=",".join(PEERS))
    parser.add_argument("--budget", type=float, default=40, help="seconds of timed rounds per contender")
    args = parser.parse_args(argv)
    rec = Recorder.of("masks", args)
    check_variants()
    bench = Masks(args, rec)
    for space in bench.spaces:
        guarded(f"space {space}", lambda: bench.space(space))  # noqa: B023
    return rec.rows


if __name__ == "__main__":
    main()
