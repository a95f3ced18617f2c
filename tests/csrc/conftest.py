from tests.csrc.kernels import kernels

__all__ = ["kernels"]
