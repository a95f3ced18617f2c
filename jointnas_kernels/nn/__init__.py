"""Supernet layers: each holds parameters and calls one op per step of the computation."""

from .block import SupernetBlock
from .choices import ArchParameters, ArchSample, BlockSample, Masks
from .linear import FakeQuantLinear, SupernetLinear
from .loss import linear_cross_entropy
from .packed import PackedLinear

__all__ = [
    "ArchParameters",
    "ArchSample",
    "BlockSample",
    "FakeQuantLinear",
    "Masks",
    "PackedLinear",
    "SupernetBlock",
    "SupernetLinear",
    "linear_cross_entropy",
]
