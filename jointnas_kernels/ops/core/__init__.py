"""Machinery of operators: registration, backend choice, calls of compiled kernels."""
