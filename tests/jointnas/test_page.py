"""The page of a campaign: of a folder written here, of what is unfinished or strange in it, and in a browser."""

from __future__ import annotations

import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib import pyplot

from jointnas import cli, plots
from jointnas.campaign.page import Campaign
from jointnas.campaign.plan import Unit
from jointnas.campaign.statistics import summary
from jointnas.compare_config import CompareConfig
from jointnas.config import build, dump
from jointnas.precision import Precision
from jointnas.verbs.report import report
from jointnas_kernels.errors import JointNASError
from tests.jointnas import browser

METHODS = {"joint": 0.0, "no-bits": 0.25, "subnet-selection": 0.4, "uniform": 0.9, "random": 1.5}  # nats behind
TARGETS = [0.6, 0.4, 0.2]
DEPTH = 6
REASON = "target 0.2 ms: its fastest choice takes 0.3 ms"


def row(unit: Unit, tasks: bool = True) -> dict[str, Any]:
    """Of a made-up model."""
    behind = METHODS.get(unit.method, -1.0)
    target = unit.target_ms or 0.5
    facts = {
        "unit": unit.name, "method": unit.method, "pipeline": unit.pipeline, "target_ms": unit.target_ms,
        "precision": None if unit.precision is None else str(unit.precision), "seed": unit.seed, "number": None,
        "caveat": "",
    }  # fmt: skip
    ms = target * (0.97 - 0.01 * unit.seed)
    ce = 3.0 + 0.3 / target + behind + 0.05 * unit.seed
    made = {
        "choice": {"hidden": 128, "heads": 4, "head_dim": 32, "intermediate": 192, "blocks": DEPTH - 1, "head_bits": 8,
                   "weight_bits": [2, 4, 8, 4, 4, 2], "act_bits": [8] * DEPTH},
        "block_rank": [0, 1, 2, 4, 5, 3], "about": {"converged": unit.seed == 0, "steps": 200, "repaired": ["a < b"]},
    }  # fmt: skip
    accuracy = {"gloss": {"acc": 0.5 - behind / 10, "acc_stderr": 0.02, "items": 300}}
    return {
        **facts, "status": "done", **({} if unit.method == "original" else made),
        "tokens": {"search": 1000, "finetune": 2000, "evaluated": 300}, "params": 5_800_000, "bytes": 3e6,
        "predicted_ms": ms, "measured_ms": ms * (1.04 - 0.05 * unit.seed), "contended": unit.seed == 1,
        "perplexity": math.exp(ce), "context": 256, "ce": ce, "tasks": accuracy if tasks else {}, "seconds": 100.5,
        "shared_seconds": 10.0,
    }  # fmt: skip


def units(seeds: int) -> list[Unit]:
    return [Unit("original", 0)] + [
        Unit(method, seed, None if method == "uniform" else target, precision)
        for method in METHODS
        for precision in ([Precision(4, 8), Precision(8, 8)] if method in ("no-bits", "uniform") else [None])
        for target in (TARGETS[:1] if method == "uniform" else TARGETS)
        for seed in range(seeds)
    ]


def campaign(folder: Path, seeds: int = 2, rows: list[dict[str, Any]] | None = None) -> Path:
    """A campaign's folder."""
    options = {"methods": list(METHODS), "targets_ms": TARGETS, "seeds": list(range(seeds))}
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(build(CompareConfig, {"compare": options})))
    planned = units(seeds)
    (folder / "plan.json").write_text(json.dumps({"targets_ms": TARGETS, "units": [unit.name for unit in planned]}))
    rows = [row(unit) for unit in planned] if rows is None else rows
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


class Parsed(HTMLParser):
    """Ids, links and text of a page; everything it names outside itself."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        of = dict(attrs)
        self.ids += [of["id"]] if of.get("id") else []  # type: ignore[list-item]
        self.links += [of["href"]] if tag == "a" and of.get("href") else []  # type: ignore[list-item]
        self.sources += [of["src"]] if of.get("src") else []  # type: ignore[list-item]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def parsed(folder: Path) -> Parsed:
    """The page of a campaign, whose links lead to what there is, and which loads nothing."""
    found = Parsed(report(str(folder)).read_text())
    assert len(set(found.ids)) == len(found.ids)
    inside = {link[1:] for link in found.links if link.startswith("#")}
    assert inside <= set(found.ids)
    assert all(source.startswith("data:image/png;base64,") for source in found.sources)
    assert not found.tags & {"script", "iframe", "object"}
    return found


def without(page: Parsed, *names: str) -> bool:
    return not any(name in page.text for name in names)


def test_a_finished_campaign(tmp_path: Path) -> None:
    folder = campaign(tmp_path / "a")
    page = parsed(folder)
    rows = [row(unit) for unit in units(2)]
    assert page.text.index("joint beats no-bits, the strongest other method, by") < page.text.index("units have ended")
    assert f"{len(rows)} of {len(rows)} units have ended: {len(rows)} models, 0 infeasible" in page.text
    assert len(page.sources) == 2  # fronts, calibration
    titles = (
        "Fronts", "Hypervolume and cross-entropy", "Hypervolume and error of the tasks", "Models", "Accuracy (%)",
        "Bits per block of joint", "Calibration", "Budget", "How the searches ended", "Rows",
    )  # fmt: skip
    assert all(title in page.text for title in titles)
    assert f"row-{'joint/0.6ms/seed-1'.replace('/', '-')}" in page.ids
    assert "units/no-bits%2BW4A8/0.6ms/seed-0/row.json" in page.links
    mean = sum(abs(r["predicted_ms"] / r["measured_ms"] - 1) for r in rows) / len(rows)
    assert f"Mean relative error of the prediction: {mean:.1%} over {len(rows)} models" in page.text
    assert "undecided" in page.text
    assert "2/8" in page.text
    assert "×" in page.text
    assert "a < b" in page.text  # escaped in the page


def test_numbers_are_those_of_the_summary_and_lead_to_their_rows(tmp_path: Path) -> None:
    folder = campaign(tmp_path / "a")
    source = report(str(folder)).read_text()
    rows = [row(unit) for unit in units(2)]
    found = summary(rows, TARGETS, "joint", 0.95)
    assert Campaign.load(folder).found == found
    for of in found["cross_entropy"]["methods"].values():
        for part in ("over_targets", "of_all"):
            volume = of[part]["hypervolume"]
            text = f"{volume['mean']:.3f} [{volume['low']:.3f}, {volume['high']:.3f}]"
            assert f'<a href="#rows-{of["method"]}">{text}</a>' in source
    for one in rows:
        anchor = "row-" + re.sub(r"[/+]", "-", one["unit"])
        assert f'<a href="#{anchor}">{one["perplexity"]:,.2f}</a>' in source
        assert f'<a href="#{anchor}">{one["predicted_ms"]:.3f}</a>' in source
        after = source[source.index(f'id="{anchor}"') :]
        raw = after[after.index("<pre>") + 5 : after.index("</pre>")]
        assert json.loads(html.unescape(raw)) == one
    # every number of a table, but for the heads of its columns, is inside a link
    for cell in re.findall(r"<td>(.*?)(?=<td>|<tr>|</table>)", source):
        outside = re.sub(r"<a .*?</a>", "", cell)
        assert not re.search(r"\d", re.sub(r"<[^>]*>", "", outside)), cell


def test_an_unfinished_campaign(tmp_path: Path) -> None:
    rows = [row(unit) for unit in units(2)]
    some = [{k: v for k, v in r.items() if k not in ("measured_ms", "contended")} for r in rows[:9]]
    page = parsed(campaign(tmp_path / "some", rows=some))
    assert f"9 of {len(rows)} units have ended: 9 models" in page.text
    assert "So far: joint beats no-bits" in page.text
    assert "Latencies are predicted by the latency table" in page.text
    assert without(page, "Calibration", "disturbed")
    page = parsed(campaign(tmp_path / "one", rows=some[:1]))
    assert "Nothing to compare in cross-entropy: there is no model of joint." in page.text
    page = parsed(campaign(tmp_path / "own", rows=some[:3]))
    assert "there is no model of another method than joint." in page.text
    page = parsed(campaign(tmp_path / "none", rows=[]))
    assert f"0 of {len(rows)} units have ended." in page.text
    (tmp_path / "none" / "results.jsonl").unlink()
    assert parsed(tmp_path / "none").text == page.text
    older = campaign(tmp_path / "older")
    (older / "plan.json").unlink()
    assert f"{len(rows)} units have ended" in parsed(older).text


def test_what_is_not_decided(tmp_path: Path) -> None:
    page = parsed(campaign(tmp_path / "one", seeds=1))
    assert "Undecided between joint and no-bits, the strongest other method: one seed gives no interval." in page.text
    assert "[" not in page.text[page.text.index("Hypervolume and") : page.text.index("In brackets")]
    rows = [row(unit) for unit in units(2)]
    for one in rows:
        if one["method"] == "joint" and one["seed"] == 1:
            one["ce"] += 0.6
    page = parsed(campaign(tmp_path / "zero", rows=rows))
    assert "Undecided between joint and no-bits, the strongest other method: the 95% interval over 2 seeds" in page.text
    for one in rows:
        one["ce"] += 0.6 if one["method"] == "joint" and one["seed"] == 0 else 0
    page = parsed(campaign(tmp_path / "loses", rows=rows))
    assert "joint loses to no-bits, the strongest other method, by -" in page.text
    for one in rows:
        one["seed"] = 7 if one["method"] == "joint" else one["seed"]
    assert "no seed has models of both" in parsed(campaign(tmp_path / "apart", rows=rows)).text


def test_infeasible_units_and_no_tasks(tmp_path: Path) -> None:
    rows = [row(unit, tasks=False) for unit in units(2)]
    kept = ("unit", "method", "pipeline", "target_ms", "precision", "seed", "number", "caveat")
    for i, one in enumerate(rows):
        if one["target_ms"] == 0.2 and one["method"] == "random":
            rows[i] = {**{k: one[k] for k in kept}, "status": "infeasible", "reason": REASON, "seconds": 1.0}
    page = parsed(campaign(tmp_path / "a", rows=rows))
    assert "2 infeasible" in page.text
    assert f"random/0.2ms/seed-1 : {REASON}" in page.text
    assert without(page, "Accuracy", "error of the tasks")


def test_a_quality_that_is_not_finite(tmp_path: Path) -> None:
    rows = [row(unit) for unit in units(2)]
    rows[1] |= {"perplexity": math.inf, "ce": math.inf}
    page = parsed(campaign(tmp_path / "one", rows=rows))
    assert "Not drawn, as their perplexity is not finite: joint/0.6ms/seed-0 ." in page.text
    assert "inf" in page.text[page.text.index("Models") :]
    assert "nan" not in page.text[: page.text.index("Models")]
    for one in rows:
        if one["method"] == "joint":
            one |= {"perplexity": math.inf, "ce": math.inf}
    assert "there is no model of joint" in parsed(campaign(tmp_path / "own", rows=rows)).text
    for one in rows:
        one |= {"perplexity": math.inf, "ce": math.inf, "tasks": {}}
    assert without(parsed(campaign(tmp_path / "all", rows=rows)), "Fronts", "Hypervolume")


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>&amp;'
    rows = [row(unit) for unit in units(2)]
    rows[1] |= {"unit": evil, "method": evil, "caveat": evil}
    rows[2] |= {"status": "infeasible", "reason": evil}
    rows[3]["about"]["repaired"] = [evil]
    rows[4]["tasks"] = {evil: {"acc": 0.5}}
    folder = campaign(tmp_path / "a", rows=rows)
    folder.rename(tmp_path / "<b>&")
    page = parsed(tmp_path / "<b>&")
    assert page.text.count(evil) >= 7
    assert page.text.startswith("<b>& ")


def test_what_is_no_campaign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--run", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "is no run folder and no campaign folder: it has no config.yaml" in message
    assert "jointnas search" in message
    assert "jointnas compare" in message
    (tmp_path / "config.yaml").write_text("compare: {methods: 3}")
    with pytest.raises(JointNASError, match=r"compare\.methods"):
        report(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


SIZES = "return [...document.querySelectorAll('body *')].filter(e => [...e.childNodes].some(n => n.nodeType == 3 && " \
        "n.data.trim())).map(e => parseFloat(getComputedStyle(e).fontSize))"  # fmt: skip
WIDTHS = "return [innerWidth, document.documentElement.scrollWidth, ...[...document.images].map(i => i.clientWidth)]"
LOADED = "return [...document.images].every(i => i.complete && i.naturalWidth > 0)"
DANGLING = "return [...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.hash.slice(1)).filter(" \
           "id => !document.getElementById(id))"  # fmt: skip
OPENED = "return [location.hash.length > 1, document.querySelector(':target').closest('details').open]"


@pytest.mark.skipif(None in (browser.CHROMIUM, browser.DRIVER), reason=browser.MISSING)
def test_in_a_browser_as_wide_as_a_telephone(tmp_path: Path) -> None:
    path = report(str(campaign(tmp_path / "a", seeds=3)))
    with browser.browser(width=400) as window:
        window.open(path.as_uri())
        width, scrolled, *pictures = window.evaluate(WIDTHS)
        assert width == 400
        assert scrolled <= 400
        assert len(pictures) == 2
        assert max(pictures) < 400
        assert window.evaluate(LOADED)
        assert min(window.evaluate(SIZES)) >= 12
        assert window.evaluate(DANGLING) == []
        window.evaluate("document.querySelector('td a[href^=\"#row-\"]').click()")
        assert window.evaluate(OPENED) == [True, True]
        assert window.console() == []
        window.evaluate("console.error('seen')")
        assert "seen" in " ".join(window.console())  # the log is that of this page


def test_drawing_leaves_the_users_pyplot_as_it_is(tmp_path: Path) -> None:
    before = matplotlib.get_backend()
    matplotlib.use("svg")
    try:
        plots.agreement([{"method": "a", "measured": 1.0, "predicted": 2.0}], {"a": ("red", "o")}, tmp_path / "a.png")
        assert (matplotlib.get_backend(), pyplot.get_fignums()) == ("svg", [])
    finally:
        matplotlib.use(before)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
