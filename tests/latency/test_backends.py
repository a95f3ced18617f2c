"""Every backend against the dequantised reference; broken ones are caught; whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency import (
    OpSpec,
    Target,
    Workload,
    calibrate,
    deploy,
    describe,
    measure_model,
    profile,
    register,
    survey,
    unregister,
)
from jointnas_kernels.latency import backends as registry
from jointnas_kernels.latency.backends.base import disagreement, quantize_weight, random_input, random_weight
from jointnas_kernels.latency.backends.torch_dense import TorchDense
from jointnas_kernels.latency.timing import copies, measure
from jointnas_kernels.nn.packed import PackedLinear
from jointnas_kernels.ops.quant.spec import quantize_tokens
from jointnas_kernels.space import SearchSpace
from tests.latency.matrix import OUTPUTS, TOKENS, cases, check
from tests.latency.tables import CONFIG, calm
from tests.latency.wrong import Wrong, explode

CPU = torch.device("cpu")
CLAIMS: dict[str, Callable[[OpSpec], bool]] = {  # of the low-bit linears, on a CPU
    "ours-cpu": lambda s: True,
    "step": lambda s: True,
    "torch-int8": lambda s: s.wbits == 8 and s.abits in (8, 16),
    "torch-int4": lambda s: (s.wbits, s.abits) == (4, 16) and s.group in (32, 64, 128) and s.n % 16 == 0,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", registry.names())
def test_every_width_group_and_odd_shape(name: str, dtype: str) -> None:
    """What each backend claims, and that it is right there; those of GPUs and of libraries claim nothing here."""
    check(registry.get(name), dtype, cases(), CLAIMS.get(name, lambda s: False))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_linears(dtype: str) -> None:
    shapes = [OpSpec("linear", m, n, k) for m in TOKENS for n in OUTPUTS for k in (33, 160)]
    check(registry.get("torch"), dtype, shapes, lambda s: True)


@pytest.mark.parametrize("inputs", [64, 256, 4096])
@pytest.mark.parametrize("a_bits", [2, 4, 8])
def test_activations_rounded_otherwise_are_caught(a_bits: int, inputs: int) -> None:
    """Not at all, or without zero point: at 8 bits both are within one percent of the reference on Gaussian inputs."""
    for seed, m in ((s, m) for s in range(4) for m in (1, 3, 63)):
        target, generator = Target(CPU, Workload(dtype="bfloat16"), 2), torch.Generator().manual_seed(seed)
        spec = OpSpec("linear", m, 96, inputs, 4, a_bits, 32)
        weight, x = random_weight(spec, target, generator), random_input(spec, target, generator)
        dense = weight.dequantized()
        right, symmetric = (quantize_tokens(x, a_bits, symmetric) for symmetric in (False, True))
        for (a, scale, zero), wrong in ((right, False), (symmetric, True), ((x, torch.ones(1), torch.zeros(1)), True)):
            y = ((a.double() - zero.double()) * scale.double() @ dense.T).bfloat16()
            assert (disagreement(spec, x, weight, y) is not None) == wrong


def test_dense_and_low_bit_torch_work_here() -> None:
    found = survey(CPU)
    assert found["torch"]["W16A16"] == "works"
    assert found["torch-int8"]["W8A8"] == found["torch-int8"]["W8A16"] == "works"
    assert found["torch-int4"]["W4A16"] == "works"
    assert found["ours-cuda"]["W4A16"] == "runs on cuda only"


def test_quantize_weight_is_the_ops_quantizer() -> None:
    from jointnas_kernels.ops.quant.weights import fake_quant_weight

    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        quantized = quantize_weight(weight, bits, 32)
        assert torch.equal(quantized.dequantized(dtype=torch.float32), fake_quant_weight(weight, bits, 32))


WRONG = {
    "scaled": (lambda x, w: 1.05 * (x @ w.T), "relative error"),
    "one-column": (lambda x, w: torch.cat((x @ w[:-1].T, x[:, :1] * torch.nan), 1), "relative error"),
    "shape": (lambda x, w: (x @ w.T)[:, 1:], "output shape"),
    "failing": (explode, "RuntimeError: no kernel image is available"),
}


@pytest.fixture
def wrong(request: pytest.FixtureRequest) -> Iterator[str]:
    how, message = WRONG[request.param]
    register(Wrong(how))
    yield message
    unregister("wrong")


@pytest.mark.parametrize("wrong", WRONG, indirect=True)
def test_broken_backend_is_reported_and_never_used(wrong: str, tmp_path: Path) -> None:
    space = SearchSpace((64,), (4,), (32,), (64,), (1, 2, 3), (4,), None, group_size=64)
    config = SimpleNamespace(**{**vars(CONFIG), "intermediate_size": 64})
    table = profile(
        space, config, tmp_path / "t.jsonl", workload=Workload(seq=4), threads=1, progress=False,
        seconds_per_operation=1e-4, backends=["torch", "torch-int4", "wrong"], watch=calm(),
    )  # fmt: skip
    rejected = [r for r in table.rows if r.backend == "wrong"]
    assert rejected
    assert all(r.status == "rejected" and wrong in r.reason for r in rejected)
    quantized = [r for r in table.rows if r.wbits == 4]
    assert all(table.best(r.spec) is None or table.best(r.spec).backend == "torch-int4" for r in quantized)  # type: ignore[union-attr]


def test_two_backends_of_one_name() -> None:
    with pytest.raises(JointNASError, match="already registered"):
        register(TorchDense())


def test_unknown_backend(tmp_path: Path) -> None:
    space = SearchSpace((64,), (4,), (32,), (64,), (1,))
    with pytest.raises(JointNASError, match=r"unknown latency backend 'torhc'\. Did you mean 'torch'"):
        profile(space, CONFIG, tmp_path / "t.jsonl", backends=["torhc"])


def test_unknown_device() -> None:
    with pytest.raises(JointNASError, match="cannot be profiled; allowed: cpu, cuda"):
        describe("meta")


def test_copies_cover_the_model_but_not_many_times_the_cache() -> None:
    assert copies(1000, 10_000, CPU) == 10
    assert copies(10_000, 1000, CPU) == 1
    assert copies(1, 10**12, CPU) == 64
    assert copies(2**20, 10**12, CPU, cache=2**22) == 16


def test_measure_walks_through_all_runs() -> None:
    calls: list[int] = []
    p10, median, p90, samples, _ = measure(
        [lambda i=i: calls.append(i) for i in range(7)], CPU, seconds=0.05, samples=20
    )  # type: ignore[misc]
    assert 0 < p10 <= median <= p90
    assert samples >= 20
    assert set(calls) == set(range(7))


LLAMA = LlamaConfig(
    hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=192,
    num_hidden_layers=3, vocab_size=97, tie_word_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_whole_models(tmp_path: Path, mode: str) -> None:
    """Profile, calibrate, predict, deploy, measure, for both workloads."""
    space = SearchSpace((64, 128), (2, 4), (32,), (64, 192), (1, 3), (4, 8), (8, 16), group_size=64)
    table = profile(
        space,
        LLAMA,
        tmp_path / "t.jsonl",
        workload=Workload(mode, 1, 8),
        threads=1,
        progress=False,
        seconds_per_operation=1e-4,
        watch=calm(),
    )  # type: ignore[arg-type]
    usable, _ = table.restrict(space)
    fitted = calibrate(table, usable, LLAMA, 2, seconds=0.01, watch=calm())
    fitted.save(tmp_path / "fitted.jsonl")
    assert fitted.calibration is not None
    assert len(fitted.calibration.points) == 2
    again = type(table).load(tmp_path / "fitted.jsonl")
    assert again.predict(usable.full(), usable) == fitted.predict(usable.full(), usable)
    choice = usable.full()
    model = deploy(LlamaForCausalLM(LLAMA).eval(), choice, usable, fitted)
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 7 * 3
    p10, median, p90, *_ = measure_model(model, table.workload, seconds=0.01, samples=3)
    assert 0 < p10 <= median <= p90


def test_deployed_model_computes_the_quantized_model() -> None:
    """Deploying changes the kernels, not the function."""
    from jointnas_kernels.ops.quant.weights import fake_quant_weight
    from tests.latency.tables import synthetic

    space = SearchSpace((128,), (4,), (32,), (192,), (3,), (8,), (16,), group_size=64)
    table = synthetic(space)
    rows = [r.model_copy(update={"backend": "torch-int8" if r.wbits == 8 else "torch"}) for r in table.rows]
    table = type(table)(table.header, rows)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA).eval()
    ids = torch.randint(97, (1, 16))
    reference = LlamaForCausalLM(LLAMA).eval()
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer in reference.model.layers:
            for name, group in (("q_proj", 64), ("k_proj", 64), ("v_proj", 64), ("o_proj", 32)):
                weight = getattr(layer.self_attn, name).weight
                weight.copy_(fake_quant_weight(weight, 8, group))
            for name in ("gate_proj", "up_proj", "down_proj"):
                weight = getattr(layer.mlp, name).weight
                weight.copy_(fake_quant_weight(weight, 8, 64))
        deploy(model, space.full(), space, table)
        assert torch.allclose(model(ids).logits, reference(ids).logits, atol=1e-5)
