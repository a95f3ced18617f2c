"""Kernel plans that were measured on a device: which kernel multiplies how many tokens with which weight, and how.

A file per device, named after it (`nvidia-h200.json`). Those of this folder ship with the package; it is empty until
somebody has measured: `jointnas tune` writes them, docs/ops.md says how. A user's own are in `~/.cache/jointnas/tuned`
(under $XDG_CACHE_HOME), or in the folder that $JOINTNAS_TUNED names, and come first; where that is set, but empty,
nothing tuned is used. What no file says the kernels decide by themselves (ops/lowbit/choice.py).

A file counts on the very device that it names, by its exact name, compute capability and multiprocessors, and for the
very kernels that it was measured with (a hash of their sources); any other is left out, with one warning.

A plan changes how long a product takes and, by rounding, its result: kernels and splits add in another order, and
"dense" rounds weights to their dtype. The same plan gives the same bits every time.
"""

from jointnas_kernels.tuned.files import Device, Made, Row, Shape, Tuned, file_name, read, user_folder, write
from jointnas_kernels.tuned.lookup import Plans, describe, forget, kernels_here, load, misfit, plans

__all__ = [
    "Device", "Made", "Plans", "Row", "Shape", "Tuned", "describe", "file_name", "forget", "kernels_here", "load",
    "misfit", "plans", "read", "user_folder", "write",
]  # fmt: skip
