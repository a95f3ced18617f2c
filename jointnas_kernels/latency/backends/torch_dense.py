"""torch's own operations in the model's dtype: dense linears and everything that is not a linear.

The parts are written as transformers' Llama runs them (eager RMSNorm in fp32, rotate-half RoPE, SDPA with grouped
heads, the dynamic cache's concatenation while decoding), because that is the model whose latency is predicted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from jointnas_kernels.latency.backends.base import Call, Target, Torch, Weight
from jointnas_kernels.latency.spec import DENSE, OpSpec


class TorchDense(Torch):
    name = "torch"

    def unsupported(self, spec: OpSpec, target: Target) -> str | None:
        if (spec.wbits, spec.abits) != (DENSE, DENSE):
            return "dense only: W16A16"
        return None

    def prepare(self, spec: OpSpec, target: Target, weight: Weight | None) -> Call:
        if weight is not None:
            assert isinstance(weight, Tensor)
            return lambda x: F.linear(x, weight)
        part = _PARTS[spec.op](spec, target)
        return lambda _: part()


def _randn(target: Target, *shape: int) -> Tensor:
    return torch.randn(shape, device=target.device, dtype=target.dtype)


def _embedding(spec: OpSpec, target: Target) -> Callable[[], Tensor]:
    weight = _randn(target, spec.k, spec.n)
    ids = torch.randint(spec.k, (target.workload.batch, target.workload.queries), device=target.device)
    return lambda: F.embedding(ids, weight)


def _norm(spec: OpSpec, target: Target) -> Callable[[], Tensor]:
    x, weight = _randn(target, 1, spec.m, spec.n), _randn(target, spec.n)

    def run() -> Tensor:
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return weight * h.to(x.dtype)

    return run


def _add(spec: OpSpec, target: Target) -> Callable[[], Tensor]:
    x, y = _randn(target, 1, spec.m, spec.n), _randn(target, 1, spec.m, spec.n)
    return lambda: x + y


def _swiglu(spec: OpSpec, target: Target) -> Callable[[], Tensor]:
    gate, up = _randn(target, 1, spec.m, spec.n), _randn(target, 1, spec.m, spec.n)
    return lambda: F.silu(gate) * up


def _heads(target: Target, heads: int, tokens: int, dim: int) -> Tensor:
    """[B, H, tokens, D] as it comes out of a projection: a transposed view."""
    return _randn(target, target.workload.batch, tokens, heads, dim).transpose(1, 2)


def _rope(spec: OpSpec, target: Target) -> Callable[[], Tensor]:
    tokens = target.workload.queries
    q, k = _heads(target, spec.n, tokens, spec.k), _heads(target, target.kv_heads, tokens, spec.k)
    cos, sin = _randn(target, 1, 1, tokens, spec.k), _randn(target, 1, 1, tokens, spec.k)

    def rotate(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    def run() -> Tensor:
        rotate(k)
        return rotate(q)

    return run


def _attention(spec: OpSpec, target: Target) -> Callable[[], Tensor]:
    work = target.workload
    q = _randn(target, work.batch, spec.n, work.queries, spec.k)
    new = _randn(target, work.batch, target.kv_heads, work.queries, spec.k)
    cached = _randn(target, work.batch, target.kv_heads, work.seq, spec.k)
    gqa = spec.n != target.kv_heads

    def run() -> Tensor:
        k, v = new, new
        if work.mode == "decode":
            k, v = torch.cat((cached, new), 2), torch.cat((cached, new), 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=work.mode == "prefill", enable_gqa=gqa)
        return y.transpose(1, 2).contiguous()

    return run


_PARTS: dict[str, Callable[[OpSpec, Target], Callable[[], Tensor]]] = {
    "embedding": _embedding,
    "norm": _norm,
    "add": _add,
    "swiglu": _swiglu,
    "rope": _rope,
    "attention": _attention,
}
