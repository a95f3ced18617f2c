"""Which blocks to drop: the least important ones, or the last ones? The paper's Fig. 2, right, for any model.

    python -m benchmarks.bench_depth [--model embedded] [--finetune 0 50] [--dropped 1 2 3]

Cross-entropy in nats per token on held-out text over the number of blocks that are dropped, in both orders, after each
number of distillation steps that --finetune asks for (0: untrained). Every model starts from the original's weights,
sees the same batches, and keeps all widths.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Recorder, arguments
from jointnas import loading
from jointnas.config import DataConfig, EvalConfig, FinetuneConfig, ModelConfig
from jointnas.data import Batches, Streams
from jointnas.distillation import bake, distil, original_logits, student_of
from jointnas.pipeline import quality
from jointnas.tasks import Tasks
from jointnas_kernels.hf import Supernet, convert, importance_scores
from jointnas_kernels.space import SearchSpace, count_params, kept_blocks

ORDERS = ("importance", "last")
SCORED = 8  # batches that blocks are scored on, as in a search


def supernet_of(source: ModelConfig, order: str, batches: Batches) -> Supernet:
    """Of every number of blocks, at the original's widths and precision."""
    model: Any = loading.load_model(source)
    scores = importance_scores(model, [batches.at(i).ids for i in range(SCORED)])
    if order == "last":
        scores = replace(scores, blocks=-torch.arange(len(scores.blocks)).float())
    space = SearchSpace.single(model.config)
    return convert(model, replace(space, blocks=tuple(range(1, space.depth + 1))), importance=scores)


def measure(supernet: Supernet, dropped: int, steps: int, source: ModelConfig, streams: Streams, args: Any) -> Any:
    """Cross-entropy of the model without so many blocks, and what else to know of it."""
    choice = replace(supernet.space.full(), blocks=supernet.space.depth - dropped)
    student = student_of(supernet, choice, args.train)
    if steps:
        config = FinetuneConfig(steps=steps, lr=args.lr, train=args.train)
        distil(
            student, original_logits(supernet), streams.all, config, batch_size=args.batch, seq_len=args.seq,
            progress=False, bos=streams.bos,
        )  # fmt: skip
    options = EvalConfig(tokens=args.tokens, tasks=[])
    found = quality(bake(student), source, streams.held_out, options, Tasks(), streams.bos)
    return math.log(found["perplexity"]), {
        "kept": kept_blocks(supernet.block_rank, choice.blocks), "params": count_params(supernet.config, choice),
        "perplexity": found["perplexity"], "context": found["context"], "caveat": loading.caveat(source),
    }  # fmt: skip


def settings(args: argparse.Namespace, dropped: int, steps: int) -> dict[str, Any]:
    """What identifies a row."""
    training = {"train": args.train, "lr": args.lr, "batch": args.batch, "seq": args.seq} if steps else {}
    return {"model": Path(args.model).name, "dropped": dropped, "steps": steps, "tokens": args.tokens, **training}


def main(argv: list[str] | None = None) -> None:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--model", default="embedded", help="'embedded', or folder, GGUF file or hub name")
    parser.add_argument("--finetune", type=int, nargs="+", default=[0], help="distillation steps; 0: untrained")
    parser.add_argument("--dropped", type=int, nargs="+", help="numbers of blocks; default: all from 0")
    parser.add_argument("--train", default="full", choices=("full", "lora"), help="what is distilled")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=65536, help="held-out tokens")
    args = parser.parse_args(argv)
    source = loading.resolve_model(ModelConfig(source=args.model, device=args.device))
    depth = loading.model_config(source).num_hidden_layers
    dropped = args.dropped or list(range(depth))
    if args.tiny:
        dropped, args.finetune, args.batch, args.seq, args.tokens = [0, depth - 1], [0, 1], 1, 16, 512
    streams = loading.load_streams(DataConfig(batch_size=args.batch, seq_len=args.seq), source, 0)
    recorder = Recorder.of("depth", args)
    for order in ORDERS:
        wanted = [(d, n) for n in args.finetune for d in dropped]
        wanted = [w for w in wanted if not recorder.has(order, **settings(args, *w))]
        if not wanted:
            continue
        batches = Batches(streams.weight, args.batch, args.seq, 0, streams.bos)
        supernet = supernet_of(source, order, batches)
        for d, n in wanted:
            value, extra = measure(supernet, d, n, source, streams, args)
            recorder.row(order, value, "nats", extra, **settings(args, d, n))


if __name__ == "__main__":
    main()
