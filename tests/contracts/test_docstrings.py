"""What ruff's rules on docstrings cannot see: every public name says what its tensors look like and what it raises, and
`help` of it reaches that text."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import pytest

from tests.contracts.sources import modules

PUBLIC = [
    *(f"jointnas_kernels.{name}" for name in ("ops", "hf", "latency", "nn", "layout", "space", "testing")),
    *(f"jointnas_kernels.{name}" for name in ("tuned", "tuning")),
    "jointnas",
]
# a shape, a dtype, a unit, or that of another argument
SAYS = re.compile(
    r"\[[^\]]*\]|\b(u?int\d*|bf16|fp\d+|b?float\d*|bool|scalar|shapes?|dtypes?|bytes?|seconds?|ms|µs|probabilit\w+|bits?|a?like)\b"
)


@cache
def names() -> dict[str, Any]:
    """Dotted name: object, of everything public: `__all__`, or what a module defines."""
    found = {}
    for path in PUBLIC:
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError:
            continue
        public = getattr(module, "__all__", None)
        if public is None:
            here = {k: v for k, v in vars(module).items() if getattr(v, "__module__", "") == path}
            public = [k for k, v in here.items() if not k.startswith("_") and callable(v)]
        found |= {f"{path}.{name}": getattr(module, name) for name in sorted(public)}
    once = {id(v): k for k, v in reversed(found.items())}  # jointnas has some names of jointnas_kernels
    return {k: v for k, v in found.items() if once[id(v)] == k and callable(v)}


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods that a class defines itself, and its constructor."""
    for name, value in vars(cls).items():
        function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        if inspect.isfunction(function) and (not name.startswith("_") or name in ("__init__", "__post_init__")):
            yield name, function


def documented() -> Iterator[tuple[str, Any, str]]:
    """(name, function, docstring) of every public function and method; a constructor's text is its class's."""
    for path, thing in names().items():
        if not inspect.isclass(thing):
            yield path, thing, inspect.getdoc(thing) or ""
            continue
        for name, method in methods(thing):
            own = name not in ("__init__", "__post_init__")
            yield f"{path}.{name}", method, inspect.getdoc(method if own else thing) or ""


def fields(thing: Any) -> dict[str, str]:
    """Parameter: annotation as text, of a function or a constructor."""
    return {p.name: str(p.annotation) for p in inspect.signature(thing).parameters.values()}


def entries(doc: str) -> dict[str, str]:
    """What the sections Args and Attributes of a Google-style docstring say, by name."""
    found: dict[str, str] = {}
    current: list[str] = []
    for line in doc.splitlines():
        entry = re.match(r" {4}(\*{0,2}\w+(?:, \w+)*)(?: \([^)]*\))?:(.*)", line)
        if entry:
            current = entry[1].replace("*", "").split(", ")
            found |= dict.fromkeys(current, entry[2])
        elif line.startswith(" " * 8):
            found |= {name: found[name] + line for name in current}
        else:
            current = []
    return found


def described(doc: str, name: str) -> bool:
    """Whether a docstring says what tensor `name` is: in its entry, or where the text names it before a shape."""
    if SAYS.search(entries(doc).get(name, "")):
        return True
    return bool(re.search(rf"\b{name}\b`*(?:(?:,| and|, and) `*\w+`*)* (?:u?int\d+ )?\[", doc))


def generated(thing: Any, doc: str) -> bool:
    """Python's own text for data classes, named tuples and protocols."""
    return inspect.isclass(thing) and (doc.startswith(f"{thing.__name__}(") or "Base class for protocol classes" in doc)


def test_public_names_have_docstrings() -> None:
    docs = {path: inspect.getdoc(thing) or "" for path, thing in names().items()}
    missing = [path for path, doc in docs.items() if not doc or generated(names()[path], doc)]
    assert not missing, "\n".join(missing)


def test_tensors_are_described() -> None:
    """Shape, dtype or unit of every tensor that goes into a public function or class."""
    missing = []
    for path, thing in names().items():
        doc = inspect.getdoc(thing) or ""
        missing += [
            f"{path}: {name}"
            for name, annotation in fields(thing).items()
            if re.search(r"\bTensor\b", annotation) and not described(doc, name)
        ]
    assert not missing, "\n".join(missing)


def test_described_arguments_exist() -> None:
    """What a section Args names, a function has."""
    wrong = [
        f"{path}: {name}"
        for path, function, doc in documented()
        for name in entries(re.split(r"\n(?!Args:)\w+:\n", doc.partition("Args:\n")[2])[0])
        if name not in fields(function)
    ]
    assert not wrong, "\n".join(wrong)


@cache
def bodies(module: str) -> dict[str, ast.AST]:
    """Functions of a module and methods of its classes, by qualified name."""
    tree = modules()[module]
    found: dict[str, ast.AST] = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    for cls in (n for n in tree.body if isinstance(n, ast.ClassDef)):
        found |= {f"{cls.name}.{n.name}": n for n in cls.body if isinstance(n, ast.FunctionDef)}
    return found


def raises(module: str, name: str) -> bool:
    """Whether a function raises an error of ours, itself or in what it calls of its module.

    Public methods are not followed: their own text says for which arguments they raise.
    """
    seen, queue = {name}, [name]
    while queue:
        current = queue.pop()
        for node in ast.walk(bodies(module).get(current, ast.Pass())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                if not hasattr(builtins, ast.unparse(node.exc.func).rpartition(".")[2]):
                    return True
            elif isinstance(node, ast.Call):
                owner, _, method = ast.unparse(node.func).rpartition(".")
                called = f"{current.partition('.')[0]}.{method}" if owner in ("self", "cls") else method
                own = owner in ("self", "cls") and method.startswith("_")
                if called not in seen and (own or not owner):
                    seen.add(called)
                    queue.append(called)
    return False


def test_errors_are_documented() -> None:
    missing = [
        path
        for path, function, doc in documented()
        if function.__module__ in modules() and raises(function.__module__, function.__qualname__)
        and "Raises:" not in doc
    ]  # fmt: skip
    assert not missing, "\n".join(missing)


def packages() -> Iterator[ModuleType]:
    for root in ("jointnas_kernels", "jointnas"):
        package = importlib.import_module(root)
        yield package
        for found in pkgutil.walk_packages(package.__path__, f"{root}."):
            if found.ispkg:
                yield importlib.import_module(found.name)


def test_help_reaches_the_documentation() -> None:
    """No function of a package has the name of one of its modules: `help(package.name)` is the function's."""
    shadowed = []
    for package in packages():
        exported = set(getattr(package, "__all__", ())) | {k for k, v in vars(package).items() if callable(v)}
        inside = {m.name for m in pkgutil.iter_modules(package.__path__)}
        shadowed += [f"{package.__name__}.{name}" for name in sorted(inside & exported)]
    assert not shadowed, "\n".join(shadowed)


@pytest.mark.parametrize(
    ("doc", "name", "says"),
    [
        ("y of x [..., I].", "x", True),
        ("y = f(x)", "x", False),
        ("Packed int32 [O, I] and scale [O, G].", "scale", True),
        ("One.\n\nArgs:\n    x: what goes in.\n    probs: [Q].", "x", False),
        ("One.\n\nArgs:\n    x: what goes in.\n    probs: [Q].", "probs", True),
        ("One.\n\nArgs:\n    gate, up: [..., F]; same dtype.", "gate", True),
    ],
)
def test_descriptions_are_found(doc: str, name: str, says: bool) -> None:
    assert described(doc, name) == says
