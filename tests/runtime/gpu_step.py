"""What the tests of a GPU's step share, in the interpreter and on a GPU: references, and models that generate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from jointnas_kernels.runtime import GraphStep, attach, kernels
from jointnas_kernels.testing import assert_close
from tests.hf.hf_models import tiny_model
from tests.runtime.test_decode import packed

LENGTH = 33  # new tokens
EPS = 1e-5


def norm(x: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return x
    return weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


class Problem:
    """Heads of `batch` times `count` tokens from `slot` on, behind random caches of two blocks."""

    def __init__(self, batch: int, share: int, kv_heads: int, dim: int, slot: int, dtype: torch.dtype, count: int = 1,
                 norms: bool = False, length: int = 50, device: str = "cpu") -> None:  # fmt: skip
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype)

        heads, self.batch, self.slot, self.count, self.share = share * kv_heads, batch, slot, count, share
        qkv = random(batch * count, (heads + 2 * kv_heads) * dim)  # as fused projections have it
        q, k, v = qkv.split((heads * dim, kv_heads * dim, kv_heads * dim), 1)
        self.caches = [random(batch, kv_heads, length, dim) for _ in range(4)]
        self.angles = [f(random(length, dim)) for f in (torch.cos, torch.sin)]
        where = [slot, length, *(t.data_ptr() for t in (*self.angles, *self.caches))]
        weights = [random(dim).abs() + 0.5 if norms else None for _ in range(2)]
        positions = torch.randint(length, (batch * count,), device=device)
        table = torch.tensor(where, device=device)
        self.heads = kernels.Heads(q, k, v, *weights, table, positions, 1, kv_heads, dim, EPS)

    def turned(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """[batch, heads, count, D] rotated, of [M, heads D]."""
        dim, h = self.heads.dim, self.heads
        x = norm(x.reshape(self.batch, self.count, -1, dim), weight)
        cosine, sine = (t[h.positions].view(self.batch, self.count, 1, dim) for t in self.angles)
        half = torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), -1)
        return (x * cosine + half * sine).transpose(1, 2)

    def expected(self, starts: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """Rotated queries [batch, heads, count, D], and the result [M, heads D] in fp64."""
        h, end = self.heads, self.slot + self.count
        q, k = self.turned(h.q, h.q_norm), self.turned(h.k, h.k_norm)
        keys, values = (t.clone() for t in self.caches[2:])
        keys[:, :, self.slot : end] = k
        values[:, :, self.slot : end] = h.v.reshape(self.batch, self.count, -1, h.dim).transpose(1, 2)
        self.want = keys, values
        at = torch.arange(end, device=q.device)
        own = at[self.slot :, None]
        seen = (at <= own) & (at >= starts[:, None, None]) & (at > own - window if window else at >= 0)
        seen = (seen | (at == own))[:, None]
        found = functional.scaled_dot_product_attention(
            q.double(), *(t[:, :, :end].double().repeat_interleave(self.share, 1) for t in (keys, values)), seen,
            scale=0.3,
        )  # fmt: skip
        return q, found.transpose(1, 2).reshape(self.batch * self.count, -1)

    def check_caches(self) -> None:
        for own, want in zip(self.caches[2:], self.want, strict=True):
            assert_close(own, want)


def model_of(
    change: dict[str, Any] | None = None, bits: tuple[int, ...] = (4, 8), act: int = 16, device: str = "cpu",
    dtype: torch.dtype = torch.float32, group: int = 16,
) -> Any:  # fmt: skip
    """A block for each of `bits`, which generates."""
    model = tiny_model(dtype, **{**(change or {}), "num_hidden_layers": len(bits)}).to(device)
    model = packed(model, list(bits), act, group=group)
    model.generation_config.eos_token_id = None
    attach(model)
    return model


def generated(model: Any, x: Tensor, fast: bool, mask: Tensor | None = None, **how: Any) -> Tensor:
    model.runtime.enabled, mask = fast, torch.ones_like(x) if mask is None else mask
    usual = {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": 0}
    return model.generate(x, attention_mask=mask, **{**usual, **how})


def decoded(step: GraphStep, x: Tensor, length: int = 9) -> Tensor:
    """Logits of the last token, decoded token by token."""
    caches = step.caches(len(x), length)
    for t in range(x.shape[1]):
        logits = step(x[:, t], torch.full((len(x),), t, device=x.device), caches, t)
    return logits


def stock(model: Any, x: Tensor) -> Tensor:
    return type(model).forward(model, x).logits[:, -1]
