"""CUDA graphs of a supernet's blocks: a step then costs the host one launch per block and direction, instead of some
hundred kernel launches (on a slow host a step over 8 x 128 tokens of Llama-3.1-8B is bound by them three times over).

Every block is captured on its own, forward and backward, by torch.cuda.make_graphed_callables. What differs between
steps reaches the graphs through memory at fixed addresses: the sample's masks, gates and probabilities live in one
buffer that a draw fills in place; LoRA is where it always is; only the block input is copied (8 MB for 8 x 128 x 4096).

Why blocks can be left out: all graphs share one memory pool, in which memory freed while capturing is used again by
what was captured later. The pool is therefore right for replays in capture order (forwards of blocks 0, 1, ..,
backwards .., 1, 0), and also for every subsequence of that order that keeps a block's backward behind its forward:
leaving replays out leaves only writes out. A block that the depth draw skips is not replayed; in "arch" mode its gate's
gradient comes from a second graph (`SupernetBlock.skipped`), captured right behind the block's own. The second mode is
captured into the memory that the first has freed: no replay of one mode needs activations of the other, because a
backward pass whose activations were overwritten raises (see `_Guard`).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.nn.block import Step
from jointnas_kernels.nn.choices import ArchParameters, ArchSample, BlockSample

log = logging.getLogger(__name__)


class Net(Protocol):
    """What graphs need of a supernet."""

    blocks: nn.ModuleList
    arch: ArchParameters

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""

    @property
    def mask_dtype(self) -> torch.dtype:
        """Of masks, gates and probabilities."""

    def embed(self, input_ids: Tensor, sample: ArchSample) -> tuple[Tensor, Step]:
        """Masked embeddings [B, T, N] of token ids [B, T], and what the blocks share."""


class Capturing(Protocol):
    """What captures by itself need of a supernet."""

    graphs: BlockGraphs | None

    @property
    def current_mode(self) -> str:
        """Whose gradients steps compute."""

    @property
    def capturable(self) -> bool:
        """Whether graphs can be captured where it is now."""

    def capture(self, batch: int, tokens: int, modes: Sequence[str]) -> Any:
        """Captures the blocks for these modes."""

    def release(self) -> Any:
        """Lets go of graphs."""


class Replay(NamedTuple):
    """One captured block."""

    call: Callable[..., Any]
    parameters: tuple[nn.Parameter, ...]  # whose gradients the graph computes
    vectors: bool  # whether it computes those of masks, gate and probabilities
    kind: tuple[Any, ...]  # `_kind` of the block samples it was captured for
    input_gradient: bool


class BlockGraphs:
    """The captured blocks of one supernet, for one batch shape; made by `Supernet.capture`."""

    def __init__(
        self, net: Net, batch: int, tokens: int, modes: Iterable[str],
        make: Callable[..., Any] = torch.cuda.make_graphed_callables,
    ) -> None:
        self.shape, self.modes = (batch, tokens), tuple(modes)
        self.automatic = False  # nobody asked for it: what its replays would overwrite, they leave alone
        self._open: weakref.ref[_Open] | None = None  # the last pass, until its backward pass ran
        _check(net, self.modes)
        cuda = net.device.type == "cuda"
        before = _reserved(net.device)
        self.buffer: Tensor | None = None
        self.live: ArchSample | None = None  # the sample whose values are in the buffer
        self.ticket = 0  # grows whenever buffer or activations change
        self.parameters = tuple(_trained(net.blocks))
        self._bindings = [  # the tensors that the graphs read; also keeps them alive
            (d, name, value)
            for module in net.blocks.modules()
            for d in (module._parameters, module._buffers)
            for name, value in d.items()
        ]
        sample = self._typical(net, False)
        ids = torch.zeros(batch, tokens, dtype=torch.long, device=net.device)
        with torch.no_grad():
            # cos, sin and sliding windows depend on the length only
            _, self.step = net.embed(ids, sample)
        pool = torch.cuda.graph_pool_handle() if cuda else None
        self._replays = {mode: self._capture(net, mode, ids, partial(make, pool=pool)) for mode in self.modes}
        self.bytes = _reserved(net.device) - before  # of device memory

    def __reduce__(self) -> Any:
        return type(None), ()  # graphs cannot be copied: a copy of a supernet has none

    # ---- capture ----------------------------------------------------------------------------------------------------

    def _typical(self, net: Net, grad: bool) -> ArchSample:
        """A sample of the kind that draws make: full depth, no precision certain. Its values do not matter."""
        alphas = {k: torch.full_like(v, 1 / v.shape[-1]) for k, v in net.arch.logits.items()}
        alphas["blocks"] = torch.zeros_like(alphas["blocks"])
        alphas["blocks"][-1] = 1
        return self.assemble(net, {k: v.requires_grad_(grad) for k, v in alphas.items()})

    def assemble(self, net: Net, alphas: Mapping[str, Tensor]) -> ArchSample:
        """The sample of these values, in the buffer; what the buffer held before is gone."""
        if self.buffer is None:
            self.buffer = net.arch.buffer(net.device, net.mask_dtype)
        self.ticket += 1
        self.live = net.arch.assemble(alphas, device=net.device, dtype=net.mask_dtype, out=self.buffer)
        return self.live

    def _capture(self, net: Net, mode: str, ids: Tensor, make: Callable[..., Any]) -> list[dict[bool, Replay]]:
        weights, vectors = mode != "arch", mode != "weight"
        sample = self._typical(net, vectors)
        with torch.no_grad():
            x, _ = net.embed(ids, sample)
        step = self.step._replace(mode=mode)
        always = min(net.arch.space.blocks)
        functions: list[Callable[..., Tensor]] = []
        block: Any
        arguments: list[tuple[Tensor, ...]] = []
        captured: list[tuple[int, bool, tuple[Any, ...]]] = []
        with stand_ins(net.blocks) as leaves:
            for index, (block, drawn) in enumerate(zip(net.blocks, sample.blocks, strict=True)):
                one = drawn.leaves(vectors)
                own = _trained(block) if weights else []
                for skipped in (False, True) if vectors and net.arch.block_rank.index(index) >= always else (False,):
                    into = vectors or index > 0  # the embedding is frozen: only its mask wants a gradient
                    tensors = [one.gate] if skipped else [*(one.vectors if vectors else ()), *own]
                    functions.append(_function(block.skipped if skipped else block, step, one))
                    arguments.append((x.clone().requires_grad_(into), *(t for t in tensors if t is not None)))
                    parameters = () if skipped else tuple(leaves[p] for p in own)
                    captured.append((index, skipped, (parameters, vectors, _kind(drawn), into)))
            with torch.enable_grad():
                calls = make(tuple(functions), tuple(arguments))
        table: list[dict[bool, Replay]] = [{} for _ in net.blocks]
        for call, (index, skipped, about) in zip(calls, captured, strict=True):
            table[index][skipped] = Replay(call, *about)
        return table

    # ---- replay -----------------------------------------------------------------------------------------------------

    def covers(self, sample: ArchSample, mode: str, shape: torch.Size) -> bool:
        """Whether a forward pass of `sample` may replay: its values are in the buffer, on what was captured."""
        return (
            mode in self._replays
            and sample is self.live
            and tuple(shape) == self.shape
            and all(d.get(name) is value for d, name, value in self._bindings)
        )

    @property
    def busy(self) -> bool:
        """Whether another pass or draw would overwrite what a backward pass to come reads, and may not."""
        return self.automatic and self._open is not None and self._open() is not None

    def begin(self) -> int:
        """A forward pass starts: activations of the last one are overwritten."""
        self.ticket += 1
        return self.ticket

    def find(self, index: int, mode: str, skipped: bool, one: BlockSample, x: Tensor) -> Replay | None:
        """The graph of a block for this sample; None where it has none (a precision that became certain)."""
        replay = self._replays[mode][index].get(skipped)
        if replay is None or replay.kind != _kind(one) or (x.requires_grad and not replay.input_gradient):
            return None
        return replay

    @staticmethod
    def run(replay: Replay, x: Tensor, one: BlockSample, skipped: bool) -> Tensor:
        """Replay a block on x; gradients reach x, the parameters and the sample's vectors."""
        vectors = [one.gate] if skipped else one.vectors if replay.vectors else ()
        y: Tensor = replay.call(x, *vectors, *replay.parameters)
        return y

    def guard(self, x: Tensor, ticket: int) -> Tensor:
        """x, the last norm's output; its backward pass runs before anything that reads the buffer or a block."""
        guarded: Tensor = _Guard.apply(x, self, ticket)  # type: ignore[no-untyped-call]
        return guarded

    def opened(self) -> _Open:
        """A pass whose backward pass may come."""
        pass_ = _Open()
        self._open = weakref.ref(pass_)
        return pass_

    def closed(self) -> None:
        """Its backward pass runs."""
        self._open = None


class _Open:
    """Lives as long as the backward pass of a forward pass can run."""


class _Guard(torch.autograd.Function):
    """Before the first backward replay: the activations must still be those of this forward pass, and gradients that
    earlier replays left in `.grad` must move out of the graphs' memory, which is about to be overwritten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, graphs: BlockGraphs, ticket: int) -> Tensor:
        ctx.graphs, ctx.ticket, ctx.open = graphs, ticket, graphs.opened()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        graphs = ctx.graphs
        if graphs.ticket != ctx.ticket:
            raise JointNASError(
                "captured supernet: its activations were overwritten by a later draw, forward or backward pass. Call"
                " backward right after each forward pass, or release() the graphs."
            )
        graphs.ticket += 1
        graphs.closed()
        for p in graphs.parameters:
            if p.grad is not None:
                p.grad = p.grad.clone()
        return grads[0], None, None


class Repeats:
    """Captures a supernet's blocks by itself when one step, of one mode and shape, came ``after`` times in a row.

    Modes that were seen at this shape are captured together. What cannot be captured, or does not fit into memory, is
    not tried again.
    """

    def __init__(self, after: int = 3) -> None:
        self.after: int | None = after
        self._seen: dict[str, tuple[tuple[int, ...], int]] = {}  # by mode: shape, how often in a row

    def step(self, net: Capturing, shape: torch.Size, plain: bool) -> None:
        """A training step over ids of a shape begins; ``plain``: nothing in it forbids graphs."""
        graphs, mode = net.graphs, net.current_mode
        if self.after is None or (graphs is not None and not graphs.automatic):
            return
        before, count = self._seen.pop(mode, (tuple(shape), 0))
        if not plain:
            return
        count = count + 1 if before == tuple(shape) else 1
        self._seen[mode] = tuple(shape), count
        if count < self.after or (graphs is not None and mode in graphs.modes and graphs.shape == tuple(shape)):
            return
        if not net.capturable:
            return
        modes = [name for name, (other, _) in self._seen.items() if other == tuple(shape)]
        try:
            net.capture(shape[0], shape[1], modes)
            if net.graphs is not None:
                net.graphs.automatic = True
        except (JointNASError, RuntimeError) as error:  # no memory, above all; steps run as they did
            self.after = None
            net.release()
            log.warning("steps run without CUDA graphs, and slower: %s", error)

    def __deepcopy__(self, _: Any) -> Repeats:
        copied = Repeats()
        copied.after = self.after
        return copied


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _check(net: Net, modes: tuple[str, ...]) -> None:
    if torch.is_autocast_enabled(net.device.type) or torch.is_inference_mode_enabled():
        raise JointNASError("capture: leave autocast and inference mode first; graphs are for training steps.")
    if any(type(p) is not nn.Parameter for p in net.blocks.parameters()):
        raise JointNASError("capture: the blocks' parameters are sharded over devices; graphs need plain parameters.")
    searched = net.arch.space.weight_bits or net.arch.space.act_bits
    if "weight" in modes and searched and net.arch.bit_relaxation == "reinmax":
        raise JointNASError(
            'capture: bit_relaxation="reinmax" draws one precision per block, and in "weight" mode its kernels differ'
            ' from draw to draw; capture modes=("arch",), or relax the bits by "softmax".'
        )


def _reserved(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


@contextmanager
def stand_ins(module: nn.Module) -> Iterator[dict[Tensor, nn.Parameter]]:
    """Inside, every trained parameter is replaced by a leaf on the same memory; yields stand-in -> parameter.

    Captured autograd graphs stay alive with their outputs, and so would the parameters' AccumulateGrad nodes, bound to
    the stream of the capture; stand-ins leave the parameters untouched.
    """
    replaced = [
        (m._parameters, name, p)
        for m in module.modules()
        for name, p in m._parameters.items()
        if p is not None and p.requires_grad
    ]
    found: dict[Tensor, nn.Parameter] = {}
    try:
        for d, name, p in replaced:
            d[name] = leaf = p.detach().requires_grad_()  # type: ignore[assignment]
            found[leaf] = p
        yield found
    finally:
        for d, name, p in replaced:
            d[name] = p


def _trained(module: nn.Module) -> list[Any]:
    return [p for p in module.parameters() if p.requires_grad]


def _kind(one: BlockSample) -> tuple[Any, ...]:
    """What of a block sample is decided on the host, and therefore frozen into a graph."""
    present = tuple(t is None for t in (one.gate, one.weight_probs, one.act_probs))
    return (*present, one.weight_index, one.act_index)


def _function(block: Callable[..., Tensor], step: Step, one: BlockSample) -> Callable[..., Tensor]:
    """A function of tensors only; behind x they are named for autograd, the block reads them where they are."""

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return block(x, step, one)

    return run
