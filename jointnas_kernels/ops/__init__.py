"""Operators of the joint-search supernet: each a torch reference, a Triton kernel and, where it pays, C++ or CUDA.

Every op takes ``backend=None`` ("triton" on CUDA, C++ or the reference on CPU) or an explicit backend name.
"""

from jointnas_kernels.ops.lowbit.linear import lowbit_linear, lowbit_matmul
from jointnas_kernels.ops.lowbit.pack import pack_weight, unpack_weight
from jointnas_kernels.ops.lowbit.weight import LowbitWeight
from jointnas_kernels.ops.norm.heads import head_rmsnorm
from jointnas_kernels.ops.norm.rms.op import mixed_rmsnorm
from jointnas_kernels.ops.norm.rms.residual import residual_rmsnorm
from jointnas_kernels.ops.quant.activations import act_quant_mix
from jointnas_kernels.ops.quant.mixture.group import quant_lora_linear_group
from jointnas_kernels.ops.quant.mixture.linear import quant_lora_linear
from jointnas_kernels.ops.quant.mixture.op import quant_lora_mix
from jointnas_kernels.ops.quant.weights import fake_quant_weight
from jointnas_kernels.ops.width.categorical import reinmax
from jointnas_kernels.ops.width.channel import channel_mask
from jointnas_kernels.ops.width.linear import mixed_linear, mixed_linear_group
from jointnas_kernels.ops.width.masks import membership, prefix_mask
from jointnas_kernels.ops.width.residual import gated_residual
from jointnas_kernels.ops.width.rope import masked_rope
from jointnas_kernels.ops.width.swiglu import masked_swiglu
from jointnas_kernels.ops.width.weight import choice_masks, mixed_weight

__all__ = [
    "LowbitWeight",
    "act_quant_mix",
    "channel_mask",
    "choice_masks",
    "fake_quant_weight",
    "gated_residual",
    "head_rmsnorm",
    "lowbit_linear",
    "lowbit_matmul",
    "masked_rope",
    "masked_swiglu",
    "membership",
    "mixed_linear",
    "mixed_linear_group",
    "mixed_rmsnorm",
    "mixed_weight",
    "pack_weight",
    "prefix_mask",
    "quant_lora_linear",
    "quant_lora_linear_group",
    "quant_lora_mix",
    "reinmax",
    "residual_rmsnorm",
    "unpack_weight",
]
