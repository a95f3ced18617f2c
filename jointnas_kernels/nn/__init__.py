"""Supernet layers: each holds parameters and calls one op per step of the computation."""

from jointnas_kernels.nn.block import SupernetBlock
from jointnas_kernels.nn.choices import ArchParameters, ArchSample, BlockSample, Masks
from jointnas_kernels.nn.linear import FakeQuantLinear, SupernetLinear
from jointnas_kernels.nn.loss import linear_cross_entropy
from jointnas_kernels.nn.packed import PackedLinear

__all__ = [
    "ArchParameters", "ArchSample", "BlockSample", "FakeQuantLinear", "Masks", "PackedLinear", "SupernetBlock",
    "SupernetLinear", "linear_cross_entropy",
]
