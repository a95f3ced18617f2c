"""What a comparison refuses before any work, and that those of examples/ are none of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jointnas import cli, loading
from jointnas.baselines import methods
from jointnas.campaign.plan import asked_precisions, check
from jointnas.campaign.variants import starts_alike, variant
from jointnas.compare_config import CompareConfig
from jointnas.config import build, dump
from jointnas_kernels.space import read_yaml
from tests.jointnas import campaigns

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("campaign")
    campaigns.prepare(root)
    return root


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
