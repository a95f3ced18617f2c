"""What this machine can do at most: copy bandwidth, library GEMM rates, and on a GPU its instructions, one by one.

python -m benchmarks.bench_ceilings [--device cuda|cpu]
"""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from typing import Any

import torch

from benchmarks import instruction_rates
from benchmarks.harness import Recorder, arguments, ceilings, gemm_rate, guarded


def instructions(rec: Recorder) -> None:
    """A row each, as it is measured: tensor cores, and what quantizers and dequantization are made of."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    capability = torch.cuda.get_device_capability()
    known = instruction_rates.instructions(capability == (9, 0))
    there = [name for name, i in known.items() if rec.has(row_name(i), instruction=name)]
    for instruction, rate in instruction_rates.measure(nvcc, capability, there):
        extra = {"per_clock": rate.clock, "sms": rate.sms}
        rec.row(row_name(instruction), rate.second, instruction.unit, extra, instruction=instruction.name)


def row_name(instruction: instruction_rates.Instruction) -> str:
    return "tensor_core" if instruction.unit == "OP/s" else "instruction"


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = arguments(argparse.ArgumentParser(description=__doc__)).parse_args(argv)
    rec = Recorder.of("ceilings", args)
    ceilings(rec)
    for m in (1024, 16384) if args.device == "cuda" else (1024,):  # the GEMMs of one 8B block
        for n, k in ((4096, 4096), (14336, 4096), (4096, 14336)):
            if not rec.has("gemm_bf16", m=m, n=n, k=k):
                rate = gemm_rate(args.device, torch.bfloat16, m, n, k)
                rec.row("gemm_bf16", rate, "FLOP/s", m=m, n=n, k=k)
    if args.device == "cuda":
        guarded("instructions", partial(instructions, rec))
    return rec.rows


if __name__ == "__main__":
    main()
