"""The paper's settings without its weights (on the meta device), and a page on it that names only what exists."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from jointnas import cli, loading
from jointnas.config import RunConfig, load
from jointnas.objective import Limits
from jointnas.verbs.bench import TOPICS
from jointnas_kernels import hf
from jointnas_kernels.hf.families import build
from jointnas_kernels.layout import all_sizes, block_of
from jointnas_kernels.nn.linear import SupernetLinear
from jointnas_kernels.space import SearchSpace, count_params

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "paper.md").read_text()
CODE = [span.strip() for span in re.findall(r"`([^`\n]+)`", PAGE)]
CONFIGS = {path.stem: load(path) for path in sorted((ROOT / "examples" / "paper").glob("*.yaml"))}
FULL = 8_030_261_248


@pytest.fixture(scope="module")
def llama() -> Any:
    """The config of Llama-3.1-8B."""
    return loading.model_config(CONFIGS["llama3"].model.model_copy(update={"source": "llama-3.1-8b"}))


@pytest.mark.parametrize("name", ["llama3", "qllama3"])
def test_settings_are_the_papers(name: str, llama: Any) -> None:
    config = CONFIGS[name]
    assert (config.model.source, config.data.source) == ("meta-llama/Llama-3.1-8B", "hf:tatsu-lab/alpaca")
    assert (config.search.lora_rank, config.search.lora_alpha, config.data.batch_size) == (32, 16, 8)
    assert config.search.relaxation == "dirichlet"
    assert config.search.importance
    space = config.space.build()
    assert space == SearchSpace.named(name)
    space.validate(llama)
    assert space.size() == {"llama3": 8 * 3 * 5 * 4 * 32, "qllama3": 6 * 2 * 3 * 4 * 32 * 3**32 * 4**32}[name]
    assert config.latency.value().dtype == config.model.dtype == "bfloat16"
    if name == "qllama3":
        assert (config.quantizer.init, space.group_size) == ("omniquant", 128)


def test_sizes_of_the_spaces(llama: Any) -> None:
    """Known totals of Llama-3.1-8B, and that each range of Table 2 has candidates."""
    space = SearchSpace.named("llama3")
    full = space.full().to_dict()
    known = {(): FULL, ("heads", 16): 7_493_390_336, ("head_dim", 64): 7_359_172_608, ("hidden", 2048): 4_015_130_624}
    for change, count in known.items():
        choice = type(space.full()).from_dict({**full, **(dict([change]) if change else {})})
        assert count_params(llama, choice) == count
    sizes = [count_params(llama, choice) for choice in space.structures()]
    assert len(sizes) == 15_360
    assert [sum(low <= size / 1e9 <= low + 1 for size in sizes) > 0 for low in (2, 3, 4, 5)] == [True] * 4
    limits = Limits.of(CONFIGS["llama3"], llama)
    assert (limits.params_min, limits.params_max) == (4e9, 5e9)


@pytest.mark.parametrize("name", ["llama3", "qllama3"])
def test_conversion_without_weights(name: str, llama: Any) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        model = build(llama).to(getattr(torch, config.model.dtype))
    assert model.num_parameters() == FULL
    space, search = config.space.build(), config.search
    supernet = hf.convert(model, space, lora_rank=search.lora_rank, lora_alpha=search.lora_alpha)
    assert supernet.device.type == "meta"
    assert len(supernet.blocks) == 32
    linears = [m for m in supernet.modules() if isinstance(m, SupernetLinear)]
    assert len(linears) == 32 * 7
    block, own = block_of(llama), all_sizes(llama)
    pairs = len(space.weight_bits or (16,))
    shapes = [(linear.weight.shape[0] + linear.weight.shape[1]) for linear in linears[:7]]
    assert sum(p.numel() for p in supernet.lora_parameters()) == 32 * pairs * search.lora_rank * sum(shapes)
    assert sum(a * b for a, b in (linear.weight.shape for linear in linears[:7])) == sum(
        linear.weights(own) for linear in block.linears
    )
    logits = {key: tuple(value.shape) for key, value in supernet.arch.logits.items()}
    assert logits.pop("blocks") == (32,)
    bits = {"weight_bits": (32, 3), "act_bits": (32, 4)} if name == "qllama3" else {}
    assert logits == {k: (len(space.sizes(k)),) for k in ("hidden", "heads", "head_dim", "intermediate")} | bits


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_is_on_the_site() -> None:
    assert "paper.md" in (ROOT / "mkdocs.yml").read_text()
    for what in [*(f"Eq. {n}" for n in range(1, 10)), "Algorithm 1", "Table 1", "Table 2"]:
        assert re.search(rf"^\| {what},", PAGE, re.MULTILINE), what
    for n in range(1, 6):
        assert re.search(rf"^\| Figures? (\d and )?{n}\b", PAGE, re.MULTILINE), n


def test_every_file_exists() -> None:
    paths = [c for c in CODE if re.fullmatch(r"[\w./-]+/[\w.-]+", c)]
    assert len(paths) >= 3
    assert [p for p in paths if not (ROOT / p).exists()] == []


def resolve(name: str) -> Any:
    """The object of a dotted name."""
    module, rest = name, []
    while module:
        try:
            found: Any = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
    for part in rest:
        found = getattr(found, part)
    return found


def test_every_name_exists() -> None:
    names = {c for c in CODE if re.fullmatch(r"(jointnas|jointnas_kernels)(\.\w+)+", c)}
    assert len(names) > 15
    for name in names:
        assert callable(resolve(name)), name


def test_every_option_exists() -> None:
    for code in CODE:
        section, dot, rest = code.partition(".")
        if dot and section in RunConfig.model_fields:
            key = rest.partition(":")[0]
            assert key in RunConfig.model_fields[section].annotation.model_fields, code  # type: ignore[union-attr]


COMMANDS = [c for c in CODE if c.startswith(("jointnas ", "python "))]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, verb, *rest = shlex.split(command)
    if program == "python":
        assert Path(verb).is_file()
    elif verb == "bench":
        assert rest[0] in TOPICS
    else:
        assert verb in cli.VERBS
        asked = cli.parse(verb, rest)
        assert (asked is None) == ("--print_config" in rest)
