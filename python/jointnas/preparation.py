"""From a configuration to what a search works with: model, data, latency table, supernet and its quantizers."""

from __future__ import annotations

import contextlib
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from jointnas import loading, parallel, sharding
from jointnas.config import RunConfig
from jointnas.data import Batches, Streams
from jointnas.initialise import calibration_windows, initialise
from jointnas.objective import Feasibility, Limits
from jointnas.precision import Precision
from jointnas.run_folder import TABLE, Run, found_choice, load_supernet, read_config
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import Supernet, convert, importance_scores
from jointnas_kernels.hf.conversion import check_model
from jointnas_kernels.latency import LatencyTable, calibrate, profile
from jointnas_kernels.space import WIDTHS, SearchSpace

log = logging.getLogger(__name__)
MISS, TRIES = 0.25, 2  # mean relative error of a calibration that is of no use; how often it may be


def prepare(
    config: RunConfig, model: torch.nn.Module | None = None, streams: Streams | None = None,
    table: LatencyTable | None = None, after: Precision | None = None, quantizers: Path | None = None,
) -> Run:  # fmt: skip
    """Loads model, data and table as configured (or takes given ones), and converts the model to a supernet.

    The model is converted in place. With `after` the supernet has no bits, and the latencies that count are those of
    models at that precision: a search to be followed by quantization. Initialised quantizers are kept in `quantizers`,
    None: in the run's folder."""
    if model is not None and config.model.device == "auto":
        own = config.model.model_copy(update={"device": str(next(model.parameters()).device)})
        config = config.model_copy(update={"model": own})
    with parallel.main_first():  # the others find what it fetched, tokenized and measured
        config = loading.resolve(config)
        known = loading.model_config(config.model) if model is None else model.config
        loading.check_lengths(known, data_seq_len=config.data.seq_len, eval_context=config.eval.context)
        space, removed = loading.space_of(config, known)
        _warn(removed)
        if model is None:
            on_host = {"device": "cpu"} if config.parallel.prepare == "host" and sharding.sharding() else {}
            model = loading.load_model(config.model.model_copy(update=on_host))
        check_model(model)
        if streams is None:
            streams = loading.load_streams(config.data, config.model, config.seed)
        if table is None:
            table = load_table(config, space, model.config)
    restricted, unsupported = table.restrict(space)
    _warn(unsupported)
    deployed = None if after is None else after.of(restricted)
    check_limits(config, model.config, table, deployed or restricted)
    if deployed is not None:
        restricted = replace(restricted, weight_bits=None, act_bits=None, head_bits=None)
    torch.manual_seed(config.seed)  # LoRA's A
    options = config.search
    importance = None
    if options.importance:
        batches = Batches(streams.weight, config.data.batch_size, config.data.seq_len, config.seed, streams.bos)
        importance = importance_scores(model, [batches.at(i).ids for i in range(options.importance_batches)])
        parallel.broadcast(vars(importance).values())  # ranks must not order channels by rounding errors of their own
        if options.depth == "last":
            importance = replace(importance, blocks=-torch.arange(len(importance.blocks)).float())
    supernet = convert(
        model, restricted, lora_rank=options.lora_rank, lora_alpha=options.lora_alpha, importance=importance,
        relaxation=options.relaxation, bit_relaxation=options.bit_relaxation, alpha_init=options.alpha_init,
        lora_pairs=options.lora_pairs, base_bits=config.model.base_bits,
    )  # fmt: skip
    supernet.gradient_checkpointing = options.gradient_checkpointing
    initialise_once(config, supernet, streams, quantizers or Path(config.out) / "quantizers")
    sharding.shard(supernet)
    return Run(config, Path(config.out), supernet, streams, table, restricted, removed + unsupported, after)


def _warn(removed: list[str]) -> None:
    for line in removed:
        log.warning("search space: removed %s", line)


def open_run(run: str | Path, searched: bool = True) -> Run:
    """A searched run folder, with the supernet as the search left it, or (not `searched`) as it began."""
    config = read_config(Path(run))
    found_choice(Path(run))
    opened = prepare(config)
    if searched:
        load_supernet(opened)
    return opened


def initialise_once(config: RunConfig, supernet: Supernet, streams: Streams, folder: Path) -> None:
    """Initialises the quantizers on the main rank; the others take what it has then."""

    def make() -> dict[str, list[int]]:
        initialise_quantizers(config, supernet, streams, folder)
        return {name: list(value.shape) for name, value in supernet.search_state().items()}

    shapes = parallel.from_main(make)
    own = supernet.search_state()
    if own.keys() != shapes.keys():  # clip ratios that are not here yet
        supernet.load_search_state({k: own[k] if k in own else torch.ones(shape) for k, shape in shapes.items()})
    parallel.broadcast(supernet.search_state().values())


def initialise_quantizers(config: RunConfig, supernet: Supernet, streams: Streams, folder: Path) -> None:
    """As configured; methods that need data keep their blocks in the folder, so that they run once."""
    method, options = config.quantizer.init, config.quantizer.options
    if method == "rtn":
        initialise(supernet, method, options=options, progress=False)
        return
    windows = calibration_windows(streams.weight, options, config.data.seq_len, config.seed, streams.bos)
    initialise(
        supernet, method, windows, options=options, folder=folder, progress=config.progress, seed=config.seed,
    )  # fmt: skip


def check_limits(config: RunConfig, model_config: Any, table: LatencyTable, space: SearchSpace) -> None:
    """Raises, before anything expensive, if no choice satisfies the limits."""
    uniform = {k: torch.full((len(space.sizes(k)),), 1 / len(space.sizes(k))) for k in (*WIDTHS, "blocks")}
    for key in ("weight_bits", "act_bits"):
        if space.sizes(key):
            uniform[key] = torch.full((space.depth, len(space.sizes(key))), 1 / len(space.sizes(key)))
    if space.head_bits:
        uniform["head_bits"] = torch.full((len(space.head_bits),), 1 / len(space.head_bits))
    bound, limits = table.bind(space), Limits.of(config, model_config)
    Feasibility(model_config, bound, limits).repair(uniform)
    with contextlib.suppress(JointNASError):  # bits that the device cannot run
        largest = bound.predict(space.full())
        if largest <= limits.latency_max < math.inf:
            target = limits.latency_max
            log.warning("target_latency_ms = %g limits nothing: the largest choice takes %.3f ms", target, largest)


# ---- latency tables -------------------------------------------------------------------------------------------------


def load_table(config: RunConfig, space: SearchSpace, model_config: Any) -> LatencyTable:
    """The configured table, or the run's own, measured (and calibrated) if it is not there yet."""
    options = config.latency
    if options.table is None:
        own = Path(config.out) / TABLE
        if not parallel.is_main():  # of several ranks one measures
            return LatencyTable.load(own, loading.device_type(config.model))
        return measure_table(config, space, model_config, own)
    table = LatencyTable.load(options.table, None if options.force else loading.device_type(config.model))
    missing = table.coverage(space, model_config).missing
    if missing:
        raise JointNASError(
            f"latency table {options.table} lacks {len(missing)} operations of the space, first {missing[0]}; "
            "measure them with `jointnas profile --resume`"
        )
    return table


def measure_table(
    config: RunConfig, space: SearchSpace, model_config: Any, out: Path, renew: bool = False
) -> LatencyTable:
    """Profiles the device and calibrates the table; a finished one is taken as it is, unless it is to be renewed where
    a busy machine disturbed it or a backend was installed since.

    Raises:
        JointNASError: what `profile` and `calibrate` raise, or predictions that miss whole models by more than 25 %.
    """
    options = config.latency
    if out.is_file() and not renew:
        try:
            table = LatencyTable.load(out, None if options.force else loading.device_type(config.model))
            held = table.coverage(space, model_config)
            if not held.missing and not held.interpolated and (table.calibration or not options.calibrate):
                return table
        except JointNASError as error:
            log.info("%s; continuing its measurement", error)
    strict = options.busy == "stop"
    for _ in range(TRIES):
        table = profile(
            space, model_config, out, workload=options.value(), device=config.model.device, threads=options.threads,
            backends=options.backends, progress=config.progress, seed=config.seed, metric=options.metric,
            seconds_per_operation=options.seconds_per_operation, strict=strict,
        )  # fmt: skip
        fitted = table.calibration is not None and not table.calibration.contended
        if fitted or not options.calibrate or options.metric != "latency":
            return table
        restricted, _ = table.restrict(space)
        found = calibrate(table, restricted, model_config, options.calibrate, seed=config.seed, strict=strict)
        missed = found.calibration.mape if found.calibration else 0.0
        if missed <= MISS:
            found.save(out)
            return found
        log.info("predictions miss whole models by %.0f %%: what was disturbed is measured again", 100 * missed)
    found = found.doubted(keep_calibration=not strict)
    found.save(out)
    if strict:
        raise JointNASError(
            f"the latency table {out} is of no use: its predictions miss whole models by {missed:.0%} on average "
            f"(allowed: {MISS:.0%}), so the machine was not the same for both. Stop what else runs, and give the same "
            "command again: everything is measured anew"
        )
    return found
