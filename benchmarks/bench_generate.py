"""Reading a prompt and writing text with a real model: ours, llama.cpp, and torch, interleaved at equal threads.

    python -m benchmarks.bench_generate --model models/smollm2 [--bits 2 4 8] [--contexts 128 1024] [--prompt 512]

The model is rounded to nearest at every precision of --bits (activations in 8 bits, groups of --group, the head in 8)
and exported once. The contenders run these folders and files:

    ours W4A8        `hf.load`, decoding through the step; "ours 16 bit" is the original with the same step
    llama.cpp Q4_0   a GGUF file of the same integers (8 bits: Q8_0), its own keys, values and attention as they come
    torch            the original in transformers, eager; with --compile also compiled

A row is the time of one token: while `context` tokens are cached, greedily chosen and fed back, or of a prompt's token.
llama.cpp's are its own figures for both. `share` is the time that reading the weights once takes at the bandwidth
measured in the same round, of the whole; `against` the median ratio to llama.cpp's nearest file of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Recorder, Timing, arguments
from benchmarks.llama_cpp import LlamaCpp
from jointnas import loading
from jointnas.config import BitsConfig, DataConfig, ModelConfig
from jointnas.verbs.quantize import quantize
from jointnas_kernels import hf
from jointnas_kernels.hf.gguf.write import write
from jointnas_kernels.latency.timing import native_bf16
from jointnas_kernels.runtime import attach
from jointnas_kernels.runtime.generation import RESULT

FILES = {2: "TQ2_0", 4: "Q4_0", 8: "Q8_0"}
Run = Callable[[str, int], float]  # ("decode" or "prefill", context): seconds per token


def read_bandwidth() -> float:
    """Bytes per second of a sum over more memory than any cache holds."""
    numbers = torch.ones(64 << 20)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - start)
    return numbers.numel() * 4 / min(times)


class Ours:
    """A model of `hf.load`, or the original, with the step or without."""

    def __init__(self, model: Any, ids: torch.Tensor, tokens: int, fast: bool) -> None:
        self.model, self.ids, self.tokens = model, ids, tokens
        if not hasattr(model, "runtime"):
            attach(model)
        model.runtime.enabled = fast
        head = model.lm_head
        tensors = {t.data_ptr(): t for t in (*model.model.layers.state_dict().values(), *head.state_dict().values())}
        self.bytes = sum(t.numel() * t.element_size() for t in tensors.values())

    @torch.inference_mode()
    def __call__(self, what: str, context: int) -> float:
        start = time.perf_counter()
        out = self.model(input_ids=self.ids[None, :context], use_cache=True, logits_to_keep=1)
        if what == "prefill":
            return (time.perf_counter() - start) / context
        cache, token = getattr(out, RESULT), out.logits[:, -1].argmax(-1, keepdim=True)
        for i in range(self.tokens + 2):
            if i == 2:
                start = time.perf_counter()
            out = self.model(input_ids=token, use_cache=True, **{RESULT: cache})
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        return (time.perf_counter() - start) / self.tokens


class Theirs:
    """llama.cpp on a file."""

    def __init__(self, path: Path, ids: torch.Tensor, tokens: int, most: int) -> None:
        self.server = LlamaCpp(path, most + tokens + 8, torch.get_num_threads(), exact=False)
        self.ids, self.tokens, self.bytes = ids, tokens, path.stat().st_size

    def __call__(self, what: str, context: int) -> float:
        prefill, decode = self.server.speed(self.ids[:context], self.tokens)
        return prefill if what == "prefill" else decode


def contenders(args: argparse.Namespace, folder: Path, ids: torch.Tensor) -> dict[str, Any]:
    source = ModelConfig(source=args.model, dtype=args.dtype)
    tokenizer, most = loading.load_tokenizer(source), max(*args.contexts, args.prompt)
    found: dict[str, Any] = {}
    for bits in args.bits:
        out = folder / f"w{bits}"
        precision = BitsConfig(weight=bits, act=8, group_size=args.group, head=8)
        quantize(str(out), source, precision, "rtn", DataConfig(), progress=False)
        found[f"ours W{bits}A8"] = Ours(hf.load(out), ids, args.decode, True)
        if bits in args.files:
            write(out, folder / f"w{bits}.gguf", tokenizer)
            found[f"llama.cpp {FILES[bits]}"] = Theirs(folder / f"w{bits}.gguf", ids, args.decode, most)
    found["ours 16 bit"] = Ours(loading.load_model(source), ids, args.decode, True)
    found["torch"] = Ours(loading.load_model(source), ids, args.decode, False)
    if args.compile:
        model: Any = loading.load_model(source)
        attach(model)
        model.runtime.enabled = False
        model.model.compile()
        found["torch.compile"] = Ours(model, ids, args.decode, False)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--model", default="embedded", help="'embedded', or folder, GGUF file or hub name")
    parser.add_argument("--bits", type=int, nargs="+", choices=(2, 4, 8), default=[2, 4, 8])
    parser.add_argument("--files", type=int, nargs="*", choices=(2, 4, 8), default=[4, 8], help="for llama.cpp")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024], help="cached tokens while decoding")
    parser.add_argument("--prompt", type=int, default=512, help="tokens that are read")
    parser.add_argument("--decode", type=int, default=32, help="tokens that are written")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if native_bf16() else "float32")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args(argv)
    if args.tiny:
        args.contexts, args.prompt, args.decode, args.rounds, args.bits, args.files = [8], 16, 2, 2, [4], []
    recorder = Recorder("generate", "cpu", Path(args.out) if args.out else None, args.commit)
    source = ModelConfig(source=args.model, dtype=args.dtype)
    text = loading.load_streams(DataConfig(batch_size=1, seq_len=2), source, 0).held_out.long()
    ids = text[: max(*args.contexts, args.prompt)]
    with tempfile.TemporaryDirectory() as folder:
        runs = contenders(args, Path(folder), ids)
        for what, context in [("decode", c) for c in args.contexts] + [("prefill", args.prompt)]:
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            bandwidth: list[float] = []
            for number in range(args.rounds + 1):  # the first warms up
                bandwidth.append(read_bandwidth())
                for name, run in runs.items():
                    value = run(what, context)
                    if number:
                        seconds[name].append(value)
            for name, run in runs.items():
                extra: dict[str, Any] = {"bytes": run.bytes}
                if what == "decode":
                    shares = (run.bytes / b / s for b, s in zip(bandwidth[1:], seconds[name], strict=True))
                    extra["share"] = statistics.median(shares)
                peer = f"llama.cpp {FILES[8 if 'W8' in name else 4]}"
                if name.startswith("ours W") and peer in runs:
                    ratios = (a / b for a, b in zip(seconds[name], seconds[peer], strict=True))
                    extra["against"] = statistics.median(ratios)
                recorder.row(
                    name, Timing.of(seconds[name]), extra=extra, what=what, context=context, dtype=args.dtype,
                    threads=torch.get_num_threads(), model=Path(args.model).name,
                )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
