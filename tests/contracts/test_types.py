"""mypy is not strict about operators and the runtime's kernels (pyproject.toml): Triton kernels have no
types. All other functions there have."""

from __future__ import annotations

import ast

from tests.contracts.sources import functions, modules


def test_everything_but_kernels_is_annotated() -> None:
    missing = []
    for module, tree in modules().items():
        if not module.startswith(("jointnas_kernels.ops", "jointnas_kernels.runtime.kernels")):
            continue
        for function in functions(tree):
            if any("jit" in ast.unparse(d) for d in function.decorator_list):
                continue
            a = function.args
            given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            bare = [x.arg for x in given if x.annotation is None and x.arg not in ("self", "cls", "ctx")]
            if bare or function.returns is None:
                missing.append(f"{module}:{function.lineno} {function.name}: {', '.join(bare) or 'what it returns'}")
    assert not missing, "\n".join(missing)
