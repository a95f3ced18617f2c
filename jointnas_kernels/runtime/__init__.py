"""Packed models, run: the decode step of a CPU in one call per token."""

from jointnas_kernels.runtime.decode import Caches, DecodeStep, misfit

__all__ = ["Caches", "DecodeStep", "misfit"]
