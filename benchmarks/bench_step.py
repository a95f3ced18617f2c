"""A supernet training step against the same model under plain PEFT LoRA, interleaved in one run.

    python -m benchmarks.bench_step [--device cuda|cpu] [--layers N] [--batch B] [--tokens T] [--panels main,...]

One step is zero_grad, forward with loss, backward, AdamW. Weight steps train LoRA, arch steps the architecture
parameters; each supernet step draws a new architecture. Depth is pinned to all blocks (its logit is set so high that
no draw skips one), because skipping would beat the LoRA step it is compared with; gates are computed all the same.
All sides: the same random weights of Llama-3.1-8B's shapes, sdpa attention, no gradient checkpointing unless the panel
says so. PEFT: r 32, alpha 16, all seven linears, dropout 0, adapters in fp32 (its default) and in the model's dtype;
the ratio is over the faster of the two. On the CPU the model is one block with a vocabulary of 256, and a short probe
decides on dtype and shape (probe.py). A row is written as soon as its last round is over.

Panels
    main       both spaces, weight and arch steps, both adapter dtypes, PEFT with the paper's dropout of 0.05
    graph      the blocks of PEFT and supernet captured in CUDA graphs (`Supernet.capture`; PEFT's layers by the same
               torch.cuda.make_graphed_callables), the rest of the step eager; beside eager rows of the same models
    long       main at four times the tokens
    checkpoint with gradient checkpointing on both sides
    embedded   the demo's search steps (small model, bits): fused kernels against the torch references
    compiled   the relaxed math in plain torch under torch.compile, and compiled PEFT LoRA
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import models, probe
from benchmarks.harness import (
    Recorder,
    Timing,
    WrongResult,
    arguments,
    free,
    gate,
    guarded,
    peak_memory,
    time_interleaved,
)
from jointnas import assets
from jointnas_kernels import hf
from jointnas_kernels.hf.graphs import stand_ins
from jointnas_kernels.progress import Progress
from jointnas_kernels.space import SearchSpace

PANELS = ("main", "graph", "long", "checkpoint", "embedded", "compiled")
CONTENDERS = 15  # of a panel, in LoRA steps: about ten, of which arch and quantized ones take longer
LAST = {  # of a panel, the contender whose row is written last
    "main": "qllama3 arch step",
    "graph": "qllama3 arch step, graph",
    "long": "qllama3 arch step",
    "checkpoint": "qllama3 weight step",
    "embedded": "demo arch step, reference ops",
    "compiled": "ours: qllama3 arch step",
}
Step = Callable[[], Any]


@dataclasses.dataclass
class Bench:
    """The base model whose weights every contender shares, and how to make contenders from it."""

    device: str
    tiny: bool
    dtype: torch.dtype
    config: Any
    base: Any
    generator: torch.Generator = dataclasses.field(default_factory=lambda: torch.Generator().manual_seed(0))

    @classmethod
    def random(cls, args: argparse.Namespace) -> Bench:
        """Random weights of Llama-3.1-8B's shapes, as many blocks and as large a vocabulary as the device takes."""
        dtype = probe.DTYPES[args.dtype]
        layers = args.layers or (32 if args.device == "cuda" else 1)
        vocab = 128256 if args.device == "cuda" else 256
        config = models.llama_tiny(layers=2) if args.tiny else models.llama_8b(layers, vocab)
        return cls(args.device, args.tiny, dtype, config, models.build_llama(config, args.device, dtype))

    @classmethod
    def embedded(cls, args: argparse.Namespace) -> Bench:
        """The package's own small model in fp32: what the demo searches."""
        base = assets.load_model(torch.float32).to(args.device).requires_grad_(False).train()
        return cls(args.device, True, torch.float32, base.config, base)

    def space(self, name: str) -> SearchSpace:
        depths = tuple(range(1, self.config.num_hidden_layers + 1))
        if name == "tiny":
            return SearchSpace.named(name)
        if self.tiny:
            tiny = {"hidden": (128, 256), "heads": (2, 4), "head_dim": (32, 64), "intermediate": (256, 512)}
            bits = {"weight_bits": (2, 4, 8), "act_bits": (2, 4, 8, 16)} if name == "qllama3" else {}
            return SearchSpace.from_dict({"blocks": depths, **tiny, **bits})
        return dataclasses.replace(SearchSpace.named(name), blocks=depths)

    def supernet(self, name: str, lora_dtype: torch.dtype, backend: str | None = None) -> hf.Supernet:
        model = models.build_llama(self.config, self.device, self.dtype, like=self.base)
        net = hf.convert(model, self.space(name), lora_dtype=lora_dtype, backend=backend)
        net.repeats.after = None  # eager steps are eager ones
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
    config = copy.deepcopy(bench.config)
    config.num_hidden_layers, config.vocab_size = 1, 256
    base = models.build_llama(config, bench.device, bench.dtype)
    small = dataclasses.replace(bench, config=config, base=base)
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
    quantized = small.space(name).act_bits is not None
    if bench.dtype != torch.bfloat16 and not quantized:
        return gate(name, pairs, 1e-3)
    # Half-precision activations through one block and back: 2^-8 per rounding, some twenty roundings in a row. Where a
    # rounding differs, an activation level may flip: inputs d apart on steps of s leave an rms error of sqrt(d s), with
    # d = 2^-8 and 2 bits (s = 2 sigma) 9 % of sigma, a quarter of it in the mixture, in each of a block's quantizers.
    # In fp32 a flip is rarer, but as large: one among the 128 tokens here was seen to make 0.033.
    return gate(name, pairs, 0.12 if quantized else 6e-2)


def measure(
    rec: Recorder, bench: Bench, panel: str, contenders: dict[str, Step], ids: Tensor, rounds: int, budget: float
) -> dict[str, Timing]:
    """Warm up (a contender that fails is left out, loudly), time interleaved, write a row for each with its ratio."""
    device, usable, peaks = bench.device, {}, {}
    first = Progress(f"{panel}: first steps", len(contenders))
    for name, step in contenders.items():
        try:
            step()
            peaks[name] = peak_memory(step, device)
            usable[name] = step
        except Exception:
            print(f"FAILED {panel}: {name}", flush=True)
            traceback.print_exc()
        first.step(now=name)
    first.close()
    lora = [name for name in usable if name.startswith("PEFT") and "dropout" not in name]
    times: dict[str, Timing] = {}
    written: set[str] = set()

    def done(name: str, timing: Timing) -> None:
        """Writes what can be: ratios want all LoRA steps, which come first."""
        times[name] = timing
        if not all(peer in times for peer in lora):
            return
        shape = {"layers": bench.config.num_hidden_layers, "batch": ids.shape[0], "tokens": ids.shape[1]}
        for ready in [n for n in times if n not in written]:
            written.add(ready)
            extra: dict[str, Any] = {"peak": peaks[ready]}
            if lora:
                extra |= {"ratio": times[ready].median / min(times[peer].median for peer in lora)}
            dtype = str(bench.dtype).removeprefix("torch.")
            rec.row(ready, times[ready], "s", extra, panel=panel, dtype=dtype, **shape)

    return time_interleaved(usable, rounds, 2 if device == "cuda" else 0, device, budget, panel, done)


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


class GraphedLayer(nn.Module):
    """A decoder layer that is replayed; all it is given besides the hidden states is as it was captured."""

    def __init__(self, call: Callable[..., Tensor], parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.call, self.trained = call, tuple(parameters)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return self.call(hidden_states, *self.trained)


def peft_graph(bench: Bench, fp32: bool, ids: Tensor) -> Step:
    """PEFT's step with its decoder layers captured as the supernet's blocks are."""
    net, step = bench.peft(0.0, fp32, ids)
    layers = net.get_base_model().model.layers
    given: dict[str, Any] = {}
    hidden: list[Tensor] = []

    def note(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0].detach())
        given.update(kwargs)

    handle = layers[0].register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        net(input_ids=ids)
    handle.remove()
    assert given["attention_mask"] is None, "an explicit mask would take the causal kernel away"
    assert given.get("past_key_values") is None
    trained = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]

    def function(layer: Any) -> Callable[..., Tensor]:
        return lambda x, *_: layer(x, **given)

    with stand_ins(layers):
        leaves = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]
        inputs = [hidden[0].clone().requires_grad_(i > 0) for i in range(len(layers))]
        functions = tuple(function(layer) for layer in layers)
        calls: Any = torch.cuda.make_graphed_callables(
            functions, tuple((x, *own) for x, own in zip(inputs, leaves, strict=True))
        )
    for i, (call, own) in enumerate(zip(calls, trained, strict=True)):
        layers[i] = GraphedLayer(call, own)
    return step


def graph_panel(rec: Recorder, bench: Bench, ids: Tensor, rounds: int, budget: float) -> None:
    """Blocks replayed; draws, embedding, loss and AdamW as in the other panels."""
    contenders: dict[str, Step] = {}

    def add(name: str, make: Callable[[], Step]) -> None:
        guarded(f"graph: {name}", lambda: contenders.__setitem__(name, make()))

    low = f"{_short(bench.dtype)} adapters"
    contenders[f"PEFT LoRA, {low}"] = bench.peft(0.0, False, ids)[1]
    for fp32 in (True, False):
        label = "fp32 adapters" if fp32 else low
        add(f"PEFT LoRA, {label}, graph", lambda fp32=fp32: peft_graph(bench, fp32, ids))  # type: ignore[misc]
    for space in ("llama3", "qllama3"):
        for captured in (False, True):
            net = bench.supernet(space, bench.dtype)
            if captured:
                guarded(f"graph: {space}", lambda net=net: net.capture(*ids.shape))  # type: ignore[misc]
                if net.graphs is None:
                    continue
                print(f"{space}: graphs hold {net.graphs.bytes / 2**30:.2f} GiB", flush=True)
            for mode in ("weight", "arch"):
                name = f"{space} {mode} step{', graph' if captured else ''}"
                contenders[name] = bench.supernet_step(net, mode, ids)
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


def embedded_panel(rec: Recorder, args: argparse.Namespace, rounds: int, budget: float) -> None:
    """Steps of the demo's search, with the fused kernels and with the torch references of the same ops."""
    bench = Bench.embedded(args)
    ids = bench.ids(args.batch, args.tokens)
    contenders = {"PEFT LoRA, fp32 adapters": bench.peft(0.0, True, ids)[1]}
    for label, backend in (("fused kernels", None), ("reference ops", "reference")):
        net = bench.supernet("tiny", torch.float32, backend)
        for mode in ("weight", "arch"):
            contenders[f"demo {mode} step, {label}"] = bench.supernet_step(net, mode, ids)
    measure(rec, bench, "embedded", contenders, ids, rounds, budget)


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
    probe.options(parser)
    parser.add_argument("--panels", default=None, help=f"comma-separated, of {','.join(PANELS)}")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument(
        "--budget", type=float, default=None, help="seconds of timed rounds per panel (default: 12, on a CPU 60)"
    )
    args = parser.parse_args(argv)
    if args.tiny:
        args.batch, args.tokens = 2, 16
    cuda = args.device == "cuda"
    panels = (args.panels or ("main,graph,long,checkpoint" if cuda else "main,embedded,compiled")).split(",")
    rounds = args.rounds or (2 if args.tiny else 15 if cuda else 5)
    for panel in panels:
        if panel not in PANELS:
            parser.error(f"unknown panel {panel!r}; allowed: {', '.join(PANELS)}")
    rec = Recorder.of("step", args)
    panels = [panel for panel in panels if not rec.has(LAST[panel], panel=panel)]
    if not panels:
        return rec.rows
    probed = models.llama_tiny() if args.tiny else models.llama_8b(args.layers or 1)
    plan = probe.plan(args, models.linear_weights(probed))
    args.batch, args.tokens, args.dtype = plan.batch, plan.tokens, _short(plan.dtype)
    budget = args.budget or (12.0 if cuda else 60.0)
    each = plan.seconds * CONTENDERS
    probe.announce(
        f"step: {', '.join(panels)}; {args.dtype}, {plan.batch} x {plan.tokens} tokens",
        0.0 if args.tiny else len(panels) * (2 * each + min(rounds * each, max(budget, 2 * each))),
    )
    bench = Bench.random(args)
    for space in ("llama3", "qllama3"):
        try:
            print(f"gate {space}: {agrees(bench, space):.3g}", flush=True)
        except WrongResult as wrong:
            print(f"FAILED gate: {wrong}; its times are not results", flush=True)
    ids = bench.ids(args.batch, args.tokens)
    runs: dict[str, Callable[[], None]] = {
        "main": lambda: main_panel(rec, bench, "main", ids, rounds, budget),
        "graph": lambda: graph_panel(rec, bench, ids, rounds, budget),
        "long": lambda: main_panel(rec, bench, "long", bench.ids(args.batch, 4 * args.tokens), rounds, budget),
        "checkpoint": lambda: checkpoint_panel(rec, bench, ids, rounds, budget),
        "embedded": lambda: embedded_panel(rec, args, rounds, budget),
        "compiled": lambda: compiled_panel(rec, bench, ids, rounds, budget),
    }
    for panel in panels:
        guarded(panel, runs[panel])
        free(args.device)
    return rec.rows


if __name__ == "__main__":
    main()
