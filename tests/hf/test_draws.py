"""What a supernet computes when nobody decided: a draw of (seed, step, mode) in training, the argmax in evaluation."""

from __future__ import annotations

import copy

import pytest
import torch

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import Supernet, convert
from jointnas_kernels.nn.choices import seeded
from jointnas_kernels.nn.linear import MODES
from tests.hf.hf_models import QUANT_SPACE, SPACE, ids, random_importance, randomize_lora, tiny_model


def build() -> Supernet:
    model = tiny_model()
    return randomize_lora(convert(model, QUANT_SPACE, lora_rank=4, importance=random_importance(model.config)))


@pytest.mark.parametrize("mode", MODES)
def test_training_draws_from_seed_and_step(mode: str) -> None:
    supernet, x = build().mode(mode), ids()
    supernet.seed, seen = 5, []
    for step in range(4):
        assert supernet.step == step
        seen.append(supernet(x, labels=x).loss)
    assert len({loss.item() for loss in seen}) == 4
    supernet.step = 2
    assert torch.equal(supernet(x, labels=x).loss, seen[2])
    supernet.seed, supernet.step = 6, 2
    assert not torch.equal(supernet(x, labels=x).loss, seen[2])
    for step, loss in enumerate(seen):  # what a search draws by hand
        supernet.relax().draw(seeded(5, step, MODES.index(mode)))
        assert torch.equal(supernet(x, labels=x).loss, loss)


def test_micro_batches_of_one_step_share_the_draw_and_add_gradients() -> None:
    supernet, x = build().mode("arch"), ids(4)
    supernet.seed = 3
    for part in x.split(2):  # the second backward pass has a graph of its own
        supernet.step = 7
        (supernet(part, labels=part).loss / 2).backward()
    added = [p.grad.clone() for p in supernet.arch_parameters()]
    supernet.zero_grad()
    supernet.step = 7
    supernet(x, labels=x).loss.backward()
    for own, p in zip(added, supernet.arch_parameters(), strict=True):
        torch.testing.assert_close(own, p.grad)


def test_what_is_decided_stays() -> None:
    supernet, x = build(), ids()
    supernet.draw(torch.Generator().manual_seed(0))
    first = supernet(x).logits
    assert torch.equal(supernet(x).logits, first)
    assert torch.equal(supernet.eval()(x).logits, first)
    choice = QUANT_SPACE.sample(torch.Generator().manual_seed(1))
    fixed = supernet.fix(choice)(x).logits
    assert torch.equal(supernet.train()(x).logits, fixed)
    assert supernet.step == 0  # automatic draws only
    supernet.relax()(x)
    assert supernet.step == 1


@torch.no_grad()
def test_evaluation_is_the_most_probable_choice() -> None:
    supernet, x = build(), ids()
    for seed in range(2):  # it follows the probabilities
        for i, logits in enumerate(supernet.arch_parameters()):
            logits.copy_(torch.randn(logits.shape, generator=torch.Generator().manual_seed(10 * seed + i)))
        out = supernet.relax().eval()(x, labels=x)
        fixed = supernet.fix(supernet.argmax())(x, labels=x)
        assert torch.equal(out.logits, fixed.logits)
        assert torch.equal(out.loss, fixed.loss)
        supernet.relax()
    assert supernet.step == 0


def test_state_is_restored() -> None:
    supernet, x = build().mode("arch"), ids()
    supernet.seed = 9
    supernet(x)
    other = build()
    other.load_state_dict(supernet.state_dict())
    assert (other.seed, other.step, other.current_mode) == (9, 1, "arch")
    assert torch.equal(other(x).logits, supernet(x).logits)
    assert torch.equal(copy.deepcopy(supernet)(x).logits, other(x).logits)
    model = tiny_model()
    foreign = convert(model, QUANT_SPACE, lora_rank=4, importance=random_importance(model.config, seed=2))
    randomize_lora(foreign)
    with pytest.raises(JointNASError, match="channel order is not this supernet's"):
        foreign.load_state_dict(supernet.state_dict())


def test_a_state_decides_which_quantizer_state_there_is() -> None:
    clipped = build()
    plain, learned = (convert(tiny_model(), QUANT_SPACE, lora_rank=4, ste="clip") for _ in range(2))
    for _, linear in learned.linears():
        linear.learn_clip()
    order = clipped.state_dict()["_extra_state"]
    for source, target in ((clipped, plain), (learned, plain), (plain, learned), (clipped, learned)):
        state = {k: v.clone() for k, v in source.state_dict().items()} | {"_extra_state": order}
        target.order = clipped.order
        target.load_state_dict(state)
        assert target.state_dict().keys() == source.state_dict().keys()
        for name, value in target.state_dict().items():
            assert torch.equal(value, state[name])


def test_loss_over_the_items_of_a_larger_batch() -> None:
    supernet, x = build().fix(QUANT_SPACE.full()), ids(2, 9)
    labels = x.clone()
    labels[0, :5] = -100
    count = (labels[:, 1:] != -100).sum()
    mean = supernet(x, labels=labels).loss
    assert torch.equal(supernet(x, labels=labels, num_items_in_batch=count).loss, mean)
    for logits in (False, True):
        part = supernet(x, labels=labels, num_items_in_batch=3 * count, return_logits=logits).loss
        torch.testing.assert_close(part, mean / 3)


def test_regularizer_is_part_of_architecture_steps() -> None:
    supernet, x = build(), ids(2, 9)
    supernet.regularizer = lambda probs: 2 * probs["hidden"][0].sum()

    def loss(mode: str, regularized: bool, **options: torch.Tensor) -> torch.Tensor:
        kept, supernet.step = supernet.regularizer, 0
        supernet.mode(mode).regularizer = kept if regularized else None
        found: torch.Tensor = supernet(x, labels=x, **options).loss
        supernet.regularizer = kept
        return found

    items = torch.tensor(64)  # of which 16 are in this batch
    for mode, added in (("weight", 0.0), ("arch", 1.0), ("full", 1.0)):
        assert (loss(mode, True) - loss(mode, False)).item() == pytest.approx(added, abs=1e-5)
        share = loss(mode, True, num_items_in_batch=items) - loss(mode, False, num_items_in_batch=items)
        assert share.item() == pytest.approx(added / 4, abs=1e-5)
    loss("arch", True).backward()
    assert supernet.arch.logits["hidden"].grad is not None
    supernet.mode("arch").eval()
    assert (loss("arch", True) - loss("arch", False)).item() == 0.0


def test_arguments_of_transformers() -> None:
    supernet, x = build().fix(QUANT_SPACE.full()), ids()
    plain = supernet(x).logits
    assert torch.equal(supernet(x, use_cache=False, output_attentions=None, return_dict=True).logits, plain)
    assert torch.equal(supernet(x, return_dict=False)[0], plain)
    with pytest.raises(JointNASError, match=r"unknown argument 'use_cache'.*Allowed: input_ids"):
        supernet(x, use_cache=True)
    with pytest.raises(JointNASError, match="Did you mean 'position_ids'"):
        supernet(x, positions_ids=x)
    with pytest.raises(JointNASError, match=r"position_ids are torch.int64 \(7,\); expected integers.*\(2, 7\)"):
        supernet(x, position_ids=torch.arange(7))


def test_what_a_trainer_asks_a_model_for() -> None:
    supernet = convert(tiny_model(torch.bfloat16), SPACE, lora_rank=4)
    assert supernet.dtype == torch.bfloat16
    assert supernet.device.type == "cpu"
    total = sum(p.numel() for p in supernet.parameters())
    trained = [*supernet.lora_parameters(), *supernet.arch_parameters()]
    assert supernet.num_parameters() == total
    assert supernet.num_parameters(exclude_embeddings=True) == total - supernet.embedding.numel()
    assert supernet.num_parameters(only_trainable=True) == sum(p.numel() for p in trained)
    supernet.gradient_checkpointing_enable({"use_reentrant": False})
    assert supernet.gradient_checkpointing
    supernet.gradient_checkpointing_disable()
    assert not supernet.gradient_checkpointing
    with pytest.raises(JointNASError, match="every_n_layers=2"):
        supernet.activation_checkpointing_enable(every_n_layers=2)
