"""Initialisers of weight quantizers: clip ratios of a supernet's, and post-training quantization of plain models.

`run.py` holds the one interface and walks over a model's blocks, `jobs.py` says what is done to each; `clip.py`,
`gptq.py`, `omniquant.py` and `reconstruct.py` are the methods, `problem.py` is what they solve; `end_to_end.py` goes on
with the whole model; `blocks.py` runs single blocks, `store.py` keeps finished ones.
"""

from jointnas.initialise.bits import Bits, single_space
from jointnas.initialise.clip import mse_clip
from jointnas.initialise.run import METHODS, calibration_windows, initialise

__all__ = ["METHODS", "Bits", "calibration_windows", "initialise", "mse_clip", "single_space"]
