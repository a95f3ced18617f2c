"""Tokens through a model on a GPU: a decode step is one CUDA graph, prompts are launched kernel by kernel.

A graph is captured when a batch size is first decoded, and serves all caches and positions of that batch: what differs
between tokens is copied into its inputs, and where caches are is read from device memory (kernels.py). Products are
those of the model's own modules, whatever they are, as long as they can be captured; packed ones that read the same
are one. The kernels run all else.
Nothing waits for the device, and a step runs on one stream at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.layout import sliding_windows
from jointnas_kernels.nn.packed import stack
from jointnas_kernels.runtime import kernels
from jointnas_kernels.runtime.step import STAGES, Caches, Step, stage_modules

Run = Callable[[], Tensor]


class Block(NamedTuple):
    """Modules and vectors of a block, as they were when the step was made."""

    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    products: list[list[nn.Module]]  # of STAGES, each a module for every name, or one for all
    window: int  # positions that a token looks back at, itself included; 0: all
    scale: float


class Graph(NamedTuple):
    """A captured step of one batch size."""

    inputs: Tensor  # int64 [3, batch]: ids, positions, starts
    replay: Run  # logits [batch, 1, vocab], the same tensor every time


def capture(run: Run, device: torch.device) -> Run:
    """What replays the launches of `run`; its result is at the same address every time.

    Two calls before the capture, on a stream of their own, compile kernels and let those that must prove themselves do
    so (ops/lowbit/check.py).

    Raises:
        JointNASError: something in it cannot be captured.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = run()
    except RuntimeError as error:
        raise JointNASError(f"decode step: the model cannot be captured as a CUDA graph: {error}; "
                            "model.runtime.enabled = False leaves it to transformers") from error  # fmt: skip

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class GraphStep(Step):
    """`Step` on a GPU.

    Args:
        model: as of `Step`.
        capture: makes of a function without arguments one that repeats its launches.

    Attributes:
        captured: how many graphs were made.

    Raises:
        JointNASError: a model that does not fit.
    """

    kind, dtypes = "cuda", (torch.float16, torch.bfloat16, torch.float32)
    most, chunk = 64, 2048

    def __init__(self, model: Any, capture: Callable[[Run, torch.device], Run] = capture) -> None:
        super().__init__(model)
        self.captured, self._capture = 0, capture
        self._graphs: dict[int, Graph] = {}
        windows = sliding_windows(model.config)
        self._blocks = [self._block(layer, windows[b] or 0) for b, layer in enumerate(model.model.layers)]
        # graphs read them where they are now
        self._kept = [t.detach() for tensors in (model.parameters(), model.buffers()) for t in tensors]
        self._embedding, self._head = model.get_input_embeddings(), model.lm_head
        self._norm, self._epsilon = model.model.norm.weight.detach(), float(model.config.rms_norm_eps)
        with torch.inference_mode(False):
            size = kernels.CACHES + 2 * len(self._blocks)
            self._where = torch.zeros(size, dtype=torch.int64, device=self.device)

    def _block(self, layer: Any, window: int) -> Block:
        attention = layer.self_attn
        norms = [attention.get_submodule(name) if hasattr(attention, name) else None for name in ("q_norm", "k_norm")]
        q_norm, k_norm = (None if norm is None else norm.weight.detach() for norm in norms)
        return Block(
            layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach(), q_norm, k_norm,
            [self._products(layer, names) for names in STAGES], window, float(attention.scaling),
        )  # fmt: skip

    def _products(self, layer: Any, names: tuple[str, ...]) -> list[nn.Module]:
        """One product for linears that read the same, if it may be."""
        modules = stage_modules(self.model.config, layer, names)
        together = stack(modules) if len(modules) > 1 else None
        return modules if together is None else [together]

    def _bind(self, caches: Caches) -> None:
        if self._bound is None or caches.length != self._bound.length:
            self._rotate_to(caches.length)
        pairs = zip(caches.keys, caches.values, strict=True)
        tensors = [*self._angles, *(tensor for pair in pairs for tensor in pair)]
        where = [caches.length, *(tensor.data_ptr() for tensor in tensors)]
        self._where[kernels.LENGTH :].copy_(torch.tensor(where, dtype=torch.int64))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _chunk(self, ids: Tensor, positions: Tensor, starts: Tensor | None, slot: int, keep: int) -> Tensor:
        with torch.cuda.device_of(ids):
            self._where[kernels.SLOT].fill_(slot)
            if ids.shape[1] > 1:
                return self._prompt(ids, positions, starts, slot, keep)
            graph = self._graphs.get(len(ids)) or self._graph(len(ids))
            for to, given in zip(graph.inputs, (ids[:, 0], positions[:, 0], starts), strict=True):
                if given is None:
                    to.zero_()
                else:
                    to.copy_(given)
            return graph.replay()[:, :keep].clone()

    def _graph(self, batch: int) -> Graph:
        """Its inputs while it is captured are tokens 0 at position 0; what they leave in the caches is overwritten by
        its first replay."""
        inputs = torch.zeros(3, batch, dtype=torch.int64, device=self.device)

        def attended(b: int, heads: kernels.Heads) -> Tensor:
            return kernels.attend(heads, inputs[2], self._blocks[b].window, self._blocks[b].scale)

        run = partial(self._logits, inputs[0], inputs[1], attended, batch, 1)
        graph = self._graphs[batch] = Graph(inputs, self._capture(run, self.device))
        self.captured += 1
        return graph

    def _prompt(self, ids: Tensor, positions: Tensor, starts: Tensor | None, slot: int, keep: int) -> Tensor:
        batch, count = ids.shape
        caches = self._bound
        assert caches is not None  # by `_bind`
        heads, masks = self.sizes["heads"], dict[int, Tensor | None]()

        def attended(b: int, of: kernels.Heads) -> Tensor:
            block, share = self._blocks[b], of.share
            first = max(0, slot + 1 - block.window) if block.window else 0
            if block.window not in masks:
                masks[block.window] = _visible(slot, count, first, block.window, starts, self.device)
            mask, queries = masks[block.window], kernels.rotate(of, batch)
            keys, values = (
                t[:, :, None, first : slot + count].expand(-1, -1, share, -1, -1).flatten(1, 2)
                for t in (caches.keys[b], caches.values[b])
            )
            found = functional.scaled_dot_product_attention(
                queries, keys, values, mask, is_causal=mask is None, scale=block.scale
            )
            return found.transpose(1, 2).reshape(batch * count, heads * of.dim)

        return self._logits(ids.flatten(), positions.flatten(), attended, batch, keep)

    def _logits(
        self, ids: Tensor, positions: Tensor, attended: Callable[[int, kernels.Heads], Tensor], batch: int, keep: int
    ) -> Tensor:
        """[batch, keep, vocab] of the last of tokens ids [M], those of each sequence behind one another."""
        dim, eps = self.sizes["head_dim"], self._epsilon
        queries, ours = self.sizes["heads"] * dim, self.sizes["kv_heads"] * dim
        x: Tensor = self._embedding(ids[None])[0]
        y: Tensor | None = None
        for b, block in enumerate(self._blocks):
            (qkv, (output,), gate_up, (down,)), h = block.products, kernels.add_norm(x, y, block.input_norm, eps)
            q, k, v = (m(h) for m in qkv) if len(qkv) > 1 else qkv[0](h).split((queries, ours, ours), 1)
            heads = kernels.Heads(q, k, v, block.q_norm, block.k_norm, self._where, positions, b,
                                  self.sizes["kv_heads"], dim, eps)  # fmt: skip
            h = kernels.add_norm(x, output(attended(b, heads)), block.post_norm, eps)
            gate, up = (m(h) for m in gate_up) if len(gate_up) > 1 else gate_up[0](h).chunk(2, 1)
            y = down(kernels.swiglu(gate, up))
        if not keep:
            return x.new_empty(batch, 0, self.sizes["vocab"])
        last = [t.view(batch, -1, t.shape[1])[:, -keep:].flatten(0, 1).contiguous() for t in (x, y) if t is not None]
        logits: Tensor = self._head(kernels.add_norm(last[0], last[1], self._norm, eps))
        return logits.view(batch, keep, -1)


def _visible(
    slot: int, count: int, first: int, window: int, starts: Tensor | None, device: torch.device
) -> Tensor | None:
    """Which slots from `first` on each of `count` tokens sees, [1 or batch, 1, count, slots]; None: all up to its own,
    and none stand before."""
    if starts is None and slot == 0 and not 0 < window < count:
        return None
    row = torch.arange(slot, slot + count, device=device)[:, None]
    column = torch.arange(first, slot + count, device=device)
    seen = column <= row
    if window:
        seen = seen & (column > row - window)
    if starts is None:
        return seen[None, None]
    return seen & ((column >= starts[:, None, None, None]) | (column == row))
