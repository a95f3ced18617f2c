"""One-hot = extracted = reloaded = GGUF in llama.cpp, for random choices of a real model's space.

    python -m benchmarks.bench_gguf --model models/smollm2 [--choices 20] [--tokens 48] [--bits 4 8]

Every choice (widths, depth, bits of each block; activations stay in 16 bit) is fixed in the supernet, extracted,
exported as compressed-tensors, reloaded by stock transformers, written as GGUF, and read back: the model that the file
stands for. llama.cpp runs it twice: as it is, where inputs of quantized products are rounded to 8 bits, and with the
same numbers stored in fp32, where nothing is rounded. A row's value is the largest difference of a log-probability
between the fp32 run and the model of the file, over the 256 most probable tokens at every position; its `extra` holds

    one_hot      largest |logit| difference of the fixed supernet and the extracted model      (fp32 accumulation)
    reloaded     of the extracted and the reloaded model                                       (0)
    rounded      largest relative change of a scale by fp16                                    (<= 2^-11)
    scales       largest difference of log-probabilities by these scales
    same_tokens  share of positions with the same most probable token in llama.cpp, in fp32
    perplexity   relative difference of llama.cpp's, in fp32                                   (0.1 %)
    rounding     what rounding inputs to 8 bits does: median difference of log-probabilities in torch
    unexplained  median difference that is left between llama.cpp's quantized run and torch with rounded inputs: nothing
                 but fp32 accumulation in the first block (tests/hf/test_gguf.py), but inputs that fall on the other
                 side of a half add up, so that after a few blocks it is about as large

The first choice is the whole architecture at the largest precision. Nothing is trained, so what is cut far, or has 2
bits, computes noise that every rounding changes: a hard test of equality; --bits 4 8 leaves out the latter. A broken
bound (BOUNDS) stops it. Choices that have a row already are skipped: it can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.harness import Recorder, WrongResult, arguments
from benchmarks.llama_cpp import LlamaCpp, eight_bit_inputs
from jointnas import loading
from jointnas.config import ModelConfig
from jointnas.config import load as load_config
from jointnas.exporting import export_model, reload
from jointnas_kernels.hf import Supernet, convert, extract
from jointnas_kernels.hf.gguf import names
from jointnas_kernels.hf.gguf.read import read
from jointnas_kernels.hf.gguf.write import Written, write
from jointnas_kernels.space import Choice, SearchSpace

TOP = 256
BOUNDS = {"one_hot": 5e-3, "reloaded": 0.0, "rounded": 2**-11, "llama_cpp": 5e-3, "perplexity": 1e-3}
TEXT = (
    "In the spring of 1847 the schooner left the harbour with 23 men aboard, and nobody in the village doubted that "
    "she would return before winter. The captain had made the voyage many times; he knew the ice, the currents and "
    "the long silence of the northern light, and he trusted his instruments more than his memory."
)


def choices(space: SearchSpace, count: int) -> list[Choice]:
    """The full architecture at the largest precision, and random ones; all different."""
    g, found = torch.Generator().manual_seed(0), {space.full(): None}
    while len(found) <= count:
        found[space.sample(g)] = None
    return list(found)


def logprobs(model: Any, ids: Tensor) -> Tensor:
    """[T, V]."""
    return model(ids[None]).logits[0].log_softmax(-1)


def compare(file: Path, ids: Tensor, want: Tensor, threads: int) -> tuple[list[float], list[float], list[bool]]:
    """llama.cpp on a file against log-probabilities [T, V]: (differences of the most probable tokens at all positions,
    its log-probabilities of the tokens that follow, whether the most probable token is the same)."""
    server, differences, following, same = LlamaCpp(file, 2 * len(ids), threads), [], [], []
    for i, token in enumerate(ids[1:].tolist()):
        top = TOP
        while token not in (found := server.after(ids[: i + 1].tolist(), top)):
            top *= 8
        first = sorted(found, key=found.__getitem__)[-TOP:]
        differences += [abs(found[t] - float(want[i, t])) for t in first]
        following.append(found[token])
        same.append(first[-1] == int(want[i].argmax()))
    return differences, following, same


def measure(
    supernet: Supernet, choice: Choice, tokenizer: Any, ids: Tensor, threads: int
) -> tuple[float, dict[str, Any]]:
    """(largest difference to llama.cpp, what else a row holds)."""
    own = supernet.fix(choice)(ids[None]).logits
    with tempfile.TemporaryDirectory() as temporary:
        folder, wide = Path(temporary) / "hf", Path(temporary) / "fp32"
        model = extract(supernet, choice)
        logits = model(ids[None]).logits
        export_model(model, folder, choice, supernet.block_rank, tokenizer=tokenizer)
        again = reload(folder)(ids[None]).logits
        done = write(folder, folder / "model.gguf", tokenizer)
        stands_for = read(folder / "model.gguf")
        exact = logprobs(stands_for, ids)
        stands_for.save_pretrained(wide)
        write(wide, wide / "model.gguf", tokenizer)
        differences, theirs, same = compare(wide / "model.gguf", ids, exact, threads)
        eight_bit_inputs(stands_for, quantized(stands_for, done))
        rounded = logprobs(stands_for, ids)
        left, _, _ = compare(folder / "model.gguf", ids, rounded, threads)
    ours = exact[:-1].gather(-1, ids[1:, None]).mean()
    top = exact[:-1].topk(TOP).indices
    extra = {
        "one_hot": float((own - logits).abs().max()), "reloaded": float((again - logits).abs().max()),
        "rounded": done.rounded, "scales": float((exact - logits[0].log_softmax(-1)).abs().max()),
        "same_tokens": sum(same) / len(same), "ppl": math.exp(-float(ours)),
        "perplexity": abs(math.exp(float(ours) - statistics.fmean(theirs)) - 1),
        "rounding": float((rounded - exact)[:-1].gather(-1, top).abs().median()),
        "unexplained": statistics.median(left), "types": sorted(set(done.types.values())),
    }  # fmt: skip
    wrong = {key: value for key, value in {**extra, "llama_cpp": max(differences)}.items()
             if key in BOUNDS and not value <= BOUNDS[key] * (1 + 1e-6)}  # fmt: skip
    if wrong:
        raise WrongResult(f"{choice}: {wrong}; bounds {BOUNDS}; {extra}")
    return max(differences), extra


def quantized(model: Any, done: Written) -> list[str]:
    """The linears whose weights are blocks of 32."""
    blocks = {n: done.types.get(names.tensor_name(n)) for n, _ in model.named_parameters()}
    return [n.rpartition(".")[0] for n, kind in blocks.items() if kind in ("Q8_0", "Q4_0")]


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--model", default="models/smollm2", help="a folder, or embedded")
    parser.add_argument("--space", default="examples/smollm2.yaml", help="a configuration with a space")
    parser.add_argument("--choices", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--bits", type=int, nargs="+", choices=(2, 4, 8), help="of weights (default: the space's)")
    args = parser.parse_args(argv)
    config = ModelConfig(source="embedded" if args.tiny else args.model)
    space = SearchSpace.named("tiny") if config.source == "embedded" else load_config(args.space).space.build()
    bits = args.bits or space.weight_bits
    space = SearchSpace.from_dict({**space.to_dict(), "weight_bits": bits, "act_bits": None, "head_bits": None})
    model, tokenizer = loading.load_model(config), loading.load_tokenizer(config)
    ids = torch.tensor(tokenizer(TEXT).input_ids[: 12 if args.tiny else args.tokens])
    recorder = Recorder("gguf", "cpu", args.out, args.commit)
    present = {json.dumps(row["params"], sort_keys=True) for row in rows.read(recorder.file) if row["topic"] == "gguf"}
    supernet = convert(model, space, lora_rank=1)
    name = Path(config.source).name
    for choice in choices(space, 0 if args.tiny else args.choices):
        params = {"model": name, "tokens": len(ids), **choice.to_dict()}
        del params["head_bits"]  # of no choice here, and of no older row
        if json.dumps(params, sort_keys=True) in present:
            continue
        value, extra = measure(supernet, choice, tokenizer, ids, torch.get_num_threads())
        recorder.row("llama.cpp", value, "nats", extra, **params)


if __name__ == "__main__":
    main()
