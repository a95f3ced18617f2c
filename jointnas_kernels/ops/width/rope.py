"""masked_rope: rotary embedding of masked queries and keys, written where SDPA wants them.

The inner op keeps [B, T, heads, D] in memory (one contiguous read, one contiguous write); the public function returns
the transposed views. Queries and keys share one launch. The attention scale is folded into q_mask by the caller, so
SDPA runs with scale=1. Backward, with halves 1, 2 and G = dL/dout:

    dp1 = G1 cos1 + G2 sin2     dp2 = G2 cos2 - G1 sin1     dq = mask dp     dmask = sum over B, T of q dp

Values go through untouched. On a GPU the backward pass lays dv beside dq and dk: dx of a linear that makes all three is
then one product, and so is its dW; moving dv reads and writes 2 MB at 8B's shapes and 1024 tokens.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core import cpu
from jointnas_kernels.ops.core.columns import STAGES, column_sums, partial_sums
from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import bad, compute_dtype, dense_like, in_dtype_of, power_of_two, processors

Triple = tuple[Tensor, Tensor, Tensor | None]
Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]  # dq, dk, dq_mask, dk_mask, dv


def _rotate(x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    acc = compute_dtype(x.dtype)
    p, c, s = x.to(acc) * mask.to(acc), cos.to(acc).unsqueeze(2), sin.to(acc).unsqueeze(2)  # c, s [B or 1, T, 1, D]
    first, second = p.chunk(2, dim=-1)
    return (p * c + torch.cat([-second, first], dim=-1) * s).to(x.dtype)


def _rotate_back(
    g: Tensor, x: Tensor | None, mask: Tensor, cos: Tensor, sin: Tensor, need_mask: bool
) -> tuple[Tensor, Tensor | None]:
    acc = compute_dtype(g.dtype)
    first, second = (g.to(acc) * sin.to(acc).unsqueeze(2)).chunk(2, dim=-1)
    dp = g.to(acc) * cos.to(acc).unsqueeze(2) + torch.cat([second, -first], dim=-1)
    dmask = (x.to(acc) * dp).sum((0, 1)).to(mask.dtype) if need_mask and x is not None else None
    return (dp * mask.to(acc)).to(g.dtype), dmask


def _reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_mask: Tensor, k_mask: Tensor, v: Tensor | None
) -> Triple:
    return _rotate(q, q_mask, cos, sin), _rotate(k, k_mask, cos, sin), v


def _reference_backward(
    dq_out: Tensor, dk_out: Tensor, dv: Tensor | None, q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor,
    q_mask: Tensor, k_mask: Tensor, v: Tensor | None, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    dq, dq_mask = _rotate_back(dq_out, q, q_mask, cos, sin, need[2])
    dk, dk_mask = _rotate_back(dk_out, k, k_mask, cos, sin, need[3])
    return dq, dk, dq_mask, dk_mask, dv


@triton.jit
def load_halves(ptr, head_stride, H, half, HP: tl.constexpr, HALF: tl.constexpr):
    """Both halves [HP, HALF] of all heads at ``ptr`` in fp32; zero beyond H heads or half the head dim."""
    head = tl.arange(0, HP)
    d = tl.arange(0, HALF)
    at = head[:, None].to(tl.int64) * head_stride + d[None, :]  # heads of a long cache are more than 2^31 apart
    ok = (head < H)[:, None] & (d < half)[None, :]
    first = tl.load(ptr + at, mask=ok, other=0.0).to(tl.float32)
    return first, tl.load(ptr + at + half, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def store_halves(ptr, first, second, H, half, HP: tl.constexpr, HALF: tl.constexpr):
    """Write both halves to contiguous [H, 2 half] memory."""
    head = tl.arange(0, HP)
    d = tl.arange(0, HALF)
    at = head[:, None] * (2 * half) + d[None, :]
    ok = (head < H)[:, None] & (d < half)[None, :]
    tl.store(ptr + at, first, mask=ok)
    tl.store(ptr + at + half, second, mask=ok)


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, v_ptr, xq_ptr, xk_ptr, cos_ptr, sin_ptr, q_mask_ptr, k_mask_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
    dqm_ptr, dkm_ptr, tokens, T, H, HKV, half, q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, xq_sb, xq_st,
    xq_sh, xk_sb, xk_st, xk_sh, cos_sb, cos_st, sin_sb, sin_st, q_step, k_step, per_program,
    HAS_V: tl.constexpr, BACKWARD: tl.constexpr, NEED_Q: tl.constexpr, NEED_K: tl.constexpr, LOOP_STAGES: tl.constexpr,
    HP: tl.constexpr, KP: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """``per_program`` tokens, all heads. Forward: rope(mask * q). BACKWARD: mask * rope^T(q) for incoming gradients q,
    with xq the forward's input for the mask gradients, and a copy of v. Outputs of a token are q_step (k_step, also of
    v) behind those of the one before."""
    pid = tl.program_id(0)
    d = tl.arange(0, HALF)
    qm1, qm2 = load_halves(q_mask_ptr, 2 * half, H, half, HP, HALF)
    km1, km2 = load_halves(k_mask_ptr, 2 * half, HKV, half, KP, HALF)
    dqm1 = tl.zeros([HP, HALF], tl.float32)
    dqm2 = tl.zeros([HP, HALF], tl.float32)
    dkm1 = tl.zeros([KP, HALF], tl.float32)
    dkm2 = tl.zeros([KP, HALF], tl.float32)
    for i in tl.range(0, per_program, num_stages=LOOP_STAGES):
        token = (pid * per_program + i).to(tl.int64)
        live = (token < tokens).to(tl.int32)  # past the last token no head is loaded or stored
        q_heads, k_heads = live * H, live * HKV
        b = token // T
        t = token % T
        at = cos_ptr + b * cos_sb + t * cos_st + d
        c1 = tl.load(at, mask=d < live * half, other=0.0).to(tl.float32)[None, :]  # [1, HALF]
        c2 = tl.load(at + half, mask=d < live * half, other=0.0).to(tl.float32)[None, :]
        at = sin_ptr + b * sin_sb + t * sin_st + d
        s1 = tl.load(at, mask=d < live * half, other=0.0).to(tl.float32)[None, :]
        s2 = tl.load(at + half, mask=d < live * half, other=0.0).to(tl.float32)[None, :]
        q1, q2 = load_halves(q_ptr + b * q_sb + t * q_st, q_sh, q_heads, half, HP, HALF)
        k1, k2 = load_halves(k_ptr + b * k_sb + t * k_st, k_sh, k_heads, half, KP, HALF)
        q_out = q_out_ptr + token * q_step
        k_out = k_out_ptr + token * k_step
        if HAS_V:
            v1, v2 = load_halves(v_ptr + b * v_sb + t * v_st, v_sh, k_heads, half, KP, HALF)
            store_halves(v_out_ptr + token * k_step, v1, v2, k_heads, half, KP, HALF)
        if BACKWARD:
            p1, p2 = q1 * c1 + q2 * s2, q2 * c2 - q1 * s1
            r1, r2 = k1 * c1 + k2 * s2, k2 * c2 - k1 * s1
            store_halves(q_out, qm1 * p1, qm2 * p2, q_heads, half, HP, HALF)
            store_halves(k_out, km1 * r1, km2 * r2, k_heads, half, KP, HALF)
            if NEED_Q:
                x1, x2 = load_halves(xq_ptr + b * xq_sb + t * xq_st, xq_sh, q_heads, half, HP, HALF)
                dqm1 += x1 * p1
                dqm2 += x2 * p2
            if NEED_K:
                y1, y2 = load_halves(xk_ptr + b * xk_sb + t * xk_st, xk_sh, k_heads, half, KP, HALF)
                dkm1 += y1 * r1
                dkm2 += y2 * r2
        else:
            p1, p2 = qm1 * q1, qm2 * q2
            r1, r2 = km1 * k1, km2 * k2
            store_halves(q_out, p1 * c1 - p2 * s1, p2 * c2 + p1 * s2, q_heads, half, HP, HALF)
            store_halves(k_out, r1 * c1 - r2 * s1, r2 * c2 + r1 * s2, k_heads, half, KP, HALF)
    if NEED_Q:
        store_halves(dqm_ptr + pid * H * (2 * half), dqm1, dqm2, H, half, HP, HALF)
    if NEED_K:
        store_halves(dkm_ptr + pid * HKV * (2 * half), dkm1, dkm2, HKV, half, KP, HALF)


def tokens_per_program(x: Tensor, tokens: int, reduce: bool) -> int:
    """Of kernels over [tokens, heads, D]. The fp32 masks weigh as much as one token's heads: registers keep them over
    up to 8 tokens. With ``reduce`` two programs per processor bound the partial sums."""
    if reduce:
        return max(1, -(-tokens // (2 * processors(x))))
    return max(1, min(8, tokens // (2 * processors(x))))


def _unit(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _launch(
    q: Tensor, k: Tensor, v: Tensor | None, xq: Tensor | None, xk: Tensor | None, cos: Tensor, sin: Tensor,
    q_mask: Tensor, k_mask: Tensor, _: Tensor | None, need: Sequence[bool], backward: bool = True,
) -> Gradients:  # fmt: skip
    """Outputs like q and k or, of gradients q, k, v and the forward's inputs xq and xk, the gradients, beside each
    other."""
    need_q, need_k = need[2] and xq is not None, need[3] and xk is not None
    q, k, cos, sin = _unit(q), _unit(k), _unit(cos), _unit(sin)
    v = None if v is None else _unit(v)
    xq, xk = _unit(xq) if xq is not None and need_q else q, _unit(xk) if xk is not None and need_k else k
    (batch, length, heads, dim), kv_heads, reduce = q.shape, k.shape[2], need_q or need_k
    tokens = batch * length
    widths = [dim * count for count in (heads, kv_heads, kv_heads)][: 2 if v is None else 3]
    every = q.new_empty(batch, length, sum(widths)).split(widths, dim=-1) if backward else []
    outs = [part.unflatten(-1, (-1, dim)) for part in every] or [dense_like(q), dense_like(k)]
    q_out, k_out, v_out = outs if len(outs) == 3 else (*outs, None)
    per_program = tokens_per_program(q, tokens, reduce)
    programs = -(-tokens // per_program)
    dqm = partial_sums(need_q, programs, heads * dim, q.device)
    dkm = partial_sums(need_k, programs, kv_heads * dim, q.device)
    hp, kp, half = power_of_two(heads), power_of_two(kv_heads), power_of_two(dim // 2)
    strides = [stride for x in (q, k, k if v is None else v, xq, xk) for stride in x.stride()[:3]]
    strides += [stride for t in (cos, sin) for stride in (0 if t.shape[0] == 1 else t.stride(0), t.stride(1))]
    strides += [sum(widths)] * 2 if backward else widths[:2]  # not stride(1): of one token it is anything
    if programs > 0:
        with torch.cuda.device_of(q):
            rope_kernel[(programs,)](
                q, k, v, xq, xk, cos, sin, q_mask.contiguous(), k_mask.contiguous(), q_out, k_out, v_out, dqm, dkm,
                tokens, length, heads, kv_heads, dim // 2, *strides, per_program, HAS_V=v is not None,
                BACKWARD=backward, NEED_Q=need_q, NEED_K=need_k, LOOP_STAGES=STAGES if per_program > 1 else 1, HP=hp,
                KP=kp, HALF=half, num_warps=4 if hp * half < 2048 else 16 if reduce else 8,
            )  # fmt: skip
    of_q, of_k = column_sums(dqm, dkm)
    return q_out, k_out, in_dtype_of(of_q, q_mask), in_dtype_of(of_k, k_mask), v_out


def _launch_forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_mask: Tensor, k_mask: Tensor, v: Tensor | None
) -> Triple:
    need = (True, True, False, False)
    return *_launch(q, k, None, None, None, cos, sin, q_mask, k_mask, None, need, backward=False)[:2], v


def _tables(cos: Tensor, sin: Tensor, batch: int) -> tuple[Tensor, Tensor, int]:
    """cos and sin as [period, D] fp32, and the period: all positions, or all tokens where the batch has its own."""
    if cos.shape[0] != sin.shape[0]:
        cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    return cpu.vector(cos), cpu.vector(sin), cos.shape[0] * cos.shape[1]


def _cpu(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_mask: Tensor, k_mask: Tensor, v: Tensor | None
) -> Triple:
    cosine, sine, period = _tables(cos, sin, q.shape[0])
    out = []
    for x, mask in ((q.contiguous(), q_mask), (k.contiguous(), k_mask)):
        y = cpu.empty_like(x)
        tokens, _, per_chunk, _ = cpu.chunking(x, last=2)
        cpu.call("masked_rope", x, cpu.vector(mask), cosine, sine, y, tokens, period, *x.shape[2:], per_chunk,
                 cpu.DTYPES[x.dtype])
        out.append(y)
    return out[0], out[1], v


def _cpu_backward(
    dq_out: Tensor, dk_out: Tensor, dv: Tensor | None, q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor,
    q_mask: Tensor, k_mask: Tensor, v: Tensor | None, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    cosine, sine, period = _tables(cos, sin, dq_out.shape[0])
    grads, masks = [], []
    for out, x, mask, needed in ((dq_out, q, q_mask, need[2]), (dk_out, k, k_mask, need[3])):
        g, source = out.contiguous(), x.contiguous() if needed and x is not None else None
        tokens, _, per_chunk, chunks = cpu.chunking(g, needed, last=2)
        dx, partial = cpu.empty_like(g), cpu.partial_sums(needed, chunks, *g.shape[2:])
        cpu.call("masked_rope_backward", g, source, cpu.vector(mask), cosine, sine, dx, partial, tokens, period,
                 *g.shape[2:], per_chunk, cpu.DTYPES[g.dtype])
        grads.append(dx)
        masks.append(cpu.total(partial, mask))
    return grads[0], grads[1], masks[0], masks[1], dv


_op = Op(
    "masked_rope",
    {"triton": _launch_forward, "cpu": _cpu, "reference": _reference},
    {"triton": _launch, "cpu": _cpu_backward, "reference": _reference_backward},
    results=3,
    frozen=("cos", "sin"),
    read_for={"q": ("q_mask",), "k": ("k_mask",), "v": ()},
)


def masked_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_mask: Tensor, k_mask: Tensor, backend: str | None = None,
    v: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """rope(q_mask * q) and rope(k_mask * k), heads before tokens; and v, if it is given, as it is.

    With p = mask * q: p cos + rot(p) sin, where rot(p)_i = -p_{i+D/2} for i < D/2, else p_{i-D/2} (rotate-half, as in
    Hugging Face).

    Args:
        q: [B, T, H, D] in any floating dtype, D even.
        k: [B, T, Hkv, D], like q.
        cos, sin: [B or 1, T, D], any floating dtype, both halves filled as Hugging Face does; they get no gradient.
        q_mask: [H, D], fp32.
        k_mask: [Hkv, D], fp32.
        backend: "triton", "cpu" or "reference"; None: by device and dtype.
        v: [B, T, Hkv, D], like k. Through here its gradient comes to lie beside those of q and k on a GPU.

    Returns:
        [B, H, T, D] and [B, Hkv, T, D], with v once more, in the dtype of q: transposed views of [B, T, heads, D]
        memory, the layout fused attention reads fastest. Gradients to q, k, v and the masks.

    Raises:
        JointNASError: shapes or dtypes that do not fit, or a backend that cannot run.
    """
    op = "masked_rope"
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise bad(op, f"q {tuple(q.shape)} and k {tuple(k.shape)} must be [B, T, heads, D] with equal B, T, D")
    if q.shape[-1] % 2 != 0:
        raise bad(op, f"head_dim {q.shape[-1]} must be even")
    if q.dtype != k.dtype:
        raise bad(op, f"q is {q.dtype}, k is {k.dtype}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 3 or table.shape[0] not in (1, q.shape[0]) or table.shape[1:] != q.shape[1::2]:
            raise bad(op, f"{name} {tuple(table.shape)} must be [B or 1, T, D] for q {tuple(q.shape)}")
    if q_mask.shape != q.shape[2:]:
        raise bad(op, f"q_mask {tuple(q_mask.shape)} must be {tuple(q.shape[2:])}")
    if k_mask.shape != k.shape[2:]:
        raise bad(op, f"k_mask {tuple(k_mask.shape)} must be {tuple(k.shape[2:])}")
    if v is not None and (v.shape != k.shape or v.dtype != k.dtype):
        raise bad(op, f"v {v.dtype} {tuple(v.shape)} must be like k {k.dtype} {tuple(k.shape)}")
    found = _op(q, k, cos, sin, q_mask, k_mask, v, backend)
    return tuple(one.transpose(1, 2) for one in found[: 2 if v is None else 3])
