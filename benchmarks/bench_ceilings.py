"""What this machine can do at most: copy bandwidth, library GEMM rates, and on a GPU the tensor cores by instruction.

python -m benchmarks.bench_ceilings [--device cuda|cpu]
"""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from typing import Any

import torch

from benchmarks import mma_rate
from benchmarks.harness import Recorder, arguments, ceilings, gemm_rate, guarded


def tensor_cores(rec: Recorder) -> None:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    for name, rate in mma_rate.measure(nvcc, torch.cuda.get_device_capability()).items():
        rec.row("tensor_core", rate, "OP/s", instruction=name)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = arguments(argparse.ArgumentParser(description=__doc__)).parse_args(argv)
    rec = Recorder.of("ceilings", args)
    ceilings(rec)
    for m in (1024, 16384) if args.device == "cuda" else (1024,):  # the GEMMs of one 8B block
        for n, k in ((4096, 4096), (14336, 4096), (4096, 14336)):
            if not rec.has("gemm_bf16", m=m, n=n, k=k):
                rate = gemm_rate(args.device, torch.bfloat16, m, n, k)
                rec.row("gemm_bf16", rate, "FLOP/s", m=m, n=n, k=k)
    if args.device == "cuda" and not rec.has("tensor_core"):
        guarded("tensor cores", partial(tensor_cores, rec))
    return rec.rows


if __name__ == "__main__":
    main()
