"""The quantizers' definitions, and what is exact about them.

A quantizer is discontinuous, so fp64 alone does not define its levels: the rule says in which precision each step is
rounded. Every step here is computed in fp64 from rounded operands and then rounded to the rule's precision, which is
the same as computing it there (53 >= 2 · 24 + 2 bits: double rounding is innocuous for + - · /).

* Levels of given values (``fake_quant_weight``, ``act_quant_mix``, ``lowbit_linear``) must agree exactly.
* ``quant_lora_mix`` quantizes W + B'A, a sum whose fp32 value depends on the order of addition. Half of the cases put
  W, A and B' on a dyadic grid, where every order gives the same fp32 value, ties included: levels must agree exactly.
  In the other half the sum is known to (r + 4) · 2^-23 · (|W| + |B'| |A|) (tensor cores truncate, hence not 2^-24), the
  scale and the quotient are intervals, and a level is *undecided* where the interval holds a rounding boundary. Each
  result may then deviate by what the undecided levels, scales and straight-through masks can change in it, no more.
  (The largest |w| of a group always is undecided if negative: by construction it lies at -(2^b - 1)/2, a tie.)

Levels, scales and masks enter the differentiable definition as constants; eager autograd gives the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.fuzz.check import Bounds, Named


def to(dtype: torch.dtype, x: Tensor) -> Tensor:
    """x (fp64) rounded to ``dtype``, in fp64."""
    return x.to(dtype).double()


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def constant(value: Tensor, like: Tensor) -> Tensor:
    """``value`` with the gradient of ``like``."""
    return value + (like - like.detach())


# ---- weights ---------------------------------------------------------------------------------------------------------


@dataclass
class Groups:
    """Quantized groups [.., G, g] or [.., G, 1]: what the rule gives, and how far fp32 sums may move it."""

    level: Tensor  # level minus zero point
    scale: Tensor
    slope: Tensor  # ds/dclip
    inside: Tensor  # the level needed no clamping
    spread: Tensor  # |Q| can differ by this much
    spread_slope: Tensor  # level - inside · w/s can differ by this much
    mask_undecided: Tensor
    level_undecided: Tensor


def quantize(
    w: Tensor, bits: int, clip: Tensor | None, symmetric: bool, dtype: torch.dtype, slack: Tensor | None
) -> Groups:
    """The rule for w [.., G, g], known to ``slack`` (None: exactly), clip [.., G] and scales stored as ``dtype``."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    acc = wide(dtype)
    w = to(acc, w)
    ratio = None if clip is None else clip.unsqueeze(-1)
    divisor = (2**bits - 1) / 2 if symmetric else 2**bits - 1
    if symmetric:
        unit, least = w.abs().amax(-1, keepdim=True), None
    else:
        least = w.amin(-1, keepdim=True).clamp(max=0)
        unit = to(acc, w.amax(-1, keepdim=True).clamp(min=0) - least)

    def stored(raw: Tensor) -> Tensor:
        s = to(dtype, to(acc, raw))
        return torch.where(s < 2.0**-100, 1.0, s)

    def times(x: Tensor) -> Tensor:
        return x if ratio is None else to(acc, ratio * x)

    s = stored(times(unit) / divisor)
    v = to(acc, w / s)
    if least is None:
        zero = torch.zeros_like(s)
    else:
        zero = to(acc, low - to(acc, times(least) / s)).clamp(low, high).round()
        v = to(acc, v + zero)
    rounded = v.round()
    level, inside = rounded.clamp(low, high) - zero, (rounded >= low) & (rounded <= high)
    none = torch.zeros_like(w)
    if slack is None:
        no = torch.zeros_like(inside)
        return Groups(level, s, unit / divisor, inside, none, none, no, no)
    assert symmetric, "only given weights are quantized asymmetrically"
    eps = 4 * torch.finfo(acc).eps
    smallest, largest = (w.abs() - slack).clamp(min=0).amax(-1, keepdim=True), (w.abs() + slack).amax(-1, keepdim=True)
    s_low, s_high = stored(times(smallest) / divisor * (1 - eps)), stored(times(largest) / divisor * (1 + eps))
    bottom, top = w - slack, w + slack
    v_low = torch.where(bottom > 0, bottom / s_high, bottom / s_low) - eps * v.abs()
    v_high = torch.where(top > 0, top / s_low, top / s_high) + eps * v.abs()
    levels = [x.round().clamp(low, high) for x in (v_low, v_high)]
    corners = torch.stack([q * x for q in levels for x in (s_low, s_high)])
    spread = torch.maximum(corners.amax(0) - level * s, level * s - corners.amin(0))
    sides = [(x.round() >= low) & (x.round() <= high) for x in (v_low, v_high)]
    level_undecided = (levels[0] != levels[1]) | ((s_high - s_low) > 1e-4 * s)
    mask_undecided = (sides[0] != sides[1]) | (sides[0] != inside)
    spread_slope = levels[1] - levels[0] + torch.where(
        mask_undecided, torch.maximum(v_low.abs(), v_high.abs()), torch.where(inside, v_high - v_low, none)
    )
    spread_slope = spread_slope + ((largest - smallest) / unit.clamp(min=1e-300)) * (level - inside * v).abs()
    return Groups(level, s, unit / divisor, inside, spread, spread_slope, mask_undecided, level_undecided)


def dequantize(w: Tensor, clip: Tensor | None, groups: Groups, ste: str) -> Tensor:
    """Q(w) with its straight-through gradients; w [.., G, g], clip [.., G]."""
    if ste == "identity":
        return constant(groups.level * groups.scale, w)
    s = groups.scale if clip is None else constant(groups.scale, clip.unsqueeze(-1) * groups.slope)
    v = w / s
    return (groups.level + groups.inside * (v - v.detach())) * s


def clip_slope(size: Tensor, w: Tensor, groups: Groups, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of dclip = ds/dclip · sum G (level - inside · w/s) with |G| = size: the sum of |terms|, and the error of level
    and quotient (each rounded once as a factor and once as a product), which are far larger than their difference."""
    v, slope = groups.inside * (w / groups.scale), groups.slope.squeeze(-1)
    rounding = torch.finfo(wide(dtype)).eps * (size * (groups.level.abs() + v.abs())).sum(-1) * slope
    return (size * (groups.level - v).abs()).sum(-1) * slope, rounding


# ---- mixture of precisions with LoRA ---------------------------------------------------------------------------------


@dataclass
class Mixture:
    """One drawn mixture: its tensors, its constants and its definition."""

    tensors: Named
    bits: list[int]
    group: int
    scaling: float
    ste: str
    mode: str
    dtype: torch.dtype
    exact: bool

    def __post_init__(self) -> None:
        t = {name: value.double() for name, value in self.tensors.items()}
        acc = wide(self.dtype)
        self.round_a = to(self.dtype, t["lora_a"]) - t["lora_a"]
        self.round_b = to(self.dtype, to(acc, t["lora_b"] * self.scaling)) - t["lora_b"] * self.scaling
        self.groups: list[Groups] = []
        a, b = self.lora(t)
        for p, bits in enumerate(self.bits):
            w = t["weight"] + b[p] @ a[p]
            slack = None
            if not self.exact:
                units = (a.shape[1] + 4) * (2.0**-23 if acc == torch.float32 else 2.0**-52)
                slack = self.split(units * (t["weight"].abs() + b[p].abs() @ a[p].abs()))
            clip = t["clip"][p] if "clip" in t else None
            self.groups.append(quantize(self.split(w), bits, clip, True, self.dtype, slack))

    def split(self, w: Tensor) -> Tensor:
        return w.unflatten(-1, (-1, self.group))

    def lora(self, t: Named) -> tuple[Tensor, Tensor]:
        """(A, scaling · B) rounded to the weight's dtype, with straight-through gradients."""
        return t["lora_a"] + self.round_a, t["lora_b"] * self.scaling + self.round_b

    def value(self, t: Named) -> Tensor:
        """W~ [O, I], differentiable."""
        a, b = self.lora(t)
        out = torch.zeros_like(t["weight"])
        for p, groups in enumerate(self.groups):
            w = self.split(t["weight"] + b[p] @ a[p])
            clip = t["clip"][p] if "clip" in t else None
            out = out + t["probs"][p] * dequantize(w, clip, groups, self.ste).flatten(-2)
        return out

    def spread(self, probs: Tensor) -> Tensor:
        """How far W~ may move with the undecided levels."""
        return torch.stack([p.abs() * g.spread.flatten(-2) for p, g in zip(probs, self.groups, strict=True)]).sum(0)

    def terms(self, probs: Tensor) -> Tensor:
        """sum_p |probs_p Q_p|."""
        q = [(p * g.level * g.scale).abs().flatten(-2) for p, g in zip(probs, self.groups, strict=True)]
        return torch.stack(q).sum(0)

    def undecided(self) -> int:
        return sum(int(g.level_undecided.sum()) for g in self.groups)

    def gradient_bounds(self, t: Named, g: Tensor) -> Bounds:
        """Of everything but the output, for g = dL/dW~."""
        a, b = (x.abs() for x in self.lora(t))
        size, probs = g.abs(), t["probs"].abs()
        found = Bounds(undecided=self.undecided())
        grouped = self.split(size)
        da, db, dprobs, dclip, clip_terms = [], [], [], [], []
        for p, groups in enumerate(self.groups):
            lost = (grouped * groups.mask_undecided).flatten(-2) if self.ste == "clip" else torch.zeros_like(size)
            da.append(probs[p] * b[p].T @ lost)
            db.append(self.scaling * probs[p] * lost @ a[p].T)
            dprobs.append((grouped * groups.spread).sum())
            w = self.split(t["weight"] + self.lora(t)[1][p] @ self.lora(t)[0][p])
            terms, rounding = clip_slope(grouped, w, groups, self.dtype)
            clip_terms.append(probs[p] * terms)
            undecided = (grouped * groups.spread_slope).sum(-1) * groups.slope.squeeze(-1)
            dclip.append(probs[p] * (rounding + undecided))
        stacked = {"dlora_a": da, "dlora_b": db, "dprobs": dprobs, "dclip": dclip}
        found.allowance = {name: torch.stack(values) for name, values in stacked.items()}
        found.scale["dclip"] = torch.stack(clip_terms)
        return found


# ---- activations -----------------------------------------------------------------------------------------------------


def token_levels(x: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(level - zero point, scale) per row of x, every step rounded to ``dtype``."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    least, most = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    tiny = torch.finfo(dtype).eps
    if symmetric:
        s = to(dtype, torch.maximum(-least, most) / ((2**bits - 1) / 2))
        zero = torch.zeros_like(s)
        s = torch.where(s == 0, tiny, s)
    else:
        s = to(dtype, to(dtype, most - least) / (2**bits - 1))
        s = torch.where(s == 0, tiny, s)
        zero = to(dtype, low - to(dtype, least / s)).clamp(low, high).round()
    v = to(dtype, x / s)
    v = v if symmetric else to(dtype, v + zero)
    return v.clamp(low, high).round() - zero, s
