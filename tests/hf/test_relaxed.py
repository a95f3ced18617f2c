"""The relaxed supernet: equal to its literal definition in values and gradients; modes, depth, state, composition."""

import dataclasses
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import Supernet, convert, shrink
from jointnas_kernels.nn import block as nn_block
from jointnas_kernels.ops import act_quant_mix, gated_residual
from jointnas_kernels.space import Choice, SearchSpace
from tests.hf.hf_models import (
    QUANT_SPACE,
    SPACE,
    ids,
    literal_logits,
    random_alphas,
    random_importance,
    randomize_lora,
    tiny_model,
)

WEIGHTS_ONLY = SearchSpace.from_dict({**QUANT_SPACE.to_dict(), "act_bits": None})


def build(
    space: SearchSpace = SPACE, dtype: torch.dtype = torch.float32, lora_pairs: str = "per-precision", **change
) -> Supernet:
    model = tiny_model(dtype, **change)
    importance = random_importance(model.config)
    return randomize_lora(convert(model, space, lora_rank=4, importance=importance, lora_pairs=lora_pairs))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(tensors) -> list[torch.Tensor | None]:
    return [None if t.grad is None else t.grad.clone() for t in tensors]


def clear(supernet: Supernet) -> None:
    for p in supernet.parameters():
        p.grad = None


@pytest.mark.parametrize(
    "space, change",
    [
        (SPACE, {}), (SPACE, {"attention_bias": True, "mlp_bias": True}), (WEIGHTS_ONLY, {}), (QUANT_SPACE, {}),
        (QUANT_SPACE, {"lora_pairs": "shared"}),
    ],
    ids=["widths", "biased", "weight-bits", "all-bits", "shared-pair"],
)
def test_relaxed_forward_and_gradients_are_the_definition(space: SearchSpace, change: dict) -> None:
    supernet, x = build(space, torch.float64, **change), ids()
    supernet.mode("full")
    weight = torch.randn(2, 7, 61, dtype=torch.float64, generator=generator(7))
    results = []
    for literally in (False, True):
        alphas = random_alphas(supernet)
        clear(supernet)
        if literally:
            logits = literal_logits(supernet, alphas, x)
        else:
            supernet.use(alphas)
            logits = supernet(x).logits
        (logits * weight).sum().backward()
        results.append((logits.detach(), gradients(alphas.values()), gradients(supernet.lora_parameters())))
    (own, own_arch, own_lora), (ref, ref_arch, ref_lora) = results
    torch.testing.assert_close(own, ref, rtol=0, atol=1e-10)
    for a, b in zip(own_arch + own_lora, ref_arch + ref_lora, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("space", [SPACE, WEIGHTS_ONLY], ids=["widths", "weight-bits"])
def test_gradients_by_finite_differences(space: SearchSpace) -> None:
    """Of the loss with respect to width alphas, depth gates and bit probabilities."""
    supernet, x = build(space, torch.float64), ids(1, 5)
    supernet.mode("arch")
    alphas = random_alphas(supernet)

    def loss(*values: torch.Tensor) -> torch.Tensor:
        supernet.use(dict(zip(alphas, values, strict=True)))
        return supernet(x, labels=x).loss

    assert torch.autograd.gradcheck(loss, tuple(alphas.values()), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("fixed", [False, True], ids=["drawn", "fixed"])
def test_norms_quantize_what_their_linears_share(fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit the norm and then the quantizer; one precision alone, known on the host, too."""
    supernet, x = build(QUANT_SPACE, torch.bfloat16), ids()
    if fixed:
        full = QUANT_SPACE.full()
        supernet.fix(dataclasses.replace(full, act_bits=tuple((4, 16, 8)[b % 3] for b in range(len(supernet.blocks)))))
    else:
        supernet.mode("weight").draw(generator(1))
    ran: list[tuple] = []
    taken: list[torch.Tensor] = []
    apply_shared = nn_block.apply_shared

    def shared(x: torch.Tensor, of: nn_block.Shared, *args: Any) -> list[torch.Tensor]:
        if len(of.linears) > 1:
            taken.append(x)
        return apply_shared(x, of, *args)

    monkeypatch.setattr(nn_block, "apply_shared", shared)
    for block in supernet.blocks:
        for norm in (block.input_norm, block.post_norm):
            norm.register_forward_hook(lambda module, inputs, out: ran.append((module, inputs, out)))
    with torch.no_grad():
        supernet(x)
        mixtures = []
        for (norm, (stream, masks, sizes, mixture, *added), (h, out)), given in zip(ran, taken, strict=True):
            assert given is out
            assert torch.equal(h, gated_residual(stream, *added, masks.hidden) if added else stream)
            _, apart = norm.forward(h, masks, sizes)
            assert torch.equal(out, apart if mixture is None else act_quant_mix(apart, *mixture))
            mixtures.append(mixture)
    assert (None in mixtures) == fixed  # 16 bits are left alone
    assert {m.bits for m in mixtures if m is not None} == ({(4,), (8,)} if fixed else {QUANT_SPACE.act_bits})


def test_modes_compute_only_their_gradients() -> None:
    supernet, x = build(QUANT_SPACE), ids()
    expected = {"weight": (True, False), "arch": (False, True), "full": (True, True)}
    seen = {}
    for mode, (lora, arch) in expected.items():
        supernet.mode(mode)
        clear(supernet)
        sample = supernet.draw(generator(1))
        assert sample.requires_grad == arch
        supernet(x, labels=x).loss.backward()
        # blocks that the draw skips have no LoRA gradient
        assert any(p.grad is not None for p in supernet.lora_parameters()) == lora
        assert all((p.grad is not None) == arch for p in supernet.arch_parameters())
        assert supernet.embedding.grad is None
        seen[mode] = gradients(supernet.lora_parameters()), gradients(supernet.arch_parameters())
    for a, b in zip(seen["weight"][0], seen["full"][0], strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(seen["arch"][1], seen["full"][1], strict=True):
        torch.testing.assert_close(a, b)
        assert torch.isfinite(a).all()
        assert a.abs().max() > 0


def test_skipped_blocks_are_skipped_and_still_tell_depth_its_gradient() -> None:
    supernet, x = build(dtype=torch.float64), ids()
    alphas = random_alphas(supernet, soft_depth=False)  # hard: two of three blocks
    runs: list[int] = []
    for i, block in enumerate(supernet.blocks):
        block.input_norm.register_forward_hook(lambda *_, i=i: runs.append(i))
    dropped = supernet.block_rank[2]

    def depth_gradient(mode: str) -> torch.Tensor:
        runs.clear()
        supernet.mode(mode).use(alphas)
        supernet(x, labels=x).loss.backward()
        return alphas["blocks"].grad.clone()

    full = depth_gradient("arch")
    assert sorted(runs) == [0, 1, 2]
    literal = random_alphas(supernet, soft_depth=False)
    logits = literal_logits(supernet, literal, x)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    torch.testing.assert_close(full, literal["blocks"].grad)
    for key in alphas:
        torch.testing.assert_close(alphas[key].grad, literal[key].grad)
    supernet.full_depth_gradient = False
    alphas["blocks"].grad = None
    partial = depth_gradient("arch")
    assert dropped not in runs
    assert partial[2] == partial[1]  # three blocks differ from two only by the one that did not run
    assert full[2] != full[1]
    supernet.mode("weight").draw(generator(3))
    runs.clear()
    supernet(x)
    kept = [i for i, gate in enumerate(supernet.sample.gates) if gate]
    assert runs == kept


@pytest.mark.parametrize("relaxation", ["dirichlet", "reinmax", "gumbel"])
def test_drawn_gradients_are_finite(relaxation: str) -> None:
    supernet, x = build(QUANT_SPACE), ids()
    supernet.mode("arch")
    with torch.no_grad():
        supernet.arch.logits["hidden"][0] = -12.0  # nearly zero concentration
    for seed in range(5):
        sample = supernet.draw(generator(seed), relaxation)
        loss = supernet(x, labels=x).loss
        loss.backward()
        assert torch.isfinite(loss)
        for key in ("hidden", "heads", "head_dim", "intermediate"):
            value = sample.alphas[key]
            assert value.sum().item() == pytest.approx(1.0, abs=1e-5)
            if key != "hidden":
                assert (value.max() == 1.0) == (relaxation == "reinmax")
    assert all(torch.isfinite(p.grad).all() for p in supernet.arch_parameters())


def test_loss_is_the_mean_cross_entropy_of_the_logits() -> None:
    supernet, x = build(), ids(3, 9)
    labels = x.clone()
    labels[0, :4] = -100
    supernet.fix(Choice(16, 4, 8, 48, 3))
    supernet.mode("full")
    both = supernet(x, labels=labels, return_logits=True)
    only = supernet(x, labels=labels)
    assert only.logits is None
    expected = torch.nn.functional.cross_entropy(
        both.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(both.loss, expected)
    torch.testing.assert_close(only.loss, expected)
    both.loss.backward()
    first = gradients(supernet.lora_parameters())
    clear(supernet)
    only.loss.backward()
    for a, b in zip(first, gradients(supernet.lora_parameters()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["weight", "arch"])
def test_gradient_checkpointing_changes_nothing(mode: str) -> None:
    supernet, x, seen = build(QUANT_SPACE, torch.float64), ids(), []
    supernet.mode(mode)
    for checkpointing in (False, True):
        clear(supernet)
        supernet.gradient_checkpointing = checkpointing
        supernet.draw(generator(2))
        supernet(x, labels=x).loss.backward()
        seen.append(gradients([*supernet.lora_parameters(), *supernet.arch_parameters()]))
    assert any(g is not None for g in seen[0])
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("space", [SPACE, QUANT_SPACE], ids=["widths", "bits"])
def test_autocast_runs_in_half(space: SearchSpace) -> None:
    supernet, x = build(space), ids()
    supernet.mode("full").draw(generator(2))
    exact = supernet(x, labels=x).loss
    with torch.autocast("cpu", torch.bfloat16):
        out = supernet(x, labels=x, return_logits=True)
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.item() == pytest.approx(exact.item(), rel=0.02)
    out.loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in supernet.parameters())
    assert any(p.grad is not None for p in supernet.lora_parameters())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_blocks_compile_as_one_graph(family: str) -> None:
    """With the aot_eager backend: traced by dynamo and AOT autograd without a graph break, executed by the same ops."""
    torch._dynamo.reset()
    supernet, x = build(QUANT_SPACE, torch.float64, family=family), ids()
    supernet.mode("full").draw(generator(5))

    def run() -> list[torch.Tensor | None]:
        clear(supernet)
        supernet.draw(generator(5))
        supernet(x, labels=x).loss.backward()
        return gradients([*supernet.lora_parameters(), *supernet.arch_parameters()])

    eager = run()
    for block in supernet.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    compiled = run()
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_search_state_round_trips(tmp_path) -> None:
    """Through safetensors, into a fresh conversion of the same model: the next steps are bit-identical."""
    supernet, x = build(QUANT_SPACE), ids()
    with torch.no_grad():
        for p in supernet.arch_parameters():
            p.normal_(generator=generator(1))
    save_file(supernet.search_state(), str(tmp_path / "state.safetensors"))
    model = tiny_model()
    other = convert(model, QUANT_SPACE, lora_rank=4, importance=random_importance(model.config))
    other.load_search_state(load_file(str(tmp_path / "state.safetensors")))
    losses = []
    for s in (supernet, other):
        s.mode("arch").draw(generator(4))
        loss = s(x, labels=x).loss
        loss.backward()
        losses.append((loss, *gradients(s.arch_parameters())))
    for a, b in zip(*losses, strict=True):
        assert torch.equal(a, b)
    assert supernet.argmax() == other.argmax()


def test_learned_clip_ratios_train_and_round_trip() -> None:
    model = tiny_model()
    supernet = convert(model, WEIGHTS_ONLY, lora_rank=4, ste="clip")
    for _, linear in supernet.linears():
        linear.learn_clip()
    supernet.draw(generator(1))
    supernet(ids(), labels=ids()).loss.backward()
    kept = {b for b, gate in enumerate(supernet.sample.gates) if gate}
    for name, linear in supernet.linears():
        if int(name.split(".")[1]) in kept:
            assert linear.clip_logits.grad.abs().max() > 0
    other = convert(tiny_model(), WEIGHTS_ONLY, lora_rank=4, ste="clip")
    other.load_search_state(supernet.search_state())
    choice = WEIGHTS_ONLY.full()
    assert torch.equal(supernet.fix(choice)(ids()).logits, other.fix(choice)(ids()).logits)
    torch.testing.assert_close(shrink(supernet, choice)(ids()).logits, supernet(ids()).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda s: s.pop("arch.hidden"), "1 missing tensors"),
        (lambda s: s.update(extra=torch.ones(1)), "1 unexpected"),
        (lambda s: s.update({"arch.hidden": torch.ones(3)}), "arch.hidden has shape"),
        (lambda s: s.update({"order.hidden": torch.arange(32)}), "hidden order is not this supernet's"),
    ],
    ids=["missing", "extra", "shape", "order"],
)
def test_foreign_states_are_refused(damage, message: str) -> None:
    supernet = build()
    state = dict(supernet.search_state())
    damage(state)
    with pytest.raises(JointNASError, match=message):
        supernet.load_search_state(state)


def test_draws_are_seeded_and_independent_of_dtype() -> None:
    a, b = build(QUANT_SPACE), build(QUANT_SPACE, torch.float64)
    first, second = (s.draw(generator(11)) for s in (a, b))
    for key in first.alphas:
        assert torch.equal(first.alphas[key], second.alphas[key])
    assert first.gates == second.gates
    assert a.arch.logits["hidden"].dtype == torch.float32
    a.to(torch.bfloat16)
    assert a.arch.logits["hidden"].dtype == torch.float32  # stays on the host, in fp32


def test_moving_keeps_a_fixed_choice_and_drops_a_draw() -> None:
    supernet, x, choice = build(), ids(), Choice(16, 2, 8, 16, 2)
    supernet.fix(choice)
    half = supernet(x).logits
    supernet.double()
    torch.testing.assert_close(supernet(x).logits.float(), half, rtol=0, atol=1e-4)
    supernet.draw(generator())
    supernet.float()
    assert supernet.sample is None


def test_wrong_calls_are_refused() -> None:
    supernet = build()
    with pytest.raises(JointNASError, match="Did you mean 'weight'"):
        supernet.mode("weights")
    with pytest.raises(JointNASError, match="Did you mean 'reinmax'"):
        supernet.draw(relaxation="reinmx")
    with pytest.raises(JointNASError, match="unknown hidden choice '17'"):
        supernet.fix(Choice(17, 2, 8, 16, 1))
    with pytest.raises(JointNASError, match="unknown relaxation"):
        convert(tiny_model(), SPACE, relaxation="dirichlett")
