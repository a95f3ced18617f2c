"""Packed models, run: the decode step of a CPU in one call per token, and generation through it."""

from jointnas_kernels.runtime.decode import Caches, DecodeStep, misfit
from jointnas_kernels.runtime.generation import Runtime, attach

__all__ = ["Caches", "DecodeStep", "Runtime", "attach", "misfit"]
