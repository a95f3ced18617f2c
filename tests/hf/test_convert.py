"""What convert accepts and refuses; importance scores; order."""

import itertools

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaForCausalLM, LlamaModel

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import Importance, convert, extract, importance_scores
from jointnas_kernels.space import Choice, SearchSpace
from tests.hf.hf_models import LLAMA3_ROPE, QUANT_SPACE, SPACE, ids, random_importance, tiny_config, tiny_model


def test_everything_is_replaced_and_only_lora_trains() -> None:
    model = tiny_model()
    supernet = convert(model, SPACE, lora_rank=4)
    assert supernet.replaced == 3 * (7 + 2) + 1
    trained = {n.split(".")[-1] for n, p in supernet.named_parameters() if p.requires_grad and "arch" not in n}
    assert trained == {"lora_a", "lora_b"}
    assert supernet.embedding.data_ptr() == model.model.embed_tokens.weight.data_ptr()  # shared, not copied
    linear = supernet.blocks[0].attention.q_proj
    assert linear.weight.data_ptr() == model.model.layers[0].self_attn.q_proj.weight.data_ptr()
    assert linear.scaling == 16 / 4
    assert linear.lora_b.abs().max() == 0


def test_quantized_layers_have_a_pair_per_precision_and_their_group() -> None:
    supernet = convert(tiny_model(), QUANT_SPACE, lora_rank=4)
    for name, linear in supernet.linears():
        assert linear.lora_a.shape == (3, 4, linear.in_features)
        assert linear.group_size == (8 if name.endswith("o_proj") else 16)  # the smallest head_dim cuts o_proj's input
    assert supernet.arch.logits["weight_bits"].shape == (3, 3)


def test_initialisation_can_favour_the_full_size() -> None:
    probs = convert(tiny_model(), QUANT_SPACE, alpha_init=3.0).arch.probs()
    assert probs["hidden"][1] > 0.79
    assert probs["blocks"][-1] > 0.9
    assert probs["weight_bits"].std() < 1e-6
    probs = convert(tiny_model(), QUANT_SPACE).arch.probs()
    assert probs["hidden"][0] == probs["hidden"][1] == 0.5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": (16, 64)}, "hidden 64 exceeds the model's 32"),
        ({"heads": (3,)}, "heads 3 is no multiple of the model's 2 key-value heads"),
        ({"head_dim": (12,)}, "head_dim 12 does not divide the model's 16"),
        ({"blocks": (4,)}, "blocks 4 exceeds the model's 3"),
        ({"weight_bits": (4,), "group_size": 32, "hidden": (32,)}, "intermediate 16 is no multiple of 32"),
        ({"weight_bits": (4,), "group_size": 32, "hidden": (32,), "intermediate": (32,)}, "intermediate size 48 is no"),
    ],
    ids=["hidden", "heads", "head_dim", "blocks", "group-of-space", "group-of-model"],
)
def test_spaces_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(JointNASError, match=message):
        convert(tiny_model(), SearchSpace.from_dict({**SPACE.to_dict(), **change}))


def test_models_of_no_supported_family_are_refused() -> None:
    gemma = GemmaForCausalLM(
        GemmaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=4)
    )  # fmt: skip
    with pytest.raises(
        JointNASError, match=r"GemmaForCausalLM .'gemma'. is not supported.*llama \(as LlamaFor.*mistral.*qwen2.*qwen3"
    ):
        convert(gemma, SPACE)
    with pytest.raises(JointNASError, match="LlamaModel"):
        convert(LlamaModel(tiny_config()), SPACE)
    with pytest.raises(JointNASError, match="convert: Linear"):
        convert(nn.Linear(2, 2), SPACE)
    with pytest.raises(JointNASError, match="hidden_act 'gelu'"):
        convert(tiny_model(hidden_act="gelu"), SPACE)
    with pytest.raises(JointNASError, match=r"attention_dropout 0.1"):
        convert(tiny_model(attention_dropout=0.1), SPACE)
    model = tiny_model()
    model.model.layers = nn.ModuleList()
    with pytest.raises(JointNASError, match="nothing to replace"):
        convert(model, SPACE)


def test_replaced_or_adapted_linears_are_named() -> None:
    class Other(nn.Linear):
        pass

    model = tiny_model()
    model.model.layers[1].mlp.up_proj = Other(32, 48)
    with pytest.raises(JointNASError, match=r"model.layers.1.mlp.up_proj is a Other, not a plain"):
        convert(model, SPACE)


def test_rope_that_depends_on_head_dim_is_refused() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(JointNASError, match=r"rope type 'yarn'.*head_dim 8 of 16.*Allowed.*\[16\]"):
        convert(tiny_model(rope_parameters=yarn, max_position_embeddings=256), SPACE)
    supernet = convert(
        tiny_model(rope_parameters=yarn, max_position_embeddings=256),
        SearchSpace.from_dict({**SPACE.to_dict(), "head_dim": (16,)}),
    )
    choice = Choice(16, 2, 16, 16, 2)
    difference = supernet.fix(choice)(ids()).logits - extract(supernet, choice)(ids()).logits
    assert difference.abs().max() <= 1e-4
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}  # NTK: equal up to 64 positions only
    with pytest.raises(JointNASError, match=r"rope type 'dynamic'.*head_dim 8 of 16"):
        convert(tiny_model(rope_parameters=dynamic), SPACE)
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    for rope in (linear, LLAMA3_ROPE):
        convert(tiny_model(rope_parameters=rope), SPACE)


def test_extracted_models_generate_like_the_original() -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = [7, 9]
    supernet = convert(model, SPACE)
    subnet = extract(supernet, SPACE.full())
    assert subnet.generation_config.eos_token_id == [7, 9]
    assert torch.equal(subnet.generate(ids(1, 4), max_new_tokens=8), model.generate(ids(1, 4), max_new_tokens=8))


def test_extraction_of_foreign_choices_is_refused() -> None:
    supernet = convert(tiny_model(), SPACE)
    with pytest.raises(JointNASError, match="unknown blocks choice '5'"):
        extract(supernet, Choice(16, 2, 8, 16, 5))


# ---- importance -----------------------------------------------------------------------------------------------------


def direct_scores(model: LlamaForCausalLM, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The definitions, from the recorded inputs and outputs of one batch."""
    seen: dict[str, torch.Tensor] = {}

    def record(name: str, module: nn.Module, index: int | None) -> None:
        module.register_forward_hook(
            lambda m, a, o: seen.__setitem__(name, (o if index is None else a[index]).detach().double())
        )

    for i, layer in enumerate(model.model.layers):
        record(f"norm{2 * i}", layer.input_layernorm, None)
        record(f"norm{2 * i + 1}", layer.post_attention_layernorm, None)
        record(f"context{i}", layer.self_attn.o_proj, 0)
        record(f"neurons{i}", layer.mlp.down_proj, 0)
    states = model(x, output_hidden_states=True).hidden_states
    record_last: list[torch.Tensor] = []
    model.model.norm.register_forward_hook(lambda m, a, o: record_last.append(a[0].detach()))
    model(x)
    inputs = [*states[:3], record_last[0]]

    def size(t: torch.Tensor) -> torch.Tensor:
        return t.flatten(0, 1).square().sum(0)

    context = torch.stack([size(seen[f"context{i}"]) for i in range(3)]).view(3, 2, 2, 16)
    return {
        "hidden": sum(size(seen[f"norm{i}"]).sqrt() for i in range(6)),
        "heads": context.sum(-1).flatten(1).sqrt(),
        "value_dims": context.sum(2).sqrt(),
        "neurons": torch.stack([size(seen[f"neurons{i}"]).sqrt() for i in range(3)]),
        "blocks": torch.stack(
            [1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in itertools.pairwise(inputs)]
        ),
    }


def test_importance_is_its_definition(tmp_path) -> None:
    model, x = tiny_model(), ids(4, 9)
    importance = importance_scores(model, [x[:1], {"input_ids": x[1:], "labels": x[1:]}])
    for name, expected in direct_scores(model, x).items():
        torch.testing.assert_close(getattr(importance, name), expected.float(), rtol=1e-4, atol=1e-5)
    importance.save(tmp_path / "importance.safetensors")
    again = Importance.load(tmp_path / "importance.safetensors")
    assert all(torch.equal(getattr(again, n), getattr(importance, n)) for n in direct_scores(model, x))


def test_importance_ignores_padding() -> None:
    model, x = tiny_model(), ids(2, 8)
    mask = torch.ones_like(x)
    mask[1, 5:] = 0
    padded = importance_scores(model, [{"input_ids": x, "attention_mask": mask}])
    separate = importance_scores(model, [x[:1], x[1:, :5]])
    torch.testing.assert_close(padded.blocks, separate.blocks, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded.hidden, separate.hidden, rtol=1e-4, atol=1e-4)


def test_important_channels_come_first() -> None:
    model, x = tiny_model(), ids(4, 9)
    convert(model, SPACE, calibration=[x])
    after = importance_scores(model, [x])
    for scores in (after.hidden, after.neurons, after.value_dims, after.heads.view(3, 2, 2)):
        assert (scores.diff(dim=-1) <= 1e-4 * scores.max()).all()
    supernet = convert(tiny_model(), SPACE, calibration=[x])
    assert supernet.block_rank == tuple(after.blocks.argsort(descending=True).tolist())


def test_bad_importance_is_refused(tmp_path) -> None:
    model = tiny_model()
    good = random_importance(model.config)
    with pytest.raises(JointNASError, match=r"neurons has shape .*needs \(3, 48\)"):
        convert(model, SPACE, importance=Importance(good.hidden, good.heads, good.value_dims, good.heads, good.blocks))
    nan = good.hidden.clone()
    nan[3] = float("nan")
    with pytest.raises(JointNASError, match="hidden has scores that are not finite"):
        convert(model, SPACE, importance=Importance(nan, good.heads, good.value_dims, good.neurons, good.blocks))
    with pytest.raises(JointNASError, match="calibration set is empty"):
        convert(model, SPACE, calibration=[])
    with pytest.raises(JointNASError, match="does not exist"):
        Importance.load(tmp_path / "none.safetensors")
