"""Supernet layers: each holds parameters and calls one op per step of the computation."""

from .block import SupernetBlock
from .choices import ArchParameters, ArchSample, BlockSample, Masks
from .linear import ActQuantLinear, SupernetLinear
from .loss import linear_cross_entropy

__all__ = [
    "ActQuantLinear",
    "ArchParameters",
    "ArchSample",
    "BlockSample",
    "Masks",
    "SupernetBlock",
    "SupernetLinear",
    "linear_cross_entropy",
]
