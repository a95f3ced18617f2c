"""torch's own operations in the model's dtype: dense linears and everything that is not a linear.

The parts are written as transformers' Llama runs them (eager RMSNorm in fp32, rotate-half RoPE, SDPA with grouped
heads, the dynamic cache's concatenation while decoding), because that is the model whose latency is predicted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jointnas_kernels.latency.backends.base import Call, Target, Torch, Weight
from jointnas_kernels.latency.spec import DENSE, OpSpec


class TorchDense(Torch):
    name = "torch"

    def unsupported(self, spec: OpSpec, target: Target) -> str | None:
        return None if (spec.wbits, spec.abits) == (DENSE, DENSE) else "dense only: W16A16"

    def prepare(self, spec: OpSpec, target: Target, weight: Weight | None) -> Call:
        if isinstance(weight, Tensor):
            return lambda x: F.linear(x, weight)
        part = _part(spec, target)
        return lambda _: part()


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * h.to(x.dtype)


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    def rotate(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    return rotate(q), rotate(k)


def _attention(q: Tensor, new: Tensor, cached: Tensor | None) -> Tensor:
    k, v = new, new
    if cached is not None:
        k, v = torch.cat((cached, new), 2), torch.cat((cached, new), 2)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=cached is None, enable_gqa=q.shape[1] != new.shape[1])
    return y.transpose(1, 2).contiguous()


def _part(spec: OpSpec, target: Target) -> Callable[[], Any]:
    """An operation that is no linear, on inputs of its own."""
    work, (op, m, n, k, *_) = target.workload, spec

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=target.device, dtype=target.dtype)

    if op == "embedding":
        ids = torch.randint(k, (work.batch, work.queries), device=target.device)
        return partial(F.embedding, ids, randn(k, n))
    if op == "norm":
        return partial(_norm, randn(1, m, n), randn(n))
    if op == "add":
        return partial(torch.add, randn(1, m, n), randn(1, m, n))
    if op == "swiglu":
        gate, up = randn(1, m, n), randn(1, m, n)
        return lambda: F.silu(gate) * up
    heads = n, target.kv_heads
    if op == "rope":  # as heads come out of a projection: a transposed view of [B, T, H, D]
        of_heads = [randn(work.batch, work.queries, h, k).transpose(1, 2) for h in heads]
        return partial(_rope, *of_heads, *(randn(1, 1, work.queries, k) for _ in range(2)))
    q, new = (randn(work.batch, h, work.queries, k) for h in heads)
    return partial(_attention, q, new, randn(work.batch, heads[1], work.seq, k) if work.mode == "decode" else None)
