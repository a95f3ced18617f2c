"""Decoding with exported models on the low-bit kernels: tokens per second, and what the latency table says of it.

    python -m benchmarks.bench_decode [--device cpu] [--panel small|blocks] [--tokens 128] [--out FOLDER]

small    the embedded model, extracted at each precision, exported, and run by `hf.load`. Its linears are so small that
         Python and the rest of transformers take most of the time.
blocks   two Llama-3.1-8B blocks of random packed weights; the kernels decide here. The vocabulary is small, because
         `lm_head` is never quantized.

One call decodes one token after `--tokens` cached ones, batch 1. Every round profiles a table of the same workload and
kernels anew and then times all models: seen on a virtual machine, its memory has states of minutes in which dense and
packed weights change places (dense 47, W4A16 10.3 ms; then 59 and 8.2): a table of one says nothing of the other.
`predicted` is the table's sum plus the overhead that all other schemes of the round fit (`latency.measure.fit`), so no
scheme sees itself. Speed-ups are over the 16-bit model; every figure is the median over rounds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Recorder, Timing, arguments, gate, guarded, time_interleaved
from jointnas import assets, exporting
from jointnas_kernels import hf
from jointnas_kernels.latency import Workload, profile
from jointnas_kernels.latency.measure import call_of, fit
from jointnas_kernels.latency.watch import Watch
from jointnas_kernels.layout import block_of
from jointnas_kernels.nn import PackedLinear
from jointnas_kernels.runtime import attach
from jointnas_kernels.space import Choice, SearchSpace

SCHEMES: dict[str, tuple[tuple[int, ...], tuple[int, ...]] | None] = {  # bits of successive blocks, repeated
    "16 bit": None,
    "W8A16": ((8,), (16,)),
    "W4A16": ((4,), (16,)),
    "W2A16": ((2,), (16,)),
    "W8A8": ((8,), (8,)),
    "W4A8": ((4,), (8,)),
    "mixed": ((4, 2), (8, 16)),
}


def single(config: Any, group: int = 128) -> SearchSpace:
    """One architecture at every precision."""
    return SearchSpace(
        (config.hidden_size,), (config.num_attention_heads,), (config.head_dim,), (config.intermediate_size,),
        (config.num_hidden_layers,), (2, 4, 8), (8, 16), group_size=group,
    )  # fmt: skip


def choices(space: SearchSpace) -> dict[str, Choice | None]:
    full, found = space.full(), dict[str, Choice | None]()
    for name, bits in SCHEMES.items():
        if bits is None:
            found[name] = None
            continue
        w, a = (tuple(of[i % len(of)] for i in range(space.depth)) for of in bits)
        found[name] = Choice(full.hidden, full.heads, full.head_dim, full.intermediate, full.blocks, w, a)
    return found


# ---- models ---------------------------------------------------------------------------------------------------------


def small_models(device: str, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module]]:
    """The embedded model through extraction, export and `hf.load`; each checked against its fake-quantized self."""
    base = assets.load_model(dtype)
    space = single(base.config)
    net = hf.convert(base, space, lora_rank=1)
    ids = torch.randint(base.config.vocab_size, (2, 64))
    with tempfile.TemporaryDirectory() as folder:
        for name, choice in choices(space).items():
            if choice is None:
                plain = assets.load_model(dtype).to(device)
                attach(plain)
                yield name, plain
                continue
            fake = hf.extract(net, choice)
            exporting.export_model(fake, Path(folder) / "model", choice, net.block_rank)
            run = hf.load(Path(folder) / "model", device, dtype)
            gate(name, {"logits": (run(ids.to(device)).logits.float().cpu(), fake(ids).logits.float())}, 0.05)
            yield name, run


def block_models(device: str, dtype: torch.dtype, config: LlamaConfig) -> Iterator[tuple[str, nn.Module]]:
    """Random packed integers of every precision, made directly: dense copies of each would not fit small machines."""
    space = single(config)
    stored: dict[tuple[int, int, int], PackedLinear] = {}
    for name, choice in choices(space).items():
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        if choice is not None:
            assert choice.weight_bits is not None
            assert choice.act_bits is not None
            for b, layer in enumerate(model.model.layers):
                for i, path in enumerate(block_of(config).modules):
                    shape, bits = layer.get_submodule(path).weight.shape, choice.weight_bits[b]
                    first = stored.get((b, i, bits))
                    if first is None:
                        packed = torch.randint(-(2**31), 2**31, (shape[0], shape[1] * bits // 32), dtype=torch.int32)
                        scale = (0.02 * (1 + torch.rand(shape[0], shape[1] // 128)) / 2**bits).to(dtype)
                        first = PackedLinear(packed.to(device), scale.to(device), None, bits, choice.act_bits[b])
                        stored[b, i, bits] = first
                    shared = copy.copy(first)  # the same buffers
                    shared.act_bits = choice.act_bits[b]
                    layer.set_submodule(path, shared)
        for module in model.modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:
                    value = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0, 0.02)
                    module.register_parameter(key, nn.Parameter(value, requires_grad=False))
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
        attach(model.eval())
        yield name, model


# ---- measurement ----------------------------------------------------------------------------------------------------


def operations(config: Any, device: str, dtype: torch.dtype, context: int, seconds: float) -> dict[str, float]:
    """Sums of operations in ms per scheme, from a new table of torch's dense kernels and our low-bit ones."""
    space = single(config)
    workload = Workload("decode", 1, context, str(dtype).removeprefix("torch."))
    names = None if device == "cpu" else ("torch", "ours-cuda")
    watch = Watch.on(torch.device(device))  # the state of the moment is the one to be measured
    with tempfile.TemporaryDirectory() as folder:
        table = profile(
            space, config, Path(folder) / "table.jsonl", workload=workload, device=device, backends=names,
            progress=False, seconds_per_operation=seconds, watch=watch,
        )  # fmt: skip
    bound = table.bind(space)
    return {n: bound.original() if c is None else bound.predict(c) for n, c in choices(space).items()}


def predictions(sums: dict[str, float], times: dict[str, Timing], blocks: int) -> dict[str, float]:
    """Milliseconds per scheme: its operations and the overhead fitted to all other schemes."""
    found = {}
    for scheme, total in sums.items():
        others = [(sums[n], blocks, times[n].p10 * 1e3) for n in sums if n != scheme]
        overhead = fit(others)
        found[scheme] = total + overhead.fixed + overhead.per_block * blocks
    return found


def panel(
    recorder: Recorder, name: str, models: Iterator[tuple[str, nn.Module]], config: Any, args: argparse.Namespace
) -> None:
    dtype = getattr(torch, args.dtype)
    contenders, held = {}, {}
    workload = Workload("decode", 1, args.tokens, args.dtype)
    for scheme, model in models:
        contenders[scheme] = torch.inference_mode()(call_of(model, workload, torch.device(recorder.device)))
        tensors = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}
        held[scheme] = sum(tensors.values())
    measured: dict[str, list[float]] = {n: [] for n in contenders}  # ms, one per round
    predicted: dict[str, list[float]] = {n: [] for n in contenders}
    plain: dict[str, list[float]] = {n: [] for n in contenders}
    for _ in range(args.rounds):
        sums = operations(config, recorder.device, dtype, args.tokens, args.seconds)
        times = time_interleaved(contenders, args.calls, warmup=2, device=recorder.device)
        whole = predictions(sums, times, config.num_hidden_layers)
        for n, timing in times.items():
            measured[n].append(timing.p10 * 1e3)  # as tables
            predicted[n].append(whole[n])
            plain[n].append(sums[n])
    over_16 = lambda of, n: [a / b for a, b in zip(of["16 bit"], of[n], strict=True)]  # noqa: E731
    for n in contenders:
        pairs = list(zip(over_16(predicted, n), over_16(measured, n), strict=True))
        recorder.row(
            n, Timing.of([ms * 1e-3 for ms in measured[n]]), panel=name, context=args.tokens, dtype=args.dtype,
            threads=torch.get_num_threads(),
            extra={
                "tokens_per_s": 1e3 / statistics.median(measured[n]), "bytes": held[n],
                "operations_ms": statistics.median(plain[n]), "predicted_ms": statistics.median(predicted[n]),
                "latency_error": statistics.median(p / m - 1 for p, m in zip(predicted[n], measured[n], strict=True)),
                "speedup": statistics.median(m for _, m in pairs),
                "predicted_speedup": statistics.median(p for p, _ in pairs),
                "speedup_error": statistics.median(p / m - 1 for p, m in pairs),
            },
        )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--panel", choices=("small", "blocks"), default=None, help="default: both")
    parser.add_argument("--tokens", type=int, default=128, help="cached tokens")
    parser.add_argument("--blocks", type=int, default=2, help="of Llama-3.1-8B")
    parser.add_argument("--rounds", type=int, default=7, help="of a new table and all models")
    parser.add_argument("--calls", type=int, default=10, help="of each model per round")
    parser.add_argument("--seconds", type=float, default=0.02, help="per operation of the table")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    dtype, device = getattr(torch, args.dtype), args.device
    recorder = Recorder("decode", device, args.out, args.commit)
    size = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    if args.tiny:
        size = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    big = LlamaConfig(
        vocab_size=1024, num_hidden_layers=args.blocks, head_dim=64 if args.tiny else 128, tie_word_embeddings=True,
        **size,
    )  # fmt: skip
    if args.tiny:
        args.rounds, args.calls, args.seconds = 2, 2, 1e-4
    makers = {
        "small": (assets.load_model(dtype).config, lambda: small_models(device, dtype)),
        "blocks": (big, lambda: block_models(device, dtype, big)),
    }
    for name, (config, make) in makers.items():
        if args.panel not in (None, name):
            continue

        def run(name: str = name, config: Any = config, make: Any = make) -> None:
            panel(recorder, name, make(), config, args)

        guarded(name, run)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
