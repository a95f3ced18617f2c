"""Decoding with exported models on the low-bit kernels: tokens per second, and what the latency table says of it.

    python -m benchmarks.bench_decode [--device cpu] [--panel small|blocks] [--tokens 128] [--out FOLDER]

small    the embedded model, extracted at each precision, exported, and run by `hf.load`. Its linears are so small that
         Python and the rest of transformers take most of the time.
blocks   two Llama-3.1-8B blocks of random packed weights; the kernels decide here. The vocabulary is small, because
         `lm_head` is never quantized.

One call decodes one token after `--tokens` cached ones, batch 1; the contenders are timed round by round. `predicted`
is the sum over a table of the same device and workload, profiled beforehand with the same kernels; speed-ups are over
the 16-bit model, so that what a table leaves out (Python) shows as predicted / measured > 1.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Recorder, arguments, gate, guarded, time_interleaved
from jointnas import artifact, assets
from jointnas_kernels import hf
from jointnas_kernels.latency import Workload, profile
from jointnas_kernels.nn import PackedLinear
from jointnas_kernels.space import LINEARS, Choice, SearchSpace

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
                yield name, assets.load_model(dtype).to(device)
                continue
            fake = hf.extract(net, choice)
            artifact.export(fake, Path(folder) / "model", choice, net.block_rank)
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
                for i, linear in enumerate(LINEARS):
                    parent = layer.self_attn if hasattr(layer.self_attn, linear) else layer.mlp
                    shape, bits = getattr(parent, linear).weight.shape, choice.weight_bits[b]
                    first = stored.get((b, i, bits))
                    if first is None:
                        packed = torch.randint(-(2**31), 2**31, (shape[0], shape[1] * bits // 32), dtype=torch.int32)
                        scale = (0.02 * (1 + torch.rand(shape[0], shape[1] // 128)) / 2**bits).to(dtype)
                        first = PackedLinear(packed.to(device), scale.to(device), None, bits, choice.act_bits[b])
                        stored[b, i, bits] = first
                    shared = copy.copy(first)  # the same buffers
                    shared.act_bits = choice.act_bits[b]
                    setattr(parent, linear, shared)
        for module in model.modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:
                    value = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0, 0.02)
                    module.register_parameter(key, nn.Parameter(value, requires_grad=False))
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
        yield name, model.eval()


# ---- measurement ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def decoder(model: Any, context: int) -> Callable[[], object]:
    """One token after `context` cached ones, again and again at the same place."""
    device, vocab = next(model.parameters()).device, model.config.vocab_size
    prompt, token = (torch.randint(vocab, (1, n), device=device) for n in (context, 1))
    cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def decode() -> object:
        output = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-1)
        return output

    return decode


def predictions(config: Any, device: str, dtype: torch.dtype, context: int, seconds: float) -> dict[str, float]:
    """Milliseconds per scheme, from a table of torch's dense kernels and our low-bit ones."""
    space = single(config)
    workload = Workload("decode", 1, context, str(dtype).removeprefix("torch."))
    ours = "ours-cpu" if device == "cpu" else "ours-cuda"
    with tempfile.TemporaryDirectory() as folder:
        table = profile(
            space, config, Path(folder) / "table.jsonl", workload=workload, device=device, backends=("torch", ours),
            progress=False, seconds=seconds,
        )  # fmt: skip
    bound = table.bind(space)
    return {n: bound.original() if c is None else bound.predict(c) for n, c in choices(space).items()}


def panel(
    recorder: Recorder, name: str, models: Iterator[tuple[str, nn.Module]], predicted: dict[str, float], context: int,
    rounds: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    contenders, held = {}, {}
    for scheme, model in models:
        contenders[scheme] = decoder(model, context)
        tensors = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}
        held[scheme] = sum(tensors.values())
    times = time_interleaved(contenders, rounds, warmup=3, device=recorder.device)
    for scheme, timing in times.items():
        measured, table = times["16 bit"].median / timing.median, predicted["16 bit"] / predicted[scheme]
        recorder.row(
            scheme, timing, panel=name, context=context, dtype=str(dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            extra={
                "tokens_per_s": 1 / timing.median, "speedup": measured, "predicted_ms": predicted[scheme],
                "predicted_speedup": table, "predicted_of_measured": table / measured, "bytes": held[scheme],
            },
        )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--panel", choices=("small", "blocks"), default=None, help="default: both")
    parser.add_argument("--tokens", type=int, default=128, help="cached tokens")
    parser.add_argument("--blocks", type=int, default=2, help="of Llama-3.1-8B")
    parser.add_argument("--rounds", type=int, default=40)
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
    rounds, seconds = (2, 1e-4) if args.tiny else (args.rounds, 0.05)
    makers = {
        "small": (assets.load_model(dtype).config, lambda: small_models(device, dtype)),
        "blocks": (big, lambda: block_models(device, dtype, big)),
    }
    for name, (config, make) in makers.items():
        if args.panel not in (None, name):
            continue

        def run(name: str = name, config: Any = config, make: Any = make) -> None:
            predicted = predictions(config, device, dtype, args.tokens, seconds)
            panel(recorder, name, make(), predicted, args.tokens, rounds, dtype)

        guarded(name, run)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
