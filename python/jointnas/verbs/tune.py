"""`tune`: which low-bit kernel plans are the fastest on this GPU, measured into a file that products then follow."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from jointnas import loading
from jointnas.config import ModelConfig, SpaceConfig
from jointnas_kernels import tuned, tuning
from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.hf import feasible_space
from jointnas_kernels.tuned import Tuned

log = logging.getLogger(__name__)
DTYPES = ("bfloat16", "float16")


def tune(
    space: SpaceConfig = SpaceConfig(), model: ModelConfig = ModelConfig(),  # noqa: B008
    tokens: list[int] = [1, 8, 16, 64, 256],  # noqa: B006
    out: str | None = None, seconds: float = 300.0, resume: bool = False, dtype: str = "bfloat16", planes: bool = False,
    device: str = "cuda", progress: bool = True,
) -> Tuned:
    """Measures the plans of the low-bit products of a space's models by successive halving.

    Args:
        space: search space; `--space NAME` is short for `--space.base NAME`.
        model: whose sizes. The embedded model stands for Llama-3.1-8B where the space is `llama3` or `qllama3`.
        tokens: counts that products are measured at, the most important first.
        out: the file, or a folder for one that is named after the device; by default that of the user's folder
            (~/.cache/jointnas/tuned, or $JOINTNAS_TUNED), which products follow.
        seconds: no product is begun after that. Those of the largest model come first.
        resume: add to what is in the file.
        dtype: of activations and scales, bfloat16 or float16.
        planes: weights of 2 and 4 bits as bit-planes instead.
        device: cuda or cuda:N.
        progress: show a progress bar.

    Raises:
        JointNASError: bad input, no CUDA device, an extension without CUDA, or the file exists and is not to be, or
            cannot be, continued.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if not seconds > 0:
        raise JointNASError(f"seconds must be positive, got {seconds}")
    if not torch.cuda.is_available():
        raise JointNASError("tune measures kernels of NVIDIA GPUs, and torch sees no CUDA device here")
    found = loading.check_device(device)
    if found.type != "cuda":
        raise JointNASError(f"tune measures kernels of NVIDIA GPUs, not of device {device!r}; allowed: cuda, cuda:N")
    where = torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
    kernels, here = tuned.kernels_here(), tuned.describe(where)
    config = loading.model_config(loading.sized(space, model))
    built, removed = feasible_space(config, space.build())
    for line in removed:
        log.warning("search space: removed %s", line)
    todo, path = tuning.jobs(built, config, tokens, dtype, planes), _file(out, here.name)
    with torch.cuda.device(where), torch.inference_mode():
        done = tuning.tune(
            todo, tuning.Products(where), path, here, kernels, seconds=seconds, resume=resume, progress=progress
        )
    tuned.forget()
    log.info("tune: %s", path)
    return done


def _file(out: str | None, device: str) -> Path:
    """Of the device's plans."""
    path = tuned.user_folder() if out is None else Path(out)
    return path if path.suffix == ".json" else path / tuned.file_name(device)


def text(result: Tuned) -> str:
    """What the command prints."""
    gains = [(row.usual_ms / row.ms, row) for row in result.rows if row.kernel is not None]
    lines = [f"{result.device.name}: {len(gains)} of {len(result.rows)} products have a faster plan than the usual one"]
    for gain, row in sorted(gains, key=lambda pair: -pair[0])[:10]:
        plan = "" if row.plan is None else f" {'/'.join(map(str, row.plan))}"
        counts = str(row.tokens) if row.least == row.tokens else f"{row.least} to {row.tokens}"
        times = f"{row.usual_ms * 1e3:.1f} -> {row.ms * 1e3:.1f} us"
        lines.append(f"  {row.shape}, {counts} tokens: {row.kernel}{plan}, {times} ({gain:.2f}x)")
    return "\n".join(lines)
