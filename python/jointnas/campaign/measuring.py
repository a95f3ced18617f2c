"""The last stage: every final model's latency, measured in turns, so that what disturbs the machine disturbs all.

What a model computes with does not depend on the values of its weights: they are random, so that models whose folders
are gone are measured, too.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from jointnas import loading
from jointnas.campaign.plan import ORIGINAL
from jointnas.campaign.worker import Base
from jointnas.pipeline import deployed, is_here
from jointnas.run_folder import read_json, write_json
from jointnas_kernels.hf.families import build
from jointnas_kernels.latency import measure_in_turns
from jointnas_kernels.space import Choice, kept_blocks, subnet_config

log = logging.getLogger(__name__)
FILE = "measured.json"


def measured(base: Base, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`measured_ms`, `contended` and `apart` (`results.Row`) by unit, of rows that ended in a model; empty on another
    device than the table's.

    Known ones are kept if they are those of all rows: models measured at different times are not compared."""
    path, done = base.out / FILE, [row for row in rows if row["status"] == "done"]
    known: dict[str, dict[str, Any]] = read_json(path) or {}
    if known.keys() == {row["unit"] for row in done}:
        return known
    table = base.table
    if not is_here(table):
        log.warning("latencies are predicted ones: the table's device, %s, is not this one", table.header.device)
        return {}
    log.info("measuring %d models in turns", len(done))

    config = loading.model_config(base.config.model)

    def maker(row: Mapping[str, Any]) -> nn.Module:
        if row["method"] == ORIGINAL:
            return deployed(build(config), None, base.space, table, ())
        choice, rank = Choice.from_dict(row["choice"]), row["block_rank"]
        model = build(subnet_config(config, choice, kept_blocks(rank, choice.blocks)))
        return deployed(model, choice, base.space, table, rank)

    itemsize = getattr(torch, table.workload.dtype).itemsize
    makers = [functools.partial(maker, row) for row in done]
    found = measure_in_turns(makers, [row["params"] * itemsize for row in done], table)
    values = {
        row["unit"]: {
            "measured_ms": one.value, "contended": bool(one.contended),
            "apart": abs(row["predicted_ms"] / one.value - 1) > table.tolerance,
        }
        for row, one in zip(done, found, strict=True)
    }  # fmt: skip
    write_json(path, values)
    return values
