"""A step's memory and traffic on many GPUs, against bytes that are counted one by one."""

from __future__ import annotations

import pytest
import torch

from benchmarks import plan as page
from jointnas import cli, footprint
from jointnas.cluster import Sharding, gathering, share, summing
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import convert
from jointnas_kernels.hf.families import family
from tests.hf.hf_models import QUANT_SPACE, tiny_config
from tests.jointnas.test_footprint import config


@pytest.fixture(scope="module")
def step() -> footprint.Phase:
    return footprint.footprint(config(), tiny_config(), QUANT_SPACE)["weight step"]


def ring(parts: list[list[float]]) -> tuple[list[list[float]], int]:
    """A ring's sum of n lists of n numbers, number by number; how many each sent."""
    n, sent = len(parts), 0
    held = [list(p) for p in parts]
    for step in range(n - 1):  # each sends one part on, which is added there
        moved = [(i, (i - step) % n, held[i][(i - step) % n]) for i in range(n)]
        for i, k, value in moved:
            held[(i + 1) % n][k] += value
        sent += 1
    for step in range(n - 1):  # now each holds a whole sum, and passes it on
        moved = [(i, (i + 1 - step) % n, held[i][(i + 1 - step) % n]) for i in range(n)]
        for i, k, value in moved:
            held[(i + 1) % n][k] = value
        sent += 1
    return held, sent


@pytest.mark.parametrize("n", [2, 3, 8])
def test_traffic_is_a_rings(n: int) -> None:
    held, sent = ring([[float(10 * i + k) for k in range(n)] for i in range(n)])
    total = [sum(10.0 * i + k for i in range(n)) for k in range(n)]
    assert held == [total] * n
    assert summing(4.0 * n, n) == 4 * sent  # n numbers of 4 bytes
    assert gathering(4.0 * n, n) == 4 * sent / 2


def test_one_is_the_step_itself(step: footprint.Phase) -> None:
    alone = share(step, Sharding())
    assert alone.kinds == dict(step.kinds)
    assert (alone.inside, alone.between, alone.flops, alone.total) == (0, 0, step.flops, step.total)


@pytest.mark.parametrize("gpus", [2, 4])
def test_parts_are_those_of_its_tensors(step: footprint.Phase, gpus: int) -> None:
    """Weights and adapters of the tiny model, tensor by tensor: a part of each, and a gathered block or two."""
    model = family(tiny_config()).model._from_config(tiny_config(), dtype=torch.float32)
    net = convert(model, QUANT_SPACE, lora_rank=4)
    names = {id(p): n for n, p in net.named_parameters()}
    tensors = {t.untyped_storage().data_ptr(): t for t in (*net.parameters(), *net.buffers())}.values()
    whole = sum(t.nbytes for t in tensors)
    first, second, rest = 0, 0, 0
    for t in tensors:
        name = names.get(id(t), "")
        if name.startswith("blocks.0."):
            first += t.nbytes
        elif name.startswith("blocks.1."):
            second += t.nbytes
        elif not name.startswith("blocks."):
            rest += t.nbytes
    expected = whole / gpus + (rest + first + second) * (gpus - 1) / gpus
    kinds = share(step, Sharding(gpus)).kinds
    assert kinds["weights"] + kinds["adapters"] == pytest.approx(expected, rel=0.03)
    assert kinds["optimizer"] == pytest.approx(step.kinds["optimizer"] / gpus)
    assert kinds["activations"] == step.kinds["activations"]


def test_modes(step: footprint.Phase) -> None:
    copied, full, hybrid = (share(step, Sharding(16, mode)) for mode in ("replicate", "full", "hybrid"))
    assert full.total < hybrid.total < copied.total == step.total
    gradients = step.gradients
    assert gradients == step.kinds["adapters"]  # what a weight step trains
    weights = step.kinds["weights"] + step.kinds["adapters"]
    assert (copied.inside, copied.between) == (0, summing(gradients, 16))  # the slowest link is between machines
    assert full.between == 2 * gathering(weights, 16) + gathering(gradients, 16)
    assert hybrid.inside == 2 * gathering(weights, 8) + gathering(gradients, 8)
    assert hybrid.between == summing(gradients / 8, 2)
    inside = share(step, Sharding(8, "replicate"))
    assert (inside.inside, inside.between) == (summing(gradients, 8), 0)


def test_refused() -> None:
    with pytest.raises(JointNASError, match=r"12 GPUs: allowed are 1 to 8, or whole machines of 8; nearest: 16"):
        Sharding(12)
    with pytest.raises(JointNASError, match="replicate"):
        Sharding(8, "fully")


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["search", "--dry-run", "--data.batch_size=32", "--data.seq_len=32"]
    assert cli.main([*tiny, "--on", "h100", "--gpus", "16", "--parallel.mode", "hybrid"]) == 0
    out = capsys.readouterr().out
    for expected in ("16 of them, sharing: hybrid", "GB sent within a machine", "GB sent to others", "It fits"):
        assert expected in out
    assert cli.main([*tiny, "--on", "h100", "--gpus", "24"]) == 2
    assert "data.batch_size is 32, which 24 ranks cannot divide" in capsys.readouterr().err
    assert cli.main(["search", "--gpus", "8"]) == 2
    assert "--gpus is an option of a --dry-run" in capsys.readouterr().err


def test_the_page_is_up_to_date() -> None:
    """`python -m benchmarks.plan` would change nothing."""
    text = page.PAGE.read_text()
    assert page.render(text, page.rows()) == text
