"""Operators of the joint-search supernet: each a torch reference, a Triton kernel and, where it pays, C++ or CUDA.

Every op takes ``backend=None`` ("triton" on CUDA, C++ or the reference on CPU) or an explicit backend name.
"""

from jointnas_kernels.ops.act_quant_mix import act_quant_mix
from jointnas_kernels.ops.channel_mask import channel_mask
from jointnas_kernels.ops.fake_quant_weight import fake_quant_weight
from jointnas_kernels.ops.gated_residual import gated_residual
from jointnas_kernels.ops.head_rmsnorm import head_rmsnorm
from jointnas_kernels.ops.lowbit_linear import lowbit_linear
from jointnas_kernels.ops.lowbit_prepared import PreparedWeight, lowbit_matmul, lowbit_pack
from jointnas_kernels.ops.masked_rope import masked_rope
from jointnas_kernels.ops.masked_swiglu import masked_swiglu
from jointnas_kernels.ops.masks import membership, prefix_mask, strided_pair_index, strided_pair_mask
from jointnas_kernels.ops.mixed_linear import mixed_linear
from jointnas_kernels.ops.mixed_linear_group import mixed_linear_group
from jointnas_kernels.ops.mixed_rmsnorm import mixed_rmsnorm
from jointnas_kernels.ops.mixed_weight import choice_masks, mixed_weight
from jointnas_kernels.ops.pack import pack_weight, unpack_weight
from jointnas_kernels.ops.quant_lora_linear import quant_lora_linear
from jointnas_kernels.ops.quant_lora_mix import quant_lora_mix
from jointnas_kernels.ops.reinmax import reinmax

__all__ = [
    "PreparedWeight",
    "act_quant_mix",
    "channel_mask",
    "choice_masks",
    "fake_quant_weight",
    "gated_residual",
    "head_rmsnorm",
    "lowbit_linear",
    "lowbit_matmul",
    "lowbit_pack",
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
    "quant_lora_mix",
    "reinmax",
    "strided_pair_index",
    "strided_pair_mask",
    "unpack_weight",
]
