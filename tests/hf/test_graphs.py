"""Captured blocks, on the CPU: a stand-in for make_graphed_callables with its static memory shows that what reaches the
graphs, and what comes back, is right; the graphs themselves are tested in tests/gpu/test_graphs.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import Supernet, convert
from jointnas_kernels.hf.graphs import BlockGraphs
from jointnas_kernels.space import Choice, SearchSpace
from tests.hf.hf_models import (
    HEAD_SPACE,
    QUANT_SPACE,
    SPACE,
    ids,
    random_alphas,
    random_importance,
    randomize_lora,
    tiny_model,
)

WEIGHTS_ONLY = SearchSpace.from_dict({**QUANT_SPACE.to_dict(), "act_bits": None})
SPACES = {"widths": SPACE, "weight-bits": WEIGHTS_ONLY, "all-bits": QUANT_SPACE, "head-bits": HEAD_SPACE}
BATCH, TOKENS = 2, 7
Memory = list[tuple[dict[str, Any], dict[str, Any]]]


class StandIn:
    """make_graphed_callables without graphs: a replay runs the function again on its static inputs and leaves outputs
    and gradients in static memory (through `.data`, because autograd does not see a replay's writes).

    `replayed` lists (function number, direction)."""

    def __init__(self, net: Supernet) -> None:
        self.net = net
        self.replayed: list[tuple[int, str]] = []

    def __call__(self, functions: tuple[Any, ...], samples: tuple[Any, ...], pool: Any = None) -> tuple[Any, ...]:
        memory = [(m._parameters, dict(m._parameters)) for m in self.net.blocks.modules()]
        return tuple(self.make(i, f, a, memory) for i, (f, a) in enumerate(zip(functions, samples, strict=True)))

    @staticmethod
    @contextmanager
    def captured(memory: Memory) -> Iterator[None]:
        """The parameters as the graphs know them."""
        now = [(d, dict(d)) for d, _ in memory]
        try:
            for d, then in memory:
                d.update(then)
            yield
        finally:
            for d, own in now:
                d.update(own)

    def make(
        self, number: int, function: Callable[..., Tensor], static: tuple[Tensor, ...], memory: Memory
    ) -> Callable[..., Tensor]:
        y = function(*static)
        output = y.detach().clone()
        static_grad = torch.empty_like(output)
        wanted = [t for t in static if t.requires_grad]
        found = torch.autograd.grad(y, wanted, torch.ones_like(y))
        grads = {id(t): g.clone() for t, g in zip(wanted, found, strict=True)}
        stand_in, graph = self, {}

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Tensor) -> Tensor:
                for own, given in zip(static, inputs, strict=True):
                    if own.data_ptr() != given.data_ptr():
                        own.data.copy_(given)
                with torch.enable_grad(), stand_in.captured(memory):
                    graph["y"] = function(*static)
                output.data.copy_(graph["y"].detach())
                stand_in.replayed.append((number, "forward"))
                return output.detach()

            @staticmethod
            def backward(ctx: Any, *incoming: Any) -> Any:
                static_grad.data.copy_(incoming[0])
                fresh = torch.autograd.grad(graph.pop("y"), wanted, static_grad)
                for t, g in zip(wanted, fresh, strict=True):
                    grads[id(t)].data.copy_(g)
                stand_in.replayed.append((number, "backward"))
                return tuple(grads[id(t)].detach() if id(t) in grads else None for t in static)

        return Graphed.apply


def build(space: SearchSpace, change: dict[str, Any] | None = None, **options: Any) -> Supernet:
    model = tiny_model(**(change or {}))
    net = randomize_lora(convert(model, space, lora_rank=4, importance=random_importance(model.config), **options))
    with torch.no_grad():  # every depth likely
        net.arch.logits["blocks"].zero_()
    return net


def capture(net: Supernet, modes: tuple[str, ...] = ("weight", "arch", "full")) -> StandIn:
    make = StandIn(net)
    net.graphs = BlockGraphs(net, BATCH, TOKENS, modes, make)
    return make


def step(net: Supernet, mode: str, seed: int, x: Tensor | None = None) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and all gradients of one drawn step."""
    net.mode(mode).draw(torch.Generator().manual_seed(seed))
    x = ids(BATCH, TOKENS, seed=seed) if x is None else x
    net.zero_grad()
    loss = net(x, labels=x).loss
    loss.backward()
    parameters = [*net.lora_parameters(), *net.arch_parameters()]
    return loss.detach(), [None if p.grad is None else p.grad.clone() for p in parameters]


def assert_same(own: tuple[Tensor, list[Tensor | None]], other: tuple[Tensor, list[Tensor | None]]) -> None:
    torch.testing.assert_close(own[0], other[0], rtol=1e-6, atol=0)
    for a, b in zip(own[1], other[1], strict=True):
        if b is None or not b.any():  # a block that one side did not run: no gradient, or zeros
            assert a is None or not a.any()
        else:
            assert a is not None
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


QWEN3 = {"family": "qwen3", "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}


@pytest.mark.parametrize(
    "space, change",
    [*((space, {}) for space in SPACES), ("all-bits", QWEN3), ("widths", {"family": "qwen2"})],
    ids=[*SPACES, "qwen3-sliding", "qwen2"],
)
def test_steps_equal_eager_over_draws_and_modes(space: str, change: dict[str, Any]) -> None:
    eager, net = build(SPACES[space], change), build(SPACES[space], change)
    make = capture(net)
    depths = set()
    for seed in range(4):
        for mode in ("weight", "arch", "full", "weight"):
            make.replayed.clear()
            assert_same(step(net, mode, seed), step(eager, mode, seed))
            assert net.sample is not None
            kept = sum(g != 0 for g in net.sample.gates)
            depths.add(kept)
            assert make.replayed.count(make.replayed[0]) == 1
            assert len(make.replayed) == 2 * (kept if mode == "weight" else len(net.blocks))  # eager ran nothing
            numbers = [n for n, _ in make.replayed]
            forward, backward = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
            assert forward == sorted(forward)
            assert backward == forward[::-1]
    assert len(depths) > 1


def test_a_step_changes_lora_in_place() -> None:
    eager, net = build(QUANT_SPACE), build(QUANT_SPACE)
    make = capture(net)
    for one in (eager, net):
        optimizers = [torch.optim.AdamW(one.lora_parameters(), lr=0.01), torch.optim.Adam(one.arch_parameters(), 0.1)]
        for seed in range(3):
            for mode, optimizer in zip(("weight", "arch"), optimizers, strict=True):
                step(one, mode, seed)
                optimizer.step()
    assert make.replayed
    for a, b in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradients_accumulate() -> None:
    eager, net = build(SPACE), build(SPACE)
    capture(net)
    for one in (eager, net):
        one.mode("weight").draw(torch.Generator().manual_seed(0))
        for seed in range(3):
            x = ids(BATCH, TOKENS, seed=seed)
            one(x, labels=x).loss.backward()
        one.zero_grad(set_to_none=False)
        for seed in range(3, 5):
            x = ids(BATCH, TOKENS, seed=seed)
            one(x, labels=x).loss.backward()
    for a, b in zip(net.lora_parameters(), eager.lora_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("what", ["draw", "forward", "twice", "other mode"])
def test_overwritten_activations_raise(what: str) -> None:
    net, x = build(SPACE), ids(BATCH, TOKENS)
    capture(net)
    net.mode("weight").draw(torch.Generator().manual_seed(0))
    loss = net(x, labels=x).loss
    if what == "draw":
        net.draw(torch.Generator().manual_seed(0))
    elif what == "forward":
        with torch.no_grad():
            net(x)
    elif what == "twice":
        loss.backward(retain_graph=True)
    else:
        step(net, "arch", 0)
    with pytest.raises(JointNASError, match="overwritten"):
        loss.backward()


def test_what_was_not_captured_runs_eagerly() -> None:
    eager, net, x = build(QUANT_SPACE), build(QUANT_SPACE), ids(BATCH, TOKENS)
    make = capture(net, ("weight",))
    make.replayed.clear()
    assert_same(step(net, "weight", 0, ids(BATCH, TOKENS + 1)), step(eager, "weight", 0, ids(BATCH, TOKENS + 1)))
    assert_same(step(net, "arch", 0), step(eager, "arch", 0))
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[0, -2:] = 0
    choice = Choice(16, 2, 8, 48, 2, (2, 4, 8), (4, 8, 16))
    found: list[list[Tensor]] = []
    for one in (eager, net):
        logits = []
        one.mode("weight").draw(torch.Generator().manual_seed(1))
        logits.append(one(x, attention_mask=mask).logits)
        with torch.autocast("cpu", torch.bfloat16):
            logits.append(one(x).logits)
        logits.append(one.fix(choice)(x).logits)
        one.relax().use(random_alphas(one))  # fractional gates are not what weight steps draw
        logits.append(one(x).logits)
        for _, linear in one.linears():
            linear.set_clip(None)
        one.draw(torch.Generator().manual_seed(1))
        logits.append(one(x).logits)
        found.append(logits)
    assert not make.replayed
    for own, other in zip(*found, strict=True):
        assert torch.equal(own, other)


def test_a_certain_precision_runs_eagerly_in_its_block() -> None:
    eager, net = build(QUANT_SPACE), build(QUANT_SPACE)
    make = capture(net)
    for one in (eager, net):
        with torch.no_grad():
            one.arch.logits["weight_bits"][1, 0] = 200.0
            one.arch.logits["blocks"][-1] = 200.0
    make.replayed.clear()
    assert_same(step(net, "weight", 0), step(eager, "weight", 0))
    assert [n for n, _ in make.replayed] == [0, 2, 2, 0]


def test_copies_and_moved_supernets_have_no_graphs() -> None:
    net = build(SPACE)
    capture(net, ("weight",))
    assert copy.deepcopy(net).graphs is None
    assert net.graphs is not None
    assert net.double().graphs is None


def test_parameters_are_untouched_by_the_capture() -> None:
    net = build(QUANT_SPACE)
    before = dict(net.named_parameters())
    capture(net)
    assert all(p is before[n] for n, p in net.named_parameters())
    assert all(p.grad is None for p in net.parameters())


def test_refusals() -> None:
    with pytest.raises(JointNASError, match="CUDA"):
        build(SPACE).capture(BATCH, TOKENS)
    with pytest.raises(JointNASError, match="mode"):
        build(SPACE).capture(BATCH, TOKENS, modes=("weigth",))
    with pytest.raises(JointNASError, match="reinmax"):
        capture(build(QUANT_SPACE, bit_relaxation="reinmax"))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(JointNASError, match="autocast"):
        capture(build(SPACE))


# ---- by itself ----


def repeating(space: SearchSpace, monkeypatch: pytest.MonkeyPatch) -> tuple[Supernet, list[tuple[int, ...]], StandIn]:
    """A supernet that may capture by itself, the shapes and numbers of modes that it captured, and what is replayed."""
    net, captured = build(space), []
    net.train()
    make = StandIn(net)

    def capture_on_cpu(self: Supernet, batch: int, tokens: int, modes: Any = ()) -> Supernet:
        captured.append((batch, tokens, len(modes)))
        self.graphs = BlockGraphs(self, batch, tokens, modes, make)
        return self

    monkeypatch.setattr(Supernet, "capturable", property(lambda one: one is net))
    monkeypatch.setattr(Supernet, "capture", capture_on_cpu)
    return net, captured, make


def trained(net: Supernet, mode: str, seed: int, tokens: int = TOKENS) -> tuple[Tensor, list[Tensor | None]]:
    return step(net, mode, seed, ids(BATCH, tokens, seed=seed))


def test_equal_steps_in_a_row_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = build(QUANT_SPACE).train()
    net, captured, make = repeating(QUANT_SPACE, monkeypatch)
    for seed in range(5):
        for mode in ("weight", "arch"):
            make.replayed.clear()
            assert_same(trained(net, mode, seed), trained(eager, mode, seed))
            assert bool(make.replayed) == (seed > 2 or (seed == 2 and mode == "arch"))  # not what was drawn before
    assert captured == [(BATCH, TOKENS, 2)]
    net.eval()
    make.replayed.clear()
    for tokens in (TOKENS + 1, TOKENS, TOKENS + 1, TOKENS):  # none in a row
        net.train()
        trained(net, "weight", 0, tokens)
    assert captured == [(BATCH, TOKENS, 2)]
    for seed in range(4):
        assert_same(trained(net, "weight", seed, TOKENS + 1), trained(eager, "weight", seed, TOKENS + 1))
    assert captured == [(BATCH, TOKENS, 2), (BATCH, TOKENS + 1, 1)]


def test_passes_that_are_open_together_keep_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forward passes, then two backward passes, with a draw between: as without graphs."""
    eager = build(SPACE).train()
    net, captured, make = repeating(SPACE, monkeypatch)
    for seed in range(3):
        trained(net, "weight", seed)
    assert captured
    for seed in (3, 4):
        make.replayed.clear()
        found = []
        for one in (net, eager):
            one.mode("weight").zero_grad()
            losses = []
            for draw in range(2):
                one.draw(torch.Generator().manual_seed(10 * seed + draw))
                x = ids(BATCH, TOKENS, seed=draw)
                losses.append(one(x, labels=x).loss)
            for loss in losses:
                loss.backward()
            found.append((losses[0].detach(), [None if p.grad is None else p.grad.clone() for p in one.parameters()]))
        assert make.replayed
        assert_same(*found)


@pytest.mark.parametrize("what", ["never", "evaluation", "mask", "no gradients", "checkpointing", "fixed", "asked for"])
def test_what_forbids_it(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, captured, make = repeating(SPACE, monkeypatch)
    x = ids(BATCH, TOKENS)
    net.mode("weight")
    if what == "never":
        net.repeats.after = None
    elif what == "evaluation":
        net.eval()
    elif what == "checkpointing":
        net.gradient_checkpointing = True
    elif what == "fixed":
        net.fix(SPACE.full())
    elif what == "asked for":
        net.graphs = BlockGraphs(net, BATCH, TOKENS, ("weight",), make)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long) if what == "mask" else None
    for _ in range(4):
        with torch.set_grad_enabled(what != "no gradients"):
            net(x, attention_mask=mask, labels=x)
    assert not captured


def test_what_does_not_fit_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net, captured, _ = repeating(SPACE, monkeypatch)

    def fails(*_: Any, **__: Any) -> None:
        captured.append(())
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Supernet, "capture", fails)
    for seed in range(5):
        trained(net, "weight", seed)
    assert captured == [()]
    assert net.graphs is None
    assert copy.deepcopy(net).repeats.after is None


def test_a_cpu_has_no_graphs() -> None:
    assert not build(SPACE).capturable
