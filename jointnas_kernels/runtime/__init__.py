"""Packed models, run: prompts by the chunk, further tokens one call each (C++ on a CPU, a CUDA graph on a GPU), and
generation through both."""

from jointnas_kernels.runtime.decode import DecodeStep
from jointnas_kernels.runtime.generation import Runtime, attach, misfit
from jointnas_kernels.runtime.graph import GraphStep
from jointnas_kernels.runtime.step import Caches, Step

__all__ = ["Caches", "DecodeStep", "GraphStep", "Runtime", "Step", "attach", "misfit"]
