"""`doctor`: what is installed here and which latency backends work, for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

from jointnas import assets
from jointnas.config import ModelConfig
from jointnas.loading import check_device, resolve_model
from jointnas_kernels.latency import survey
from jointnas_kernels.latency.timing import cache_bytes, compiled, describe
from jointnas_kernels.ops.lowbit import check as lowbit_check

PACKAGES = (
    "jointnas-kernels", "torch", "triton", "transformers", "tokenizers", "safetensors", "pydantic", "jsonargparse",
    "peft", "accelerate", "lm_eval", "datasets", "matplotlib", "tensorboard", "humming-kernels", "gemlite", "vllm",
    "gptqmodel",
)  # fmt: skip

EXTENSION = {
    (): "not built (run `make setup`)",
    ("cpu",): "CPU only (nvcc was not found when it was built)",
    ("cpu", "cuda"): "with CUDA",
}
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}  # what models usually have there


def doctor(device: str = "auto") -> dict[str, Any]:
    """Reports the environment and which latency backends work on a device.

    Args:
        device: cpu, cuda, or auto: cuda where there is one.

    Raises:
        JointNASError: there is no such device.
    """
    device = resolve_model(ModelConfig(device=device)).device
    kind, packages = check_device(device), {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "system": {
            "platform": platform.platform(),
            "python": sys.version.split()[0],
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": str(describe(device)),
            "last-level cache": f"{cache_bytes(kind) / 2**20:.0f} MiB",
            "CUDA devices": torch.cuda.device_count() if torch.cuda.is_available() else 0,
            "compiled extension": EXTENSION[compiled()],
            "embedded model": "installed" if assets.has_weights() else "no weights",
        },
        "packages": packages,
        "dtype": DTYPE[kind.type],
        "backends": survey(kind, DTYPE[kind.type]),
        "self-checks": lowbit_check.report(kind) if kind.type == "cuda" and "cuda" in compiled() else {},
    }


def text(found: dict[str, Any]) -> str:
    """What the command prints."""
    lines = []
    for section in ("system", "packages"):
        lines.append(section)
        width = max(len(k) for k in found[section])
        lines += [f"  {k:<{width}}  {v}" for k, v in found[section].items()]
    checked = "one small linear each, checked against the dequantised reference"
    lines.append(f"latency backends ({checked}, {found['dtype']})")
    for name, bits in found["backends"].items():
        works = [b for b, r in bits.items() if r == "works"]
        lines.append(f"  {name}: {', '.join(works) if works else 'nothing works here'}")
        reasons: dict[str, list[str]] = {}
        for b, reason in bits.items():
            if reason != "works":
                reasons.setdefault(reason, []).append(b)
        lines += [f"      {', '.join(b) if len(b) < 6 else f'{len(b)} combinations'}: {r}" for r, b in reasons.items()]
    if found["self-checks"]:
        lines.append("kernels of one GPU generation (used only where verified on this device)")
        lines += [f"  {name}: {result}" for name, result in found["self-checks"].items()]
    return "\n".join(lines)
