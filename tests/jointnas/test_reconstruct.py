"""Block reconstruction and learning end to end: better than rounding, on the grid, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jointnas.initialise import Bits, blocks, initialise, jobs
from jointnas.initialise.blocks import Blocks
from jointnas_kernels.hf import convert, extract
from jointnas_kernels.nn.linear import FakeQuantLinear
from jointnas_kernels.ops.quant import grid
from tests.jointnas import tiny
from tests.jointnas.test_initialise import OPTIONS, G, Killed, bits_of, model, random, windows

BLOCKS = OPTIONS.model_copy(update={"end_epochs": 0})


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
@pytest.mark.parametrize("bits", [2, 4])
def test_reconstruction_is_better_than_rounding_on_every_block(family: str, bits: int) -> None:
    made = tiny.model(family).requires_grad_(False)
    rows = initialise(made, "reconstruct", windows(), bits_of(made, bits), options=BLOCKS, progress=False)
    for row in rows:
        assert row["error"] <= row["error_start"] <= row["error_rtn"]
        assert row["error"] < 0.8 * row["error_rtn"] or bits == 4
    assert sum(row["error"] for row in rows) < 0.95 * sum(row["error_rtn"] for row in rows)
    for block in made.model.layers:
        for module in block.modules():
            if isinstance(module, FakeQuantLinear):
                assert module.grid is not None
                grid.integers(module.weight, module.grid)  # on the grid, bit for bit


def test_reconstruction_of_a_supernet_learns_pairs_and_keeps_the_weights() -> None:
    torch.manual_seed(0)
    space = tiny.config("unused", {**tiny.SPACE, "weight_bits": [2, 8]}).space.build()
    supernet = convert(model(), space)
    before = {k: v.clone() for k, v in supernet.state_dict().items()}
    rows = initialise(supernet, "reconstruct", windows(), options=BLOCKS, progress=False)
    assert [(r["block"], r["weight_bits"]) for r in rows] == [(b, w) for b in range(3) for w in (2, 8)]
    assert all(r["error"] <= r["error_rtn"] for r in rows)
    assert all(r["error"] < 0.95 * r["error_rtn"] for r in rows if r["weight_bits"] == 2)
    after = supernet.state_dict()
    changed = {k.rpartition(".")[2] for k in after if k not in before or not torch.equal(after[k], before[k])}
    assert changed == {"lora_a", "lora_b", "clip"}
    ids, generator = windows(2), torch.Generator().manual_seed(0)
    for _ in range(3):  # one-hot is extracted, with pairs away from zero
        choice = space.sample(generator)
        torch.testing.assert_close(supernet.fix(choice)(ids).logits, extract(supernet, choice)(ids).logits,
                                   rtol=1e-4, atol=1e-4)  # fmt: skip


def test_inputs_of_a_supernet_come_from_blocks_of_the_same_precision() -> None:
    """Row errors are those of the block behind the blocks that were initialised before it."""
    torch.manual_seed(0)
    supernet = convert(model(), tiny.config("unused").space.build())
    ids = windows()
    rows = initialise(supernet, "reconstruct", ids, options=BLOCKS, progress=False)
    walk = Blocks(supernet, 4)
    x = walk.start(ids)
    behind = x.clone()
    for b in range(3):
        x = walk.advance(b, x)
        linears = {path: walk.layers[b].get_submodule(path) for path in walk.modules}
        weights = {f"{path}.weight": linear.merged(0) for path, linear in linears.items()}
        error = walk.mse(b, behind[11:], x[11:], weights)  # one of twelve windows is not learned from
        assert error == pytest.approx(next(r["mse"] for r in rows if (r["block"], r["weight_bits"]) == (b, 4)))
        behind = walk.advance(b, behind, weights)


def test_a_token_that_becomes_a_sink_does_not_drown_the_others() -> None:
    y = random(2, 8, 64)
    out = y + 0.1 * random(2, 8, 64, seed=1)
    usual = blocks.relative_error(out, y)
    torch.testing.assert_close(usual, ((out - y).square().sum(-1) / y.square().sum(-1)).log1p())
    out[0, 3] *= 1e4
    assert blocks.relative_error(out, y).mean() < usual.mean() + 20 / 16
    assert (blocks.relative_error(1000 * out, 1000 * y) - blocks.relative_error(out, y)).abs().max() < 1e-9


def test_without_an_improvement_the_start_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    options = BLOCKS.model_copy(update={"lr_weight": 10.0, "lr_ratio": 10.0})
    made = model()
    rows = initialise(made, "reconstruct", windows(), bits_of(made), options=options, progress=False)
    assert all(row["error"] == row["error_start"] <= row["error_rtn"] for row in rows)
    assert "did not improve on its start" in caplog.text


# ---- end to end -----------------------------------------------------------------------------------------------------


END = OPTIONS.model_copy(update={"end_epochs": 4, "end_lr_weight": 3e-3, "end_lr_ratio": 3e-3})


def divergence(original: Any, made: Any, ids: Tensor) -> float:
    """KL(original || made), nats per token."""
    own, target = made(ids).logits.log_softmax(-1), original(ids).logits.log_softmax(-1)
    return float((target.exp() * (target - own)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize(("family", "act"), [("llama", 16), ("phi3", 8), ("qwen2", 16)])
def test_end_to_end_predicts_more_like_the_original_than_blocks(family: str, act: int) -> None:
    original, by_blocks, made = (tiny.model(family).requires_grad_(False) for _ in range(3))
    ids = windows(64)
    initialise(by_blocks, "reconstruct", ids, bits_of(made, 2, act), options=BLOCKS, progress=False)
    *rows, end = initialise(made, "reconstruct", ids, bits_of(made, 2, act), options=END, progress=False)
    assert len(rows) == 3
    held = ids[56:]  # an eighth
    assert end["kl_start"] == pytest.approx(divergence(original, by_blocks, held), rel=1e-4)
    assert end["kl"] == pytest.approx(divergence(original, made, held), rel=1e-4)
    assert end["kl"] < 0.9 * end["kl_start"]
    linears = [m for m in made.modules() if isinstance(m, FakeQuantLinear)]
    assert len(linears) == 3 * len(Blocks(made).modules)
    assert {m.act_bits for m in linears} == {act}
    for module in linears:
        assert module.grid is not None
        grid.integers(module.weight, module.grid)


def test_end_to_end_without_an_improvement_keeps_the_blocks(caplog: pytest.LogCaptureFixture) -> None:
    options = END.model_copy(update={"end_lr_weight": 10.0, "end_lr_ratio": 10.0})
    made, by_blocks = model(), model()
    *_, end = initialise(made, "reconstruct", windows(), bits_of(made, 2), options=options, progress=False)
    assert end["kl"] == end["kl_start"]
    assert "did not improve on its blocks" in caplog.text
    initialise(by_blocks, "reconstruct", windows(), bits_of(made, 2), options=BLOCKS, progress=False)
    for (name, a), (_, b) in zip(made.state_dict().items(), by_blocks.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("bits", "phases"), [((2, 4, 4), 1), ((4, 4, 8), 0)])
def test_few_bits_are_learned_end_to_end_by_default(bits: tuple[int, ...], phases: int) -> None:
    made = model()
    mixed = Bits(bits, (16,) * 3, G, 32)
    rows = initialise(made, "reconstruct", windows(), mixed, options=OPTIONS, progress=False)
    assert [r.get("phase") for r in rows] == [None] * 3 + ["end to end"] * phases


def test_killed_end_to_end_keeps_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(folder: Path | None) -> tuple[Any, list[dict[str, Any]]]:
        made = model()
        return made, initialise(
            made, "reconstruct", windows(), bits_of(made, 2), options=END, folder=folder, progress=False
        )

    whole, rows = start(None)

    def killed(*args: Any) -> Any:
        raise Killed

    monkeypatch.setattr(jobs, "end_to_end", killed)
    with pytest.raises(Killed):
        start(tmp_path)
    monkeypatch.undo()
    again, resumed = start(tmp_path)
    assert resumed[-1] == rows[-1]
    monkeypatch.setattr(jobs, "end_to_end", killed)  # finished: not learned again
    finished, reported = start(tmp_path)
    assert reported == resumed
    assert [json.loads(line) for line in (tmp_path / "blocks.jsonl").read_text().splitlines()] == reported
    for other in (again, finished):
        for (name, a), (_, b) in zip(whole.state_dict().items(), other.state_dict().items(), strict=True):
            assert torch.equal(a, b), name
