"""`jointnas compare`: plans, equal budgets, resuming after SIGKILL, measuring, and what is said of the rows."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
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
import yaml
from pyarrow import parquet

from jointnas import budget, cli, loading
from jointnas.baselines import methods
from jointnas.campaign import measuring
from jointnas.campaign.clock import EVERY, Clock, seconds
from jointnas.campaign.page import Campaign
from jointnas.campaign.plan import Shared, Unit, asked_precisions, check, plan, targets_of
from jointnas.campaign.schedule import ordered
from jointnas.campaign.statistics import at, interval, summary
from jointnas.campaign.variants import starts_alike, variant
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
    assert rows_of(compare(config)) == before
    assert not list((root / "elsewhere").rglob("final"))


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


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD = {
    "method": ({"methods": ["joint", "subnet-selecton"]}, "method 'subnet-selecton' in compare.methods. Did you"),
    "twice": ({"seeds": [1, 1]}, "seeds names something twice"),
    "precision": ({"precisions": ["W3A8"]}, "unknown precision 'W3A8' in compare.precisions. Did you mean"),
    "both": ({"targets_ms": [1.0]}, "give one of targets_ms, target_shares and target_levels"),
    "none": ({"target_shares": []}, "are all empty: give targets"),
    "target": ({"target_shares": [1e-6]}, "its fastest choice takes"),
    "level": ({"target_shares": [], "target_levels": [1.5]}, "target_levels must be between 0 and 1"),
    "negative": ({"target_shares": [-1.0]}, "targets must be positive"),
    "exhaustive": ({"methods": ["exhaustive"]}, "too many for the method exhaustive"),
    "key": ({"method": ["joint"]}, "Did you mean 'compare.methods'?"),
    "variant key": (
        {"variants": {"a": {"search.etaa": 0}}},
        "unknown key 'search.etaa' in compare.variants.a. Did you mean 'search.eta'",
    ),
    "variant section": (
        {"variants": {"a": {"serach": {"eta": 0}}}},
        "unknown key 'serach' in compare.variants.a. Did you mean 'search'",
    ),
    "variant value": ({"variants": {"a": {"search": {"eta": "x"}}}}, "compare.variants.a: search.eta: Input should be"),
    "variant part": ({"variants": {"a": {"search.eta.x": 1}}}, "compare.variants.a: search.eta: Input should be"),
    "variant data": ({"variants": {"a": {"data.seq_len": 8}}}, "compare.variants.a: data.seq_len is the same for all"),
    "variant seed": ({"variants": {"a": {"seed": 3}}}, "compare.variants.a: seed is the same for all"),
    "variant tokens": ({"variants": {"a": {"finetune.steps": 8}}}, "compare.variants.a: finetune.steps is the same"),
    "variant longer": ({"variants": {"a": {"search.steps": 99}}}, "compare.variants.a: its search alone takes more"),
    "variant gptq": ({"variants": {"a": {"quantizer.init": "gptq"}}}, "quantizer.init gptq is for plain models"),
    "variant nothing": ({"variants": {"a": {}}}, "compare.variants.a changes nothing"),
    "variant method": ({"variants": {"ilp": {"search.eta": 0}}}, "compare.variants: 'ilp' is a method"),
    "variant name": ({"variants": {"a/b": {"search.eta": 0}}}, "compare.variants: 'a/b' names folders"),
    "variant together": (
        {"variants": {"a": {"search.lora_pairs": "shared", "quantizer.init": "reconstruct"}}},
        "compare.variants.a: Value error, search.lora_pairs: shared does not go with",
    ),
    "variant target": (
        {"methods": ["uniform"], "target_shares": [], "variants": {"a": {"search.eta": 0}}}, "are all empty: give"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_any_work(
    name: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("jointnas.loading.load_model", loaded)
    change, message = BAD[name]
    values = yaml.safe_load(dump(campaigns.config(root, compare={"target_shares": [0.6], "precisions": ["W4A8"]})))
    values["compare"] |= change
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    assert cli.main(["compare", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jointnas")]
    assert message in line
    assert not (tmp_path / "out").exists()


EXAMPLES = [path for name in ("compare", "ablations") for path in sorted((ROOT / "examples" / name).glob("*.yaml"))]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_examples_name_what_exists(path: Path) -> None:
    config = build(CompareConfig, read_yaml(path, "configuration file"), where=str(path))
    assert set(check(config, config.space.build())) == set(config.compare.methods) <= set(methods.METHODS)
    if config.compare.precisions is not None:
        assert len(asked_precisions(config, config.space.build())) == len(config.compare.precisions)
    if config.model.source == "embedded":
        config.space.build().validate(loading.model_config(config.model))


def test_the_ablations_ask_every_question() -> None:
    path = ROOT / "examples" / "ablations" / "embedded.yaml"
    config = build(CompareConfig, read_yaml(path, "configuration file"), where=str(path))
    found = {name: variant(config, name) for name in config.compare.variants}
    for key, values in {
        "depth": {"last"}, "importance": {False}, "relaxation": {"reinmax", "gumbel"}, "eta": {0},
        "bit_relaxation": {"dirichlet", "reinmax", "gumbel"}, "penalty": {"expectation"}, "entropy_stop_on": {"mean"},
        "lora_pairs": {"shared"},
    }.items():  # fmt: skip
        usual = getattr(config.search, key)
        assert {getattr(v.search, key) for v in found.values()} == values | {usual}, key
    assert {v.quantizer.init for v in found.values()} == {"reconstruct", "rtn", "clip", "omniquant"}
    apart = {name for name, v in found.items() if not starts_alike(config, v)}
    assert apart == {"last-blocks", "no-importance"} | {n for n in found if n.startswith(("init-", "one-pair"))}


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


# ---- what follows from the rows -------------------------------------------------------------------------------------


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


def row(
    method: str, seed: int, ms: float, ce: float, acc: float | None = None, target: float | None = None
) -> dict[str, Any]:
    tasks = {} if acc is None else {"a": {"acc": acc}}
    return {
        "unit": f"{method}/{seed}/{ms}", "method": method, "seed": seed, "status": "done", "target_ms": target,
        "predicted_ms": ms, "measured_ms": ms, "ce": ce, "tasks": tasks,
    }  # fmt: skip


def test_summary() -> None:
    """Against numbers found by hand: b is 0.5 nats worse, and takes twice as long for what a reaches at 2 ms."""
    rows = [row("original", 0, 9.0, 1.0)]
    for seed in (0, 1):
        rows += [row("a", seed, 1.0, 3.0), row("a", seed, 2.0, 2.0), row("a", seed, 3.0, 1.5)]
        rows += [row("b", seed, 2.0, 2.5), row("b", seed, 4.0, 2.0), row("b", seed, 3.0, 2.6)]
    found = summary(rows, [2.0, 1.0], "a", 0.9)
    methods = found["cross_entropy"]["methods"]
    assert found["latency"] == "measured_ms"
    assert "error" not in found
    assert methods["b"]["front"] == ["b/0/2.0", "b/0/4.0", "b/1/2.0", "b/1/4.0"]
    assert methods["b"]["at_latency"][0]["it_minus_reference"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "seeds": 2}
    twice = {"mean": 2.0, "low": 2.0, "high": 2.0, "seeds": 2}
    assert methods["b"]["at_quality"][0] == {"quality": 2.0, "speed_up": twice}
    assert methods["b"]["at_latency"][1]["quality"]["mean"] is None  # slower than the target
    assert methods["a"]["of_all"]["reference_minus_it"]["mean"] == 0
    x, y = 9.0 * 1.01, 3.0 * 1.01
    assert found["cross_entropy"]["corner"] == pytest.approx((x, y))
    area = (x - 1) * (y - 3) + (x - 2) * (3 - 2) + (x - 3) * (2 - 1.5)
    assert methods["a"]["of_all"]["hypervolume"]["mean"] == pytest.approx(area / ((x - 1.0) * (y - 1.0)))
    # over the targets: a reaches 3 within 1 ms and 2 within 2, b 2.5 within 2; its model at 3 ms counts nowhere
    x, whole = 2 * 1.01, (2 * 1.01 - 1) * (y - 1)
    over = {"a": ((x - 1) * (y - 3) + (x - 2) * (3 - 2)) / whole, "b": (x - 2) * (y - 2.5) / whole}
    for name, volume in over.items():
        assert methods[name]["over_targets"]["hypervolume"]["mean"] == pytest.approx(volume)
    assert methods["b"]["over_targets"]["reference_minus_it"]["mean"] == pytest.approx(over["a"] - over["b"])


def test_hypervolumes_that_there_are_not() -> None:
    """Without targets, within none of them, and where nobody errs."""
    rows = [row("a", 0, 1.0, 3.0, 1.0), row("b", 0, 2.0, 2.0, 1.0)]
    found = summary(rows, [], "a", 0.9)
    none = {"mean": None, "low": None, "high": None, "seeds": 0}
    assert found["cross_entropy"]["methods"]["a"]["over_targets"]["hypervolume"] == none
    assert found["error"]["methods"]["b"]["of_all"]["hypervolume"] == none
    found = summary(rows, [1.5], "a", 0.9)
    assert found["cross_entropy"]["methods"]["b"]["over_targets"]["hypervolume"] == none
    assert found["cross_entropy"]["methods"]["a"]["over_targets"]["hypervolume"]["mean"] > 0


def test_summary_of_accuracy_and_of_predictions() -> None:
    rows = [row("a", 0, 1.0, 3.0, 0.5), row("b", 0, 1.0, 3.0, 0.25)]
    rows[1]["measured_ms"] = None
    found = summary(rows, [1.0], "a", 0.9)
    assert found["latency"] == "predicted_ms"
    assert found["error"]["methods"]["b"]["at_latency"][0]["it_minus_reference"]["mean"] == 0.25


def test_a_quality_that_is_not_finite_is_on_no_front() -> None:
    """And moves no corner."""
    rows = [row("a", 0, 1.0, 3.0), row("b", 0, 1.5, 4.0)]
    broken = [row("a", 0, 2.0, math.inf), row("c", 0, 9.0, math.inf)]
    found, before = (summary(of, [1.0], "a", 0.9)["cross_entropy"] for of in (rows + broken, rows))
    assert found == before


def test_fixed_latencies_are_those_that_the_reference_has() -> None:
    """Both seeds' models for 1 ms take a little longer."""
    rows = [row("a", 0, 1.02, 3.0, target=1.0), row("a", 1, 1.05, 3.2, target=1.0), row("b", 0, 1.04, 4.0, target=1.0)]
    found = summary(rows, [1.0, 0.5], "a", 0.9)
    assert found["fixed_ms"] == [1.05, 0.5]
    methods = found["cross_entropy"]["methods"]
    assert methods["a"]["at_latency"][0]["quality"]["mean"] == pytest.approx(3.1)
    assert methods["b"]["at_latency"][0]["it_minus_reference"]["mean"] == pytest.approx(1.0)


def test_reading_a_front() -> None:
    front = [(1.0, 4.0), (3.0, 2.0)]
    assert at(front, 0.5) is None
    assert [at(front, x) for x in (1.0, 2.0, 3.0, 9.0)] == [4.0, 3.0, 2.0, 2.0]
    assert at([], 1.0) is None


def test_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, generator=generator).tolist()
    found = interval(values, 0.95)
    half = 1.96 * torch.tensor(values).std().item() / math.sqrt(50)
    assert found["mean"] - found["low"] == pytest.approx(half, rel=0.15)
    assert found["high"] - found["mean"] == pytest.approx(half, rel=0.15)
    assert interval([1.0], 0.95) == {"mean": 1.0, "low": None, "high": None, "seeds": 1}
    assert interval([], 0.95)["mean"] is None
