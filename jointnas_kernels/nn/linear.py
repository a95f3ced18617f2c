"""Linear layers of the supernet: a frozen base weight with LoRA; when bits are searched, one pair per weight precision,
or one that all of them share.

Width masks are not applied here. They are rank 1, so they commute with the linear and with group quantization whose
groups they do not cut, and sit in the elementwise kernels around it:

    y = r * ((W + s B A) (c * x))                      unquantized;   s = lora_alpha / rank
    y = r * (sum_p pi_p Q_p(W + s B_p A_p) (c * x))    quantized
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.nn.base import KEY as PACKED_KEY
from jointnas_kernels.nn.base import pack, packed
from jointnas_kernels.ops.quant.activations import act_quant_mix
from jointnas_kernels.ops.quant.grid import Grid
from jointnas_kernels.ops.quant.mixture.linear import quant_lora_linear
from jointnas_kernels.ops.quant.mixture.op import quant_lora_mix
from jointnas_kernels.ops.quant.mixture.reference import Mixture
from jointnas_kernels.ops.width.linear import mixed_linear

MODES = ("weight", "arch", "full")
INITS = ("kaiming", "gaussian")
LORA_PAIRS = ("per-precision", "shared")


class SupernetLinear(nn.Module):
    """W [O, I] and bias frozen; lora_a [r, I], lora_b [O, r], or with bits [P, r, I], [P, O, r] (shared: P is 1).

    Args:
        weight, bias: [O, I] and [O] of the original layer; shared with it, not copied.
        rank, alpha: of LoRA; s = alpha / rank, or alpha / sqrt(rank) with `rslora`.
        init: of A, "kaiming" or "gaussian", PEFT's two; B starts at 0, which leaves the base model.
        bits: the weight precisions, or None.
        group_size: quantization group along the input.
        ste: straight-through estimator, "identity" or "clip".
        lora_dtype: of the trained parameters; fp32 keeps AdamW's small steps that bf16 would round away.
        lora_pairs: with bits, "per-precision", or "shared": one pair in the quantizers of all precisions.
        base_bits: 8 rounds the weight once and keeps it in so many bits between uses (nn/base.py); None: as it is.

    Raises:
        JointNASError: a rank below 1, or an unknown `init`, `ste`, `lora_pairs` or `base_bits`.
    """

    clip: Tensor | None  # [P, O, I / group]: ratio in (0, 1] of each group's absmax; set by `set_clip`
    clip_logits: nn.Parameter | None  # trained instead of `clip` after `learn_clip`

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, rank: int = 32, alpha: float = 16,
        bits: Sequence[int] | None = None, group_size: int = 128, ste: str = "identity",
        lora_dtype: torch.dtype | None = None, rslora: bool = False, init: str = "kaiming",
        lora_pairs: str = "per-precision", base_bits: int | None = None, backend: str | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise JointNASError(f"LoRA rank is {rank}; it must be positive.")
        if init not in INITS:
            raise unknown("LoRA initialisation", init, INITS)
        if ste not in ("identity", "clip"):
            raise unknown("straight-through estimator", ste, ("identity", "clip"))
        if lora_pairs not in LORA_PAIRS:
            raise unknown("LoRA pairs", lora_pairs, LORA_PAIRS)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.rank, self.alpha, self.rslora, self.ste, self.backend = rank, alpha, rslora, ste, backend
        self.lora_pairs, self.base_bits = lora_pairs, base_bits
        if base_bits is not None:
            pack(self, base_bits)
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.bits = None if bits is None else tuple(bits)
        self.group_size = group_size
        pairs = () if self.bits is None else (1 if lora_pairs == "shared" else len(self.bits),)
        dtype = lora_dtype or (torch.float64 if weight.dtype == torch.float64 else torch.float32)
        self.lora_a = nn.Parameter(torch.empty(*pairs, rank, self.in_features, device=weight.device, dtype=dtype))
        self.lora_b = nn.Parameter(torch.zeros(*pairs, self.out_features, rank, device=weight.device, dtype=dtype))
        if init == "gaussian":
            nn.init.normal_(self.lora_a, std=1 / rank)
        else:
            bound = 1 / math.sqrt(self.in_features)  # kaiming_uniform(a=sqrt(5))
            nn.init.uniform_(self.lora_a, -bound, bound)
        self.register_buffer("clip", None)
        self.register_parameter("clip_logits", None)

    def extra_repr(self) -> str:
        """Sizes and quantizer, for `print`."""
        quant = "" if self.bits is None else f", bits={self.bits}, group={self.group_size}, ste={self.ste}"
        base = "" if self.base_bits is None else f", base_bits={self.base_bits}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, rank={self.rank}{quant}{base}"

    # ---- quantizer state --------------------------------------------------------------------------------------------

    def set_clip(self, ratio: Tensor | None) -> None:
        """Clip ratios [P, O, I / group] of a quantizer initialiser; None: the plain absmax.

        Raises:
            JointNASError: another shape.
        """
        if ratio is not None:
            bits = self.bits or ()
            shape = (len(bits), self.out_features, self.in_features // self.group_size)
            if not bits or tuple(ratio.shape) != shape:
                raise JointNASError(f"clip ratios have shape {tuple(ratio.shape)}; this layer needs {shape}.")
            ratio = ratio.detach().to(self.lora_a.device, self.lora_a.dtype)
        self.clip, self.clip_logits = ratio, None

    def learn_clip(self) -> None:
        """Turn the clip ratios into trained logits (sigmoid(4) = 0.98 where none were set).

        Raises:
            JointNASError: weight bits are not searched, or `ste` is not "clip".
        """
        if self.bits is None or self.ste != "clip":
            raise JointNASError('learn_clip: needs searched weight bits and ste="clip".')
        shape = (len(self.bits), self.out_features, self.in_features // self.group_size)
        ratio = self.lora_a.new_full(shape, torch.sigmoid(torch.tensor(4.0)).item()) if self.clip is None else self.clip
        self.clip_logits = nn.Parameter(torch.logit(ratio.clamp(1e-3, 1 - 1e-3)))
        self.clip = None

    @torch.no_grad()
    def keep(self, bits: int) -> None:
        """Drops all precisions but this one, with their LoRA pairs and clip ratios: what a fixed choice trains.

        Raises:
            JointNASError: the layer has no such precision.
        """
        if self.bits is None or bits not in self.bits:
            raise unknown("precision", bits, self.bits or (), where="keep")
        index = self.bits.index(bits)
        one = slice(index, index + 1)
        a, b = self.pair(index)
        self.lora_a, self.lora_b = nn.Parameter(a[None].clone()), nn.Parameter(b[None].clone())
        self.clip = None if self.clip is None else self.clip[one].clone()
        if self.clip_logits is not None:
            self.clip_logits = nn.Parameter(self.clip_logits[one].clone())
        self.bits = (bits,)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """A whole layer's state decides which quantizer state there is; `torch` alone would ignore clip ratios."""
        if {f"{prefix}weight", f"{prefix}{PACKED_KEY}"} & state_dict.keys():
            shape = (len(self.bits or ()), self.out_features, self.in_features // self.group_size)
            for name in ("clip", "clip_logits"):
                there = f"{prefix}{name}" in state_dict
                if there != (getattr(self, name) is not None):
                    value = self.lora_a.detach().new_empty(shape) if there else None
                    setattr(self, name, value if value is None or name == "clip" else nn.Parameter(value))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def clip_ratio(self) -> Tensor | None:
        """Current clip ratios, None for the plain absmax."""
        return self.clip if self.clip_logits is None else self.clip_logits.sigmoid()

    # ---- forward ----------------------------------------------------------------------------------------------------

    def lora(self, mode: str) -> tuple[Tensor, Tensor]:
        """The LoRA pair(s), with bits one per precision; detached in "arch" mode: arch steps need neither dA nor dB."""
        a, b = (self.lora_a.detach(), self.lora_b.detach()) if mode == "arch" else (self.lora_a, self.lora_b)
        if self.bits is not None and len(a) < len(self.bits):  # a shared pair: its gradients add up
            a, b = a.expand(len(self.bits), -1, -1), b.expand(len(self.bits), -1, -1)
        return a, b

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for linears that one op can compute on one input."""
        return self.bits, self.group_size, self.scaling, self.ste, self.rank, self.lora_pairs, self.backend

    def forward(self, x: Tensor, mode: str = "full", probs: Tensor | None = None, index: int | None = None) -> Tensor:
        """x [..., I] -> [..., O]. With bits: `probs` [P] mixes the precisions, `index` computes one of them only.

        Raises:
            JointNASError: bits are searched and neither is given.
        """
        if self.bits is None:
            a, b = self.lora(mode)
            return mixed_linear(
                x, self.weight, lora_a=a, lora_b=b, scaling=self.scaling, bias=self.bias, backend=self.backend
            )
        w, a, b, probs, clip, scaling, bits, group_size, ste = self.mixture(mode, probs, index)
        return quant_lora_linear(
            x, w, a, b, scaling, bits, probs, group_size, clip=clip, ste=ste, mode=mode, bias=self.bias,
            backend=self.backend,
        )  # fmt: skip

    def mixture(self, mode: str, probs: Tensor | None, index: int | None) -> Mixture:
        """What `forward` multiplies by.

        Raises:
            JointNASError: neither probabilities nor an index.
        """
        (a, b), bits, clip = self.lora(mode), self.bits or (), self.clip_ratio()
        if index is not None:
            index = index if len(bits) > 1 else 0  # after `keep`, whatever number the precision has in the space
            bits, a, b = bits[index : index + 1], a[index : index + 1], b[index : index + 1]
            clip = None if clip is None else clip[index : index + 1]
            probs = a.new_ones(1, dtype=torch.float32)
        if probs is None:
            raise JointNASError("a linear with searched bits needs their probabilities.")
        return Mixture(self.weight, a, b, probs, clip, self.scaling, bits, self.group_size, self.ste)

    def original(self, x: Tensor) -> Tensor:
        """The layer as it was before conversion (up to the reordering)."""
        return nn.functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    # ---- extraction -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def adapted(self, index: int | None = None) -> Tensor:
        """W + s B A of one pair in the weight's dtype, before any quantizer; with bits, of precision number `index`.

        PEFT's arithmetic, bit for bit: the product in fp32, scaled, added in fp32, and rounded once.
        """
        (a, b), weight = self.pair(index), self.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = (b.to(wide) @ a.to(wide)) * self.scaling
        return (weight.to(wide) + delta).to(weight.dtype)

    def index_of(self, bits: int | None) -> int | None:
        """Number of a precision; None for None."""
        return None if bits is None or self.bits is None else self.bits.index(bits)

    def pair(self, index: int | None = None) -> tuple[Tensor, Tensor]:
        """A [r, I] and B [O, r]; with bits, those of precision number `index`.

        Raises:
            JointNASError: bits are searched and no index is given.
        """
        if self.bits is None:
            return self.lora_a, self.lora_b
        if index is None:
            raise JointNASError("a linear with searched bits needs the index of one precision to be merged.")
        index = 0 if self.lora_pairs == "shared" else index
        return self.lora_a[index], self.lora_b[index]

    @torch.no_grad()
    def merged(self, index: int | None = None) -> Tensor:
        """What the layer multiplies by: `adapted`; with bits, Q_p(W + s B_p A_p) of precision number `index`.

        The quantizer sees W + s B A as the supernet's kernels compute it: unrounded, with A and s B rounded to the
        weight's dtype. In bf16 that is not what `adapted` rounds to; what it quantizes to differs at ties.
        """
        if self.bits is None or index is None:
            return self.adapted(index)
        one = slice(index, index + 1)
        (a, b), clip = self.pair(index), self.clip_ratio()
        return quant_lora_mix(
            self.weight, a[None], b[None], self.scaling, self.bits[one],
            self.lora_a.new_ones(1, dtype=torch.float32), self.group_size,
            clip=None if clip is None else clip[one], ste=self.ste, backend=self.backend,
        )

    @torch.no_grad()
    def sliced(self, rows: Tensor, columns: Tensor) -> SupernetLinear:
        """The layer on a subset of its channels, LoRA and quantizer state included; `columns` keep whole groups."""
        small = SupernetLinear(
            self.weight[rows][:, columns], None if self.bias is None else self.bias[rows], rank=self.rank,
            alpha=self.alpha, bits=self.bits, group_size=self.group_size, ste=self.ste,
            lora_dtype=self.lora_a.dtype, rslora=self.rslora, lora_pairs=self.lora_pairs, backend=self.backend,
        )
        if self.base_bits is not None and (base := packed(self)):  # the very same values: it is not rounded again
            small.base_bits = self.base_bits
            pack(small, self.base_bits, (base[0][rows][:, columns], base[1][rows]))
        small.lora_a.copy_(self.lora_a[..., columns])
        small.lora_b.copy_(self.lora_b[..., rows, :])
        groups = columns[:: self.group_size] // self.group_size
        if self.clip is not None:
            small.set_clip(self.clip[:, rows][..., groups])
        if self.clip_logits is not None:
            small.register_parameter("clip_logits", nn.Parameter(self.clip_logits.detach()[:, rows][..., groups]))
        return small


def joined(parts: Iterable[Tensor | None]) -> Any:
    """Rows of several linears as those of one: a copy; None if there are none."""
    found: list[Any] = list(parts)
    return None if all(part is None for part in found) else torch.cat(found)


class FakeQuantLinear(nn.Linear):
    """A plain linear on a fake-quantized weight that fake-quantizes its input per token: what a quantized linear
    extracts to. It knows its weight's grid, so that an export can store the integers instead.

    Args:
        weight, bias: [O, I] and [O], plain tensors or parameters; the weight's values lie on `grid`.
        grid: None for a weight that is not quantized.
        act_bits: 16 for an input that is not quantized.
    """

    scale: Tensor | None
    zero: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, grid: Grid | None = None, act_bits: int = 16,
        act_symmetric: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.act_bits, self.act_symmetric = act_bits, act_symmetric
        self.weight_bits = None if grid is None else grid.bits
        # not persistent: `save_pretrained` of the model stays a plain checkpoint of the values
        self.register_buffer("scale", None if grid is None else grid.scale, persistent=False)
        self.register_buffer("zero", None if grid is None else grid.zero, persistent=False)

    @property
    def grid(self) -> Grid | None:
        """What the weight's values are multiples of; None: they are not quantized."""
        return None if self.weight_bits is None or self.scale is None else Grid(self.weight_bits, self.scale, self.zero)

    @property
    def group_size(self) -> int:
        """Inputs per scale."""
        return self.in_features // (1 if self.scale is None else self.scale.shape[1])

    def extra_repr(self) -> str:
        """Sizes and quantizers, for `print`."""
        weight = "" if self.scale is None else f", weight_bits={self.weight_bits}, group={self.group_size}"
        return f"{super().extra_repr()}{weight}, act_bits={self.act_bits}, act_symmetric={self.act_symmetric}"

    def forward(self, input: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        if self.act_bits < 16:
            one = torch.ones(1, dtype=torch.float32, device=input.device)
            input = act_quant_mix(input, (self.act_bits,), one, symmetric=self.act_symmetric)
        return super().forward(input)
