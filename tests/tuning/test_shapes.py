"""What is measured for a space, in which order, and which plans are tried."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, Phi3Config, PretrainedConfig

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.lowbit.choice import LOCKS, candidates
from jointnas_kernels.ops.lowbit.cuda import stripe_steps, usual_plan
from jointnas_kernels.space import SearchSpace
from jointnas_kernels.tuned import Shape
from jointnas_kernels.tuning import jobs

SIZES = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 1024}
LLAMA = LlamaConfig(**SIZES, num_hidden_layers=2, vocab_size=1000)
SPACE = SearchSpace(
    hidden=[256, 512], heads=[2, 4], head_dim=[128], intermediate=[1024], blocks=[2], weight_bits=[2, 8],
    act_bits=[2, 8, 16], group_size=128, head_bits=[4, 16],
)  # fmt: skip


def test_the_largest_model_comes_first() -> None:
    found = jobs(SPACE, LLAMA, [16, 1], "bfloat16")
    count = 5 * 4 + 1  # sizes at W2 and W8, A8 and A16; the head at W4
    sizes = {(job.shape.outputs, job.shape.inputs) for job in found[: 2 * count]}
    assert sizes == {(2048, 512), (1024, 512), (512, 1024), (512, 512), (256, 512), (1000, 512)}
    assert found[0].shape == Shape(2, 8, 2048, 512)
    assert [job.tokens for job in found[: 2 * count]] == [16] * count + [1] * count
    assert {(job.least, job.tokens) for job in found} == {(1, 1), (9, 16)}
    assert len(found) == len(set(found))


def test_products_that_run_as_one_are_measured_as_one() -> None:
    """q, k and v of 4, 2 and 2 heads; gate and up. Alone, too, as latency tables measure them. The others are o's."""

    def rows(config: PretrainedConfig) -> set[int]:
        shapes = [job.shape for job in jobs(SPACE, config, [1], "bfloat16")]
        return {shape.outputs for shape in shapes if shape.inputs == 512 and shape.w_bits == 2}

    assert rows(LLAMA) == {256, 512, 1024, 512 + 2 * 256, 256 + 2 * 256, 2 * 1024}
    fused = Phi3Config(**SIZES, num_hidden_layers=2, vocab_size=1000, pad_token_id=0)
    assert rows(fused) == {256, 512, 512 + 2 * 256, 256 + 2 * 256, 2 * 1024}


def test_activations_of_few_bits_are_one_shape_but_of_planes() -> None:
    shapes = {job.shape for job in jobs(SPACE, LLAMA, [1], "float16")}
    assert {(s.w_bits, s.a_bits) for s in shapes} == {(2, 8), (2, 16), (8, 8), (8, 16), (4, 16)}
    assert {s.dtype for s in shapes} == {"float16"}
    planes = {job.shape for job in jobs(SPACE, LLAMA, [1], "bfloat16", planes=True)}
    assert {(s.w_bits, s.a_bits, s.planes) for s in planes} == {(2, 2, True), (2, 8, True)}


def test_counts_hold_for_smaller_ones() -> None:
    found = {job.tokens: job.least for job in jobs(SPACE, LLAMA, [1, 6, 8, 16, 256], "bfloat16")}
    assert found == {1: 1, 6: 2, 8: 7, 16: 9, 256: 129}


@pytest.mark.parametrize("tokens", [[], [0, 1]])
def test_counts_are_positive(tokens: list[int]) -> None:
    with pytest.raises(JointNASError, match="positive counts"):
        jobs(SPACE, LLAMA, tokens, "bfloat16")


def test_a_space_without_low_bits_has_nothing_to_measure() -> None:
    with pytest.raises(JointNASError, match="no products that the CUDA kernels take"):
        jobs(SearchSpace.named("llama3"), LLAMA, [1], "bfloat16")


@pytest.mark.parametrize("tokens", [1, 5, 33, 200, 4096])
@pytest.mark.parametrize(
    "shape",
    [Shape(4, 16, 4096, 4096), Shape(8, 8, 128256, 2048), Shape(2, 8, 17, 128), Shape(2, 4, 1024, 14336, planes=True)],
    ids=str,
)
def test_candidates_are_what_kernels_take(shape: Shape, tokens: int) -> None:
    """The checks of csrc/cuda: values they are compiled for, a lock for every block that is split, no empty split."""
    found = candidates(tokens, shape, 132)
    assert len(found) == len(set(found)) <= 100
    tiles = {"bitplane": (1, 2, 4), "tile": (8, 16), "wgmma": (8, 16), "int8": (16, 32), "stripe": (4, 8)}
    tiles["stream"] = (1, 2) if shape.a_bits == 16 else (1, 2, 4)
    tiles["half"] = (2, 4, 8, 16, 32)
    for kernel, plan in found:
        if plan is None:
            assert (kernel, shape.a_bits) == ("dense", 16)
            continue
        assert plan.token_tiles in tiles[kernel]
        most = stripe_steps(shape.outputs, shape.inputs) if kernel == "stripe" else shape.inputs // 128
        assert 1 <= plan.splits <= most
        if kernel in ("stream", "bitplane"):
            assert plan.warp_rows in (1, 2, 4, 8)
        else:
            assert plan.warp_rows == 2
        assert plan.cluster == 1 or (kernel in ("int8", "half") and plan.token_tiles % plan.cluster == 0)
        columns = tokens * (shape.a_bits if kernel == "bitplane" else 1)
        assert plan.splits == 1 or plan.blocks(columns, shape.outputs) // plan.splits <= LOCKS
        assert (kernel == "bitplane") == shape.planes
        assert kernel != "int8" or plan.splits == 1
        assert kernel in ("stream", "tile", "bitplane") or (kernel in ("half", "stripe")) == (shape.a_bits == 16)
    if tokens == 1:  # of few tokens the usual plan is among them
        kernel = "bitplane" if shape.planes else "stream"
        usual = usual_plan(kernel, 1, shape.outputs, shape.inputs, shape.w_bits, shape.a_bits, 132)
        assert usual.splits not in (1, 2, 3, 4, 6, 8, 12, 16) or (kernel, usual) in found
