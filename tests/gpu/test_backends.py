"""The latency backends of a GPU: every bit combination of this package's and torch's, as `doctor` checks them."""

from __future__ import annotations

import itertools

import torch

from jointnas_kernels.latency import survey
from jointnas_kernels.latency.backends import ThirdParty, get


def test_survey(device: torch.device) -> None:
    found = survey(device, "bfloat16")
    bits = [f"W{w}A{a}" for w, a in itertools.product((2, 4, 8), (2, 4, 8, 16))]
    wanted = {"torch": ["W16A16"], "torch-int8": ["W8A8"], "torch-int4": ["W4A16"]}
    wanted |= {"ours-cuda": bits, "ours-triton": bits}
    works = {name: [b for b, reason in reasons.items() if reason == "works"] for name, reasons in found.items()}
    assert {name: works[name] for name in wanted} == wanted, found
    others = set(found) - set(wanted) - {name for name in found if isinstance(get(name), ThirdParty)}
    assert not any(works[name] for name in others)
