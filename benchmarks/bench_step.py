"""A supernet training step against the same model under plain PEFT LoRA, interleaved in one run.

    python -m benchmarks.bench_step [--device cuda|cpu] [--layers N] [--batch 8] [--tokens 128] [--panels main,...]

One step is zero_grad, forward with loss, backward, AdamW. Weight steps train LoRA, arch steps the architecture
parameters; each supernet step draws a new architecture. Depth is pinned to all blocks (its logit is set so high that
no draw skips one), because skipping would beat the LoRA step it is compared with; gates are computed all the same.
All sides: the same random weights of Llama-3.1-8B's shapes, sdpa attention, no gradient checkpointing unless the panel
says so. PEFT: r 32, alpha 16, all seven linears, dropout 0, adapters in fp32 (its default) and in the model's dtype;
the ratio is over the faster of the two. On the CPU the model is one block with a vocabulary of 256.

Panels
    main       both spaces, weight and arch steps, both adapter dtypes, PEFT with the paper's dropout of 0.05
    graph      PEFT and supernet steps captured in CUDA graphs: what remains without the host's launch time
    long       main at four times the tokens
    checkpoint with gradient checkpointing on both sides
    compiled   the relaxed math in plain torch under torch.compile, and compiled PEFT LoRA
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import traceback
import unittest.mock
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

from benchmarks import models
from benchmarks.harness import (
    Recorder,
    Timing,
    WrongResult,
    arguments,
    free,
    gate,
    graphed,
    guarded,
    peak_memory,
    time_interleaved,
)
from jointnas_kernels import hf
from jointnas_kernels.space import SearchSpace

PANELS = ("main", "graph", "long", "checkpoint", "compiled")
Step = Callable[[], Any]


class Bench:
    """The base model whose weights every contender shares, and how to make contenders from it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.tiny = args.device, args.tiny
        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
        layers = args.layers or (32 if args.device == "cuda" else 1)
        vocab = 128256 if args.device == "cuda" else 256
        self.config = models.llama_tiny(layers=2) if args.tiny else models.llama_8b(layers, vocab)
        self.base = models.build_llama(self.config, self.device, self.dtype)
        self.generator = torch.Generator().manual_seed(0)

    def space(self, name: str) -> SearchSpace:
        depths = tuple(range(1, self.config.num_hidden_layers + 1))
        if self.tiny:
            tiny = {"hidden": (128, 256), "heads": (2, 4), "head_dim": (32, 64), "intermediate": (256, 512)}
            bits = {"weight_bits": (2, 4, 8), "act_bits": (2, 4, 8, 16)} if name == "qllama3" else {}
            return SearchSpace.from_dict({"blocks": depths, **tiny, **bits})
        return dataclasses.replace(SearchSpace.named(name), blocks=depths)

    def supernet(self, name: str, lora_dtype: torch.dtype, backend: str | None = None) -> hf.Supernet:
        model = models.build_llama(self.config, self.device, self.dtype, like=self.base)
        net = hf.convert(model, self.space(name), lora_dtype=lora_dtype, backend=backend)
        with torch.no_grad():
            net.arch.logits["blocks"][-1] = 60.0
            for parameter in net.lora_parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
        return net

    def supernet_step(self, net: hf.Supernet, mode: str, ids: Tensor) -> Step:
        net.mode(mode)
        parameters = list(net.lora_parameters() if mode == "weight" else net.arch_parameters())

        def loss() -> Tensor:
            net.mode(mode)
            net.draw(self.generator)
            return net(ids, labels=ids).loss

        return models.training_step(loss, parameters)

    def peft(self, dropout: float, fp32: bool, ids: Tensor, compiled: bool = False) -> tuple[Any, Step]:
        model = models.build_llama(self.config, self.device, self.dtype, like=self.base)
        net: Any = models.peft_lora(model, dropout, fp32)
        parameters = [p for p in net.parameters() if p.requires_grad]
        if compiled:
            for layer in model.model.layers:
                layer.compile(dynamic=False)
        return net, models.training_step(lambda: net(input_ids=ids, labels=ids).loss, parameters)

    def ids(self, batch: int, tokens: int) -> Tensor:
        return models.random_tokens(self.config, batch, tokens, self.device)


def agrees(bench: Bench, name: str) -> float:
    """Gate: on one draw, loss and LoRA or architecture gradients of the default backend equal the reference's."""
    small = Bench.__new__(Bench)
    small.__dict__.update(bench.__dict__)
    small.config = copy.deepcopy(bench.config)
    small.config.num_hidden_layers, small.config.vocab_size = 1, 256
    small.base = models.build_llama(small.config, bench.device, bench.dtype)
    fast, slow = small.supernet(name, torch.float32), small.supernet(name, torch.float32, "reference")
    slow.load_search_state({k: v.clone() for k, v in fast.search_state().items()})
    ids = models.random_tokens(small.config, 2, 64, bench.device)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for mode in ("weight", "arch"):
        alphas = fast.arch.draw(torch.Generator().manual_seed(1))
        found = []
        for net in (fast, slow):
            net.mode(mode)
            leaves = {k: v.detach().clone().requires_grad_(mode == "arch") for k, v in alphas.items()}
            net.use(leaves)
            loss = net(ids, labels=ids).loss
            wanted = (
                list(net.lora_parameters()) if mode == "weight" else [v for k, v in leaves.items() if k != "blocks"]
            )
            grads = torch.autograd.grad(loss, wanted)
            found.append((loss, torch.cat([g.flatten().float() for g in grads])))
        pairs |= {f"{mode} loss": (found[0][0], found[1][0]), f"{mode} gradient": (found[0][1], found[1][1])}
    # half-precision activations through one block and back: 2^-8 per rounding, some twenty roundings in a row
    return gate(name, pairs, 6e-2 if bench.dtype == torch.bfloat16 else 1e-3)


def measure(
    rec: Recorder, bench: Bench, panel: str, contenders: dict[str, Step], ids: Tensor, rounds: int, budget: float
) -> dict[str, Timing]:
    """Warm up (a contender that fails is left out, loudly), time interleaved, write a row for each with its ratio."""
    device, usable, peaks = bench.device, {}, {}
    for name, step in contenders.items():
        try:
            step()
            peaks[name] = peak_memory(step, device)
            usable[name] = step
        except Exception:
            print(f"FAILED {panel}: {name}", flush=True)
            traceback.print_exc()
    times = time_interleaved(usable, rounds, 2 if device == "cuda" else 1, device, budget)
    lora = [t.median for name, t in times.items() if name.startswith("PEFT") and "dropout" not in name]
    for name, t in times.items():
        extra: dict[str, Any] = {"peak": peaks[name]}
        if lora:
            extra |= {"ratio": t.median / min(lora)}
        shape = {"layers": bench.config.num_hidden_layers, "batch": ids.shape[0], "tokens": ids.shape[1]}
        rec.row(name, t, "s", extra, panel=panel, dtype=str(bench.dtype).removeprefix("torch."), **shape)
    return times


def main_panel(rec: Recorder, bench: Bench, panel: str, ids: Tensor, rounds: int, budget: float) -> None:
    low = bench.dtype
    contenders: dict[str, Step] = {}
    kept: list[Any] = []  # models stay alive through their steps; the list says so
    adapters = {"fp32 adapters": torch.float32} | ({f"{_short(low)} adapters": low} if low != torch.float32 else {})
    for label, dtype in adapters.items():
        contenders[f"PEFT LoRA, {label}"] = bench.peft(0.0, dtype == torch.float32, ids)[1]
    label, dtype = list(adapters.items())[-1]
    contenders[f"PEFT LoRA, {label}, dropout 0.05"] = bench.peft(0.05, dtype == torch.float32, ids)[1]
    for space in ("llama3", "qllama3"):
        for label, dtype in adapters.items():
            net = bench.supernet(space, dtype)
            kept.append(net)
            contenders[f"{space} weight step, {label}"] = bench.supernet_step(net, "weight", ids)
        contenders[f"{space} arch step"] = bench.supernet_step(net, "arch", ids)
    measure(rec, bench, panel, contenders, ids, rounds, budget)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


class Replayed:
    """A supernet step whose forward and backward are one captured graph.

    A draw stays host work. Its device vectors all live in one buffer (one copy per draw), so the graph reads a static
    copy of that buffer and, in arch steps, leaves its gradient there; the host then carries it on to the logits.
    """

    def __init__(self, net: hf.Supernet, mode: str, ids: Tensor, generator: torch.Generator) -> None:
        self.net, self.mode, self.generator = net, mode, generator
        self.wanted = list(net.mode(mode).lora_parameters() if mode == "weight" else net.arch_parameters())
        fused = {"fused": True, "capturable": True} if self.wanted[0].is_cuda else {}
        self.optimizer = torch.optim.AdamW(self.wanted, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, **fused)
        sample = net.draw(generator)
        self.buffer = self._storage(sample).clone().requires_grad_(mode == "arch")
        self.loss: Tensor | None = None

        def body() -> None:
            net.sample = self._on_buffer(sample)
            self.loss = net(ids, labels=ids).loss
            if mode == "arch":
                (self.grad,) = torch.autograd.grad(self.loss, [self.buffer])
            else:
                self.optimizer.zero_grad(set_to_none=True)
                self.loss.backward()
                self.optimizer.step()

        self.replay = graphed(body)

    @staticmethod
    def _vectors(sample: Any) -> list[Tensor]:
        per_block = [t for block in sample.blocks for t in block[:3] if t is not None]
        return [*sample.masks, *per_block]

    @classmethod
    def _storage(cls, sample: Any) -> Tensor:
        """The one buffer behind all vectors of a sample, as a flat tensor."""
        first = cls._vectors(sample)[0].detach()
        count = first.untyped_storage().nbytes() // first.element_size()
        assert all(t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for t in cls._vectors(sample))
        return first.as_strided((count,), (1,), 0)

    def _on_buffer(self, sample: Any) -> Any:
        """The sample with every vector replaced by the same region of the static buffer."""
        vectors = self._vectors(sample)
        order = sorted(range(len(vectors)), key=lambda i: vectors[i].storage_offset())
        starts = [vectors[i].storage_offset() for i in order] + [self.buffer.numel()]
        sizes = [b - a for a, b in pairwise(starts)]  # one split: its backward is one concatenation
        parts = self.buffer.split([starts[0], *sizes])[1:]
        moved: dict[int, Tensor] = {}
        for i, part in zip(order, parts, strict=True):
            moved[i] = part[: vectors[i].numel()].view(vectors[i].shape)
        found = iter(moved[i] for i in range(len(vectors)))
        masks = type(sample.masks)(*(next(found) for _ in sample.masks))
        blocks = tuple(
            type(block)(*(None if t is None else next(found) for t in block[:3]), *block[3:]) for block in sample.blocks
        )
        return dataclasses.replace(sample, masks=masks, blocks=blocks)

    def __call__(self) -> None:
        self.net.mode(self.mode)
        sample = self.net.draw(self.generator)
        with torch.no_grad():
            self.buffer.copy_(self._storage(sample))
        self.replay()
        if self.mode == "arch":
            vectors = self._vectors(sample)
            grads = [self.grad.as_strided(v.shape, v.stride(), v.storage_offset()) for v in vectors]
            self.optimizer.zero_grad(set_to_none=True)
            needed = [(v, g) for v, g in zip(vectors, grads, strict=True) if v.requires_grad]
            torch.autograd.backward([v for v, _ in needed], [g for _, g in needed])
            self.optimizer.step()


def peft_graph(bench: Bench, fp32: bool, ids: Tensor) -> Step:
    """PEFT's step captured. transformers would build an explicit mask while capturing, which takes attention's causal
    kernel away; without it PEFT is faster, and computes the same."""
    step = bench.peft(0.0, fp32, ids)[1]
    with unittest.mock.patch.object(modeling_llama, "create_causal_mask", return_value=None):
        return graphed(step)


def graph_panel(rec: Recorder, bench: Bench, ids: Tensor, rounds: int, budget: float) -> None:
    """Forward, backward and (weight steps, PEFT) AdamW captured once and replayed; draws and logits on the host."""
    contenders: dict[str, Step] = {}

    def add(name: str, make: Callable[[], Step]) -> None:
        guarded(f"graph: {name}", lambda: contenders.__setitem__(name, make()))

    for fp32 in (True, False):
        label = "fp32 adapters" if fp32 else f"{_short(bench.dtype)} adapters"
        add(f"PEFT LoRA, {label}, graph", lambda fp32=fp32: peft_graph(bench, fp32, ids))  # type: ignore[misc]
    for space in ("llama3", "qllama3"):
        net = bench.supernet(space, bench.dtype)
        for mode in ("weight", "arch"):
            name = f"{space} {mode} step, graph"
            add(name, lambda net=net, mode=mode: Replayed(net, mode, ids, bench.generator))  # type: ignore[misc]
    measure(rec, bench, "graph", contenders, ids, rounds, budget)


def checkpoint_panel(rec: Recorder, bench: Bench, ids: Tensor, rounds: int, budget: float) -> None:
    net, step = bench.peft(0.0, False, ids)
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    contenders = {f"PEFT LoRA, {_short(bench.dtype)} adapters": step}
    for space in ("llama3", "qllama3"):
        own = bench.supernet(space, bench.dtype)
        own.gradient_checkpointing = True
        contenders[f"{space} weight step"] = bench.supernet_step(own, "weight", ids)
    measure(rec, bench, "checkpoint", contenders, ids, rounds, budget)


def compiled_panel(rec: Recorder, bench: Bench, ids: Tensor, rounds: int, budget: float) -> None:
    """Compile time is part of the warm-up and not of the rows; it is printed by torch.compile's caller as wall time."""
    torch._dynamo.config.recompile_limit = 64  # one compiled block per kind of step, in one process
    contenders = {"PEFT LoRA, eager": bench.peft(0.0, False, ids)[1]}
    contenders["torch.compile: LoRA"] = bench.peft(0.0, False, ids, compiled=True)[1]
    for name in ("llama3", "qllama3"):
        space = bench.space(name)
        sizes = {k: getattr(space, k) for k in ("hidden", "heads", "head_dim", "intermediate")}
        bits = (space.weight_bits or (), space.act_bits or ())
        own = bench.supernet(name, bench.dtype)
        for mode in ("weight", "arch"):
            plain = models.PlainSupernet(bench.base, sizes, "factored", *bits)
            parameters = plain.mode(mode)
            plain.compile_blocks()
            contenders[f"torch.compile: {name} {mode} step"] = models.training_step(partial(plain, ids), parameters)
            contenders[f"ours: {name} {mode} step"] = bench.supernet_step(own, mode, ids)
    measure(rec, bench, "compiled", contenders, ids, rounds, budget)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--layers", type=int, default=None, help="blocks (default: 32 on a GPU, 1 on a CPU)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--panels", default=None, help=f"comma-separated, of {','.join(PANELS)}")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--budget", type=float, default=12, help="seconds of timed rounds per panel")
    args = parser.parse_args(argv)
    if args.tiny:
        args.batch, args.tokens = 2, 16
    cuda = args.device == "cuda"
    panels = (args.panels or ("main,graph,long,checkpoint" if cuda else "main")).split(",")
    rounds = args.rounds or (2 if args.tiny else 15 if cuda else 5)
    rec = Recorder("step", args.device, args.out, args.commit)
    bench = Bench(args)
    for space in ("llama3", "qllama3"):
        try:
            print(f"gate {space}: {agrees(bench, space):.3g}", flush=True)
        except WrongResult as wrong:
            print(f"FAILED gate: {wrong}; its times are not results", flush=True)
    ids = bench.ids(args.batch, args.tokens)
    budget = args.budget
    plan: dict[str, Callable[[], None]] = {
        "main": lambda: main_panel(rec, bench, "main", ids, rounds, budget),
        "graph": lambda: graph_panel(rec, bench, ids, rounds, budget),
        "long": lambda: main_panel(rec, bench, "long", bench.ids(args.batch, 4 * args.tokens), rounds, budget),
        "checkpoint": lambda: checkpoint_panel(rec, bench, ids, rounds, budget),
        "compiled": lambda: compiled_panel(rec, bench, ids, rounds, budget),
    }
    for panel in panels:
        if panel not in plan:
            parser.error(f"unknown panel {panel!r}; allowed: {', '.join(plan)}")
        guarded(panel, plan[panel])
        free(args.device)
    return rec.rows


if __name__ == "__main__":
    main()
