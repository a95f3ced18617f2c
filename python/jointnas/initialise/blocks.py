"""The blocks of a model, one at a time: hidden states in, hidden states out, with any of their parameters replaced.

A block is run with what the model itself passes to it (rotary angles, masks), recorded once on a probe. It works alike
for a plain transformers model and for a supernet, whose blocks are run at full size as in the original model.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from jointnas_kernels.hf import Supernet
from jointnas_kernels.layout import all_sizes, block_of
from jointnas_kernels.nn.linear import SupernetLinear
from jointnas_kernels.ops.core.tensors import compute_dtype
from jointnas_kernels.ops.quant import spec
from jointnas_kernels.ops.quant.activations import act_quant_mix

Place = tuple[str, slice]  # of a linear: path of its module in a block, and its rows there


class _Stop(Exception):
    """Ends a forward pass that has shown what it was run for."""


class Blocks:
    """Blocks of a transformers model or a supernet. `batch` windows are run at once.

    Attributes:
        modules: path of each module in a block that is quantized -> the linears that it holds.
        stages: paths of the modules that read the same input, in the order they run.
        places: where each linear is.
        layout, sizes: of the model.
    """

    def __init__(self, model: nn.Module, batch: int = 4) -> None:
        self.batch = batch
        self._forward: Callable[[Tensor], Any]
        source: Any = model
        layout = self.layout = block_of(source.config)
        self.sizes, self.modules = all_sizes(source.config), layout.modules
        if isinstance(model, Supernet):
            self.layers, self._forward, self.device = list(model.blocks), model.original, model.device
            paths = {m: name for name, m in self.layers[0].named_modules()}
            by_name = source.blocks[0].linears
            self.modules = {paths[by_name[linear.name]]: (linear,) for linear in layout.linears}
        else:
            self.layers, self.device = list(source.model.layers), next(model.parameters()).device
            self._forward = lambda ids: source(input_ids=ids, use_cache=False, logits_to_keep=1)
        runs = itertools.groupby(self.modules, lambda path: self.modules[path][0].reads)
        self.stages = tuple(tuple(run) for _, run in runs)
        self.places: dict[str, Place] = {m.name: (m.module, layout.rows(m, self.sizes)) for m in layout.linears}
        self._others: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @torch.no_grad()
    def start(self, ids: Tensor) -> Tensor:
        """Inputs [n, T, N] of block 0 for token ids [n, T]; also records what else each block is called with."""
        self._others = [((), {})] * len(self.layers)
        found: list[Tensor] = []

        def note(b: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._others[b] = (args[1:], kwargs)

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0])
            raise _Stop

        with contextlib.ExitStack() as hooks:
            for b, layer in enumerate(self.layers):
                hooks.enter_context(layer.register_forward_pre_hook(partial(note, b), with_kwargs=True))
            self._forward(ids[:1].to(self.device))
        with self.layers[0].register_forward_pre_hook(keep, with_kwargs=True):
            for part in ids.split(self.batch):
                with contextlib.suppress(_Stop):
                    self._forward(part.to(self.device))
        return torch.cat(found)

    def run(self, b: int, x: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Block b on x [n, T, N], with some of its parameters replaced, by name; differentiable in both."""
        args, kwargs = self._others[b]
        if parameters:
            out: Tensor = functional_call(self.layers[b], dict(parameters), (x, *args), kwargs)
        else:
            out = self.layers[b](x, *args, **kwargs)
        return out

    @torch.no_grad()
    def advance(self, b: int, x: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Block b on all windows, in x's own memory."""
        for part in x.split(self.batch):
            part.copy_(self.run(b, part, parameters))
        return x

    @torch.no_grad()
    def mse(
        self, b: int, x: Tensor, y: Tensor, parameters: Mapping[str, Tensor] | None = None, relative: bool = False
    ) -> float:
        """Mean squared difference of block b's output from y, or the mean of `relative_error`."""
        total = 0.0
        for source, target in zip(x.split(self.batch), y.split(self.batch), strict=True):
            out = self.run(b, source, parameters)
            wrong = relative_error(out, target).double() if relative else (out - target).double().square()
            total += float(wrong.sum())
        return total / (y[..., 0] if relative else y).numel()

    @torch.no_grad()
    def inputs(self, b: int, path: str, x: Tensor, parameters: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """The inputs of one of block b's modules, batch by batch; what comes behind it is not run."""
        found: list[Tensor] = []

        def stop(x: Tensor) -> None:
            found.append(x)
            raise _Stop

        module: Any = self.layers[b].get_submodule(path)
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(module.register_forward_pre_hook(lambda _, args: stop(args[0])))
            supernet = isinstance(module, SupernetLinear)
            if supernet:  # as in the original model: asked for `original`, not called
                hooks.callback(delattr, module, "original")
                module.original = stop
            for part in x.split(self.batch):
                with contextlib.suppress(_Stop):
                    self.run(b, part, parameters)
                yield found.pop()

    @contextlib.contextmanager
    def quantized_inputs(self, b: int, bits: int, symmetric: bool) -> Iterator[None]:
        """Inside, block b's linears quantize their inputs per token; 16 bits: nothing."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (quantize_tokens(args[0], bits, symmetric), *args[1:])

        with contextlib.ExitStack() as hooks:
            for path in self.modules if bits < 16 else ():
                hooks.enter_context(self.layers[b].get_submodule(path).register_forward_pre_hook(hook))
            yield


def relative_error(out: Tensor, y: Tensor) -> Tensor:
    """log(1 + |out - y|^2 / |y|^2) of each token [...] of block outputs [..., N]; differentiable in `out`.

    By the token's own energy, because a norm divides by it next: attention sinks carry thousands of times that of other
    tokens (SmolLM2: 968,000 to 31) and would be all of a plain mean. The logarithm is for the same tokens: where one
    becomes a sink behind quantized blocks and was none, its quotient is that large, and would again be all."""
    wide = compute_dtype(out.dtype)
    wrong = (out.to(wide) - y.to(wide)).square().sum(-1)
    return (wrong / y.to(wide).square().sum(-1).clamp_min(torch.finfo(wide).tiny)).log1p()


def quantize_tokens(x: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    """`act_quant_mix` of one precision, whose gradient also knows that the scale s follows the token's range.

        dQ/dx = 1 + (q - z - x / s) ds/dx

    The op's own gradient, 1, cannot tell whether a change of range makes the steps finer, and that is all that an
    equivalent transformation is about."""
    one = torch.ones(1, dtype=torch.float32, device=x.device)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return act_quant_mix(x, (bits,), one, symmetric=symmetric)
    value = act_quant_mix(x.detach(), (bits,), one, symmetric=symmetric)
    wide = x.to(compute_dtype(x.dtype))
    span, _ = spec.extent(wide, symmetric)
    # (Q - x) / s is constant; the ratio of the span to itself carries ds / s
    step = span / span.detach().clamp_min(torch.finfo(span.dtype).tiny)
    soft = wide + (value.to(wide.dtype) - wide.detach()) * step
    return value + (soft - soft.detach()).to(x.dtype)
