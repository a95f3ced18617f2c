"""The packages as syntax trees: what the contracts read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOTS = {"jointnas_kernels": ROOT, "jointnas": ROOT / "python", "benchmarks": ROOT}


def name_of(path: Path) -> str:
    """The dotted name of a module, `__init__` left out."""
    base = next(base for package, base in ROOTS.items() if path.is_relative_to(base / package))
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, ast.Module]:
    """Dotted name: syntax tree, of every module of the packages and the benchmarks."""
    files = [f for package, base in ROOTS.items() for f in sorted((base / package).rglob("*.py"))]
    return {name_of(f): ast.parse(f.read_text(), str(f)) for f in files}


@cache
def packages() -> frozenset[str]:
    """Names that are folders."""
    return frozenset(name.rpartition(".")[0] for name in modules()) - {""}


def folder(module: str) -> str:
    """The package whose folder holds the module's file."""
    return module if module in packages() else module.rpartition(".")[0]


def imports(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of every import below a node; the name is empty for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, node.module or "", alias.name) for alias in node.names)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method below a node."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def is_ours(module: str) -> bool:
    """Whether a dotted name belongs to this repository."""
    return module.partition(".")[0] in ROOTS
