"""Tables of decoding on a CPU: parts of the decode step, timed alone, and whole models through it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency import LatencyTable, OpSpec, Target, Workload, profile, profiler
from jointnas_kernels.latency.backends.base import failure, quantize_weight, random_input, random_weight
from jointnas_kernels.latency.backends.step import Step, linear, running
from jointnas_kernels.latency.measure import calibrate, deploy
from jointnas_kernels.latency.spec import DENSE
from jointnas_kernels.latency.watch import Measured
from jointnas_kernels.nn.packed import PackedLinear
from jointnas_kernels.ops.quant.weights import fake_quant_weight
from jointnas_kernels.runtime import DecodeStep
from jointnas_kernels.runtime.generation import RESULT
from jointnas_kernels.runtime.parts import PARTS, Part
from jointnas_kernels.space import SearchSpace
from tests.hf.hf_models import ids, tiny_config
from tests.latency.tables import calm, synthetic

CPU = torch.device("cpu")
F32 = torch.float32
DECODE = Workload("decode", 1, 8)
SPACE = SearchSpace((32, 64), (2, 4), (16,), (64, 96), (1, 3), (2, 4, 8), (4, 8, 16), group_size=16)
CONFIG = LlamaConfig(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=96,
    num_hidden_layers=3, vocab_size=61, tie_word_embeddings=True,
)  # fmt: skip


def profiled(out: Path, workload: Workload = DECODE, config: Any = CONFIG, **how: Any) -> LatencyTable:
    return profile(SPACE, config, out, workload=workload, threads=1, progress=False, seconds_per_operation=1e-4,
                   watch=calm(), **how)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_products_are_those_of_the_layers(batch: int, dtype: torch.dtype) -> None:
    """Several in one call; the last one's result is returned."""
    for bits, act, (n, k) in ((2, 8, (96, 64)), (4, 16, (40, 128)), (8, 4, (64, 96)), (16, 16, (33, 50))):
        dense = [torch.randn(n, k).to(dtype) for _ in range(3)]
        layers = [linear(w if bits == 16 else quantize_weight(w, bits, 32), act) for w in dense]
        x = torch.randn(batch, k).to(dtype)
        found, want = Part("product", batch, dtype, layers, hidden=k)(x), layers[-1](x)
        assert (found - want).abs().max() <= 0.01 * want.abs().max()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_part_runs(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        sizes = {"hidden": 48, "heads": 6, "kv_heads": 2, "head_dim": 16, "intermediate": 40, "length": 9}
        for name in (p for p in PARTS if p != "product"):
            for batch, chunk in ((1, 1), (2, 1), (16, 1), (1, 256), (3, 7), (16, 16)):
                part = Part(name, batch, torch.float32, repeats=5, chunk=chunk, **sizes)
                assert part().shape == (batch * chunk, 0)
    finally:
        torch.set_num_threads(before)


def test_other_parts_are_refused() -> None:
    with pytest.raises(JointNASError, match="Did you mean 'attention'"):
        Part("atention", 1, torch.float32)
    for batch, dtype, chunk in ((17, F32, 1), (0, F32, 1), (1, torch.float16, 1), (1, F32, 257), (3, F32, 86)):
        with pytest.raises(JointNASError, match="no parts for"):
            Part("norm", batch, dtype, chunk=chunk)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_it_claims_is_right(dtype: str) -> None:
    """All packed bits; dense weights only with activations of 16 bits; nothing but up to 16 sequences."""
    backend, generator, claimed = Step(), torch.Generator().manual_seed(0), set()
    for mode, batch, rows in (*(("decode", b, b) for b in (1, 5, 16, 17)), ("prefill", 2, 600)):
        target = Target(CPU, Workload(mode, batch, rows // batch, dtype), 2)
        for n, k, w, a in ((n, k, w, a) for n, k in ((40, 96), (64, 64)) for w in (2, 3, 4, 8, 16) for a in (2, 8, 16)):
            spec = OpSpec("linear", rows, n, k, w, a, 32 if w < DENSE else 0)
            if backend.unsupported(spec, target) is None:
                weight = random_weight(spec, target, generator)
                assert failure(backend, spec, target, random_input(spec, target, generator), weight) is None, spec
                claimed.add((rows, w, a))
    bits = {(w, a) for w in (2, 4, 8) for a in (2, 8, 16)} | {(16, 16)}
    assert claimed == {(rows, w, a) for rows in (1, 5, 16, 600) for w, a in bits}


def test_the_step_alone_measures_decoding(tmp_path: Path) -> None:
    table = profiled(tmp_path / "t.jsonl")
    assert {row.backend for row in table.rows} == {"step"}
    assert table.header.runtime == "step"
    assert {row.status for row in table.rows} == {"ok"}
    prompts = profiled(tmp_path / "p.jsonl", Workload("prefill", 3, 200))
    assert {(row.backend, row.status) for row in prompts.rows} == {("step", "ok")}
    assert prompts.header.runtime == "step"
    many = profiled(tmp_path / "m.jsonl", Workload("prefill", 17, 8))
    assert "step" not in {row.backend for row in many.rows}
    assert many.header.runtime == "torch"


@pytest.mark.parametrize(
    ("workload", "change"),
    [
        (Workload("decode", 17, 8), {}),
        (Workload("decode", 1, 8, "float16"), {}),
        (DECODE, {"hidden_act": "gelu"}),
        (DECODE, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ],
)
def test_models_that_do_not_decode_through_it(workload: Workload, change: dict[str, Any]) -> None:
    target = Target(CPU, workload, 2)
    assert running(tiny_config(), Target(CPU, DECODE, 2))
    assert not running(tiny_config(**change), target)


def test_what_runs_whole_models_on_a_gpu() -> None:
    cuda, odd = torch.device("cuda"), {"hidden_act": "gelu"}
    for workload, change, kind in (
        (Workload("decode", 64, 8), {}, "graph"), (Workload(), {}, "graph"), (DECODE, odd, "transformers"),
        (Workload("decode", 65, 8), {}, "transformers"),
    ):  # fmt: skip
        assert profiler._runtime(["torch"], tiny_config(**change), Target(cuda, workload, 2)) == kind


def test_mixtures_and_old_tables_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "t.jsonl"
    with pytest.raises(JointNASError, match="'step' runs whole models; name it alone"):
        profiled(out, backends=["torch", "step"])
    profiled(out, backends=["torch", "ours-cpu"])  # of transformers' code, because it was asked for
    with pytest.raises(JointNASError, match=r"another runtime \(torch, not step\)"):
        profiled(out)
    assert LatencyTable.load(out).header.runtime == "torch"
    for workload, runtime in ((DECODE, None), (Workload(), None), (Workload(), "transformers")):
        old = synthetic(workload=workload)
        old.header = old.header.model_copy(update={"runtime": runtime})
        old.save(tmp_path / "old.jsonl")
        with pytest.raises(JointNASError, match="measured before models ran through the step"):
            LatencyTable.load(tmp_path / "old.jsonl")
    LatencyTable.load(tmp_path / "old.jsonl", force=True)
    synthetic().save(tmp_path / "prefill.jsonl")
    LatencyTable.load(tmp_path / "prefill.jsonl")


def test_times_are_those_of_one_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that takes 64 ms for 64 norms is a row of 1 ms; of products as many as there are copies of the weight."""
    seen: list[int] = []

    def measure(runs: Any, *_: Any, **__: Any) -> Measured:
        repeats = runs[0].func.repeats
        seen.append(repeats)
        return Measured(0.5 * repeats, repeats, 2.0 * repeats, 9)

    monkeypatch.setattr(profiler, "meter", lambda *_, **__: lambda spec, runs, seconds, watch: measure(runs))
    table = profiled(tmp_path / "t.jsonl")
    assert {(row.p10, row.median, row.p90) for row in table.rows} == {(0.5, 1.0, 2.0)}
    assert 64 in seen  # of parts
    assert min(seen) < 64  # of products: as many as the model has bytes for
    # also where the time of the operation is known, and one call takes 64 times as long
    norm, target = OpSpec("norm", 1, 64, 0), Target(torch.device("cpu"), Workload("decode", 1, 24), 2)
    store = profiler.Weights(target, 1 << 20, torch.Generator())
    (row,) = profiler.time_operation(norm, target, ["step"], store, 1e-4, fastest=1.0)
    assert (row.p10, row.samples) == (0.5, 9)


@pytest.mark.parametrize("workload", [DECODE, Workload("prefill", 2, 8)], ids=["decode", "prefill"])
@torch.no_grad()
def test_a_head_is_profiled_and_deployed_at_its_bits(tmp_path: Path, workload: Workload) -> None:
    """Whole models of it calibrate the table."""
    space = SearchSpace((64,), (4,), (16,), (96,), (1, 3), group_size=16, head_bits=(4, 8, 16))
    table = profile(space, CONFIG, tmp_path / "t.jsonl", workload=workload, threads=1, progress=False,
                    seconds_per_operation=1e-4, watch=calm())  # fmt: skip
    rows = {row.wbits: row for row in table.rows if row.op == "lm_head" and table.best(row.spec) is row}
    assert {w: (row.m, row.n, row.k, row.abits, row.group) for w, row in rows.items()} == {
        w: (workload.batch, 61, 64, 16, 16 if w < 16 else 0) for w in (4, 8, 16)
    }
    assert {row.backend for row in rows.values()} == {"step"}
    assert calibrate(table, space, CONFIG, 4, watch=calm(), seconds=1e-3).calibration is not None
    torch.manual_seed(0)
    model, reference = (LlamaForCausalLM(CONFIG).eval().requires_grad_(False) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    reference.lm_head.weight = torch.nn.Parameter(fake_quant_weight(model.lm_head.weight, 8, 16))
    deploy(model, replace(space.full(), head_bits=8), space, table)
    assert isinstance(model.lm_head, PackedLinear)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    x = ids(workload.batch, 6)
    found = model(x, use_cache=False, logits_to_keep=1).logits[:, -1]
    if workload is DECODE:
        cache = getattr(model(x[:, :5], use_cache=True), RESULT)
        found = model(x[:, 5:], **{RESULT: cache}).logits[:, -1]
        assert model.runtime.reason is None
    assert (found - reference(x).logits[:, -1]).abs().max() <= 1e-4


@torch.no_grad()
def test_deployed_models_decode_through_the_step_and_compute_the_same(tmp_path: Path) -> None:
    table = profiled(tmp_path / "t.jsonl")
    space = SearchSpace((64,), (4,), (16,), (96,), (3,), (8,), (16,), group_size=16)
    torch.manual_seed(0)
    model, reference = (LlamaForCausalLM(CONFIG).eval().requires_grad_(False) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    for layer in reference.model.layers:
        for module in (*layer.self_attn.children(), *layer.mlp.children()):
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(fake_quant_weight(module.weight, 8, 16))
    deploy(model, space.full(), space, table)
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 21
    x = ids(1, 6)
    cache = getattr(model(x[:, :5], use_cache=True), RESULT)
    found = model(x[:, 5:], **{RESULT: cache}).logits[0, -1]
    assert model.runtime.reason is None
    assert isinstance(model.runtime._step, DecodeStep)
    assert (found - reference(x).logits[0, -1]).abs().max() <= 1e-4
