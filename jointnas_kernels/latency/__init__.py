"""Latency tables: measure every operation of a search space on a device, predict and differentiate whole models."""

from jointnas_kernels.latency.backends import Backend, Target, register, survey, unregister
from jointnas_kernels.latency.bound import Expected
from jointnas_kernels.latency.changes import Comparison, compare
from jointnas_kernels.latency.interpolation import interpolate
from jointnas_kernels.latency.measure import (
    calibrate,
    deploy,
    feasible_choices,
    measure_choices,
    measure_in_turns,
    measure_model,
)
from jointnas_kernels.latency.profiler import profile
from jointnas_kernels.latency.spec import OpSpec, Workload, enumerate_ops
from jointnas_kernels.latency.table import Coverage, LatencyTable
from jointnas_kernels.latency.timing import describe

__all__ = [
    "Backend", "Comparison", "Coverage", "Expected", "LatencyTable", "OpSpec", "Target", "Workload",
    "calibrate", "compare", "deploy", "describe", "enumerate_ops", "feasible_choices", "interpolate", "measure_choices",
    "measure_in_turns", "measure_model", "profile", "register", "survey", "unregister",
]  # fmt: skip
