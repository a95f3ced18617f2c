"""Is a dry run right? Bytes that it predicts for steps, beside the most that a process really takes for them.

    python -m benchmarks.bench_memory [--only checkpoints]

CPU on Linux. Every configuration runs in a process of its own, with random weights: the steps of a search and of a
distillation, twice, because optimizers have their state from the first on. Measured is the growth of the resident set
to its peak (the kernel's VmHWM, reset before every step) without the text of libraries. malloc gives every array pages
of its own there, so that memory which is free again is not counted: how much an allocator keeps beyond that is its own
affair.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.harness import Recorder, arguments
from jointnas.bilevel import update
from jointnas.config import RunConfig
from jointnas.data import Batch
from jointnas.distillation import Trained, distillation_step, original_logits, student_of
from jointnas.footprint import PHASES, footprint
from jointnas.guards import Guard
from jointnas.losses import cross_entropy
from jointnas_kernels.hf import Supernet, convert
from jointnas_kernels.hf.families import family
from jointnas_kernels.nn.choices import seeded
from jointnas_kernels.space import SearchSpace

# name: hidden, MLP, blocks, vocabulary, sequences, tokens, what is distilled, checkpoints, base bits
CONFIGURATIONS: dict[str, tuple[int, int, int, int, int, int, str, bool, int | None]] = {
    "full": (768, 2048, 6, 16384, 4, 256, "full", False, None),
    "lora": (512, 1408, 8, 8192, 8, 256, "lora", False, None),
    "checkpoints": (512, 1408, 8, 8192, 8, 256, "full", True, None),
    "packed": (512, 1408, 8, 8192, 8, 256, "lora", True, 8),
}
TINY = (256, 704, 2, 4096, 4, 256, "full", False, None)


def model_and_space(values: tuple[Any, ...]) -> tuple[Any, SearchSpace, RunConfig]:
    hidden, mlp, blocks, vocabulary, batch, tokens, train, checkpoints, base_bits = values
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=blocks, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128, head_dim=64, vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip
    space = SearchSpace(
        (hidden // 2, hidden), (hidden // 128, hidden // 64), (32, 64), (mlp // 2, mlp), tuple(range(1, blocks + 1)),
        (2, 4, 8), (8, 16), group_size=32,
    )  # fmt: skip
    options = {"gradient_checkpointing": checkpoints}
    run = RunConfig(
        model={"device": "cpu", "dtype": "float32", "base_bits": base_bits},
        data={"batch_size": batch, "seq_len": tokens}, search=options, finetune={"train": train, **options},
    )  # fmt: skip
    return config, space, run


def resident() -> dict[str, int]:
    """Bytes: now of data (RssAnon), of program text that was read (RssFile) and of both (VmRSS), and of both at most
    since the last reset (VmHWM)."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {key: int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile", "VmRSS", "VmHWM")}


def peak(step: Any) -> int:
    """The most data during a step. The first steps read tens of MB of libraries; that is none of it."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    step()
    now = resident()
    return now["VmHWM"] - now["RssFile"]


def search_peaks(net: Supernet, batch: Batch) -> dict[str, int]:
    """Of the second of two steps of each kind."""
    trained = {"weight": net.lora_parameters(), "arch": net.arch_parameters()}
    optimizers = {mode: torch.optim.AdamW(of, lr=1e-3) for mode, of in trained.items()}
    found: dict[str, int] = {}

    def step(mode: str) -> None:
        net.mode(mode).relax()
        net.draw(seeded(0, 0, 0))
        update(optimizers[mode], trained[mode], 1.0, batch, lambda part: {"loss": cross_entropy(net, part)}, Guard())

    for _ in range(2):
        for phase, mode in zip(PHASES, trained, strict=False):
            found[phase] = peak(partial(step, mode))
    return found


def measure(values: tuple[Any, ...]) -> dict[str, tuple[float, float]]:
    """(predicted, measured) bytes by phase, in this process."""
    model_config, space, run = model_and_space(values)
    planned = footprint(run, model_config, space)
    gc.collect()
    base = resident()["RssAnon"]
    model = family(model_config).model._from_config(model_config, dtype=torch.float32).requires_grad_(False)
    net = convert(model, space, lora_rank=run.search.lora_rank, base_bits=run.model.base_bits).train()
    del model
    net.gradient_checkpointing = run.search.gradient_checkpointing
    with torch.no_grad():
        net.arch.logits["blocks"][-1] = 1e3  # all blocks are drawn
    ids = torch.randint(0, model_config.vocab_size, (run.data.batch_size, run.data.seq_len))
    batch = Batch(ids, ids)
    found = {phase: size - base for phase, size in search_peaks(net, batch).items()}
    net.zero_grad(set_to_none=True)
    student = student_of(net, space.full(), run.finetune.train).train()
    if not isinstance(student, Supernet):
        student.requires_grad_(True)
    masters = Trained(student)
    optimizer = torch.optim.AdamW(masters.masters.values(), lr=1e-3)
    teacher = original_logits(net)
    for _ in range(2):
        done = peak(lambda: distillation_step(student, teacher, batch, run.finetune, masters, optimizer))
        found[PHASES[2]] = done - base
    return {phase: (planned[phase].total, size) for phase, size in found.items()}


def main(argv: list[str] | None = None) -> None:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--only", nargs="+", choices=list(CONFIGURATIONS), help="default: all")
    parser.add_argument("--here", help=argparse.SUPPRESS)  # the configuration that this process measures
    args = parser.parse_args(argv)
    if args.here is not None:
        print(json.dumps(measure(tuple(json.loads(args.here)))))
        return
    wanted = {"tiny": TINY} if args.tiny else {n: CONFIGURATIONS[n] for n in args.only or CONFIGURATIONS}
    recorder = Recorder.of("memory", args)
    for name, values in wanted.items():
        command = [sys.executable, "-m", "benchmarks.bench_memory", "--device", "cpu", "--here", json.dumps(values)]
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"bench_memory: {name} failed:\n{done.stderr[-2000:]}")
        for phase, (predicted, measured) in json.loads(done.stdout.splitlines()[-1]).items():
            extra = {"predicted": predicted, "ratio": predicted / measured}
            recorder.row(phase, measured, "B", extra, configuration=name)


if __name__ == "__main__":
    main()
