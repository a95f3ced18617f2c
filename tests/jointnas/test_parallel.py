"""Several ranks train as one process does, whatever they share; nobody waits long for a rank that is lost."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from jointnas import checkpoint, cli, parallel
from jointnas.bilevel import weight_step
from jointnas.config import RunConfig, build
from jointnas.data import Batches
from jointnas.losses import cross_entropy
from jointnas.metrics import read_metrics
from jointnas_kernels.errors import JointNASError
from tests.jointnas import ranks, tiny

ROOT = Path(__file__).resolve().parents[2]
State = dict[str, Any]


def losses(folder: Path) -> list[float]:
    return [loss for row in read_metrics(folder) for loss in row["losses"]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[State, list[float]]]:
    """One process, by what is distilled: parameters, and losses by step."""
    found = {}
    for train in ("full", "lora"):
        out = tmp_path_factory.mktemp("alone") / train
        found[train] = (ranks.mission(ranks.config(out, finetune={"train": train})), losses(out))
    return found


def follows(state: State, out: Path, alone: tuple[State, list[float]]) -> None:
    expected, steps = alone
    np.testing.assert_allclose(losses(out), steps, rtol=1e-6)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        # where a gradient is nothing but rounding, Adam makes a step of it
        atol = 1e-6 if name.startswith("arch.") else 1e-5
        np.testing.assert_allclose(state[name], value, rtol=1e-6, atol=atol, err_msg=name)


# ---- one trajectory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "mode", "train"),
    [
        *((1, mode, "full") for mode in ("replicate", "full")),
        (2, "replicate", "full"), (4, "replicate", "lora"), (2, "full", "lora"), (4, "full", "full"),
        (2, "hybrid", "full"), (4, "hybrid", "lora"),
    ],
)  # fmt: skip
def test_ranks_follow_one_process(alone: Any, tmp_path: Path, count: int, mode: str, train: str) -> None:
    hybrid = mode == "hybrid"  # with blocks that are recomputed, too
    sections = {"search": {"gradient_checkpointing": hybrid}, "finetune": {"gradient_checkpointing": hybrid}}
    sections["finetune"]["train"] = train
    config = ranks.config(tmp_path, mode, 2 if hybrid else None, **sections)
    found = ranks.run(count, ranks.mission, config)
    for state, _ in found:
        follows(state, tmp_path, alone[train])
        for name, value in found[0][0].items():  # all ranks have one model
            np.testing.assert_array_equal(state[name], value, err_msg=name)


def with_bits(out: Path, mode: str, **sections: Any) -> RunConfig:
    clip = {"init": "clip", "options": {"samples": 2}}
    return ranks.config(out, mode, space=tiny.SPACE, quantizer=clip, **sections)


def is_told(found: list[ranks.Ended], killed: int, out: Path) -> None:
    """All ranks but the one that was killed have raised, soon."""
    assert found[killed][0] is None
    died = float((out / ranks.DIED).read_text())
    for rank, (error, when) in enumerate(found):
        if rank != killed:
            assert isinstance(error, JointNASError), error
            assert f"rank {rank} of {len(found)}: another rank has ended" in str(error)
            assert when - died < 60


@pytest.mark.slow
def test_killed_and_resumed_ends_bit_identical(tmp_path: Path) -> None:
    """A rank dies as it writes its part of a checkpoint of the search, then one of the distillation."""
    whole = ranks.run(2, ranks.mission, with_bits(tmp_path / "whole", "full"))
    out = tmp_path / "killed"
    is_told(ranks.run(2, ranks.mission, with_bits(out, "full"), (1, "checkpoints/.step-2")), 1, out)
    assert checkpoint.steps(out / "checkpoints") == [1]
    resumed = with_bits(out, "full", resume="auto")
    is_told(ranks.run(2, ranks.mission, resumed, (0, "checkpoints-finetune/.step-2")), 0, out)
    assert checkpoint.steps(out / "checkpoints") == [2, 3]  # two are kept
    assert checkpoint.steps(out / "checkpoints-finetune") == [1]
    again = ranks.run(2, ranks.mission, resumed)
    for (state, _), (other, _) in zip(whole, again, strict=True):
        assert state.keys() == other.keys()
        for name, value in state.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)
    rows = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(folder)]
        for folder in (tmp_path / "whole", out)
    ]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_other_numbers_of_ranks_go_on(alone: Any, tmp_path: Path) -> None:
    """Four ranks begin, two go on, and one process ends; it finds whole tensors in what the four have left."""
    config = ranks.config(tmp_path, "full")
    is_told(ranks.run(4, ranks.mission, config, (2, "checkpoints/.step-3")), 2, tmp_path)
    tensors, state = checkpoint.load(tmp_path / "checkpoints" / "step-2")
    assert state["data_position"] == 2
    assert len(list((tmp_path / "checkpoints" / "step-2").glob("supernet.*-of-4.safetensors"))) == 4
    shapes = {name: tensor.shape for name, tensor in ranks.start(config).supernet.search_state().items()}
    assert {name: tensor.shape for name, tensor in tensors["supernet"].items()} == shapes
    hybrid = ranks.config(tmp_path, "hybrid", 2, resume="auto")
    is_told(ranks.run(2, ranks.mission, hybrid, (1, "checkpoints-finetune/.step-2")), 1, tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints-finetune") == [1]
    follows(ranks.mission(ranks.config(tmp_path, resume="auto")), tmp_path, alone["full"])


# ---- what ranks tell each other -------------------------------------------------------------------------------------


def diverging(config: RunConfig) -> tuple[JointNASError, float]:
    """What a weight step of ranks of which one has another seed raises, and after how long."""
    with parallel.session(config):
        run = ranks.start(config)
        if parallel.rank() == 1:
            run.config = run.config.model_copy(update={"seed": 7})
        batches = Batches(run.streams.weight, 4, 16, 0)
        began = time.monotonic()
        with pytest.raises(JointNASError) as caught:
            weight_step(run, torch.optim.SGD(run.supernet.lora_parameters(), lr=0.1), batches, 0)
        return caught.value, time.monotonic() - began


def test_other_draws_raise_on_every_rank(tmp_path: Path) -> None:
    for (error, seconds), _ in ranks.run(4, diverging, ranks.config(tmp_path)):
        assert "the architecture drawn for weight step 0 differs between ranks: 1 from 0" in str(error)
        assert seconds < 5


def tight(config: RunConfig, fits: int) -> list[float]:
    """Losses of two weight steps, where the last rank cannot compute more than so many sequences at once."""
    with parallel.session(config):
        run = ranks.start(config)

        def loss(supernet: Any, batch: Any) -> torch.Tensor:
            if parallel.rank() == parallel.world() - 1 and len(batch.ids) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return cross_entropy(supernet, batch)

        batches = Batches(run.streams.weight, 4, 16, 0)
        optimizer = torch.optim.SGD(run.supernet.lora_parameters(), lr=1.0)
        return [weight_step(run, optimizer, batches, step, loss).item() for step in range(2)]


def test_one_rank_may_compute_its_rows_in_parts(tmp_path: Path) -> None:
    """Its further draws are nobody else's business."""
    expected = tight(ranks.config(tmp_path / "alone"), 4)
    for found, _ in ranks.run(2, tight, ranks.config(tmp_path / "two"), 1):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def talk(config: RunConfig) -> list[Any]:
    """What ranks tell each other, and what one of them fails at."""
    with parallel.session(config):
        me = parallel.rank()
        said: list[Any] = [parallel.any_rank(False), parallel.any_rank(me == 1)]
        said.append(parallel.on_each(lambda: me * ["ä", None]))
        said.append(parallel.from_main(lambda: {"main": me}))

        def fail() -> Any:
            raise JointNASError(f"the disk of {me} is full")

        for broken in (0, 1):
            with pytest.raises(JointNASError) as caught:
                parallel.on_each(fail if me == broken else list)
            said.append(str(caught.value))
        with pytest.raises(JointNASError) as caught, parallel.main_first():
            fail()
        return [*said, str(caught.value)]


def test_what_ranks_tell_each_other(tmp_path: Path) -> None:
    (first, _), (second, _) = ranks.run(2, talk, ranks.config(tmp_path))
    both = [False, True, [[], ["ä", None]], {"main": 0}]
    full = [f"the disk of {rank} is full" for rank in range(2)]
    assert first == [*both, full[0], f"rank 1: {full[1]}", full[0]]
    assert second == [*both, f"rank 0: {full[0]}", full[1], f"rank 0: {full[0]}"]


def hang(config: RunConfig) -> None:
    """One rank does not answer."""
    with parallel.session(config):
        if parallel.rank() == 1:
            time.sleep(2 * config.parallel.timeout)
        parallel.any_rank(True)


def test_a_rank_that_does_not_answer_is_lost(tmp_path: Path) -> None:
    began = time.monotonic()
    (waited, when), (late, _) = ranks.run(2, hang, ranks.config(tmp_path, parallel={"timeout": 2}))
    assert "rank 0 of 2: another rank has not answered for 2 s (parallel.timeout)" in str(waited)
    assert when - began >= 2
    assert "rank 1 of 2: another rank has ended" in str(late)


# ---- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"batch_size": 6}}, "data.batch_size is 6, which 4 ranks cannot divide"),
        ({"finetune": {"batch_size": 2}}, "finetune.batch_size is 2, which 4 ranks cannot divide"),
        ({"model": {"device": "cuda:1"}}, "every rank has its own: set cuda or auto"),
        ({"mode": "hybrid", "shard": 3}, "parallel.shard is 3"),
    ],
    ids=["batch", "finetune", "device", "shard"],
)
def test_what_ranks_cannot_divide(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(JointNASError, match=message):
        parallel.check(ranks.config(tmp_path, **sections), 4)
    parallel.check(ranks.config(tmp_path, "hybrid", 2), 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"shard": 2}, "shard is of mode: hybrid"), ({"prepare": "host"}, "prepare: host is of models that are shared")],
)
def test_options_that_mean_nothing(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(JointNASError, match=message):
        ranks.config(tmp_path, parallel=options)


# ---- torchrun -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_starts_the_command_line(tmp_path: Path) -> None:
    command = ["--nproc-per-node", "2", "-m", "jointnas", "search", "--data.batch_size=3", f"--out={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "jointnas: error: data.batch_size is 3, which 2 ranks cannot divide" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_other_verbs_are_of_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["doctor"]) == 2
    assert "doctor is the work of one process, and torchrun started 2" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["slurm.sbatch", "kubernetes.yaml"])
def test_examples_of_jobs(name: str) -> None:
    """Their commands have options that exist and fit the ranks."""
    text = (ROOT / "examples" / "distributed" / name).read_text()
    if name.endswith("yaml"):
        service, job = yaml.safe_load_all(text)
        assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"]
        words = job["spec"]["template"]["spec"]["containers"][0]["command"]
    else:
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        words = shlex.split(text[text.index("srun ") :].replace("\\\n", " "))
    values = cli.parse("search", words[words.index("search") + 1 :])
    assert values is not None
    config = build(RunConfig, values)
    parallel.check(config.model_copy(update={"parallel": config.parallel.model_copy(update={"shard": 8})}), 16)
    assert config.resume == "auto"
