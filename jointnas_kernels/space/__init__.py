"""Search spaces, choices, and exact sizes of what a choice describes.

A space lists the allowed sizes of each dimension; one choice picks one of each:

    hidden, heads, head_dim, intermediate   widths shared by all blocks
    blocks                                  how many blocks are kept, most important first
    weight_bits, act_bits                   one per original block (None: not quantized, 16 = identity)
    head_bits                               one: of the head's weight, and of an embedding tied to it (16 = identity)

Every key-value head is kept; `heads` query heads keep the first heads / n_kv of each key-value group. The stock model
class refuses some combinations of the three sizes of its attention: `SearchSpace.feasible` asks it, and takes them out.
"""

from jointnas_kernels.space.choice import Choice
from jointnas_kernels.space.counts import (
    Joint,
    count_params,
    expected_bytes,
    expected_params,
    joint,
    keep_matrix,
    keep_probability,
    kept_blocks,
    model_bytes,
    structure_params,
)
from jointnas_kernels.space.plain import ATTENTION, BITS, HEAD_BITS, STRUCTURE, WIDTHS, read_yaml
from jointnas_kernels.space.search_space import SearchSpace, subnet_config

__all__ = [
    "ATTENTION", "BITS", "HEAD_BITS", "STRUCTURE", "WIDTHS", "Choice", "Joint", "SearchSpace",
    "count_params", "expected_bytes", "expected_params", "joint", "keep_matrix", "keep_probability", "kept_blocks",
    "model_bytes", "read_yaml", "structure_params", "subnet_config",
]  # fmt: skip
