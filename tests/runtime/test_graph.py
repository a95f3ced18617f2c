"""How a GPU's step is captured, on a stand-in of torch.cuda; what it computes: tests/triton_interpret, tests/gpu."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.runtime import GraphStep, misfit
from jointnas_kernels.runtime.graph import capture
from tests.hf.hf_models import tiny_model

DEVICE = torch.device("cuda", 0)


class Machine:
    """Says what happened, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.capturing = False
        for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name.lower()))

    def stream(self, of: Any) -> Any:
        self.log.append("side stream")
        return self

    def current_stream(self, device: Any) -> Any:
        return self

    def wait_stream(self, other: Any) -> None:
        self.log.append("wait")

    def __enter__(self) -> None:
        self.log.append("on it")

    def __exit__(self, *_: Any) -> None:
        self.log.append("off it")

    def cudagraph(self) -> Any:
        return self

    @contextlib.contextmanager
    def graph(self, graph: Any, capture_error_mode: str) -> Iterator[None]:
        self.log.append("capture")
        self.capturing = True
        yield
        self.log.append("captured")

    def replay(self) -> None:
        self.log.append("replay")


def test_warm_up_comes_before_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    result = torch.zeros(1)

    def run() -> Tensor:
        machine.log.append("run")
        return result

    replay = capture(run, DEVICE)
    warm = ["side stream", "wait", "side stream", "on it", "run", "run", "off it", "wait"]
    assert machine.log == [*warm, "capture", "run", "captured"]
    assert replay() is result
    assert replay() is result
    assert machine.log[-2:] == ["replay", "replay"]


def test_models_that_cannot_be_captured_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)

    def run() -> Tensor:
        if machine.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.zeros(1)

    with pytest.raises(JointNASError, match=r"cannot be captured as a CUDA graph: operation not permitted .*enabled"):
        capture(run, DEVICE)


def test_models_elsewhere_do_not_fit() -> None:
    model = tiny_model()
    reason = "it runs models in float16, bfloat16, float32 on cuda, not torch.float32 on cpu"
    assert GraphStep.misfit(model) == reason
    with pytest.raises(JointNASError, match="the model does not fit: it runs models in"):
        GraphStep(model)
    assert misfit(model.to("meta")) == "there is none for meta"
