"""What import-linter's layers (pyproject.toml) do not say: no circle with a package's own __init__, no private names of
another folder, imports at the top of a file."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter

import grimp
import pytest

from tests.contracts.sources import ROOTS, folder, functions, imports, is_ours, modules

# (who, what, why): the only imports that may stand inside functions; names are prefixes
LATE = [
    ("jointnas_kernels.ops.core.backends", "triton.knobs", "read when asked: the interpreter is switched on before"),
    ("jointnas_kernels.space", "yaml", "only users of files need it"),
    ("jointnas_kernels.hf", "peft", "optional: LoRA pairs as PEFT adapters"),
    ("jointnas_kernels.hf", "gguf", "optional: files of llama.cpp"),
    ("jointnas_kernels.latency.backends", "gemlite", "optional, found at run time"),
    ("jointnas_kernels.latency.backends", "humming", "optional, found at run time"),
    ("jointnas_kernels.latency", "jointnas_kernels.hf", "tables are read without transformers, a load of seconds"),
    ("jointnas", "compressed_tensors", "optional: stock transformers loads quantized exports with it"),
    ("jointnas", "datasets", "optional: Parquet files and data sets of the Hugging Face hub"),
    ("jointnas", "lm_eval", "optional: tasks; loads for seconds"),
    ("jointnas", "matplotlib", "optional: plots"),
    ("jointnas", "psutil", "optional: memory of this machine"),
    ("jointnas", "pyarrow", "optional: Parquet files"),
    ("jointnas", "scipy", "optional: bits by integer programming"),
    ("jointnas", "torch.utils.tensorboard", "optional: logs"),
    ("jointnas", "transformers", "`import jointnas` and the command line's help stay fast"),
    ("jointnas.cli", "", "a verb's help and errors do not wait for torch"),
    ("benchmarks", "peft", "optional: the peer"),
    ("benchmarks", "xllamacpp", "optional: llama.cpp"),
    ("benchmarks", "matplotlib", "optional: plots"),
    ("benchmarks.bench_against", "", "imports whichever checkout its process measures"),
]


def within(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


def test_no_import_circles() -> None:
    graph = grimp.build_graph(*ROOTS, cache_dir=None)
    try:
        TopologicalSorter({m: graph.find_modules_directly_imported_by(m) for m in graph.modules}).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("package", ROOTS)
def test_no_private_names_of_other_folders(package: str) -> None:
    """`_name` stays in its folder; a private module (`jointnas_kernels._ext`) in its package."""
    found = []
    for module, tree in modules().items():
        if not within(module, package):
            continue
        names: dict[str, str] = {}  # how the file calls another folder's module: that module
        for line, source, name in imports(tree):
            whole = f"{source}.{name}" if name else source
            if not is_ours(source):
                continue
            target = whole if whole in modules() else source
            if whole in modules():
                names[name or source] = whole
            private_module = any(is_private(part) for part in target.split("."))
            private_name = is_private(name) and whole not in modules()
            if (private_module and not within(target, package)) or (private_name and folder(target) != folder(module)):
                found.append(f"{module}:{line} {whole}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                target = names.get(ast.unparse(node.value), "")
                if target and f"{target}.{node.attr}" not in modules() and folder(target) != folder(module):
                    found.append(f"{module}:{node.lineno} {target}.{node.attr}")
    assert not found, "\n".join(found)


def test_imports_stand_at_the_top() -> None:
    """Imports inside functions only for the reasons listed above."""
    found = []
    for module, tree in modules().items():
        late = {(line, source, name) for function in functions(tree) for line, source, name in imports(function)}
        for line, source, name in sorted(late):
            whole = f"{source}.{name}" if name else source
            if not any(within(module, who) and within(whole, what) for who, what, _ in LATE):
                found.append(f"{module}:{line} {whole}")
    assert not found, "\n".join(found)


def test_every_exception_is_used() -> None:
    """The list of late imports does not outlive the imports."""
    late = [
        (module, f"{source}.{name}" if name else source)
        for module, tree in modules().items()
        for function in functions(tree)
        for _, source, name in imports(function)
    ]
    assert [e for e in LATE if not any(within(m, e[0]) and within(w, e[1]) for m, w in late)] == []
