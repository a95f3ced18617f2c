"""Nothing that is read can run code, and nothing is depended on whose licence a user could not live with."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import socket
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest

from jointnas import cli
from tests.contracts.sources import ROOT, imports, modules

FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CODE = {"eval", "exec", "compile", "__import__"}  # builtins that run text
CALLS = {  # by their ends
    "torch.load": "unpickles; use safetensors", "torch.save": "pickles; use safetensors", "torch.hub.load": "runs code",
    "os.system": "a shell", "os.popen": "a shell", "yaml.load": "makes objects; use the safe loader",
    "yaml.unsafe_load": "makes objects", "yaml.full_load": "makes objects",
}  # fmt: skip
NETWORK = {"urllib", "http", "requests", "httpx", "aiohttp", "socket", "ftplib"}
LICENCES = re.compile(r"MIT|BSD|Apache|ISC|Python Software Foundation|MPL|Enthought|matplotlib", re.IGNORECASE)
REFUSED = re.compile(r"\b[AL]?GPL|GNU|Affero|SSPL|Commons Clause", re.IGNORECASE)


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def problems(tree: ast.AST) -> Iterator[str]:
    for line, module, _ in imports(tree):
        if module.partition(".")[0] in FORBIDDEN_MODULES:
            yield f"{line}: imports {module}"
        if module.partition(".")[0] in NETWORK and module != "urllib.parse":
            yield f"{line}: imports {module}; the hub's and pip's own clients are the only ones"
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = dotted(call.func)
        given = {k.arg: k.value for k in call.keywords}
        if name in CODE:
            yield f"{call.lineno}: {name} runs text"
        yield from (f"{call.lineno}: {name}, {why}" for end, why in CALLS.items() if name == end)
        for flag in ("shell", "trust_remote_code", "allow_pickle"):
            value = given.get(flag)
            if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
                yield f"{call.lineno}: {flag} is not False"
        if name.startswith("Auto") and name.endswith(".from_pretrained") and "trust_remote_code" not in given:
            yield f"{call.lineno}: {name} without trust_remote_code=False"


def test_nothing_runs_what_it_reads() -> None:
    found = [f"{name}:{problem}" for name, tree in modules().items() for problem in problems(tree)]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from joblib import load", "torch.load(f)", "eval('1')", "os.system('ls')", "yaml.load(f)",
        "subprocess.run(c, shell=True)", "AutoModel.from_pretrained(f)", "import urllib.request",
        "AutoConfig.from_pretrained(f, trust_remote_code=config.trust)", "np.load(f, allow_pickle=True)",
    ],
)  # fmt: skip
def test_the_check_finds(code: str) -> None:
    assert list(problems(ast.parse(code)))


def test_the_check_lets_pass() -> None:
    fine = ("model.eval()", "AutoConfig.from_pretrained(f, trust_remote_code=False)", "subprocess.run(['ls'])")
    assert [p for code in fine for p in problems(ast.parse(code))] == []


# ---- the network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["doctor"], ["search", "--print_config"], ["eval", "embedded", "--tokens=300", "--tasks=[]"]]
)
def test_no_network_unless_asked(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"a connection was tried: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert cli.main(arguments) == 0


# ---- licences -------------------------------------------------------------------------------------------------------


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[<>=!~\[; ]", r)[0] for one in lists for r in one}
    return sorted(names - {project["name"]})


def stated(name: str) -> str:
    """What an installed package says of its licence; empty: it is not installed."""
    try:
        found = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
    classifiers = [c for c in found.get_all("Classifier") or [] if c.startswith("License")]
    return " ".join([found.get("License-Expression") or "", (found.get("License") or "")[:300], *classifiers])


@pytest.mark.parametrize("name", requirements())
def test_licence(name: str) -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text()
    rows = {r[0].split()[-1]: r[1] for r in re.findall(r"^\| ([^|]+) \| ([^|]+) \|", page, re.MULTILINE)}
    assert name in rows, f"docs/dependencies.md does not list {name}"
    assert not REFUSED.search(rows[name])
    said = stated(name)
    assert not said or (LICENCES.search(said) and not REFUSED.search(said)), said


def test_every_row_is_a_requirement() -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text()
    listed = {row.split()[-1] for row in re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)}
    assert listed - {"package"} == set(requirements())
