"""Hugging Face Llama models as supernets, and back."""

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
    "reorder",
    "shrink",
    "subnet_config",
]
