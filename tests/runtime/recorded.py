"""A CUDA graph's stand-in: records what a function launches, on the tensors it used, and repeats that.

As of a graph, a replay runs no Python of the function: numbers are those of the capture, and what differs must come
from memory. What a capture forbids raises: reading a result on the host, results whose shape depends on values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from jointnas_kernels.runtime import GraphStep

aten = torch.ops.aten
WAITS, SHAPE = "waits for the device", "has a shape that depends on values"
FORBIDDEN = {
    aten._local_scalar_dense.default: WAITS, aten.equal.default: WAITS, aten.nonzero.default: SHAPE,
    aten.masked_select.default: SHAPE,
}  # fmt: skip


class NotCapturable(RuntimeError):
    pass


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []
        self.busy = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FORBIDDEN:
            raise NotCapturable(f"{func} {FORBIDDEN[func]}")
        self.busy = True  # launches inside of an operator are repeated with it
        try:
            out = func(*args, **kwargs)
        finally:
            self.busy = False
        returned = [r.alias_info for r in func._schema.returns]
        if any(alias is not None and alias.is_write for alias in returned):
            self.calls.append(lambda: func(*args, **kwargs))
        elif isinstance(out, Tensor) and all(alias is None for alias in returned) and "empty" not in func.name():
            self.calls.append(lambda: out.copy_(func(*args, **kwargs)))
        return out

    def launched(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """In place of InterpretedFunction.run."""

        def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
            if self.busy:
                run(kernel, *args, **kwargs)
                return
            self.calls.append(lambda: run(kernel, *args, **kwargs))
            with torch.utils._python_dispatch._disable_current_modes():
                run(kernel, *args, **kwargs)

        return launch


def capture(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    run()
    recorder = Recorder()
    with mock.patch.object(InterpretedFunction, "run", recorder.launched(InterpretedFunction.run)), recorder:
        result = run()

    def replay() -> Tensor:
        for call in recorder.calls:
            call()
        return result

    return replay


class Emulated(GraphStep):
    """The GPU's step on a CPU, in Triton's interpreter."""

    kind = "cpu"

    def __init__(self, model: Any) -> None:
        super().__init__(model, capture)
