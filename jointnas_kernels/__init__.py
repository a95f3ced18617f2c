"""Kernels, latency tables and drop-in supernet layers for joint architecture and quantization search of LLMs."""

__version__ = "0.1.0"
