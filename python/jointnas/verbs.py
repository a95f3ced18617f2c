"""The verbs of the command line as functions. Heavy imports wait until a verb runs."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from jointnas.config import (
    BitsConfig,
    DataConfig,
    InitOptions,
    LatencyConfig,
    Method,
    ModelConfig,
    RunConfig,
    SpaceConfig,
)
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency import LatencyTable


def doctor(device: str = "cpu") -> dict[str, Any]:
    """Reports the environment and which latency backends work on a device."""
    from jointnas import environment, models

    models.check_device(device)
    return environment.collect(device)


def demo(
    out: str = "runs/demo", device: str = "cpu", seed: int = 0, randoms: int = 1, threads: int | None = None
) -> list[dict[str, Any]]:
    """Runs the whole mission on the embedded model and returns the result table.

    Args:
        out: run folder; a finished or interrupted demo in it is continued.
        device: cpu or cuda.
        seed: of everything.
        randoms: random architectures of the found model's cost, trained for comparison.
        threads: CPU threads; default: what torch uses.
    """
    from jointnas import demonstration, models

    models.check_device(device)
    return demonstration.demo(out, device, seed, randoms, threads)


def profile(
    out: str = "",
    space: SpaceConfig = SpaceConfig(),  # noqa: B008
    model: ModelConfig = ModelConfig(),  # noqa: B008
    latency: LatencyConfig = LatencyConfig(),  # noqa: B008
    device: str = "cpu",
    resume: bool = False,
    progress: bool = True,
    force: bool = False,
    compare: list[str] | None = None,
    merge: list[str] | None = None,
    coverage: str | None = None,
    heatmap: str | None = None,
    interpolate: str | None = None,
) -> LatencyTable | str:
    """Measures the latency table of a space on this machine; or compares, merges, completes or describes tables.

    Args:
        out: table file.
        space: search space; `--space NAME` is short for `--space.base NAME`.
        model: whose sizes. The embedded model stands for Llama-3.1-8B where the space is `llama3` or `qllama3`.
        latency: workload and how to measure.
        device: cpu or cuda.
        resume: continue an unfinished or smaller table in `out`; what a busy machine disturbed is measured again, and
            backends that were installed since are tried.
        progress: show a progress bar.
        force: accept tables of another device.
        compare: two tables; prints what changed from the first to the second, largest change first.
        merge: two or more tables of one device and workload, into `out`; of rows they share the last file's are taken.
        coverage: a table, unfinished or not; prints which operations and precisions of the space it holds, lacks, and
            why.
        heatmap: a table; draws its speed-ups over 16 bit into `out` (PNG).
        interpolate: a table; writes it into `out` with those sizes of the space that lie between measured ones.
    """
    from jointnas import bilevel, models

    def table(path: str, recover: bool = False) -> LatencyTable:
        return LatencyTable.load(path, None if force else device, recover=recover)

    if compare is not None:
        from jointnas_kernels.latency import compare as changes

        if len(compare) != 2:
            raise JointNASError(f"--compare takes two table files, got {len(compare)}")
        return changes(*(LatencyTable.load(path, None) for path in compare)).text()  # looking needs no device
    built = space.build()
    eight_billion = space.base in ("llama3", "qllama3") and model.source == "embedded"
    model = model.model_copy(update={"device": device} | ({"source": "llama-3.1-8b"} if eight_billion else {}))
    if coverage is not None:
        loaded = table(coverage, recover=True)
        return f"{loaded.summary()}\nfor this space: {loaded.coverage(built, models.model_config(model))}"
    if not out:
        raise JointNASError("profile needs --out FILE")
    path = Path(out)
    if heatmap is not None:
        from jointnas import plots

        return f"drawn into {plots.table_heatmap(table(heatmap), path)}"
    if (merge is not None or interpolate is not None) and path.exists():
        raise JointNASError(f"{out} exists; choose another file")
    if interpolate is not None:
        from jointnas_kernels.latency import interpolate as complete

        model_config, before = models.model_config(model), table(interpolate)
        completed = complete(before, built, model_config)
        completed.save(path)
        missing = len(completed.coverage(built, model_config).missing)
        return f"{len(completed.rows) - len(before.rows)} operations interpolated, {missing} still missing: {out}"
    if merge is not None:
        if len(merge) < 2:
            raise JointNASError(f"--merge takes two or more table files, got {len(merge)}")
        merged = table(merge[0])
        for other in merge[1:]:
            merged = merged.merge(table(other))
        merged.save(path)
        return merged
    models.check_device(device)
    config = models.model_config(model)
    built.validate(config)
    if path.exists() and not resume:
        raise JointNASError(f"{out} exists; pass --resume true to continue or complete it, or choose another file")
    run = RunConfig(model=model, space=space, latency=latency, progress=progress)
    return bilevel.measure_table(run, built, config, path, renew=True)


def search(config: RunConfig) -> Path:
    """Searches, prunes, distils, exports, evaluates and reports; returns the run folder."""
    from jointnas import pipeline

    return pipeline.search(config)


def quantize(
    out: str,
    model: ModelConfig = ModelConfig(),  # noqa: B008
    bits: BitsConfig = BitsConfig(),  # noqa: B008
    method: Method = "gptq",
    data: DataConfig = DataConfig(),  # noqa: B008
    options: InitOptions = InitOptions(),  # noqa: B008
    seed: int = 0,
    resume: bool = False,
    progress: bool = True,
) -> Path:
    """Quantizes a model as it is, every block at one precision, and exports it; returns the new folder.

    Args:
        out: new folder. Until it is done, finished blocks are in OUT.partial.
        model: which model.
        bits: of weights and activations.
        method: rtn and clip need no data, gptq and omniquant learn from calibration windows of `data`.
        data: text of the calibration.
        options: of the methods.
        seed: of the calibration windows and their order.
        resume: continue an interrupted quantization.
        progress: show a progress bar.
    """
    from jointnas import ptq

    return ptq.quantize(Path(out), model, bits, method, data, options, seed, resume, progress)


def finetune(run: str) -> Path:
    """Distils (again) the found choice of a run folder and exports it to RUN/final.

    Args:
        run: run folder of a search.
    """
    from jointnas import pipeline

    return pipeline.finetune(run)


def export(run: str, out: str, adapters: bool = False) -> Path:
    """Copies the finished model of a run folder.

    Args:
        run: run folder of a search.
        out: new folder.
        adapters: also write OUT/adapters/NAME: what the search trained, as PEFT adapters (w2, w4, .. by weight
            precision) of the original model.
    """
    from jointnas import pipeline

    return pipeline.export(run, out, adapters)


def evaluate(run: str) -> list[dict[str, Any]]:
    """Measures size, latency and quality of the original and the found model of a run folder.

    Args:
        run: run folder of a search.
    """
    from jointnas import pipeline

    return [row.to_dict() for row in pipeline.evaluate(run)]


def report(run: str) -> Path:
    """Writes RUN/report.html and RUN/plots.

    Args:
        run: run folder of a search.
    """
    from jointnas import reporting

    return reporting.report(run)


def compare(run: str, count: int = 8, seed: int = 0, width: float = 0.1) -> dict[str, Any]:
    """Fine-tunes the found choice of a run folder and random ones of its cost, all from the original weights.

    Args:
        run: run folder of a search.
        count: random architectures.
        seed: of the random architectures and of the fine-tuning.
        width: how far their latency and parameters may be from the found model's, as a share.
    """
    from jointnas import models, peers, pipeline

    opened = pipeline.open_run(run, supernet=False)
    config, found = opened.config, pipeline.found_choice(Path(run))
    others = peers.random_peers(found, opened.bound, opened.model_config, count, seed, width)
    original = models.load_model(config.model)
    supernet = peers.fresh_supernet(original, opened.space, opened.importance)

    def teacher(ids: Any) -> Any:
        return original(input_ids=ids, use_cache=False).logits

    rows = [
        peers.score(supernet, teacher, choice, opened.streams, config, opened.bound, seed).to_dict()
        for choice in (found, *others)
    ]
    result = {
        "found": rows[0],
        "random": rows[1:],
        "median_random": statistics.median(r["ce"] for r in rows[1:]),
        "better_than": sum(rows[0]["ce"] < r["ce"] for r in rows[1:]),
    }
    (Path(run) / "compare.json").write_text(json.dumps(result, indent=1))
    return result
