"""What the stock model class takes: the config of a sub-network, and which sizes it refuses.

Rules are asked for, not repeated here: they are the model's own config class', and change with its versions. In
transformers 5.24 a Llama's heads divide its hidden size, even where head_dim is explicit, and a Phi-3's rotary factors
are as many as half of hidden / heads.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jointnas_kernels.layout import all_sizes, config_sizes, original_sizes


def made(config: Any, sizes: Mapping[str, int], kept: Sequence[int] | None = None) -> tuple[Any, str]:
    """The config, of the same class, of a model of other sizes, None if the class refuses them; and the first line of
    why. `kept`: the original indices of its blocks, None: the first ones."""
    data = {**config.to_dict(), **config_sizes(all_sizes(config, sizes)), "num_hidden_layers": sizes["blocks"]}
    data.pop("_name_or_path", None)
    types = data.pop("layer_types", None)
    if types is not None:  # which blocks look through a sliding window
        data["layer_types"] = [types[b] for b in (range(sizes["blocks"]) if kept is None else kept)]
    try:
        return type(config)(**data), ""
    except Exception as error:  # whatever its checks raise
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        return None, f"{type(config).__name__} refuses it: {lines[0]}"


def refused(config: Any, dims: Sequence[str], grid: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], str]:
    """Which sizes of these dimensions the class of a config refuses beside the model's own sizes of the others, and
    why. A plain object with sizes refuses nothing."""
    if not hasattr(config, "to_dict"):
        return {}
    own, found = original_sizes(config), dict[tuple[int, ...], str]()
    with _quiet():
        for sizes in grid:
            taken, why = made(config, {**own, **dict(zip(dims, sizes, strict=True))})
            if taken is None:
                found[sizes] = why
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers also warns about what it then refuses, at every question."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
