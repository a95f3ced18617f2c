"""The whole supernet on the device: against fp64 on the host, against the extracted model, captured, checkpointed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from jointnas_kernels import hf
from jointnas_kernels.space import SearchSpace
from jointnas_kernels.testing import assert_close, relative_error

ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
PLAIN = {
    "hidden": (128, 256), "heads": (2, 4), "head_dim": (32, 64), "intermediate": (128, 384), "blocks": (1, 2, 3)
}  # fmt: skip
SPACES = {
    "widths": SearchSpace.from_dict(PLAIN),
    "bits": SearchSpace.from_dict(PLAIN | {"weight_bits": (2, 4, 8), "act_bits": (8, 16)}),
}


def model(dtype: torch.dtype, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=64, rope_parameters=ROPE, tie_word_embeddings=False,
        use_cache=False,
    )  # fmt: skip
    made = LlamaForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(0.5 + torch.rand_like(p) if "norm" in name else 0.1 * torch.randn_like(p))
    return made


def supernet(space: str, dtype: torch.dtype, device: str, backend: str | None = None) -> hf.Supernet:
    """The same weights and LoRA pairs wherever and in whatever dtype it is made."""
    net = hf.convert(copy.deepcopy(model(torch.float32)).to(dtype), SPACES[space], backend=backend)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.lora_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net.to(device)


def token_ids() -> Tensor:
    return torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(3))


def result(net: hf.Supernet, mode: str, device: str) -> dict[str, Tensor]:
    """Loss and gradients of one step at fixed, soft architecture values."""
    net.mode(mode)
    generator = torch.Generator().manual_seed(4)
    alphas = {}
    for key, logits in net.arch.logits.items():
        value = torch.rand(logits.shape, generator=generator, dtype=torch.float64) + 0.2
        value = value / value.sum(-1, keepdim=True)
        alphas[key] = value.to(torch.float64 if net.embedding.dtype == torch.float64 else torch.float32)
        alphas[key].requires_grad_(mode != "weight")
    net.use(alphas)
    ids = token_ids().to(device)
    loss = net(ids, labels=ids).loss
    leaves = dict(alphas) if mode != "weight" else {}
    if mode != "arch":
        leaves |= {f"lora {i}": p for i, p in enumerate(net.lora_parameters())}
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("mode", ["weight", "arch", "full"])
def test_widths_against_fp64(mode: str) -> None:
    """fp32 on the device, every gradient, against fp64 reference ops on the host."""
    fast = result(supernet("widths", torch.float32, "cuda"), mode, "cuda")
    exact = result(supernet("widths", torch.float64, "cpu", "reference"), mode, "cpu")
    for name, value in fast.items():
        assert_close(value, exact[name], 1e-4, name)  # three blocks deep, with GEMM sums of 384 terms


@pytest.mark.parametrize("mode", ["weight", "arch", "full"])
def test_bits_against_reference(mode: str) -> None:
    """Quantizers jump at ties, so activations that differ in the last bit may land on another level: a loose bound."""
    fast = result(supernet("bits", torch.float32, "cuda"), mode, "cuda")
    exact = result(supernet("bits", torch.float32, "cpu", "reference"), mode, "cpu")
    assert_close(fast["loss"], exact["loss"], 1e-2, "loss")
    everything = [torch.cat([v.flatten().cpu() for k, v in r.items() if k != "loss"]) for r in (fast, exact)]
    assert_close(everything[0], everything[1], 5e-2, "gradients")


@pytest.mark.parametrize("space", list(SPACES))
@pytest.mark.parametrize("mode", ["weight", "arch"])
def test_bf16_is_finite_and_close(space: str, mode: str) -> None:
    fast = result(supernet(space, torch.bfloat16, "cuda"), mode, "cuda")
    exact = result(supernet(space, torch.float32, "cuda"), mode, "cuda")
    assert_close(fast["loss"], exact["loss"], 2e-2, "loss")
    assert all(torch.isfinite(v).all() for v in fast.values())


@pytest.mark.parametrize("space", list(SPACES))
def test_one_hot_equals_extracted(space: str) -> None:
    """On the device, for random choices: logits of the fixed supernet and of the extracted plain model."""
    net = supernet(space, torch.float32, "cuda")
    generator = torch.Generator().manual_seed(8)
    ids = token_ids().cuda()
    for _ in range(6):
        choice = SPACES[space].sample(generator)
        net.fix(choice)
        with torch.no_grad():
            ours = net(ids).logits
            plain = hf.extract(net, choice).to("cuda")(ids).logits
        # low-bit activations may flip a level where the two sum in another order
        limit = 1e-4 if space == "widths" else 5e-2
        assert relative_error(ours, plain) <= limit, choice


def test_weight_step_in_a_cuda_graph() -> None:
    """Forward and backward captured once; the replay on other tokens equals an eager step on them."""
    net = supernet("bits", torch.bfloat16, "cuda")
    net.mode("weight").fix(SPACES["bits"].full())
    net.relax()
    net.draw(torch.Generator().manual_seed(1))
    ids = token_ids().cuda()
    parameters = net.lora_parameters()

    def step() -> tuple[Tensor, ...]:
        loss = net(ids, labels=ids).loss
        return loss, *torch.autograd.grad(loss, parameters, allow_unused=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    ids.copy_(ids.flip(0).roll(1, 1))
    graph.replay()
    torch.cuda.synchronize()
    for ours, eager in zip(captured, step(), strict=True):
        assert (ours is None) == (eager is None)
        if ours is not None and eager is not None:
            assert_close(ours, eager, 1e-2)


@pytest.mark.parametrize("space", list(SPACES))
def test_gradient_checkpointing_changes_nothing(space: str) -> None:
    net = supernet(space, torch.float32, "cuda")
    plain = result(net, "full", "cuda")
    net.gradient_checkpointing = True
    again = result(net, "full", "cuda")
    for name, value in again.items():
        assert_close(value, plain[name], 1e-4, name)
