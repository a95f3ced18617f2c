"""Post-training quantization of the embedded model: perplexity on all held-out text, and errors of every block.

    python -m benchmarks.bench_ptq [--schemes w4a16 w2a16 w4a4 w8a8] [--methods 16bit rtn clip gptq omniquant]

Each (scheme, method) starts from the original weights. A row holds the perplexity and, per block, the mean squared
error of its output on the calibration windows as a share of the output's energy: with rounding to nearest, where
learning started (OmniQuant), and in the end; each on inputs from the blocks quantized before it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import Recorder, Timing, arguments
from jointnas import assets
from jointnas.config import InitOptions
from jointnas.evaluation import perplexity
from jointnas.initialise import Bits, calibration_windows, initialise

SCHEMES = {"w4a16": (4, 16), "w2a16": (2, 16), "w4a4": (4, 4), "w8a8": (8, 8)}
METHODS = ("16bit", "rtn", "clip", "gptq", "omniquant")
CONTEXT = 256


def measure(recorder: Recorder, scheme: str, method: str, options: InitOptions, held_out: torch.Tensor) -> None:
    """One row."""
    weight, act = SCHEMES[scheme]
    if method == "omniquant" and weight == 2:  # as published: twice the passes at 2 bits
        options = options.model_copy(update={"epochs": 2 * options.epochs})
    model = assets.load_model().requires_grad_(False)
    torch.nn.Module.to(model, recorder.device)
    extra: dict[str, object] = {"samples": options.samples, "context": CONTEXT}
    if method != "16bit":
        windows = calibration_windows(assets.train_tokens(0), options, CONTEXT)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            bits = Bits.uniform(model.config, weight, act)
            rows = initialise(model, method, windows, bits, options=options, folder=folder, progress=False)
        extra["seconds"] = time.perf_counter() - began
        extra |= {k: [r[k] / r["power"] for r in rows] for k in ("mse_rtn", "mse_start", "mse") if k in rows[0]}
        if method == "omniquant":
            extra["epochs"] = options.epochs
    value = perplexity(model, held_out, context=CONTEXT)
    timing = Timing(value, value, value, 1)
    recorder.row(
        method, timing, "perplexity", extra, scheme="16" if method == "16bit" else scheme, tokens=len(held_out)
    )


def main(argv: list[str] | None = None) -> None:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 256 tokens")
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args(argv)
    recorder = Recorder("ptq", args.device, Path(args.out) if args.out else None, args.commit)
    options, held_out = InitOptions(samples=args.samples, epochs=args.epochs), assets.held_out_tokens()
    if args.tiny:
        options, held_out = InitOptions(samples=4, epochs=1), held_out[: 4 * CONTEXT]
    for scheme in args.schemes:
        for method in args.methods:
            if method != "16bit" or scheme == args.schemes[0]:
                measure(recorder, scheme, method, options, held_out)


if __name__ == "__main__":
    main()
