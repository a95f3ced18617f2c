"""Hugging Face models as supernets, and back: Llama, Mistral, Qwen2, Qwen3 and Phi-3."""

from jointnas_kernels.hf.adapters import load_adapters, save_adapters
from jointnas_kernels.hf.conversion import convert
from jointnas_kernels.hf.extraction import extract, shrink, subnet_config
from jointnas_kernels.hf.importance import Importance, importance_scores
from jointnas_kernels.hf.loading import load
from jointnas_kernels.hf.ordering import Order, reorder
from jointnas_kernels.hf.supernet import Supernet

__all__ = [
    "Importance", "Order", "Supernet", "convert", "extract", "importance_scores", "load", "load_adapters", "reorder",
    "save_adapters", "shrink", "subnet_config",
]
