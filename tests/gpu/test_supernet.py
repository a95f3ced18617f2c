"""The supernet on a GPU: the same promise and numbers as on the CPU; no host synchronisation; CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from jointnas_kernels.hf import Supernet, convert, extract, shrink
from jointnas_kernels.space import SearchSpace
from tests.hf.hf_models import ids, random_importance, randomize_lora, tiny_model

SPACE = SearchSpace((128, 256), (2, 4), (32, 64), (256, 768), (1, 2, 3))
WEIGHT_BITS = SearchSpace.from_dict({**SPACE.to_dict(), "weight_bits": (2, 4, 8)})
ALL_BITS = SearchSpace.from_dict({**WEIGHT_BITS.to_dict(), "act_bits": (2, 4, 8, 16)})
SPACES = {"widths": SPACE, "weight-bits": WEIGHT_BITS, "all-bits": ALL_BITS}


def build(space: SearchSpace, dtype: torch.dtype = torch.float32, family: str = "llama") -> Supernet:
    """On the host; weights scaled so that activations stay of order one at these widths."""
    model = tiny_model(torch.float32, family=family, hidden_size=256, intermediate_size=768, head_dim=64)
    with torch.no_grad():
        for p in model.model.layers.parameters():
            if p.dim() == 2:
                p.mul_(0.3)
    supernet = convert(model.to(dtype), space, lora_rank=16, importance=random_importance(model.config))
    return randomize_lora(supernet, scale=0.05)


def gradients(supernet: Supernet) -> torch.Tensor:
    """All of them as one host vector in fp64."""
    parameters = [*supernet.lora_parameters(), *supernet.arch_parameters()]
    return torch.cat([p.grad.detach().double().cpu().flatten() for p in parameters if p.grad is not None])


def step(supernet: Supernet, mode: str, seed: int = 3) -> tuple[float, torch.Tensor]:
    """One drawn step: loss and gradients."""
    supernet.zero_grad()
    supernet.mode(mode).draw(torch.Generator().manual_seed(seed))
    x = ids(4, 33).to(supernet.device)
    loss = supernet(x, labels=x).loss
    loss.backward()
    return loss.item(), gradients(supernet)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_every_choice_is_exact(device: torch.device, family: str) -> None:
    supernet, host, x = build(SPACE, family=family).to(device), build(SPACE, family=family), ids()
    for choice in SPACE:
        own = supernet.fix(choice)(x.to(device)).logits
        assert (own - extract(supernet, choice)(x.to(device)).logits).abs().max() <= 1e-4
        assert (own - shrink(supernet, choice)(x.to(device)).logits).abs().max() <= 1e-4
        assert (own.cpu() - host.fix(choice)(x).logits).abs().max() <= 1e-4


@torch.no_grad()
def test_quantized_weights_are_exact(device: torch.device) -> None:
    supernet, x, g = build(WEIGHT_BITS).to(device), ids().to(device), torch.Generator().manual_seed(1)
    for _ in range(12):
        choice = WEIGHT_BITS.sample(g)
        own = supernet.fix(choice)(x).logits
        assert (own - extract(supernet, choice)(x).logits).abs().max() <= 1e-4


@torch.no_grad()
def test_quantized_activations_are_exact_but_for_flips(device: torch.device) -> None:
    """An activation within fp32 rounding of a boundary takes the other level; the bulk of the logits must not move."""
    supernet, x, g = build(ALL_BITS).to(device), ids().to(device), torch.Generator().manual_seed(1)
    for _ in range(12):
        choice = ALL_BITS.sample(g)
        own, plain = supernet.fix(choice)(x).logits, extract(supernet, choice)(x).logits
        assert (own - plain).norm() <= 0.05 * plain.norm()


@torch.no_grad()
def test_bf16_is_as_exact_as_the_extracted_model(device: torch.device) -> None:
    supernet, wide, x = build(SPACE, torch.bfloat16).to(device), build(SPACE).to(device), ids().to(device)
    for choice in list(SPACE)[::5]:
        exact = wide.fix(choice)(x).logits
        own = (supernet.fix(choice)(x).logits - exact).norm() / exact.norm()
        plain = (extract(supernet, choice)(x).logits - exact).norm() / exact.norm()
        assert own <= max(2 * plain, 0.01)


@pytest.mark.parametrize("mode", ["weight", "arch"])
@pytest.mark.parametrize("space", SPACES)
def test_steps_equal_the_host(device: torch.device, space: str, mode: str) -> None:
    """Triton kernels in fp32 against the fp64 reference on the host: loss and every gradient."""
    loss, own = step(build(SPACES[space]).to(device), mode)
    expected, ref = step(build(SPACES[space], torch.float64), mode)
    flips = space == "all-bits"  # activation levels flip, see above
    assert loss == pytest.approx(expected, rel=0.02 if flips else 1e-4)
    assert (own - ref).norm() <= (0.2 if flips else 2e-3) * ref.norm()


@pytest.mark.parametrize("mode", ["weight", "arch"])
@pytest.mark.parametrize("space", ["widths", "weight-bits"])
def test_bf16_steps_follow_the_host(device: torch.device, space: str, mode: str) -> None:
    loss, own = step(build(SPACES[space], torch.bfloat16).to(device), mode)
    expected, ref = step(build(SPACES[space], torch.float64), mode)
    assert loss == pytest.approx(expected, rel=0.03)
    assert torch.cosine_similarity(own, ref, dim=0) >= 0.98


@pytest.mark.parametrize("space", SPACES)
def test_weight_steps_never_wait_for_the_device(device: torch.device, space: str) -> None:
    supernet, x = build(SPACES[space], torch.bfloat16).to(device), ids(4, 32).to(device)
    step(supernet, "weight")  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        supernet.draw(torch.Generator().manual_seed(4))
        supernet(x, labels=x).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("space", ["widths", "all-bits"])
def test_weight_steps_are_cuda_graphs(device: torch.device, space: str) -> None:
    """Forward and backward of one draw, captured; replayed on other tokens it computes what eager does."""
    supernet = build(SPACES[space], torch.bfloat16).to(device)
    supernet.draw(torch.Generator().manual_seed(5))
    static, other = ids(4, 32).to(device), ids(4, 32, seed=9).to(device)

    def run() -> torch.Tensor:
        loss = supernet(static, labels=static).loss
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    supernet.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run()
    static.copy_(other)
    graph.replay()
    captured = loss.item(), gradients(supernet)
    supernet.zero_grad(set_to_none=True)
    eager = run().item(), gradients(supernet)
    assert captured[0] == pytest.approx(eager[0], rel=1e-3)
    assert (captured[1] - eager[1]).norm() <= 1e-2 * eager[1].norm()


def test_blocks_compile(device: torch.device) -> None:
    supernet = build(ALL_BITS, torch.bfloat16).to(device)
    expected = step(supernet, "arch")
    for block in supernet.blocks:
        block.compile(fullgraph=True)
    compiled = step(supernet, "arch")
    assert compiled[0] == pytest.approx(expected[0], rel=0.01)
    assert torch.cosine_similarity(compiled[1], expected[1], dim=0) >= 0.99


def test_draws_do_not_depend_on_the_device(device: torch.device) -> None:
    host, supernet = build(ALL_BITS), build(ALL_BITS).to(device)
    a, b = (s.mode("arch").draw(torch.Generator().manual_seed(2)) for s in (host, supernet))
    assert a.gates == b.gates
    assert all(torch.equal(a.alphas[k], b.alphas[k]) for k in a.alphas)
    for one, other in zip(a.masks, b.masks, strict=True):
        assert other.is_cuda
        assert torch.equal(one, other.cpu())
