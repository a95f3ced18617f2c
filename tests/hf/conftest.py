"""Fixtures of the Hugging Face tests."""

import pytest
import torch
import transformers

from jointnas_kernels.hf.families import FAMILIES


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def exact_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' RMSNorms always compute in fp32; let them be exact for fp64 models."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    for family in FAMILIES.values():
        monkeypatch.setattr(family.norm, "forward", forward)
