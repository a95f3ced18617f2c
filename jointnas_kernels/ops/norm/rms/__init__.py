"""mixed_rmsnorm: what it computes (reference.py), its Triton kernels (kernels.py), C++ calls and the op (op.py)."""
