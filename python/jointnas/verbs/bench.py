"""`bench TOPIC`: the repository's benchmarks, by topic.

They compare against peers and write raw rows into the repository, so they live there and not in the package: the only
place from which this package loads something above it, by name.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from jointnas_kernels.errors import JointNASError, unknown

TOPICS = {
    "masks": "time and memory of weight mixing over growing search spaces: loops, stored masks, ours, LoRA",
    "step": "weight and arch steps of the llama3 and qllama3 supernets against PEFT LoRA and torch.compile",
    "kernels": "each fused op's share of this machine's copy bandwidth or GEMM rate",
    "ceilings": "copy bandwidth, GEMM rates, on a GPU the rate of single instructions",
    "launches": "one eager training step launch by launch: times, gaps, floors, what waits for the host",
    "ncu": "hardware counters of chosen ops, under Nsight Compute",
    "gemm": "low-bit linears against the library's and, where installed, other packages'",
    "decode": "a token of whole models, written and read: ours, llama.cpp, torch, torch.compile",
    "calibration": "predictions of a latency table against whole models that it was not fitted to",
    "search": "the search against random architectures and against every choice of a small space",
    "memory": "what a dry run says of a step's memory, beside what a process takes for it (CPU, Linux)",
    "depth": "loss over blocks dropped by importance or from the end, untrained and distilled",
    "gguf": "random choices of a real model: supernet, extracted, reloaded, and as GGUF in llama.cpp",
    "ptq": "perplexity of the small model after RTN, clip search, GPTQ and OmniQuant",
}
ALL = ("ceilings", "kernels", "step", "masks")  # what "all" runs: no further input needed on any machine


def bench(arguments: Sequence[str]) -> int:
    """Runs one topic, or all; what follows the topic goes to its benchmark. Returns 0, the exit code.

    Raises:
        JointNASError: an unknown topic, or the package is not in its repository.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: jointnas bench TOPIC [options]     jointnas bench TOPIC --help\n")
        print("\n".join(f"  {name:<9} {text}" for name, text in TOPICS.items()))
        print(f"  {'all':<9} {', '.join(ALL)}")
        return 0
    topic, rest = arguments[0], list(arguments[1:])
    if topic != "all" and topic not in TOPICS:
        raise unknown("benchmark", topic, [*TOPICS, "all"])
    root = Path(__file__).resolve().parents[3]
    if not (root / "benchmarks" / "harness.py").is_file():
        raise JointNASError(
            f"the benchmarks are part of the source repository, which {root} is not: clone it, run `make setup` there "
            "and call its jointnas"
        )
    sys.path.insert(0, str(root))
    for name in ALL if topic == "all" else (topic,):
        importlib.import_module(f"benchmarks.bench_{name}").main(rest)
    return 0
