"""Random models, precisions, batches and paddings: prompts in random pieces and decode steps against the stock model,
in fp64 unless inputs are rounded: levels are decided in the model's own dtype.

    python -m tests.runtime.fuzz --cases 5000 [--first SEED] [--isa INDEX]
"""

from __future__ import annotations

import argparse
import copy
import random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import logging

from jointnas_kernels.latency.backends.base import quantize_weight
from jointnas_kernels.latency.backends.step import linear
from jointnas_kernels.nn.linear import FakeQuantLinear
from jointnas_kernels.nn.packed import PackedLinear
from jointnas_kernels.ops.core import cpu
from jointnas_kernels.progress import Progress
from jointnas_kernels.runtime import DecodeStep
from tests.hf.hf_models import LLAMA3_ROPE, tiny_model
from tests.runtime.test_decode import packed

# Of the largest logit: worst difference of A16; mean difference where inputs are rounded, which is 0 or, where one of
# so few inputs takes the next of 255 levels, some tenths of a percent.
EXACT, ROUNDED = 2e-4, 2e-2
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")


def shape(rng: random.Random) -> dict[str, Any]:
    """A config: heads divide the hidden size, as stock transformers wants; 16 inputs fill a group."""
    family, kv_heads = rng.choice(FAMILIES), rng.randint(1, 3)
    heads = kv_heads * rng.randint(1, 3)
    found: dict[str, Any] = {
        "family": family, "num_key_value_heads": kv_heads, "num_attention_heads": heads,
        "head_dim": 16 * rng.randint(1, 3), "hidden_size": 16 * heads * rng.randint(1, 2),
        "intermediate_size": 16 * rng.randint(1, 6), "num_hidden_layers": rng.randint(1, 3),
        "vocab_size": rng.randint(20, 150), "tie_word_embeddings": rng.random() < 0.5,
    }  # fmt: skip
    if family == "phi3":
        found["head_dim"] = found["hidden_size"] // heads
    if family in ("llama", "qwen3") and rng.random() < 0.5:
        found["attention_bias"] = True
    if rng.random() < 0.4 and family != "llama":
        found |= {"sliding_window": rng.randint(2, 6)}
        if family.startswith("qwen"):
            found |= {"use_sliding_window": True, "max_window_layers": rng.randint(0, 2)}
    if rng.random() < 0.3 and family != "phi3":
        found["rope_parameters"] = LLAMA3_ROPE
    return found


def exact(model: Any) -> Any:
    """The same model in fp64 on dense weights."""
    found = copy.deepcopy(model)
    for name, module in list(found.named_modules()):
        if isinstance(module, PackedLinear):
            weight = module.weight.dequantized(dtype=torch.float64)
            bias = None if module.bias is None else module.bias.detach().double()
            found.set_submodule(name, FakeQuantLinear(weight, bias))
    return found.double().requires_grad_(False)


@torch.no_grad()
def run(seed: int, isa: int = 0) -> str | None:
    """What is wrong in one case on an instruction set (`cpu.ISAS`); None: nothing."""
    rng = random.Random(seed)
    change = shape(rng)
    model = tiny_model(seed=seed, **change)
    act = rng.choice((16, 16, 16, 8))
    bits = [rng.choice((2, 4, 8) if act < 16 else (2, 4, 8, 16)) for _ in model.model.layers]
    model = packed(model, bits, act, rng.random() < 0.3, 16)
    if rng.random() < 0.3:
        model.lm_head = packed_head(model, rng.choice((4, 8)))
    batch, length = rng.choice((1, 1, 2, 3, 5, 16)), rng.randint(*rng.choice(((2, 9), (2, 9), (10, 140))))
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(change["vocab_size"], (batch, length), generator=g)
    padding = torch.tensor([rng.choice((0, 0, rng.randint(0, length - 1))) for _ in range(batch)])
    step = DecodeStep(model, threads=rng.randint(1, 3), isa=isa)
    caches = step.caches(batch, length + rng.randint(0, 3))
    positions, own, t = (torch.arange(length) - padding[:, None]).clamp_min(0), [], 0
    longest = rng.choice((1, 2, length, length))
    while t < length:
        end = min(t + rng.randint(1, longest), length)
        if end == t + 1:
            own.append(step(x[:, t], positions[:, t], caches, t, padding.clamp_max(t)))
        else:
            part = step.prefill(x[:, t:end], positions[:, t:end], caches, t, padding.clamp_max(end - 1), end - t)
            own.extend(part.unbind(1))
        t = end
    reference = exact(model) if act == 16 else model
    for row, count in enumerate(padding.tolist()):
        want = reference(x[row : row + 1, count:]).logits[0].double()
        found = torch.stack([logits[row] for logits in own[count:]]).double()
        wrong, largest = (found - want).abs(), want.abs().max()
        if act == 16 and not wrong.max() <= EXACT * largest:
            return f"seed {seed}: {float(wrong.max() / largest):.2e} of the largest logit; {change}, {bits}"
        if act < 16 and not wrong.mean() <= ROUNDED * largest:
            return f"seed {seed}: {float(wrong.mean() / largest):.2e} in the mean; {change}, {bits}, A{act}"
    return None


def packed_head(model: Any, bits: int) -> nn.Module:
    """Its head in few bits."""
    weight: Tensor = model.lm_head.weight.detach()
    return linear(quantize_weight(weight, bits, 16), 16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--isa", type=int, default=0, help=f"index of: {', '.join(cpu.ISAS)}")
    args = parser.parse_args()
    logging.set_verbosity_error()  # of tokens beyond a tiny vocabulary
    wrong, progress = 0, Progress("cases", args.cases)
    for seed in range(args.first, args.first + args.cases):
        if text := run(seed, args.isa):
            wrong += 1
            print(text, flush=True)
        progress.step()
    progress.close()
    print(f"{args.cases} cases, {wrong} failures, on {cpu.ISAS[args.isa]}")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
