"""Train the embedded small model: ``python benchmarks/embedded/train_embedded.py --device cuda --minutes 7 --out DIR``.

A Llama (hidden 256, 4 query and 2 KV heads of 64, intermediate 768, 6 blocks, 4,096 tokens, tied embeddings;
5.8M parameters) on about 4M tokens of text. The text, not the computer, is the limit: on a GPU there is time for
more than a hundred epochs, so the time goes into three stages and the best validation loss wins:

    1. plain     the model itself, with dropout
    2. teacher   a larger model with more dropout, which learns the same text better
    3. distil    the model again, on 0.3 cross-entropy + 0.7 KL(teacher || model) at temperature 1

Every stage measures its own tokens/s first and sets the length of its cosine schedule from it. Written to ``--out``
as it goes, so that a kill loses nothing: ``model.safetensors`` (bf16, best so far) with its ``config.json``,
``loss.jsonl`` and ``record.json``. ``--install DIR`` copies them into the package.

Needs torch, transformers, tokenizers, safetensors and numpy only.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from jointnas import assets

CONTEXT = 256
INSTALLED = ("config.json", "generation_config.json", "model.safetensors", "loss.jsonl", "record.json")


@dataclass(frozen=True)
class Stage:
    """One training run: its share of the time, the longest useful schedule, its size and its regularisation."""

    name: str
    share: float
    max_epochs: float
    dropout: float
    lr: float
    teacher: str | None = None
    large: bool = False


STAGES = (
    Stage("plain", share=0.22, max_epochs=30, dropout=0.10, lr=3e-3),
    Stage("teacher", share=0.40, max_epochs=40, dropout=0.25, lr=1.5e-3, large=True),
    Stage("distil", share=0.38, max_epochs=80, dropout=0.05, lr=3e-3, teacher="teacher"),
)


def model_config(large: bool = False) -> LlamaConfig:
    """The embedded model's configuration, or that of the larger teacher (27M parameters)."""
    width: dict[str, Any] = {
        "hidden_size": 512 if large else 256,
        "intermediate_size": 1408 if large else 768,
        "num_attention_heads": 8 if large else 4,
        "num_key_value_heads": 8 if large else 2,
        "num_hidden_layers": 8 if large else 6,
    }
    return LlamaConfig(
        **width, head_dim=64, vocab_size=4096, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.02, rms_norm_eps=1e-5,
    )  # fmt: skip


def build(config: LlamaConfig, dropout: float, seed: int, device: str) -> LlamaForCausalLM:
    """A fresh model; dropout (absent from the Llama code) by forward hooks on what is added to the residual stream."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    depth_scale = (2 * config.num_hidden_layers) ** -0.5  # GPT-2: residual projections start smaller
    for block in model.model.layers:
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.weight.data.mul_(depth_scale)
    if dropout > 0:

        def drop(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return F.dropout(output, dropout, module.training)

        for block in model.model.layers:
            block.self_attn.o_proj.register_forward_hook(drop)
            block.mlp.down_proj.register_forward_hook(drop)
        model.model.embed_tokens.register_forward_hook(drop)
    return nn.Module.to(model, device)


class Batches:
    """Endless [B, T+1] windows of the training stream; documents are shuffled anew each epoch, on the device."""

    def __init__(self, batch: int, device: str, seed: int) -> None:
        documents = [torch.from_numpy(d) for d in assets.token_documents("train")]
        self.flat = torch.cat(documents).to(device)  # [N]
        self.length = torch.tensor([len(d) for d in documents], device=device)
        self.start = self.length.cumsum(0) - self.length
        self.tokens, self.batch, self.device = len(self.flat), batch, device
        self.generator = torch.Generator(device="cpu").manual_seed(seed)

    def _epoch(self) -> Tensor:
        order = torch.randperm(len(self.length), generator=self.generator).to(self.device)
        length, start = self.length[order], self.start[order]
        first = length.cumsum(0) - length  # where each document begins in the shuffled stream
        index = torch.repeat_interleave(start - first, length) + torch.arange(self.tokens, device=self.device)
        return self.flat[index]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        need = self.batch * CONTEXT
        while True:
            stream = self._epoch()
            offset = int(torch.randint(CONTEXT, (1,), generator=self.generator))
            for i in range(offset, self.tokens - need - 1, need):
                x, y = stream[i : i + need], stream[i + 1 : i + need + 1]
                yield x.view(self.batch, CONTEXT), y.view(self.batch, CONTEXT)


def autocast(device: str) -> torch.autocast:
    """Mixed precision of all forward passes."""
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, tokens: Tensor, device: str, batch: int = 64) -> float:
    """Cross-entropy in nats per token over non-overlapping windows of CONTEXT tokens."""
    model.eval()
    windows = tokens[: (len(tokens) - 1) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    targets = tokens[1 : windows.numel() + 1].view(-1, CONTEXT)
    total = 0.0
    for i in range(0, len(windows), batch):
        with autocast(device):
            logits = model(input_ids=windows[i : i + batch].to(device), use_cache=False).logits
        goal = targets[i : i + batch].to(device)
        total += float(F.cross_entropy(logits.float().flatten(0, 1), goal.flatten(), reduction="sum"))
    model.train()
    return total / windows.numel()


class Run:
    """What all stages share: data, output folder, record, best student so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out: Path = args.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.device, self.seed, self.batch_size = args.device, args.seed, args.batch
        self.compile: bool = args.device.startswith("cuda") if args.compile is None else args.compile
        self.began = time.time()
        self.curve = (self.out / "loss.jsonl").open("w")
        self.valid = assets.valid_tokens()
        self.batches = Batches(args.batch, args.device, args.seed)
        name = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "cpu"
        self.best = math.inf
        self.record: dict[str, Any] = {
            "command": f"python benchmarks/embedded/train_embedded.py --device {args.device} --minutes {args.minutes:g}"
            f" --seed {args.seed} --batch {args.batch} --stages {args.stages}",
            "device": name, "torch": torch.__version__, "seed": args.seed, "minutes": args.minutes,
            "batch": [args.batch, CONTEXT], "train_tokens": self.batches.tokens, "valid_tokens": len(self.valid),
            "stages": {},
        }  # fmt: skip

    def log(self, **row: Any) -> None:
        """A line of the curve."""
        row["seconds"] = round(time.time() - self.began, 1)
        self.curve.write(json.dumps(row) + "\n")
        self.curve.flush()
        print(row, flush=True)

    def write_record(self) -> None:
        """record.json, as far as it is known."""
        self.record["seconds"] = round(time.time() - self.began, 1)
        partial = self.out / "record.json.part"
        partial.write_text(json.dumps(self.record, indent=1) + "\n")
        partial.replace(self.out / "record.json")

    def keep(self, model: LlamaForCausalLM, loss: float, stage: str, step: int) -> None:
        """Save the model as bf16 if it is the best of the embedded size so far."""
        if loss >= self.best:
            return
        self.best = loss
        copy = LlamaForCausalLM(model.config)
        copy.load_state_dict({k: v.detach().cpu() for k, v in model.state_dict().items()})
        partial = self.out / ".part"
        nn.Module.to(copy, torch.bfloat16)
        copy.save_pretrained(partial)
        for file in partial.iterdir():  # rename is atomic: a kill leaves the last complete checkpoint
            file.replace(self.out / file.name)
        partial.rmdir()
        self.record["best"] = {"stage": stage, "step": step, "valid_loss": loss}
        self.write_record()


def _step_function(
    model: LlamaForCausalLM, teacher: LlamaForCausalLM | None, optimizer: torch.optim.Optimizer, device: str, fast: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """One optimizer step; ``fast`` compiles forward and loss."""

    def loss_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(device):
            logits = model(input_ids=x, use_cache=False).logits.float().flatten(0, 1)  # [B*T, V]
            loss = F.cross_entropy(logits, y.flatten())
            if teacher is None:
                return loss, loss
            with torch.no_grad():
                goal = teacher(input_ids=x, use_cache=False).logits.float().flatten(0, 1)
            divergence = F.kl_div(
                F.log_softmax(logits, -1), F.log_softmax(goal, -1), reduction="batchmean", log_target=True
            )
        return 0.3 * loss + 0.7 * divergence, loss

    compiled = torch.compile(loss_of) if fast else loss_of
    parameters = [p for p in model.parameters()]

    def step(x: Tensor, y: Tensor) -> Tensor:
        total, loss = compiled(x, y)
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def train(stage: Stage, run: Run, minutes: float, teachers: dict[str, LlamaForCausalLM], max_steps: int | None) -> None:
    """One stage within its minutes (compilation and evaluations included)."""
    begin, device = time.time(), run.device
    deadline = begin + 60 * minutes
    model = build(model_config(stage.large), stage.dropout, run.seed, device)
    model.train()
    count = sum(p.numel() for p in model.parameters())
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=0.0, betas=(0.9, 0.95), fused=device.startswith("cuda"),
    )  # fmt: skip
    teacher = teachers[stage.teacher] if stage.teacher else None
    batches = iter(run.batches)
    step_fn = _step_function(model, teacher, optimizer, device, fast=run.compile)
    mode = "compiled" if run.compile else "eager"

    def sync() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    try:  # lr is 0: compiles and warms up without learning
        for _ in range(3):
            step_fn(*next(batches))
    except Exception as error:  # no C compiler on the machine, for one; said aloud and recorded
        if mode == "eager":
            raise
        mode = f"eager, because torch.compile failed: {str(error).strip().splitlines()[0][:200]}"
        optimizer.zero_grad(set_to_none=True)
        step_fn = _step_function(model, teacher, optimizer, device, fast=False)
        step_fn(*next(batches))
    optimizer.state.clear()
    sync()
    compile_seconds = time.time() - begin
    # measure on real work for 5 % of the stage (at most 15 s), at lr 0, and set the schedule's length from it
    start, measured = time.time(), 0
    while time.time() - start < min(15.0, 0.05 * 60 * minutes) or measured < 2:
        for _ in range(8 if device.startswith("cuda") else 1):
            step_fn(*next(batches))
            measured += 1
        sync()
    optimizer.state.clear()
    rate = measured * run.batch_size * CONTEXT / (time.time() - start)
    per_step = run.batch_size * CONTEXT
    epoch = run.batches.tokens / per_step
    steps = int(min(0.93 * max(deadline - time.time(), 1.0) * rate / per_step, stage.max_epochs * epoch))
    steps = max(10, min(steps, max_steps or steps))
    warmup = max(5, min(200, steps // 20))
    every = max(1, min(int(epoch), steps // 8))
    info = run.record["stages"][stage.name] = {
        **asdict(stage), "parameters": count, "mode": mode, "compile_seconds": round(compile_seconds, 1),
        "tokens_per_second": round(rate), "steps": steps, "epochs": round(steps / epoch, 2), "warmup": warmup,
    }  # fmt: skip
    run.log(stage=stage.name, event="start", **{k: info[k] for k in ("mode", "tokens_per_second", "steps", "epochs")})

    best, best_state, running, since = math.inf, {}, torch.zeros((), device=device), 0
    for step in range(1, steps + 1):
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        lr = stage.lr * (step / warmup if step <= warmup else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        running += step_fn(*next(batches))
        since += 1
        if step % every == 0 or step == steps:
            loss = mean_loss(model, run.valid, device)
            run.log(
                stage=stage.name, step=step, tokens=step * per_step, lr=lr, train_loss=round(float(running) / since, 4),
                valid_loss=round(loss, 4),
            )  # fmt: skip
            running.zero_()
            since = 0
            if loss < best:
                best = loss
                if stage.large:
                    best_state = {k: v.detach().clone() for k, v in model.state_dict().items()}
                else:
                    run.keep(model, loss, stage.name, step)
            if loss > best + 0.15 or time.time() > deadline:  # over-fitting has set in, or the share is used up
                run.log(stage=stage.name, event="stopped early", step=step)
                break
    if stage.large:
        model.load_state_dict(best_state)
        teachers[stage.name] = model.eval().requires_grad_(False)
    info |= {"best_valid_loss": best, "seconds": round(time.time() - begin, 1), "tokens_seen": step * per_step}
    run.write_record()


def finish(run: Run) -> None:
    """Losses of the saved bf16 checkpoint itself, read back from disk, also on the test split."""
    model = LlamaForCausalLM.from_pretrained(run.out, dtype=torch.float32)
    nn.Module.to(model, run.device)
    for split, tokens in (("valid", run.valid), ("test", assets.held_out_tokens())):
        loss = mean_loss(model, tokens, run.device)
        run.record[f"saved_{split}_loss"], run.record[f"saved_{split}_perplexity"] = loss, math.exp(loss)
    run.record["done"] = True
    run.write_record()
    print(json.dumps(run.record, indent=1), flush=True)


def install(source: Path) -> None:
    """Copy a finished run into the package."""
    record = json.loads((source / "record.json").read_text())
    if "best" not in record:
        raise SystemExit(f"{source} holds no checkpoint: its record has no 'best'")
    for name in INSTALLED:
        shutil.copyfile(source / name, assets.model_dir() / {"record.json": "training.json"}.get(name, name))
    best = record["best"]
    print(f"installed into {assets.model_dir()}: stage {best['stage']}, validation loss {best['valid_loss']:.4f}")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=7.0, help="wall-clock budget of all stages together")
    parser.add_argument("--out", type=Path, default=Path("base_model"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64, help="sequences of 256 tokens per step")
    parser.add_argument("--stages", default="plain,teacher,distil", help="which stages to run, in this order")
    parser.add_argument("--max-steps", type=int, help="cap on the steps of each stage (for trying it out)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    parser.add_argument("--install", type=Path, metavar="DIR", help="copy the run in DIR into the package and stop")
    args = parser.parse_args(argv)
    if args.install:
        install(args.install)
        return
    torch.set_float32_matmul_precision("high")
    disable_progress_bar()
    names = args.stages.split(",")
    stages = [s for s in STAGES if s.name in names]
    if len(stages) != len(names):
        parser.error(f"--stages: allowed are {', '.join(s.name for s in STAGES)}")
    run = Run(args)
    run.write_record()
    # start-up is part of the budget; 3 % are kept for the final check
    teachers: dict[str, LlamaForCausalLM] = {}
    for i, stage in enumerate(stages):
        left = 0.97 * args.minutes - (time.time() - run.began) / 60
        train(stage, run, left * stage.share / sum(s.share for s in stages[i:]), teachers, args.max_steps)
    finish(run)


if __name__ == "__main__":
    main()
