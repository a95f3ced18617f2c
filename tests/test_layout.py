"""The described block against transformers' modules, and its channels against their definitions."""

import pytest
import torch

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf.families import FAMILIES, build
from jointnas_kernels.layout import GROUPS, HEADS, PAIRS, TRAITS, VALUES, all_sizes, block_of, kept, size, traits
from tests.hf.hf_models import tiny_config
from tests.ops.naive import strided_pair_index


@pytest.mark.parametrize("family", TRAITS)
def test_every_parameter_of_a_layer_is_described(family: str) -> None:
    config = tiny_config(family, hidden_size=48, num_attention_heads=6, attention_bias=True, mlp_bias=True)
    with torch.device("meta"):
        layer = build(config).get_submodule("model.layers.0")
    block, sizes = block_of(config), all_sizes(config)
    shapes: dict[str, tuple[int, ...]] = {f"{norm.path}.weight": (size(norm.axis, sizes),) for norm in block.norms}
    for path, members in block.modules.items():
        rows = block.rows(members[-1], sizes).stop
        shapes[f"{path}.weight"] = (rows, size(members[0].columns, sizes))
        shapes |= {f"{path}.bias": (rows,)} if members[0].bias else {}
    assert shapes == {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert TRAITS.keys() == FAMILIES.keys()


def test_kept_channels_are_their_definition() -> None:
    full = {"heads": 12, "kv_heads": 3, "head_dim": 16}
    small = {**full, "heads": 6, "head_dim": 4}
    heads = torch.tensor([0, 1, 4, 5, 8, 9])  # the first two of each group of four
    pairs, first = strided_pair_index(16, 4), torch.arange(4)
    assert torch.equal(kept((*HEADS, *PAIRS), full, small), (heads[:, None] * 16 + pairs).flatten())
    assert torch.equal(kept((*HEADS, *VALUES), full, small), (heads[:, None] * 16 + first).flatten())
    assert torch.equal(kept((*GROUPS, *PAIRS), full, small), (torch.arange(3)[:, None] * 16 + pairs).flatten())
    assert torch.equal(kept(HEADS, full, full), torch.arange(12))


def test_other_model_types_are_refused() -> None:
    with pytest.raises(JointNASError, match=r"unknown model type 'gpt2'.*Allowed: llama"):
        traits(type("Config", (), {"model_type": "gpt2"}))
