"""A GPU that is not there, for what a program launches on it: `with absent():` runs the program without computing.

What a program puts on "cuda" are tensors without memory (torch's meta device), which say that they are on cuda:0;
torch computes their shapes, and nothing else. Tensors of the CPU stay what they are. Triton's launches run as on the
GPU, up to the call of the driver: signature, specialisation, key, cache, and where that has nothing, the compiler. What
is read from the device is what was copied there if that was a few numbers, else 1, or true, but that any of many is
something, which programs ask to refuse it, is false. So a program takes one of its paths, and a test may fail, where it
would have passed: what it launched until then counts.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.runtime import build

from jointnas_kernels.ops.core.op import Registered

CUDA, META, CPU = torch.device("cuda", 0), torch.device("meta"), torch.device("cpu")
ADDRESS = 1 << 20  # of every tensor's memory: as aligned as the allocator's
BYTES = 141 << 30  # memory
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
COPIES = {aten._to_copy.default, aten.clone.default}
FEW = 64  # numbers


def on_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class NoMemory(TorchDispatchMode):
    """What is made on cuda is made on meta; what comes from there to the host is zeros."""

    inside = False  # torch's own Python, which must see meta

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakIdKeyDictionary()  # what a tensor without memory holds, where that is known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, NoMemory.inside = NoMemory.inside, True
        try:
            return self.shaped(func, args, dict(kwargs or {}))
        finally:
            NoMemory.inside = before

    def shaped(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is aten.to.device:  # whole in inference mode, elsewhere taken apart before
            args, kwargs = (args[0],), {"device": args[1], "dtype": args[2]}
            func = aten._to_copy.default
        given, device = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)], kwargs.get("device")
        absent = any(t.is_meta for t in given)
        held = given[0] if given and not given[0].is_meta else self.known.get(given[0]) if given else None
        if on_cuda(device):
            kwargs["device"], absent = META, True
        elif absent and device is not None and torch.device(device).type == "cpu":
            if held is not None and func in COPIES:
                return held.to(kwargs.get("dtype") or held.dtype, copy=True)
            return torch.zeros_like(given[0], dtype=kwargs.get("dtype"), device=CPU)
        elif absent and func in READS:
            if func is aten._local_scalar_dense.default:
                return (torch.ones((), dtype=given[0].dtype) if held is None else held).item()
            return held is None or bool(held.any())
        elif absent and func is aten.copy_.default and not args[0].is_meta:
            return args[0]
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if absent:
            kwargs = {k: None if isinstance(v, torch.Generator) else v for k, v in kwargs.items()}
            if func is not aten._to_copy.default:  # indices and numbers of the host, which a GPU takes too
                args, kwargs = tree_map_only(Tensor, lambda t: t if t.is_meta else t.to(META), (args, kwargs))
        made = func(*args, **kwargs)
        if absent and func in COPIES and held is not None and held.numel() <= FEW:
            self.known[made] = held.detach().to(made.dtype, copy=True)
        elif absent and func._overloadpacket is aten.any and not made.dim():
            self.known[made] = torch.zeros((), dtype=torch.bool)
        return made


class FromValues(TorchFunctionMode):
    """Tensors of given values are made on the host first: these functions know no dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and on_cuda(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": CPU}).to(CUDA)
        return func(*args, **kwargs)


class Generator(torch.Generator):
    """Of random numbers on any device: the host's."""

    def __new__(cls, device: Any = None) -> Generator:
        return super().__new__(cls)


class Silent(SimpleNamespace):
    """Functions by name; any other one does nothing."""

    def __getattr__(self, _: str) -> Any:
        return lambda *_: 0


class Driver:
    """Triton's, of a device of capability 9.0 whose calls do nothing; launchers are compiled, as the GPU's are."""

    def __init__(self) -> None:
        self.launcher_cls = self.launcher
        self.utils = Silent(
            load_binary=lambda *_: (1, 1, 32, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 227 << 10}
        )

    def launcher(self, src: Any, metadata: Any) -> Callable[..., None]:
        if hasattr(driver, "make_launcher"):  # Triton 3.6 compiles one of C for every signature, later ones do not
            driver.CudaLauncher(src, metadata)
        return lambda *_: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Counter:
    """How often a kernel was found in the cache, and how often the compiler ran for it: Triton's own listener."""

    def __init__(self) -> None:
        self.hits, self.compiled = 0, 0
        self.said: Callable[[int, int], None] = lambda *_: None

    def __call__(self, *, cache_hit: bool, **_: Any) -> None:
        self.hits, self.compiled = self.hits + cache_hit, self.compiled + (not cache_hit)
        self.said(self.hits, self.compiled)


class Anything:
    """A stream, an event, a graph, a context: takes every call."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: 1.0 if name == "elapsed_time" else None

    def __enter__(self) -> Anything:
        return self

    def __exit__(self, *_: Any) -> None: ...


def graphed(calls: Any, *_: Any, **__: Any) -> Any:
    return calls


def patches() -> dict[str, Any]:
    """What torch.cuda says and does."""
    properties = SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20, total_memory=BYTES,
        uuid="0", max_threads_per_multi_processor=2048, shared_memory_per_multiprocessor=228 << 10,
    )  # fmt: skip
    said = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 0),
        "get_device_name": properties.name, "get_device_properties": properties, "mem_get_info": (BYTES, BYTES),
        "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "is_current_stream_capturing": False,
        "is_initialized": True, "is_bf16_supported": True, "_is_in_bad_fork": False, "get_rng_state": torch.zeros(16),
    }  # fmt: skip
    silent = (
        "_lazy_init", "init", "synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed", "set_device",
        "manual_seed_all", "graph_pool_handle", "set_rng_state", "_lazy_call", "ipc_collect",
    )  # fmt: skip
    objects = ("Stream", "Event", "CUDAGraph", "device", "device_of", "stream", "graph", "current_stream")
    return {
        **{name: lambda *_, value=value, **__: value for name, value in said.items()},
        **{name: lambda *_, **__: None for name in silent},
        **dict.fromkeys(objects, Anything),
        "make_graphed_callables": graphed,
    }


def tensor_members() -> dict[str, Any]:
    """What a tensor without memory says of itself."""
    base, address = torch._C.TensorBase, Tensor.data_ptr

    def device(self: Tensor) -> torch.device:
        return CUDA if self.is_meta and not NoMemory.inside else base.device.__get__(self)

    def data_ptr(self: Tensor) -> int:
        return ADDRESS + self.storage_offset() * self.element_size() if self.is_meta else address(self)

    return {
        "device": property(device),
        "is_cuda": property(lambda t: t.is_meta and not NoMemory.inside),
        "data_ptr": data_ptr,
        "pin_memory": lambda self, *_: self,
        "get_device": lambda self: 0 if self.is_meta else -1,
    }


def direct(self: Registered, *args: Any) -> Any:
    """An operator's own launches, in place of the shapes of its reference, which a mode would get."""
    if self.function is not None and torch.is_grad_enabled():
        return self.function.apply(*args)
    return self.run(*args)


@contextlib.contextmanager
def driver_library() -> Iterator[None]:
    """An empty libcuda.so.1, which launchers are linked to; where they run there is a real one."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "empty.c", Path(folder) / "libcuda.so.1"
        source.write_text("")
        subprocess.run(["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
        with mock.patch.dict("os.environ", {"TRITON_LIBCUDA_PATH": folder}):
            yield


@contextlib.contextmanager
def absent() -> Iterator[Counter]:
    """Within it programs may use "cuda"; counts kernels."""
    torch._C._ensureCUDADeviceGuardSet()  # of no device
    counter = Counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(driver_library())
        for name, value in patches().items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name, value in tensor_members().items():
            stack.enter_context(mock.patch.object(Tensor, name, value))
        stack.enter_context(mock.patch.object(Registered, "__call__", direct))
        for name, value in {"available": True, "load": Silent(has_cuda=True), "lowbit_kernels": "0"}.items():
            stack.enter_context(mock.patch(f"jointnas_kernels._ext.{name}", return_value=value))
        stack.enter_context(mock.patch.object(knobs.compilation, "listener", counter))
        stack.enter_context(mock.patch.object(build, "_load_module_from_path", Anything))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", Driver()))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        with FromValues(), NoMemory():
            yield counter
