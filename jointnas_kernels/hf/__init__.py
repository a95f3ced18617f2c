"""Hugging Face models as supernets, and back: Llama, Mistral, Qwen2, Qwen3 and Phi-3."""

from jointnas_kernels.hf.adapters import load_adapters, save_adapters
from jointnas_kernels.hf.conversion import convert, feasible_space
from jointnas_kernels.hf.extraction import extract, shrink
from jointnas_kernels.hf.importance import Importance, importance_scores
from jointnas_kernels.hf.loading import load
from jointnas_kernels.hf.ordering import Order, reorder
from jointnas_kernels.hf.supernet import Supernet
from jointnas_kernels.space import subnet_config

__all__ = [
    "Importance", "Order", "Supernet", "convert", "extract", "feasible_space", "importance_scores", "load",
    "load_adapters", "reorder", "save_adapters", "shrink", "subnet_config",
]
