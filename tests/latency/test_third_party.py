"""Adapters of other libraries on stand-ins: right where they claim it, reported and left out where anything fails."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_gemm
from jointnas.verbs.doctor import doctor, text
from jointnas_kernels.latency import LatencyTable, OpSpec, Target, Workload, profile
from jointnas_kernels.latency import backends as registry
from jointnas_kernels.latency.backends.base import (
    ThirdParty,
    Weight,
    disagreement,
    failure,
    random_input,
    random_weight,
)
from jointnas_kernels.latency.backends.humming import Humming
from jointnas_kernels.ops import LowbitWeight, unpack_weight
from jointnas_kernels.ops.quant.spec import quantize_tokens
from jointnas_kernels.space import SearchSpace
from tests.latency import stand_ins
from tests.latency.tables import CONFIG, calm

CPU = torch.device("cpu")
BF16 = Target(CPU, Workload(dtype="bfloat16"), 2)
NAMES = list(stand_ins.LIBRARIES)


def backend_of(name: str) -> ThirdParty:
    backend = registry.get(name)
    assert isinstance(backend, ThirdParty)
    return backend


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], ThirdParty]:
    """Puts a stand-in in place of a library, and lets its backend run on the CPU."""

    def install(name: str) -> ThirdParty:
        for module, attributes in stand_ins.LIBRARIES[name].items():
            stand_ins.install(monkeypatch, tmp_path, module, **attributes)
        backend = backend_of(name)
        monkeypatch.setattr(backend, "device", "cpu")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        return backend

    return install


def reason(backend: ThirdParty, spec: OpSpec, target: Target = BF16) -> str | None:
    generator = torch.Generator().manual_seed(0)
    weight, x = random_weight(spec, target, generator), random_input(spec, target, generator)
    return failure(backend, spec, target, x, weight)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_claimed_operations_are_right(name: str, dtype: str, installed: Callable[[str], ThirdParty]) -> None:
    backend, target = installed(name), Target(CPU, Workload(dtype=dtype), 2)
    claimed = set()
    for n, k in ((64, 128), (96, 96), (192, 384), (40, 256)):
        for m, w, a in ((m, w, a) for m in (1, 3, 17, 63) for w in (2, 4, 8) for a in (2, 4, 8, 16)):
            for group in {g for g in (32, 64, 128, k) if k % g == 0}:
                spec = OpSpec("linear", m, n, k, w, a, group)
                if backend.unsupported(spec, target) is None:
                    assert reason(backend, spec, target) is None, spec
                    claimed.add((m, n, k, w, a, group == k))
    shapes = {"gemlite": {(64, 128), (96, 96), (192, 384)}}.get(name, {(64, 128), (192, 384)})
    bits = {2, 4, 8} if name in ("humming", "gemlite") else {4, 8}
    assert claimed == {(m, *s, w, 16, whole) for m in (1, 3, 17, 63) for s in shapes for w in bits for whole in (0, 1)}
    assert backend.version() == "1.2.3"


SPEC = OpSpec("linear", 16, 64, 256, 4, 16, 64)
LIMITS = {
    "W": (SPEC._replace(wbits=16, group=0), BF16, r"linears with W in \((2, )?4, 8\) only"),
    "A": (SPEC._replace(abits=8), BF16, "activations of 16 bits only"),
    "dtype": (SPEC, Target(CPU, Workload(), 2), "float16 and bfloat16 only, got float32"),
    "group": (SPEC._replace(k=384, group=96), BF16, r"groups of \(32, 64, 128\) or whole rows only, got 96"),
    "n": (SPEC._replace(n=40), BF16, r"n must be a multiple of \d+ and k of \d+, got 40 and 256"),
    "device": (SPEC, Target(torch.device("meta"), Workload(dtype="bfloat16"), 2), "runs on cpu only"),
}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", NAMES)
def test_limits_are_declared(name: str, limit: str, installed: Callable[[str], ThirdParty]) -> None:
    backend, (spec, target, message) = installed(name), LIMITS[limit]
    assert backend.unsupported(SPEC, BF16) is None
    found = backend.unsupported(spec, target)
    assert found is not None
    assert pytest.importorskip("re").match(message, found), found


def test_old_devices(installed: Callable[[str], ThirdParty], monkeypatch: pytest.MonkeyPatch) -> None:
    backend = installed("humming")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert backend.unsupported(SPEC, BF16) == "needs compute capability 8.0"


def test_symmetric_activations_are_another_function(installed: Callable[[str], ThirdParty]) -> None:
    """Humming's int8 activations agree with the symmetric reference only, so no table times them."""
    registered, symmetric = installed("humming"), Humming(symmetric=True)
    symmetric.device = "cpu"
    spec = SPEC._replace(abits=8)
    assert "no zero point" in (registered.unsupported(spec, BF16) or "")
    assert symmetric.unsupported(spec, BF16) is None
    generator = torch.Generator().manual_seed(0)
    weight, x = random_weight(spec, BF16, generator), random_input(spec, BF16, generator)
    y = symmetric.prepare(spec, BF16, weight)(x).double()
    assert (disagreement(spec, x, weight, y) or "").startswith("relative error")
    scale = x.double().abs().amax(1, keepdim=True) / 127
    want = (x.double() / scale).round() * scale @ weight.dequantized().T
    assert float((y - want).norm() / want.norm()) < 5e-3


# ---- failing libraries ----------------------------------------------------------------------------------------------


def raising(error: Exception) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call


ENTRY = {  # what is called when a weight is packed
    "humming": ("humming.layer", "HummingLayer"),
    "gemlite": ("gemlite.helper", "A16Wn"),
    "marlin-vllm": ("vllm._custom_ops", "gptq_marlin_repack"),
    "marlin-gptqmodel": ("gptqmodel.utils.marlin", "gptq_marlin_repack"),
}
ERRORS = [
    (AttributeError("'Layer' object has no attribute 'pack'\nhint"), "AttributeError: 'Layer' object has no attribute"),
    (ImportError("libcudart.so.12: cannot open"), "ImportError: libcudart.so.12"),
    (TypeError("got an unexpected keyword argument 'perm'"), "TypeError: got an unexpected"),
    (AssertionError(), "AssertionError"),
    (KeyError("sm_90"), "KeyError: 'sm_90'"),
    (Exception("Weights were not packed"), "Exception: Weights were not packed"),
]


@pytest.mark.parametrize(("error", "message"), ERRORS, ids=[type(e).__name__ for e, _ in ERRORS])
@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_raised_is_reported(
    name: str, error: Exception, message: str, installed: Callable[[str], ThirdParty], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = installed(name)
    assert reason(backend, SPEC) is None
    module, entry = ENTRY[name]
    monkeypatch.setattr(sys.modules[module], entry, raising(error))
    assert (reason(backend, SPEC) or "").startswith(message)
    monkeypatch.delattr(sys.modules[module], entry)  # another version's interface
    assert (reason(backend, SPEC) or "").startswith(("AttributeError", "ImportError"))


def test_another_packing_is_caught(installed: Callable[[str], ThirdParty], monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that reads words from the other end, scales of other rows, or no zero point."""
    unpacked, backends = stand_ins.unpacked, {name: installed(name) for name in NAMES}
    with monkeypatch.context() as patch:
        patch.setattr(
            stand_ins,
            "unpacked",
            lambda words, bits, dim: (
                unpacked(words, bits, dim).unflatten(dim, (-1, 32 // bits)).flip(dim + 1).flatten(dim, dim + 1)
            ),
        )
        for name in ("humming", "marlin-vllm", "marlin-gptqmodel"):
            assert (reason(backends[name], SPEC) or "").startswith("relative error"), name
    with monkeypatch.context() as patch:
        patch.setattr(stand_ins, "MANY", torch.arange(64))  # kept in order when they are read only
        patch.setattr(sys.modules[stand_ins.VLLM], "marlin_permute_scales", lambda s, **_: s.flip(1).contiguous())
        assert (reason(backends["marlin-vllm"], SPEC) or "").startswith("relative error")
    with monkeypatch.context() as patch:
        from_weights = stand_ins.A16Wn.from_weights
        patch.setattr(stand_ins.A16Wn, "from_weights", lambda s, w, c, z, *rest: from_weights(s, w, c, 0 * z, *rest))
        assert (reason(backends["gemlite"], SPEC) or "").startswith("relative error")


SPACE = SearchSpace((128,), (4,), (32,), (128,), (1, 2, 3), (4,), None, group_size=64)
MODEL = SimpleNamespace(**{**vars(CONFIG), "intermediate_size": 128})


def tabled(folder: Path, *names: str) -> LatencyTable:
    return profile(
        SPACE, MODEL, folder / "t.jsonl", workload=Workload(seq=4, dtype="bfloat16"), threads=1, progress=False,
        seconds_per_operation=1e-4, backends=["torch", "torch-int4", *names], watch=calm(),
    )  # fmt: skip


def test_a_table_of_all(tmp_path: Path, installed: Callable[[str], ThirdParty]) -> None:
    for name in NAMES:
        installed(name)
    found = {(r.backend, r.status, r.backend_version) for r in tabled(tmp_path, *NAMES).rows if r.wbits == 4}
    assert found == {("torch-int4", "ok", torch.__version__), *((name, "ok", "1.2.3") for name in NAMES)}


@pytest.mark.parametrize("calls", [0, 1, 4])
def test_failing_libraries_are_not_in_the_table(
    tmp_path: Path, calls: int, installed: Callable[[str], ThirdParty], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's first call fails, the one after its verification, or one of a timing."""
    installed("humming")
    forward = stand_ins.HummingLayer.forward

    def failing(self: Any, inputs: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls > calls:
            raise AttributeError("no kernel")
        return forward(self, inputs)

    monkeypatch.setattr(stand_ins.HummingLayer, "forward", failing)
    monkeypatch.setattr("jointnas_kernels.latency.profiler.HOPELESS", math.inf)
    table = tabled(tmp_path, "humming")
    rejected = [r for r in table.rows if r.backend == "humming"]
    assert rejected
    assert all((r.status, r.reason) == ("rejected", "AttributeError: no kernel") for r in rejected)
    best = {table.best(r.spec).backend for r in table.rows if r.wbits == 4}  # type: ignore[union-attr]
    assert best == {"torch-int4"}
    assert "humming rejected for" in table.summary()


class Mistaken:
    """A backend of this package with a mistake in it."""

    name = "mistaken"

    def version(self) -> str:
        return ""

    def unsupported(self, spec: OpSpec, target: Target) -> str | None:
        return None

    def prepare(self, spec: OpSpec, target: Target, weight: Weight | None) -> Callable[[Tensor], Tensor]:
        return weight.levles  # type: ignore[union-attr]


def test_mistakes_in_own_backends_are_raised() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = random_weight(SPEC, BF16, generator), random_input(SPEC, BF16, generator)
    with pytest.raises(AttributeError, match="levles"):
        failure(Mistaken(), SPEC, BF16, x, weight)


# ---- not installed --------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_named() -> None:
    found = doctor()["backends"]
    for name, package in zip(NAMES, ("humming-kernels", "gemlite", "vllm", "gptqmodel"), strict=True):
        if not pytest.importorskip("importlib.util").find_spec(backend_of(name).package):
            assert set(found[name].values()) == {f"not installed (cuda only; pip install {package})"}
    shown = text({**doctor(), "backends": found})
    assert "torch-fp8: nothing works here" in shown
    assert "W8A8: another function than integer W8A8: e4m3 holds 80 of the 256 levels of 8 bits" in shown


def test_nothing_is_imported_before_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation is found without being imported, and reported when it is asked to run."""
    for package in ("humming", "gemlite", "vllm", "gptqmodel"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in NAMES:
        backend = backend_of(name)
        assert backend.unsupported(SPEC, BF16) == "runs on cuda only"
        assert backend.package not in sys.modules
        assert reason(backend, SPEC) == "ImportError: undefined symbol"


# ---- fp8 ------------------------------------------------------------------------------------------------------------


def test_fp8_is_another_function() -> None:
    """e4m3 holds 80 of the 256 levels; rounding to it fails the check that comes before a timing."""
    levels = torch.arange(-128, 128).float()
    assert int((levels.to(torch.float8_e4m3fn).float() == levels).sum()) == 80

    def fp8(t: Tensor) -> Tensor:
        return t.float().to(torch.float8_e4m3fn).double()

    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        spec = OpSpec("linear", 64, 256, 1024, 8, 8, 128)
        weight, x = random_weight(spec, BF16, generator), random_input(spec, BF16, generator)
        a, scale, zero = quantize_tokens(x, 8)
        assert isinstance(weight, LowbitWeight)
        packed, group_scale = weight.unpack()
        q = unpack_weight(packed, 8, (256, 1024))
        w = fp8(q) * group_scale.double().repeat_interleave(128, 1)
        found = disagreement(spec, x, weight, fp8(a.double() - zero.double()) * scale.double() @ w.T)
        assert found is not None
        assert 0.03 < float(found.split()[2]) < 0.035


# ---- the benchmark's use of them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gemm_benchmark_runs_the_same_adapters(
    bits: int, installed: Callable[[str], ThirdParty], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, x = bench_gemm.Case(64, 256, bits, torch.bfloat16, "cpu"), torch.randn(3, 256).bfloat16()
    assert not bench_gemm.contenders(case, 16, True)
    for name, peer in zip(NAMES, sorted(bench_gemm.PEERS, key=lambda p: NAMES.index(p.name)), strict=True):
        installed(name)
        monkeypatch.setattr(peer, "device", "cpu")
    by_bits = {2: NAMES[:2], 4: NAMES, 8: NAMES}[bits]
    for a_bits, expected in ((16, set(by_bits)), (8, {"humming"}), (4, set())):
        found = bench_gemm.contenders(case, a_bits, True)
        assert set(found) == expected
        for make, product, symmetric in found.values():
            first, second = make(), make()
            reference = case.reference(x, a_bits, symmetric)
            for layer in (first, second):
                bench_gemm.gate("y", {"y": (product(layer, x), reference)}, bench_gemm.allowed(a_bits, peer=True))
