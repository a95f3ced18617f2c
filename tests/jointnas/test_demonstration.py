"""The demo's target; the demo as a whole is `make demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jointnas.verbs import demo
from jointnas.verbs.demo import TARGET, with_target
from tests.jointnas import tiny
from tests.latency.tables import synthetic


def test_target_is_a_share_of_the_fastest_single_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config(tmp_path)
    made = synthetic(config.space.build())
    seen: list[Any] = []
    monkeypatch.setattr(demo, "measure_table", lambda *given: seen.append(given[3]) or made)
    monkeypatch.setattr(demo.loading, "model_config", lambda _: tiny.model().config)
    aimed, table = with_target(config)
    bound = table.bind(table.restrict(config.space.build())[0])
    uniform = [bound.predict(choice) for _, choice in demo.single_precisions(bound)]
    assert uniform
    assert aimed.target_latency_ms == pytest.approx(TARGET * min([bound.original(), *uniform]))
    assert config.target_latency_ms is None, "what was given is left as it is"
    assert seen == [tmp_path / "latency.jsonl"]
