"""Packed models, run on a CPU: prompts by the chunk, further tokens one call each, and generation through both."""

from jointnas_kernels.runtime.decode import Caches, DecodeStep, misfit
from jointnas_kernels.runtime.generation import Runtime, attach

__all__ = ["Caches", "DecodeStep", "Runtime", "attach", "misfit"]
