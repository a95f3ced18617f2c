"""Measuring which kernel plans are the fastest on a device, by successive halving; what is found `tuned` looks up."""

from jointnas_kernels.tuning.halving import Found, halve
from jointnas_kernels.tuning.lowbit import Products
from jointnas_kernels.tuning.shapes import Job, jobs
from jointnas_kernels.tuning.tuner import Contest, tune

__all__ = ["Contest", "Found", "Job", "Products", "halve", "jobs", "tune"]
