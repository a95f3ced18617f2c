"""Variants of the joint search, for ablations: the campaign's configuration with a few keys changed.

    compare.variants: {no-latency: {search.eta: 0}, one-pair: {search: {lora_pairs: shared}, quantizer: {init: rtn}}}

Each is a method of its own in rows and statistics. All of a campaign have its model, data, space, table, evaluation and
trained tokens: what a variant's search takes more or less of these, its fine-tuning gets less or more.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jointnas import budget
from jointnas.baselines.methods import METHODS
from jointnas.compare_config import CompareConfig
from jointnas.config import RunConfig, build
from jointnas.metrics import flat
from jointnas.run_folder import read_json, write_json
from jointnas_kernels.errors import JointNASError

SECTIONS = ("search", "quantizer", "finetune")
KEPT = "variants.json"  # what each had changed when its first unit was begun
# with `quantizer`, what initialised quantizers depend on
STARTS = ("lora_rank", "lora_alpha", "lora_pairs", "importance", "importance_batches", "depth")


def changes(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What a variant changes, by dotted name."""
    return {".".join(map(str, path)): value for path, value in flat(overrides)}


def variant(config: CompareConfig, name: str) -> CompareConfig:
    """The configuration of a variant.

    Raises:
        JointNASError: it has no name for a folder or that of a method, or changes nothing, what is not there, what is
            the same for all, or to values that are not possible.
    """
    where = f"compare.variants.{name}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise JointNASError(f"compare.variants: {name!r} names folders; take letters, digits, dots, dashes and _")
    if name in METHODS or name == "original":
        raise JointNASError(f"compare.variants: {name!r} is a method; take another name")
    changed, values = changes(config.compare.variants[name]), config.model_dump()
    if not changed:
        raise JointNASError(f"{where} changes nothing: it is the method joint")
    for key, value in changed.items():
        *parents, last = key.split(".")
        section = (parents or [last])[0]
        if (section in CompareConfig.model_fields and section not in SECTIONS) or key == "finetune.steps":
            raise JointNASError(
                f"{where}: {key} is the same for all models of a comparison; a variant changes keys of "
                f"{', '.join(SECTIONS)} (finetune.steps follow from the search's)"
            )
        place = values
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[last] = value
    found = build(CompareConfig, values, where=where)
    if found.quantizer.init == "gptq":
        raise JointNASError(f"{where}: quantizer.init gptq is for plain models, not for the supernet of a search")
    if budget.bilevel(found, found.search.steps) > budget.total(config):
        raise JointNASError(f"{where}: its search alone takes more tokens than all training of the other methods")
    return found


def starts_alike(config: RunConfig, other: RunConfig) -> bool:
    """Whether the initialised quantizers of one are those of the other."""
    return config.quantizer == other.quantizer and all(
        getattr(config.search, key) == getattr(other.search, key) for key in STARTS
    )


def check_kept(config: CompareConfig, ended: Collection[str]) -> None:
    """Raises if a variant that the campaign's folder holds something of was another one then. `ended`: those that its
    rows are of."""
    out = Path(config.out)
    kept = read_json(out / KEPT) or {}
    for name, overrides in config.compare.variants.items():
        before, now = kept.get(name), changes(overrides)
        folders = out / "units" / name, out / "shared" / f"quantizers-{name}"
        begun = name in ended or any(folder.exists() for folder in folders)
        if begun and before not in (None, now):
            raise JointNASError(f"compare.variants.{name} was {before}, is {now}: give it another name")


def keep(config: CompareConfig) -> None:
    """Writes what every variant changes, those of earlier calls included."""
    if config.compare.variants:
        path = Path(config.out) / KEPT
        write_json(path, (read_json(path) or {}) | {k: changes(v) for k, v in config.compare.variants.items()})
