"""Which implementation of an op runs: decided inside the op, from the tensor's device and dtype or by the caller."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from jointnas_kernels import _ext
from jointnas_kernels.errors import JointNASError, unknown

BACKENDS = ("reference", "triton", "cpu", "cuda")


class Op:
    """A ``torch.library`` custom op that takes the short way when nothing is watching.

    The dispatcher's Python layers cost about 25 us per call forward and 50 us with backward, as much as a kernel over 8
    x 128 tokens. Plain tensors in eager mode therefore go straight to ``run`` (inside an autograd Function when
    gradients are on); tracing, tensor subclasses and dispatch modes see the registered op. ``run`` may return None for
    outputs nobody asked for; the registered op turns it into an empty tensor.
    """

    def __init__(self, name: str, schema: str, run: Callable[..., Any]) -> None:
        def registered(*args: Any) -> Any:  # the dispatcher knows no absent tensor among outputs
            output = run(*args)
            if not isinstance(output, tuple):
                return output
            like = next(a for a in args if isinstance(a, Tensor))
            return tuple(no_grad_slot(like) if part is None else part for part in output)

        self.run = run
        self.definition = torch.library.custom_op(f"jointnas::{name}", registered, mutates_args=(), schema=schema)
        self.registered = getattr(torch.ops.jointnas, name).default
        self.function: type[torch.autograd.Function] | None = None
        self.register_fake = self.definition.register_fake

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        self.definition.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *args: Any) -> Any:  # a separate setup_context costs a signature binding per call, 30 us
            output = self.run(*args)
            setup_context(ctx, args, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.function = type("Direct", (torch.autograd.Function,), members)

    def __call__(self, *args: Any) -> Any:
        """``args`` positional, a tensor first."""
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return self.registered(*args)
        if type(args[0]) is not Tensor and type(args[0]) is not torch.nn.Parameter:
            return self.registered(*args)
        if self.function is not None and torch.is_grad_enabled():
            return self.function.apply(*args)
        return self.run(*args)


def custom_op(name: str, schema: str) -> Callable[[Callable[..., Any]], Op]:
    """Decorator: register a function as ``jointnas::name``; then ``register_fake`` and ``register_autograd`` on it."""
    return lambda run: Op(name, schema, run)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def why_not(backend: str, tensor: Tensor) -> str | None:
    """Why ``backend`` cannot run on ``tensor``; None if it can."""
    if backend == "reference":
        return None
    if tensor.dtype == torch.float64:
        return "it computes in float32 and the input is float64"
    if backend == "triton":
        if tensor.is_cuda or interpreting():
            return None
        return f"Triton needs a CUDA tensor and this one is on {tensor.device.type!r}"
    if backend == "cuda":
        if not tensor.is_cuda:
            return f"it needs a CUDA tensor and this one is on {tensor.device.type!r}"
        if not (_ext.available() and _ext.load().has_cuda):
            return "jointnas_kernels._C was built without CUDA or is not built"
        return None
    if tensor.device.type != "cpu":
        return f"it needs a CPU tensor and this one is on {tensor.device.type!r}"
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        return f"it has float32 and bfloat16 kernels and the input is {tensor.dtype}"
    return None if _ext.available() else "jointnas_kernels._C is not built (run `make setup`)"


def resolve(
    op: str, backend: str | None, tensor: Tensor, available: Sequence[str] = ("triton", "cpu", "reference")
) -> str:
    """The backend ``op`` uses on ``tensor``.

    Args:
        op: the op's public name, for messages.
        backend: what the caller asked for; None or "auto" chooses.
        tensor: the main input.
        available: what the op implements, best first; the first that can run is chosen. The Triton interpreter is
            never chosen by itself: ask for "triton".

    Raises:
        JointNASError: an unknown backend, one the op does not have, or one that cannot run on this tensor.
    """
    if backend is None or backend == "auto":
        for name in available:
            if name == "triton" and not tensor.is_cuda:
                continue
            if why_not(name, tensor) is None:
                return name
        raise JointNASError(f"{op}: none of its backends ({', '.join(available)}) runs on a {tensor.dtype} "
                            f"tensor on {tensor.device}")
    if backend not in available:
        raise unknown("backend", backend, available, where=op)
    reason = why_not(backend, tensor)
    if reason is not None:
        raise JointNASError(f"{op}: backend {backend!r} cannot run: {reason}")
    return backend


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """References compute in fp32 for half types and fp32, in fp64 for fp64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


_NOTHING = contextlib.nullcontext()


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast off inside an op. Where it is off already nothing is entered: the context costs as much as a launch."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # meta has no autocast, and asking is an error
        return _NOTHING
    return torch.autocast(kind, enabled=False)


def bad(op: str, message: str) -> JointNASError:
    """The error of bad input to ``op``. Raised by the caller, so that a good call builds no message."""
    return JointNASError(f"{op}: {message}")


def check(condition: bool, op: str, message: str) -> None:
    """Raise one clear error naming the op unless ``condition`` holds; for ops whose calls are not counted in us."""
    if not condition:
        raise bad(op, message)


def rows(tensor: Tensor) -> Tensor:
    """``tensor`` as [rows, last dim] with unit stride along the last dim; a view whenever the layout allows it."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def no_grad_slot(tensor: Tensor) -> Tensor:
    """What a backward op returns in place of a gradient nobody asked for (custom ops cannot return None)."""
    return torch.empty(0, dtype=torch.float32, device=tensor.device)


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(tensor: Tensor) -> int:
    """Streaming multiprocessors of the tensor's GPU; 2 in the interpreter, so that loops over rows are exercised."""
    return _multiprocessors(tensor.device.index) if tensor.is_cuda else 2


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << (n - 1).bit_length()
