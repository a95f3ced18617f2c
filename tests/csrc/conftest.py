from tests.csrc.kernels import kernels, lowbit_kernels

__all__ = ["kernels", "lowbit_kernels"]
