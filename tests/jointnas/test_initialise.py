"""Initialisers: exact equivalence of transformations, resume, grids, bad input."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from jointnas import cli, exporting
from jointnas.config import InitOptions, Method
from jointnas.initialise import Bits, calibration_windows, initialise, jobs, single_space
from jointnas.initialise.blocks import Blocks, quantize_tokens
from jointnas.initialise.clip import mse_clip
from jointnas.initialise.gptq import gptq
from jointnas.initialise.head import quantize_head
from jointnas.initialise.omniquant import equivalent, identity, learn, smoothed
from jointnas.initialise.problem import Problem
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import convert, extract
from jointnas_kernels.nn.linear import FakeQuantLinear
from jointnas_kernels.ops.quant import grid
from jointnas_kernels.ops.quant.activations import act_quant_mix
from jointnas_kernels.space import Choice
from tests.jointnas import tiny
from tests.jointnas.tiny import random

OPTIONS = InitOptions(samples=12, batch=4, epochs=3)
G = 64


def windows(count: int = 12, length: int = 16) -> Tensor:
    return calibration_windows(tiny.streams().all, InitOptions(samples=count), length)


def fused() -> tuple[Any, Any]:
    """The tiny Llama, and a Phi-3 of the same function: the rows of its linears in fewer modules."""
    phi = tiny.model("phi3").requires_grad_(False)
    llama = model(rms_norm_eps=phi.config.rms_norm_eps)
    weights = llama.state_dict()
    for name, value in phi.state_dict().items():
        one = name.replace("qkv_proj", "{}_proj").replace("gate_up_proj", "{}_proj")
        parts = "qkv" if "qkv_proj" in name else ("gate", "up")
        value.copy_(weights[name] if name in weights else torch.cat([weights[one.format(part)] for part in parts]))
    return llama, phi


def model(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """The tiny Llama (grouped-query attention), with biases of its own where the config has them."""
    made = tiny.model()
    if changes:
        torch.manual_seed(0)
        made = LlamaForCausalLM(LlamaConfig(**{**made.config.to_dict(), **changes})).eval()
        for name, parameter in made.named_parameters():
            if "norm" in name or "bias" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    torch.nn.Module.to(made, dtype)
    return made.requires_grad_(False)


def bits_of(made: Any, weight: int = 4, act: int = 16, **more: Any) -> Bits:
    return Bits.uniform(made.config, weight, act, G, **more)


# ---- OmniQuant ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "biased", "fused"])
def test_transformation_is_exactly_equivalent(kind: str) -> None:
    biased = kind == "biased"
    made: Any = model(torch.float64, attention_bias=biased, mlp_bias=biased)
    if kind == "fused":
        made = fused()[1].double()
    original = made(windows(3)).logits
    walk = Blocks(made)
    for layer in made.model.layers:
        parameters = {k: v.detach() for k, v in layer.named_parameters()}
        moved = identity(parameters, walk)
        assert (moved.shift is not None) == biased
        for i, leaf in enumerate(moved.leaves()):
            leaf += random(*leaf.shape, seed=i)
        new = equivalent(parameters, walk, moved)
        assert max(float((new[k] - v).abs().max()) for k, v in parameters.items()) > 0.1
        layer.load_state_dict(new)
    assert (made(windows(3)).logits - original).abs().max() <= 1e-10


def problem(made: LlamaForCausalLM, bits: int = 2, b: int = 1) -> Problem:
    walk = Blocks(made)
    x = walk.start(windows())
    for i in range(b):
        walk.advance(i, x)
    return Problem(walk, b, x, walk.advance(b, x.clone()), bits, bits_of(made).groups(walk.modules))


@pytest.mark.parametrize(("bits", "act"), [(2, 16), (4, 16), (4, 4), (8, 8)], ids=lambda v: str(v))
def test_learning_never_raises_the_block_error(bits: int, act: int) -> None:
    made = model(attention_bias=True)
    todo = problem(made, bits)
    with todo.blocks.quantized_inputs(1, act, False):
        found = learn(todo, InitOptions(epochs=8, batch=4), transform=act < 16)
        rounded = todo.error(todo.quantized(todo.weights, todo.unclipped()))
        # clipping hardly helps a block of random weights: only the transformation has something to learn here
        assert found.end <= found.start <= rounded
        assert found.end < found.start or act != 4
        assert todo.error(todo.quantized(found.parameters, found.clips)) == found.end
    assert all((clip > 0).all() and (clip <= 1).all() for clip in found.clips.values())


def test_smoothing_evens_out_an_outlier() -> None:
    """A channel of large activations and small weights: per-token quantization profits from SmoothQuant's start."""
    made = model()
    layer = made.model.layers[1]
    with torch.no_grad():
        layer.post_attention_layernorm.weight[5] *= 60
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight[:, 5] /= 60
    todo = problem(made, 8)
    start = identity(todo.parameters, todo.blocks)
    smooth = smoothed(todo, start)
    assert smooth.log_scale["mlp"].argmax() == 5
    with todo.blocks.quantized_inputs(1, 4, False):
        plain, better = (
            todo.error(todo.quantized(equivalent(todo.parameters, todo.blocks, t), todo.unclipped()))
            for t in (start, smooth)
        )
    assert better < 0.5 * plain


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_learnable_token_quantizer(symmetric: bool) -> None:
    """The op's values; a gradient that follows the range: scaling x by t scales Q(x) by t, so x · dQ/dx = Q."""
    x = random(5, 33).requires_grad_()
    y = quantize_tokens(x, 3, symmetric)
    assert torch.equal(y, act_quant_mix(x.detach(), (3,), torch.ones(1), symmetric=symmetric))
    g = random(5, 33, seed=1)
    (dx,) = torch.autograd.grad(y, x, g)
    assert torch.allclose((x * dx).sum(-1), (g * y).sum(-1))
    half = x.detach().bfloat16().requires_grad_()
    assert torch.equal(
        quantize_tokens(half, 4, symmetric), act_quant_mix(half.detach(), (4,), torch.ones(1), symmetric=symmetric)
    )


def test_transformed_weights_scale_their_grid() -> None:
    """Likewise for weights: w · dQ/dw + the clipped part = Q; a gradient does not change values."""
    todo = problem(model(), 3)
    clips = {n: torch.full_like(c, 0.7) for n, c in todo.unclipped().items()}
    name = "self_attn.o_proj.weight"
    leaf = todo.parameters[name].double().requires_grad_()
    out = todo.quantized({**todo.weights, name: leaf}, clips)[name]
    with torch.no_grad():
        assert torch.equal(out, todo.quantized({**todo.weights, name: leaf}, clips)[name])
    g = random(*out.shape, seed=3)
    (dw,) = torch.autograd.grad(out, leaf, g)
    assert torch.allclose((leaf * dw).sum(), (g * out).sum(), rtol=1e-5, atol=1e-4)


# ---- the whole model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("method", "act"), [("rtn", 16), ("clip", 8), ("gptq", 4), ("omniquant", 16), ("omniquant", 4)]
)
def test_plain_model_lies_on_its_grid(method: Method, act: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Integers and scales give the weights bit for bit, before and after an export."""
    made = model(dtype)
    rows = initialise(made, method, windows(), bits_of(made, 4, act), options=OPTIONS, progress=False)
    assert [r["block"] for r in rows] == [0, 1, 2]
    linears = [m for m in made.modules() if isinstance(m, FakeQuantLinear)]
    assert len(linears) == 21
    for linear in linears:
        assert linear.grid is not None
        assert linear.act_bits == act
        assert linear.group_size == (32 if linear in [layer.self_attn.o_proj for layer in made.model.layers] else G)
        q = grid.integers(linear.weight, linear.grid)
        scale = linear.grid.scale.repeat_interleave(linear.group_size, 1)
        assert scale.dtype == dtype
        assert torch.equal(q.to(dtype) * scale, linear.weight)
    if dtype == torch.float32 and method != "rtn":
        choice = single_space(made.config, 4, act, G).full()
        exporting.export_model(made, tmp_path / "m", choice, range(3))
        ids = windows(2)
        assert torch.equal(exporting.reload(tmp_path / "m")(ids).logits, made(ids).logits)


@pytest.mark.parametrize(("method", "act"), [("rtn", 16), ("clip", 8), ("gptq", 8), ("omniquant", 4)])
def test_fused_linears_are_quantized_row_by_row(method: Method, act: int, tmp_path: Path) -> None:
    """As if they were stored apart; an equivalent transformation moves the rows of v and up alone."""
    llama, phi = fused()
    ids = windows()
    assert torch.allclose(llama(ids).logits, phi(ids).logits, atol=1e-5)
    errors = []
    for made in (llama, phi):
        rows = initialise(made, method, ids, bits_of(made, 4, act), options=OPTIONS, progress=False)
        errors.append([r["mse"] for r in rows])
    assert errors[0] == pytest.approx(errors[1], rel=1e-3 if method != "omniquant" else 0.05)
    assert sum(isinstance(m, FakeQuantLinear) for m in phi.modules()) == 12
    a, m = llama.model.layers[0].self_attn, llama.model.layers[0].mlp
    if method != "omniquant":
        apart = torch.cat([linear.weight for linear in (a.q_proj, a.k_proj, a.v_proj)])
        own = phi.model.layers[0].self_attn.qkv_proj
        assert (own.weight != apart).float().mean() <= (0.01 if method == "gptq" else 0)
        assert (phi.model.layers[0].mlp.gate_up_proj.weight[: m.gate_proj.out_features] == m.gate_proj.weight).all()
    exporting.export_model(phi, tmp_path / "m", single_space(phi.config, 4, act, G).full(), range(3))
    assert torch.equal(exporting.reload(tmp_path / "m")(windows(2)).logits, phi(windows(2)).logits)


def test_methods_keep_their_order() -> None:
    """Errors of the last block at 2 bits: rounding > OmniQuant and GPTQ; reported is what the model does."""
    last, ids = {}, windows()
    original = model()
    for method in ("rtn", "gptq", "omniquant"):
        made = model()
        rows = initialise(made, method, ids, bits_of(made, 2), options=OPTIONS, progress=False)
        last[method] = rows[-1]["mse"]
        assert all(r["mse"] < r["mse_rtn"] or method == "rtn" for r in rows)
        got, want = (m.model(ids, output_hidden_states=True).hidden_states for m in (made, original))
        assert float((got[2] - want[2]).square().mean()) == pytest.approx(rows[1]["mse"], rel=1e-3)
    assert max(last["gptq"], last["omniquant"]) < last["rtn"]


def test_mixed_bits_of_an_extracted_choice() -> None:
    space = tiny.config("unused").space.build()
    choice = Choice(64, 4, 16, 192, 2, (4, 8, 4), (8, 16, 8))
    bits = Bits.of(choice, space, block_rank=(2, 1, 0), act_symmetric=True)
    assert (bits.weight, bits.act, bits.group_size, bits.o_proj_group) == ((8, 4), (16, 8), 64, 16)
    plain = extract(convert(model(), tiny.config("unused", tiny.NO_BITS).space.build()), Choice(64, 4, 16, 192, 2))
    initialise(plain, "gptq", windows(), bits, options=OPTIONS, progress=False)
    first, second = plain.model.layers
    assert (first.mlp.up_proj.weight_bits, first.mlp.up_proj.act_bits) == (8, 16)
    assert (second.self_attn.o_proj.weight_bits, second.self_attn.o_proj.act_bits) == (4, 8)
    assert second.self_attn.o_proj.act_symmetric
    assert second.self_attn.o_proj.group_size == 16


@pytest.mark.parametrize("method", ["rtn", "clip", "omniquant"])
def test_supernet_gets_ratios_for_every_precision(method: Method) -> None:
    supernet = convert(model(), tiny.config("unused").space.build())
    rows = initialise(supernet, method, windows(), options=OPTIONS, progress=False)
    assert [(r["block"], r["weight_bits"]) for r in rows] == [(b, w) for b in range(3) for w in (4, 8)]
    assert all(r["mse"] < r["mse_rtn"] for r in rows if method == "omniquant")
    walk = Blocks(supernet)
    parts = {path: walk.layers[0].get_submodule(path).group_size for path in walk.modules}
    problem = Problem(walk, 0, walk.start(windows()), None, 4, parts)
    energy = problem.energies(problem.weights)
    for path in walk.modules:
        linear = walk.layers[0].get_submodule(path)
        assert tuple(linear.clip.shape) == (2, linear.out_features, linear.in_features // linear.group_size)
        ratio = torch.ones(1) if method == "rtn" else mse_clip(linear.weight, 4, linear.group_size, energy[path])
        assert method == "omniquant" or torch.equal(linear.clip[0], ratio.expand_as(linear.clip[0]))
    # what was minimised is what the supernet computes: block 0 of the choice with the highest precision
    x = Blocks(supernet).start(windows(2))
    choice = supernet.space.full()
    seen: list[Tensor] = []
    hook = supernet.blocks[0].register_forward_hook(lambda m, a, out: seen.append(out))
    supernet.fix(choice)(windows(2))
    supernet.original(windows(2))
    hook.remove()
    assert x.shape == seen[0].shape
    with torch.no_grad():
        assert (seen[0] - seen[1]).square().mean() < 1e-2 * seen[1].square().mean()


@pytest.mark.parametrize("method", ["rtn", "clip"])
def test_supernet_gets_ratios_for_its_head(method: Method, tmp_path: Path) -> None:
    """Of least error where its inputs have energy, once: a resumed run takes them from the folder."""
    space = tiny.config("unused", {**tiny.NO_BITS, "head_bits": [4, 8, 16]}).space.build()
    supernet, other = (convert(model(), space) for _ in range(2))
    assert initialise(supernet, method, windows(), folder=tmp_path, progress=False) == []
    quantizer = supernet.head_quantizer
    assert quantizer is not None
    states = supernet.original_states(windows()[:32]).double().square().sum((0, 1))
    energy = (states / states.mean()).float()
    for i, bits in enumerate((4, 8)):
        want = mse_clip(supernet.embedding, bits, 64, energy)
        assert torch.equal(quantizer.clip[i], torch.ones_like(want) if method == "rtn" else want)
    plain = tiny.model()
    quantize_head(plain, 4, 64, windows())
    extracted = extract(supernet, replace(space.full(), head_bits=4))
    if method == "clip":  # what quantizing the model itself gives, up to the order of sums in the energies
        assert (extracted.lm_head.weight != plain.lm_head.weight).double().mean() < 0.01
    initialise(other, method, windows(), folder=tmp_path, progress=False)
    assert other.head_quantizer is not None
    assert torch.equal(other.head_quantizer.clip, quantizer.clip)
    assert (tmp_path / "head" / "block-000.safetensors").is_file() == (method == "clip")


def test_without_weight_bits_there_is_nothing_to_do() -> None:
    supernet = convert(model(), tiny.config("unused", tiny.NO_BITS).space.build())
    assert initialise(supernet, "omniquant", windows(), progress=False) == []


# ---- resume ---------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["gptq", "omniquant", "reconstruct", "supernet omniquant", "supernet reconstruct"])
def test_resumed_is_uninterrupted(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(folder: Path | None) -> tuple[Any, list[dict[str, Any]]]:
        made: Any = model()
        of, _, method = kind.rpartition(" ")
        bits = None if of else bits_of(made, 4, 8)
        if of:
            torch.manual_seed(0)
            made = convert(made, tiny.config("unused").space.build())
        return made, initialise(made, method, windows(), bits, options=OPTIONS, folder=folder, progress=False)

    whole, rows = start(None)
    job = jobs.Supernets if kind.startswith("supernet") else jobs.Plain
    solve = job.solve

    def solve_two(self: Any, b: int, x: Any, behind: Any, y: Any) -> Any:
        if b == 2:
            raise Killed
        return solve(self, b, x, behind, y)

    monkeypatch.setattr(job, "solve", solve_two)
    with pytest.raises(Killed):
        start(tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "block-000.safetensors", "block-001.safetensors", "blocks.jsonl", "settings.json",
    ]  # fmt: skip
    again, resumed = start(tmp_path)
    for (name, a), (other, b) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name

    def plain(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if k != "seconds"} for r in found]

    assert plain(rows) == plain(resumed)
    assert [json.loads(line) for line in (tmp_path / "blocks.jsonl").read_text().splitlines()] == resumed
    monkeypatch.setattr(job, "solve", None)  # finished: nothing is computed again
    third, _ = start(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), third.state_dict().values(), strict=True))


def test_another_job_in_the_folder_is_refused(tmp_path: Path) -> None:
    def start(bits: int, count: int = 12) -> None:
        made = model()
        initialise(made, "clip", windows(count), bits_of(made, bits), folder=tmp_path, progress=False)

    start(4)
    with pytest.raises(JointNASError, match="another bits; remove it or choose another folder"):
        start(8)
    with pytest.raises(JointNASError, match="another calibration"):
        start(4, 8)
    start(4)
    (tmp_path / "block-001.safetensors").write_bytes(b"torn")
    with pytest.raises(JointNASError, match=r"block-001.safetensors cannot be read: .* is damaged: remove it"):
        start(4)


# ---- command line and bad input -------------------------------------------------------------------------------------


def test_command_quantizes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("jointnas.data.load", lambda *a, **k: tiny.streams())
    tiny.model().save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = [
        "quantize", "--model.source", str(tmp_path / "model"), "--bits.weight", "4", "--bits.act", "8",
        "--out", str(out), "--bits.group_size", "64", "--data.seq_len", "16", "--options.samples", "8",
        "--progress", "false", "--method", "gptq",
    ]  # fmt: skip
    (tmp_path / "out.partial").mkdir()
    assert cli.main(arguments) == 2
    assert "unfinished quantization; pass --resume" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert len((out / "quantization.jsonl").read_text().splitlines()) == 3
    assert "Quantized after training by `gptq` on 128 tokens." in (out / "README.md").read_text()
    assert not (tmp_path / "out.partial").exists()
    made = tiny.model().requires_grad_(False)
    ids = calibration_windows(tiny.streams().all, InitOptions(samples=8), 16)
    initialise(made, "gptq", ids, bits_of(made, 4, 8), options=InitOptions(samples=8), progress=False)
    assert torch.equal(exporting.reload(out)(ids).logits, made(ids).logits)
    assert cli.main(arguments) == 2
    assert "exists; choose another folder" in capsys.readouterr().err


def test_search_takes_the_initialiser(tmp_path: Path) -> None:
    """A run keeps the blocks of methods that need data, and opens with the same quantizers again."""
    quantizer = {"init": "omniquant", "options": {"samples": 8, "epochs": 1}}
    first = tiny.start(tiny.config(tmp_path, quantizer=quantizer))
    second = tiny.start(tiny.config(tmp_path, quantizer=quantizer))
    assert (tmp_path / "quantizers" / "block-002.safetensors").is_file()
    for (_, a), (_, b) in zip(first.supernet.linears(), second.supernet.linears(), strict=True):
        assert torch.equal(a.clip, b.clip)
    with pytest.raises(JointNASError, match=r"gptq decides how fixed weights are rounded.* omniquant, reconstruct"):
        tiny.start(tiny.config(tmp_path / "g", quantizer={"init": "gptq"}))


def quantized() -> Any:
    made = model()
    initialise(made, "rtn", None, bits_of(made), progress=False)
    return made


CASES = {
    "method": (lambda m: initialise(m, "gptqq", windows(), bits_of(m)), "Did you mean 'gptq'"),
    "no-data": (lambda m: initialise(m, "gptq", None, bits_of(m)), "gptq needs calibration tokens .*: rtn, clip"),
    "shape": (lambda m: initialise(m, "gptq", windows()[0], bits_of(m)), r"must be token ids .* got shape \(16,\)"),
    "no-bits": (lambda m: initialise(m, "rtn"), "a plain model needs `bits`"),
    "bits": (lambda m: bits_of(m, 9), "weight_bits contains 9; allowed: 2 to 8"),
    "act": (lambda m: bits_of(m, 4, 12), "act_bits contains 12"),
    "group": (lambda m: Bits.uniform(m.config, 4, 16, 48), "no multiple of 48"),
    "blocks": (lambda m: initialise(m, "rtn", None, Bits((4,), (16,), G, 32)), "the model has 3 blocks"),
    "twice": (lambda m: initialise(quantized(), "rtn", None, bits_of(m)), "q_proj is quantized already"),
    "hessian": (lambda m: gptq(torch.ones(2, 64), torch.eye(63), 4, 64), r"Hessian has shape \(63, 63\)"),
    "not-finite": (lambda m: gptq(torch.ones(2, 64), torch.full((64, 64), torch.nan), 4, 64), "cannot be factorised"),
    "few-tokens": (lambda m: calibration_windows(torch.arange(99), InitOptions(samples=8), 16), "hold 6 calib"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str) -> None:
    call, message = CASES[case]
    with pytest.raises(JointNASError, match=message):
        call(model())


def test_supernet_takes_no_bits() -> None:
    supernet = convert(copy.deepcopy(model()), tiny.config("unused").space.build())
    with pytest.raises(JointNASError, match="a supernet's bits are those of its space"):
        initialise(supernet, "rtn", None, Bits((4,), (16,), G, 32))
