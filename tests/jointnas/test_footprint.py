"""What a search needs, planned on the meta device: exact where it can be, and close to what a process really takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jointnas import cli, footprint
from jointnas.config import RunConfig
from jointnas.verbs import dry_run as planning
from jointnas_kernels.hf import convert
from jointnas_kernels.hf.families import family
from jointnas_kernels.nn import loss
from jointnas_kernels.space import SearchSpace
from tests.hf.hf_models import QUANT_SPACE, tiny_config

SPACE = QUANT_SPACE
WITHOUT_BITS = replace(SPACE, weight_bits=None, act_bits=None)


def config(**options: Any) -> RunConfig:
    values = {"data": {"batch_size": 2, "seq_len": 24}, "search": {"lora_rank": 4}, "model": {"dtype": "float32"}}
    return RunConfig(**values | options)


@pytest.fixture(scope="module")
def phases() -> dict[str, footprint.Phase]:
    return footprint.footprint(config(), tiny_config(), SPACE)


@pytest.mark.parametrize("space", [SPACE, WITHOUT_BITS], ids=["bits", "sizes"])
def test_what_stays_is_exact(space: SearchSpace) -> None:
    phase = footprint.footprint(config(), tiny_config(), space)["weight step"]
    found = phase.kinds
    model = family(tiny_config()).model._from_config(tiny_config(), dtype=torch.float32)
    net = convert(model, space, lora_rank=4)
    adapters = sum(p.nbytes for p in net.lora_parameters())
    tensors = {t.untyped_storage().data_ptr(): t.nbytes for t in (*net.parameters(), *net.buffers())}
    assert found["adapters"] == adapters
    assert phase.gradients == adapters
    assert adapters * 2 <= found["optimizer"] <= adapters * 2 + 4096  # with its step counters
    assert found["weights"] == pytest.approx(sum(tensors.values()) - adapters, rel=0.02)


@pytest.mark.parametrize("options", [
    {}, {"search": {"lora_rank": 4, "gradient_checkpointing": True}, "finetune": {"gradient_checkpointing": True}},
    {"model": {"dtype": "bfloat16"}, "finetune": {"train": "lora"}}, {"data": {"batch_size": 1, "seq_len": 8}},
    {"model": {"dtype": "bfloat16", "base_bits": 8}, "search": {"lora_rank": 4, "gradient_checkpointing": True},
     "finetune": {"train": "lora", "gradient_checkpointing": True}},
], ids=["plain", "checkpoints", "lora", "few tokens", "packed"])  # fmt: skip
@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [64, 8192])
def test_blocks_are_alike(options: dict[str, Any], vocabulary: int) -> None:
    """Steps of two and of three blocks give those of seven, also where gradients are the most there is in seven, and
    logits in two."""
    model_config = tiny_config()
    model_config.vocab_size, model_config.num_hidden_layers = vocabulary, 7
    space = replace(SPACE, blocks=(6, 7))
    found = footprint.footprint(config(**options), model_config, space)
    for name, direct in footprint._steps(config(**options), model_config, space).items():
        largest = max(sum(kinds.values()) for kinds in direct.peaks.values())
        assert found[name].total == pytest.approx(largest, rel=0.01)
        assert min(found[name].kinds.values()) >= 0
        assert found[name].flops == direct.flops
        assert found[name].gradients == pytest.approx(direct.gradients, abs=64)  # options of the number of blocks


def _multiplied(space: SearchSpace) -> int:
    """Weights of the blocks' linears, and of the head."""
    of, full = tiny_config(), space.full()
    attention = full.hidden * full.head_dim * (2 * full.heads + 2 * of.num_key_value_heads)
    return full.blocks * (attention + 3 * full.hidden * full.intermediate) + full.hidden * of.vocab_size


@pytest.mark.slow
@pytest.mark.parametrize("space", [SPACE, WITHOUT_BITS], ids=["bits", "sizes"])
def test_operations_are_those_of_the_products(space: SearchSpace) -> None:
    """Forward and backward of a frozen model 4 per weight and token, of a trained one 6, of its teacher 2 more; and a
    tenth for attention, which is small here, and LoRA of rank 1."""
    found = footprint.footprint(config(search={"lora_rank": 1}), tiny_config(), space)
    tokens, weights = 2 * 24, _multiplied(space)
    lora = 1.25  # of three precisions, their gradients, and their products
    assert 4 * tokens * weights <= found["weight step"].flops <= 4 * lora * tokens * weights
    assert 8 * tokens * weights <= found["distillation"].flops <= 8 * 1.1 * tokens * weights
    more = 6 if space.weight_bits else 4  # probabilities of bits read the gradient of the mixed weight
    assert more * tokens * weights * 0.9 <= found["architecture step"].flops <= more * lora * tokens * weights


def test_operations_of_a_product_with_lora() -> None:
    from jointnas_kernels.ops.width.linear import mixed_linear

    with FlopCounterMode(display=False) as flops:
        mixed_linear(torch.ones(5, 7), torch.ones(3, 7), lora_a=torch.ones(2, 7), lora_b=torch.ones(3, 2), scaling=1.0)
    assert flops.get_total_flops() == 2 * 5 * (3 * 7 + 2 * 7 + 3 * 2)


@pytest.mark.slow
def test_less_is_kept_with_checkpoints_and_lora() -> None:
    long = {"batch_size": 4, "seq_len": 64}
    plain = footprint.footprint(config(data=long), tiny_config(), SPACE)
    options = {"search": {"lora_rank": 4, "gradient_checkpointing": True}, "finetune": {"train": "lora"}}
    less = footprint.footprint(config(data=long, **options), tiny_config(), SPACE)
    for name in footprint.PHASES[:2]:
        assert less[name].kinds["activations"] < plain[name].kinds["activations"]
        assert less[name].flops > plain[name].flops
    assert less["distillation"].kinds["optimizer"] < plain["distillation"].kinds["optimizer"]


@pytest.mark.slow
def test_packed_base_weights_take_half() -> None:
    more = {"search": {"lora_rank": 4, "gradient_checkpointing": True},
            "finetune": {"train": "lora", "gradient_checkpointing": True}}  # fmt: skip
    found = [
        footprint.footprint(config(model={"dtype": "bfloat16", "base_bits": bits}, **more), tiny_config(), SPACE)
        for bits in (None, 8)
    ]
    linears = _multiplied(SPACE) - tiny_config().vocab_size * SPACE.full().hidden
    for name in footprint.PHASES:
        usual, packed = (plan[name].kinds for plan in found)
        assert usual["weights"] - packed["weights"] == pytest.approx(linears, rel=0.1)  # a byte each, but for scales
    usual, packed = (plan["distillation"].kinds for plan in found)
    assert usual["trained weights"] - packed["trained weights"] == pytest.approx(linears, rel=0.1)


@pytest.mark.slow
def test_the_loss_of_distillation_is_that_of_the_device() -> None:
    """A CPU takes fewer logits at once."""
    model_config = tiny_config()
    model_config.vocab_size = 1 << 15
    cpu, gpu = (
        footprint.footprint(config(model={"device": device, "dtype": "float32"}), model_config, SPACE)
        for device in ("cpu", "cuda")
    )
    assert cpu["distillation"].kinds["logits and loss"] < gpu["distillation"].kinds["logits and loss"]
    assert "meta" not in loss.PARTS


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3"])
def test_every_family(family: str) -> None:
    assert all(p.total > 0 for p in footprint.footprint(config(), tiny_config(family), SPACE).values())


# ---- the command ----------------------------------------------------------------------------------------------------

EMBEDDED = ["search", "--dry-run", "--data.batch_size=2", "--data.seq_len=32"]


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*EMBEDDED, "--on", "h100"]) == 0
    out = capsys.readouterr().out
    for expected in ("NVIDIA H100", "5,770,496 parameters", "weight step", "distillation", "optimizer", "It fits"):
        assert expected in out
    assert list(tmp_path.iterdir()) == []


def sized(of: RunConfig) -> dict[str, footprint.Phase]:
    """10 GB for every sequence; a fifth of it with checkpoints; 40 GB for the copies of a full distillation."""
    per = 10e9 * (0.2 if of.search.gradient_checkpointing else 1)
    phases = {
        name: footprint.Phase({"activations": per * of.data.batch_size}, 1e12) for name in footprint.PHASES[:2]
    }
    copies = 40e9 if of.finetune.train == "full" else 0.0
    batch = of.finetune.batch_size or of.data.batch_size
    return phases | {footprint.PHASES[2]: footprint.Phase({"activations": per * batch, "optimizer": copies}, 1e12)}


@pytest.mark.parametrize(
    "options, fits, expected",
    [
        (["--data.batch_size=3"], True, "It fits: 70.0 GB of the 76.0 GB"),
        (["--data.batch_size=7"], False, "With --finetune.train lora it would: 70.0 GB"),
        (["--data.batch_size=16"], False, "gradient_checkpointing true it would: 32.0 GB"),
        (["--data.batch_size=64"], False, "--data.batch_size 32 --finetune.batch_size 32 it would: 64.0 GB"),
    ],
    ids=["fits", "lora", "checkpoints", "batch"],
)
def test_what_would_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], fits: bool, expected: str
) -> None:
    monkeypatch.setattr(planning, "footprint", lambda config, *_: sized(config))
    code = cli.main(["search", "--dry-run", "--on=h100", *options])
    out, err = capsys.readouterr()
    assert expected in out
    assert code == (0 if fits else 2)
    assert fits or "does not fit" in err


def test_nothing_would_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    huge = {name: footprint.Phase({"weights": 1e12}, 1e12) for name in footprint.PHASES}
    monkeypatch.setattr(planning, "footprint", lambda *_: huge)
    assert cli.main(["search", "--dry-run", "--on=a100"]) == 2
    assert "neither do smaller batches" in capsys.readouterr().out


def test_unknown_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", "--dry-run", "--on=h10"]) == 2
    assert "h100" in capsys.readouterr().err


def test_search_knows_no_device_without_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", "--on=h100"]) == 2
    assert "--on" in capsys.readouterr().err
