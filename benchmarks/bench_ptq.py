"""Post-training quantization: perplexity on held-out text, task accuracy, and errors of every block.

    python -m benchmarks.bench_ptq [--schemes w4a16 w2a16 w4a4 w8a8] [--methods 16bit rtn clip gptq omniquant]
    python -m benchmarks.bench_ptq --model DIR --group 64 --schemes w4a16 w2a16 w4a8 --tasks 100 --state DIR2

Each (scheme, method) starts from the original weights; `supernet` is the one-hot start of a supernet by block
reconstruction. A row holds the perplexity on all held-out text that was asked for, with --tasks also that on its
fiction alone and the accuracy in the embedded tasks, and, per block, the mean squared error of its output on the
calibration windows as a share of the output's energy: with rounding to nearest, where learning started (OmniQuant),
and in the end; each on inputs from the blocks quantized before it. With --state, what is finished is not done again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Recorder, Timing, arguments
from jointnas import assets, loading
from jointnas.config import DataConfig, EvalConfig, InitOptions, ModelConfig
from jointnas.evaluation import accuracy, perplexity
from jointnas.initialise import Bits, calibration_windows, initialise, single_space
from jointnas.tasks import load_tasks
from jointnas_kernels.hf import convert, extract

SCHEMES = {"w4a16": (4, 16), "w2a16": (2, 16), "w4a8": (4, 8), "w4a4": (4, 4), "w8a8": (8, 8)}
METHODS = ("16bit", "rtn", "clip", "gptq", "gptq-order", "omniquant", "reconstruct", "supernet")
CONTEXT = 256


def quantized(
    model: nn.Module, scheme: str, method: str, group: int, options: InitOptions, windows: Tensor, folder: str | Path
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The quantized model, and the rows of its blocks."""
    weight, act = SCHEMES[scheme]
    name: Any = method
    if method == "gptq-order":
        name, options = "gptq", options.model_copy(update={"act_order": True})
    if method == "supernet":
        of: Any = model
        torch.manual_seed(0)  # LoRA's A
        supernet = convert(model, single_space(of.config, weight, act, group))
        rows = initialise(supernet, "reconstruct", windows, options=options, folder=folder, progress=False)
        return extract(supernet, supernet.space.full()), rows
    bits = Bits.uniform(model.config, weight, act, group)
    return model, initialise(model, name, windows, bits, options=options, folder=folder, progress=False)


def measure(recorder: Recorder, scheme: str, method: str, args: argparse.Namespace, held_out: Tensor) -> None:
    """One row."""
    source = ModelConfig(source=args.model, device=args.device, dtype="float32")
    options = InitOptions(samples=args.samples, epochs=args.epochs, end_epochs=args.end_epochs)
    if method == "omniquant" and scheme.startswith("w2") and args.epochs:  # as published: twice the passes at 2 bits
        options = options.model_copy(update={"epochs": 2 * args.epochs})
    model: Any = loading.load_model(source)
    extra: dict[str, Any] = {"samples": options.samples, "length": args.length, "context": CONTEXT}
    if method != "16bit":
        train = loading.load_streams(DataConfig(batch_size=1, seq_len=args.length), source, 0)
        windows = calibration_windows(train.all, options, args.length, bos=train.bos)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(args.state or scratch) / f"{scheme}-{method}"
            model, rows = quantized(model, scheme, method, args.group, options, windows, folder)
        extra["seconds"] = time.perf_counter() - began
        if "kl" in rows[-1]:
            extra |= {k: rows[-1][k] for k in ("kl_start", "kl")}
            rows = rows[:-1]
        extra |= {k: [r[k] / r["power"] for r in rows] for k in ("mse_rtn", "mse_start", "mse") if "power" in rows[0]
                  and k in rows[0]}  # fmt: skip
        extra |= {k: [r[k] for r in rows] for k in ("error_rtn", "error_start", "error") if k in rows[0]}
        extra["epochs"] = options.epochs
    value = perplexity(model, held_out, context=CONTEXT)
    if args.tasks:
        tokenizer = loading.load_tokenizer(source)
        fiction = tokenizer(assets.documents("test", ("austen",)), add_special_tokens=False)["input_ids"]
        ids = torch.tensor([i for document in fiction for i in document])
        extra["fiction"] = perplexity(model, ids[: len(held_out)], context=CONTEXT)
        extra["tasks"] = accuracy(model, tokenizer, load_tasks(EvalConfig()), limit=args.tasks)["mean"]
    extra["caveat"] = loading.caveat(source)
    recorder.row(
        method, Timing(value, value, value, 1), "perplexity", extra, scheme="16" if method == "16bit" else scheme,
        tokens=len(held_out), model=Path(args.model).name, group=args.group,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--model", default="embedded", help="'embedded', or folder, GGUF file or hub name")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=["w4a16", "w2a16", "w4a4", "w8a8"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--epochs", type=int, default=None, help="none: the methods' own")
    parser.add_argument("--end-epochs", type=int, default=None, help="passes end to end; none: the method's own")
    parser.add_argument("--tokens", type=int, default=None, help="held-out tokens; none: all")
    parser.add_argument("--tasks", type=int, default=0, help="questions of each embedded task; 0: no tasks")
    parser.add_argument("--state", default=None, help="folder that keeps finished blocks and methods")
    args = parser.parse_args(argv)
    if args.tiny:
        args.samples, args.epochs, args.tokens = 4, 1, 4 * CONTEXT
    recorder = Recorder.of("ptq", args)
    source = ModelConfig(source=args.model, dtype="float32")
    held_out = loading.load_streams(DataConfig(batch_size=1, seq_len=2), source, 0).held_out[: args.tokens]
    for scheme in args.schemes:
        for method in args.methods:
            if method == "16bit" and scheme != args.schemes[0]:
                continue
            done = None if args.state is None else Path(args.state) / f"{scheme}-{method}.done"
            if done is None or not done.is_file():
                measure(recorder, scheme, method, args, held_out)
                if done is not None:
                    done.parent.mkdir(parents=True, exist_ok=True)
                    done.touch()


if __name__ == "__main__":
    main()
