"""Files of plans of devices that are not there."""

from __future__ import annotations

from typing import Any

from jointnas_kernels.tuned import Device, Made, Row, Tuned

H100 = Device("NVIDIA H100 80GB HBM3", "9.0", 132)
H200 = Device("NVIDIA H200", "9.0", 132)
KERNELS = "0123456789abcdef"
MADE = Made("0.1.0", "abc1234", "2.13.0", "13.0", "580.1", "2026-12-01T00:00:00+00:00")


def row(**changes: Any) -> Row:
    usual = {"w_bits": 4, "a_bits": 16, "outputs": 4096, "inputs": 4096, "dtype": "bfloat16", "planes": False}
    found = {"least": 9, "tokens": 16, "kernel": "stream", "plan": (2, 2, 3, 1), "ms": 0.01, "usual_ms": 0.012}
    return Row(**{**usual, **found, **changes})


def tuned(*rows: Row, device: Device = H200, kernels: str = KERNELS) -> Tuned:
    return Tuned(device, kernels, MADE, rows)
