"""Hugging Face models as supernets, and back: Llama, Mistral, Qwen2 and Qwen3."""

from .adapters import load_adapters, save_adapters
from .convert import convert
from .extract import extract, shrink, subnet_config
from .importance import Importance, importance_scores
from .load import load
from .reorder import Order, reorder
from .supernet import Supernet

__all__ = [
    "Importance",
    "Order",
    "Supernet",
    "convert",
    "extract",
    "importance_scores",
    "load",
    "load_adapters",
    "reorder",
    "save_adapters",
    "shrink",
    "subnet_config",
]
