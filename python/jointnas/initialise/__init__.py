"""Initialisers of weight quantizers: clip ratios of a supernet's, and post-training quantization of plain models.

`run.py` holds the one interface and walks over a model's blocks; `clip.py`, `gptq.py` and `omniquant.py` are the
methods, `problem.py` is what they solve, `blocks.py` runs single blocks, `store.py` keeps finished ones.
"""

from jointnas.initialise.clip import mse_clip
from jointnas.initialise.run import METHODS, Bits, calibration_windows, initialise, single_space

__all__ = ["METHODS", "Bits", "calibration_windows", "initialise", "mse_clip", "single_space"]
