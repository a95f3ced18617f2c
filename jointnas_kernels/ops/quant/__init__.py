"""Fake quantization in expectation over precisions."""
