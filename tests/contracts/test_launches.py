"""A Triton kernel is launched on the device of its tensors, whichever device is the current one: inside
`with torch.cuda.device_of(..)`. Compiled kernels are called in one place that does it (ops/core/cuda.py)."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.contracts.sources import modules


def launches(node: ast.AST, guarded: bool = False) -> Iterator[tuple[str, int, bool]]:
    """(kernel, line, whether it is guarded) of every `kernel[grid](..)` below a node."""
    if isinstance(node, ast.With):
        guarded = guarded or any("torch.cuda.device_of(" in ast.unparse(item) for item in node.items)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
        name = ast.unparse(node.func.value)
        if name.endswith("_kernel"):
            yield name, node.lineno, guarded
    for child in ast.iter_child_nodes(node):
        yield from launches(child, guarded)


def test_launches_choose_their_device() -> None:
    found = [(module, *launch) for module, tree in modules().items() for launch in launches(tree)]
    assert len(found) > 15
    assert not [f"{module}:{line} {kernel}" for module, kernel, line, guarded in found if not guarded]

