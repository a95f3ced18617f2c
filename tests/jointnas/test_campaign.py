"""`jointnas compare`: plans, equal budgets, resuming after SIGKILL, measuring, and what is said of the rows."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet

from jointnas import budget, cli, loading
from jointnas.campaign import measuring
from jointnas.campaign.clock import EVERY, Clock, seconds
from jointnas.campaign.page import Campaign
from jointnas.campaign.plan import Shared, Unit, plan, targets_of
from jointnas.campaign.schedule import ordered
from jointnas.campaign.worker import Base
from jointnas.compare_config import CompareConfig
from jointnas.config import build, dump
from jointnas.verbs.compare import compare, text
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency import LatencyTable
from jointnas_kernels.latency.watch import Measured
from jointnas_kernels.space import Choice, read_yaml
from tests.jointnas import campaigns, tiny

ROOT = Path(__file__).resolve().parents[2]
METHODS = ["joint", "no-bits", "subnet-selection", "lonas", "tanglenas", "pruned", "ilp", "uniform", "random"]
TIMES = ("seconds", "shared_seconds")


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def untimed(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows_of(out)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("campaign")
    campaigns.prepare(root)
    return root


@pytest.fixture(scope="module")
def every(root: Path) -> Path:
    """All methods once."""
    options = {"methods": METHODS, "target_shares": [0.6], "precisions": ["W4A8"]}
    return compare(campaigns.config(root, out="every", compare=options))


def test_every_method_ends_in_a_model_within_the_target(every: Path) -> None:
    rows = rows_of(every)
    assert [row["method"] for row in rows] == ["original", *METHODS]
    assert all(row["status"] == "done" for row in rows)
    for row in rows[1:]:
        if row["target_ms"] is not None:
            assert row["predicted_ms"] <= row["target_ms"]
        folder = every / "units" / row["unit"]
        assert (folder / "final" / "config.json").is_file()
        assert not list(folder.glob("checkpoints*"))
        choice = Choice.from_dict(row["choice"])
        assert json.loads((folder / "final" / "choice.json").read_text())["choice"] == choice.to_dict()
        if row["precision"]:
            assert set(choice.weight_bits or ()) == {4}
            assert set(choice.act_bits or ()) == {8}
    assert len(parquet.read_table(every / "results.parquet")) == len(rows)


def test_the_page_says_what_the_summary_says(every: Path) -> None:
    page, rows = (every / "report.html").read_text(), rows_of(every)
    assert f"{len(rows)} of {len(rows)}</a> units have ended" in page
    assert "predicted by the latency table" in page
    assert all(f"units/{row['unit']}/row.json" in page for row in rows)
    found = json.loads(json.dumps(Campaign.load(every).found))
    assert found == json.loads((every / "summary.json").read_text())


def test_budgets_are_equal(root: Path, every: Path) -> None:
    """What the search does not take goes into the fine-tuning, to a step."""
    config = campaigns.config(root)
    total, step = budget.total(config), budget.finetune_step(config)
    assert total == 16 * 2 * (2 * 12 + 6)
    for row in rows_of(every)[1:]:
        tokens = row["tokens"]
        assert total - step < tokens["search"] + tokens["finetune"] <= total
        searched = row["method"] in ("joint", "no-bits", "tanglenas", "subnet-selection", "lonas")
        assert tokens["search"] == (budget.bilevel(config, 12) if searched else 0)
    warm = config.model_copy(update={"search": config.search.model_copy(update={"weight_warmup": 5})})
    assert budget.bilevel(warm, 12) == 16 * 2 * (12 + 7)
    assert budget.bilevel(warm, 3) == 16 * 2 * 3


def test_resuming_a_finished_campaign_and_asking_for_more(root: Path, every: Path) -> None:
    shutil.copytree(every, root / "more")
    options = {"methods": ["ilp", "uniform"], "target_shares": [0.6, 0.8], "precisions": ["W4A8"]}
    again = rows_of(compare(campaigns.config(root, out="more", compare=options)))
    assert [row["method"] for row in again] == ["original", "ilp", "ilp", "uniform"]
    before = {row["unit"]: row for row in rows_of(every)}
    assert [before.get(row["unit"]) == row for row in again] == [True, False, True, True]


def test_targets_are_levels_of_the_space(root: Path) -> None:
    config = campaigns.config(root, compare={"target_shares": [], "target_levels": [0.0, 1.0, 0.25]})
    table, space = LatencyTable.load(root / "table.jsonl", force=True), config.space.build()
    least, most = table.bind(space).extremes()
    assert targets_of(config, space, table) == [most, least + 0.25 * (most - least), least]


def test_a_campaign_goes_on_from_its_rows_alone(root: Path, every: Path) -> None:
    """Folders of units are gone, as on another machine: what has ended is not done again, but measured again."""
    options = {"methods": METHODS, "target_shares": [0.6], "precisions": ["W4A8"]}
    config = campaigns.config(root, out="elsewhere", compare=options)
    (root / "elsewhere").mkdir()
    for name in ("config.yaml", "results.jsonl"):
        shutil.copy(every / name, root / "elsewhere")
    before = rows_of(every)
    lines = [json.dumps({**row, "measured_ms": 9.0}) + "\n" for row in before]
    (root / "elsewhere" / "results.jsonl").write_text("".join(lines))
    fewer = campaigns.config(root, out="elsewhere", compare={**options, "methods": METHODS[:1]})
    assert len(rows_of(compare(fewer))) == 2, "the original and one"
    assert rows_of(compare(config)) == before, "rows that were not asked for in between are kept"
    assert not list((root / "elsewhere").rglob("final"))
    # on a machine of another kind, whose table is that of the campaign
    shutil.copy(root / "table.jsonl", root / "elsewhere" / "latency.jsonl")
    latency = [config.latency.model_copy(update={"table": None, "calibrate": 0, "force": yes}) for yes in (False, True)]
    own, forced = (config.model_copy(update={"latency": section}) for section in latency)
    (root / "elsewhere" / "config.yaml").write_text(dump(own))
    with pytest.raises(JointNASError, match=r"latency\.jsonl .* another device"):
        compare(own)
    assert rows_of(compare(forced)) == before
    assert (root / "elsewhere" / "latency.jsonl").read_bytes() == (root / "table.jsonl").read_bytes()
    (root / "elsewhere" / "config.yaml").write_text(dump(config))
    (root / "elsewhere" / "results.jsonl").write_text(json.dumps({**before[0], "unit": "../../x"}))
    with pytest.raises(JointNASError, match=r"'\.\./\.\./x' is no name of a unit"):
        compare(config)
    (root / "elsewhere" / "results.jsonl").write_text(json.dumps({"unit": "original"}))
    with pytest.raises(JointNASError, match=r"results\.jsonl cannot be read: KeyError 'method'; it is damaged"):
        compare(config)


def test_another_configuration_is_refused(root: Path, every: Path) -> None:
    options = {"methods": METHODS, "target_shares": [0.6], "precisions": ["W4A8"]}
    with pytest.raises(JointNASError, match=r"holds another campaign: search\.steps was 12, is 13"):
        compare(campaigns.config(root, out="every", compare=options, search={"steps": 13}))
    config = campaigns.config(root, out="every", compare=options).model_copy(update={"resume": "never"})
    with pytest.raises(JointNASError, match="already holds a campaign; pass --resume"):
        compare(config)


def test_variants_are_methods_of_their_own(root: Path, every: Path) -> None:
    """Added to a finished campaign: what was there stays, quantizers are shared where they are the same, and the tokens
    are the campaign's whatever a variant's search takes."""
    shutil.copytree(every, root / "variants")
    options = {"methods": METHODS, "target_shares": [0.6], "precisions": ["W4A8"], "variants": {
        "no-latency": {"search.eta": 0}, "one-pair": {"search": {"lora_pairs": "shared"}, "finetune.kd": 0.5},
        "short": {"search.steps": 4, "search.entropy_stop_on": "mean"}, "rtn": {"quantizer.init": "rtn"},
    }}  # fmt: skip
    config = campaigns.config(root, out="variants", compare=options)
    rows = rows_of(compare(config))
    assert rows[: 1 + len(METHODS)] == rows_of(every)
    new = rows[1 + len(METHODS) :]
    assert [row["method"] for row in new] == [row["pipeline"] for row in new] == list(options["variants"])
    for row in new:
        assert row["status"] == "done"
        assert row["predicted_ms"] <= row["target_ms"]
        assert row["unit"] == f"{row['method']}/{row['target_ms']:.6g}ms/seed-0"
        tokens = row["tokens"]
        assert tokens["search"] == budget.bilevel(config, 4 if row["method"] == "short" else 12)
        left = budget.total(config) - tokens["search"]
        assert left - budget.finetune_step(config) < tokens["finetune"] <= left
    assert sorted(f.name for f in (root / "variants" / "shared").glob("quantizers*")) == [
        "quantizers", "quantizers-one-pair", "quantizers-rtn"
    ]  # fmt: skip
    summed = json.loads((root / "variants" / "summary.json").read_text())
    assert summed["reference"] == "joint"
    assert set(options["variants"]) < set(summed["cross_entropy"]["methods"])
    used = {f.parts[-4]: read_yaml(f, "") for f in (root / "variants").glob("units/*/*/*/config.yaml")}
    assert (used["no-latency"]["search"]["eta"], used["joint"]["search"]["eta"]) == (0, 1)
    assert (used["one-pair"]["search"]["lora_pairs"], used["one-pair"]["finetune"]["kd"]) == ("shared", 0.5)

    without = {**options, "variants": {}}
    assert [row["method"] for row in rows_of(compare(campaigns.config(root, out="variants", compare=without)))] == [
        "original", *METHODS
    ]  # fmt: skip
    options["variants"]["no-latency"] = {"search": {"eta": 0.0}}  # the same
    again = campaigns.config(root, out="variants", compare=options)
    assert untimed(compare(again)) == [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    options["variants"]["no-latency"] = {"search.eta": 0.5}
    with pytest.raises(JointNASError, match=r"no-latency was {'search\.eta': 0\.0}, is {'search\.eta': 0\.5}"):
        compare(campaigns.config(root, out="variants", compare=options))
    for folder in ("units", "shared"):  # of what is left, the rows say that it had begun
        shutil.rmtree(root / "variants" / folder)
    with pytest.raises(JointNASError, match=r"compare\.variants\.no-latency was"):
        compare(campaigns.config(root, out="variants", compare=options))


def test_infeasible_units_say_why(root: Path) -> None:
    options = {"methods": ["uniform", "ilp", "no-bits"], "target_shares": [0.055], "precisions": ["W8A16"]}
    out = compare(campaigns.config(root, out="infeasible", compare=options))
    rows = {row["method"]: row for row in rows_of(out)}
    assert rows["uniform"]["status"] == "done"
    assert rows["ilp"]["status"] == rows["no-bits"]["status"] == "infeasible"
    assert "does not reach" in rows["ilp"]["reason"]
    assert "no choice of the space satisfies the limits" in rows["no-bits"]["reason"]
    assert "–" in text(out)


SMALL = {**tiny.SPACE, "hidden": [128], "heads": [4], "head_dim": [32], "intermediate": [64, 192], "blocks": [1, 3],
         "weight_bits": [4], "act_bits": [8]}  # fmt: skip


def test_exhaustive_has_every_model_once(tmp_path: Path) -> None:
    campaigns.prepare(tmp_path, SMALL)
    config = campaigns.config(tmp_path, SMALL, finetune={"steps": 1}, search={"steps": 1},
                              compare={"methods": ["exhaustive"]})  # fmt: skip
    rows = rows_of(compare(config))[1:]
    assert {(row["choice"]["intermediate"], row["choice"]["blocks"]) for row in rows} == {
        (i, b) for i in (64, 192) for b in (1, 3)
    }
    assert len(rows) == 4


# ---- plans and processes --------------------------------------------------------------------------------------------


def test_plan(root: Path) -> None:
    config = campaigns.config(root, compare={
        "methods": ["joint", "no-bits", "uniform", "random"], "targets_ms": [0.3, 0.5], "seeds": [0, 3], "randoms": 2,
    })  # fmt: skip
    base = Base.load(config)
    units = plan(config, base.space, base.table, tiny.model().config)
    # the paper's precisions that the space has: W4A16, W8A8, W8A16
    assert len(units) == 1 + 2 * 2 + 3 * 2 * 2 + 3 * 2 + 2 * 2 * 2
    assert len({unit.name for unit in units}) == len(units)
    assert targets_of(config, base.space, base.table) == [0.5, 0.3]
    tasks = ordered(units)
    assert [t for t in tasks if isinstance(t, Shared)] == [Shared("quantizers", 0), Shared("quantizers", 3)]
    assert all(tasks.index(need) < tasks.index(task) for task in tasks for need in task.needs)
    assert Unit("subnet-selection", 1).needs == [Shared("subnet-selection", 1)]
    assert Unit("joint", 1, variant="a").needs == [Shared("quantizers", 1)]
    assert Unit("joint", 1, variant="a", quantizers="a").needs == [Shared("quantizers", 1, "a")]


@pytest.mark.slow
def test_the_command_on_two_processes(root: Path, every: Path, tmp_path: Path) -> None:
    """What the worker processes leave is what one process left."""
    options = {"methods": ["subnet-selection", "ilp", "uniform"], "target_shares": [0.6], "precisions": ["W4A8"]}
    config = campaigns.config(root, out="two", compare=options)
    (tmp_path / "c.yaml").write_text(dump(config))
    assert cli.main(["compare", "--config", str(tmp_path / "c.yaml"), "--processes", "2", "--resume"]) == 0
    alone = {row["unit"]: row for row in untimed(every)}
    assert all(row == alone[row["unit"]] for row in untimed(root / "two"))
    assert len(rows_of(root / "two")) == 4


def killed_and_continued(root: Path, processes: int, kills: int, seed: int) -> int:
    """Runs the campaign of `campaigns.KILLED`, killing it so often, each time up to 4 seconds after it left something;
    how often it was."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.jointnas.campaigns", str(root), str(processes)]
    generator = random.Random(seed)
    for happened in itertools.count():
        before = newest(root / "out")
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        try:
            while happened < kills and newest(root / "out") == before and process.poll() is None:
                time.sleep(0.01)
            process.wait(generator.uniform(0, 4) if happened < kills else 300)
            assert process.returncode == 0
            return happened
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.wait(60)
    raise AssertionError


def newest(out: Path) -> float:
    """When something of a campaign's tasks changed last."""
    times = [0.0]
    for path in itertools.chain((out / "units").rglob("*"), (out / "shared").rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign that nobody killed, on two processes."""
    folder = tmp_path_factory.mktemp("whole")
    campaigns.prepare(folder)
    killed_and_continued(folder, 2, 0, seed=0)
    return folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments_it_ends_with_the_same_rows(tmp_path: Path, whole: Path, processes: int) -> None:
    campaigns.prepare(tmp_path)
    times = killed_and_continued(tmp_path, processes, int(os.environ.get("JOINTNAS_KILLS", "3")), seed=0)
    assert times > 0
    assert untimed(whole) == untimed(tmp_path / "out")


def test_clock_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert EVERY > 1
    monkeypatch.setattr("jointnas.campaign.clock.EVERY", 0.01)
    with Clock(tmp_path):
        time.sleep(0.1)
        assert 0 < seconds(tmp_path) < 0.2  # written meanwhile
    first = seconds(tmp_path)
    with Clock(tmp_path) as clock:
        assert clock.seconds >= first >= 0.1


# ---- measuring -----------------------------------------------------------------------------------------------------


def test_all_models_are_measured_in_turns(root: Path, every: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known values are kept only while they are those of all rows."""
    base, rows = Base.load(loading.resolve(campaigns.config(root, out="every"))), rows_of(every)
    calls: list[int] = []

    def in_turns(makers: Any, sizes: Any, table: Any) -> list[Measured]:
        calls.append(len(makers))
        assert all(isinstance(make(), torch.nn.Module) for make in makers)
        return [Measured(1.0 + i, 1.0, 1.0, 9, False) for i in range(len(makers))]

    monkeypatch.setattr(measuring, "is_here", lambda table: True)
    monkeypatch.setattr(measuring, "deployed", lambda model, *_: model)
    monkeypatch.setattr(measuring, "measure_in_turns", in_turns)
    found = measuring.measured(base, rows)
    assert [found[row["unit"]]["measured_ms"] for row in rows] == [1.0 + i for i in range(len(rows))]
    assert measuring.measured(base, rows) == found
    assert len(measuring.measured(base, rows[:-1])) == len(rows) - 1
    assert calls == [len(rows), len(rows) - 1]
    (every / measuring.FILE).unlink()


@pytest.mark.slow
def test_a_table_of_this_machine_is_made_and_models_are_measured(tmp_path: Path) -> None:
    campaigns.prepare(tmp_path)
    config = campaigns.config(
        tmp_path, SMALL, search={"steps": 2}, finetune={"steps": 1},
        compare={"methods": ["uniform", "no-bits"], "target_shares": [0.9], "precisions": ["W4A8"]},
    )  # fmt: skip
    latency = {"seq": 8, "seconds_per_operation": 1e-4, "calibrate": 2, "busy": "mark"}
    out = compare(build(CompareConfig, {**config.model_dump(), "latency": latency}))
    rows = rows_of(out)
    assert (out / "latency.jsonl").is_file()
    assert [row["method"] for row in rows] == ["original", "uniform", "no-bits"]
    assert all(row["measured_ms"] > 0 for row in rows if row["status"] == "done")
    assert json.loads((out / "summary.json").read_text())["latency"] == "measured_ms"
