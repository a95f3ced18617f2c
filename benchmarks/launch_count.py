"""What a step launches on a GPU, counted where there is none: per block, forward and backward.

    python -m benchmarks.launch_count            # rows into benchmarks/results
    python -m benchmarks.launch_count --show     # every launch of a block, in order; no rows

The steps of bench_step run on a GPU that is not there (absent_gpu.py), at Llama-3.1-8B's shapes and 8 x 128 tokens, and
every call that would reach the device is noted: Triton's kernels and compiled ones by name, torch's operators where
they are no view and no allocation. Of a block is what a step of three blocks launches more than one of two, sums of
gradients between blocks included. Besides

    reads       of the device by the host, which waits for it then: .item(), a copy to the host, nonzero
    operators   of this package (jointnas::) that were called: each costs the host some 20 us in Python

A torch operator counts as the kernels in KERNELS, else as one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from triton.runtime.jit import JITFunction

from benchmarks import absent_gpu, models
from benchmarks.bench_step import Bench
from benchmarks.harness import RESULTS
from benchmarks.rows import Row
from jointnas_kernels.ops.core import cuda
from jointnas_kernels.ops.core.op import Registered

ROWS = RESULTS / "launch_count.jsonl"
SPACES, MODES, PARTS = ("llama3", "qllama3"), ("weight", "arch"), ("forward", "backward")
ADAPTERS = {"bf16": torch.bfloat16, "fp32": torch.float32}
BLOCKS = (2, 3)
BATCH, TOKENS = 8, 128
DEVICE = "cuda:0"  # a torch without CUDA knows no current one
aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero}
MEMORY = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view,
    aten.lift_fresh, aten.detach, aten.detach_,
}  # fmt: skip
# flash attention's backward: sum of dO * O, the gradients, dQ rounded; and dK and dV summed over a KV head's queries
KERNELS = {aten._scaled_dot_product_flash_attention_backward: 5}


@dataclasses.dataclass
class Counts:
    """Of one pass."""

    launches: list[str] = dataclasses.field(default_factory=list)
    reads: int = 0
    operators: int = 0

    def minus(self, other: Counts) -> dict[str, Any]:
        """What this one has more."""
        launches = Counter(self.launches)
        launches.subtract(other.launches)
        return {
            "launches": launches.total(), "reads": self.reads - other.reads,
            "operators": self.operators - other.operators,
            "kernels": {name: count for name, count in sorted(launches.items()) if count},
        }  # fmt: skip


class Launches(TorchDispatchMode):
    """Notes torch's operators on the absent device."""

    def __init__(self) -> None:
        super().__init__()
        self.of = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        device, op = kwargs.get("device"), func.overloadpacket
        to_host = device is not None and torch.device(device).type == "cpu"
        if any(t.is_meta for t in given):
            if op in READS or to_host or (op is aten.copy_ and not args[0].is_meta):
                self.of.reads += 1
            elif not func.is_view and op not in MEMORY:
                self.of.launches += [str(op).removeprefix("aten.")] * KERNELS.get(op, 1)
        elif absent_gpu.on_cuda(device) and op not in MEMORY:
            self.of.launches.append(str(op).removeprefix("aten."))
        return func(*args, **kwargs)


class FusedAttention(TorchFunctionMode):
    """The operator that attention is on a GPU; on meta torch takes it apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and args[0].is_meta:
            if kwargs.get("attn_mask") is not None:
                raise NotImplementedError("attention with a mask is another operator")
            scale, causal = kwargs.get("scale"), kwargs.get("is_causal", False)
            return aten._scaled_dot_product_flash_attention(*args, 0.0, causal, scale=scale)[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def counting() -> Iterator[Launches]:
    """Within it nothing is compiled and nothing computed; what would be launched is noted."""

    def triton_launch(self: Any, *_: Any, **__: Any) -> None:
        launches.of.launches.append(self.fn.__name__)

    def compiled_launch(name: str, *_: Any, **__: Any) -> None:
        launches.of.launches.append(name)

    def operator(self: Registered, *args: Any) -> Any:
        launches.of.operators += 1
        return absent_gpu.direct(self, *args)

    launches = Launches()
    with absent_gpu.absent(), contextlib.ExitStack() as stack:
        for owner, name, value in (
            (JITFunction, "run", triton_launch), (cuda, "call", compiled_launch), (Registered, "__call__", operator),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, value))
        with FusedAttention(), launches:
            yield launches


def step(space: str, mode: str, adapters: str, blocks: int, tiny: bool) -> dict[str, Counts]:
    """What forward and backward pass of one step launch."""
    with counting() as launches:
        config = models.llama_tiny(layers=blocks) if tiny else models.llama_8b(blocks, 256)
        bench = Bench(DEVICE, tiny, torch.bfloat16, config, models.build_llama(config, DEVICE, torch.bfloat16))
        net = bench.supernet(space, ADAPTERS[adapters]).mode(mode)
        ids = bench.ids(BATCH, TOKENS)
        parts = {}
        for _ in range(2):  # a first step may look things up
            net.draw(bench.generator)
            parts["forward"] = launches.of = Counts()
            loss = net(ids, labels=ids).loss
            parts["backward"] = launches.of = Counts()
            loss.backward()
            for parameter in net.parameters():
                parameter.grad = None
    return parts


def block(space: str, mode: str, adapters: str = "bf16", tiny: bool = False) -> dict[str, dict[str, Any]]:
    """By part: launches, reads, operators and launches by kernel of one block."""
    few, many = (step(space, mode, adapters, n, tiny) for n in BLOCKS)
    return {part: many[part].minus(few[part]) for part in PARTS}


def count() -> list[Row]:
    rows = []
    for space in SPACES:
        for mode in MODES:
            for adapters in ADAPTERS if mode == "weight" else ("bf16",):
                params = {"space": space, "mode": mode, "adapters": adapters, "batch": BATCH, "tokens": TOKENS}
                rows.append({"params": params, "parts": block(space, mode, adapters)})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def listing(launches: Sequence[str]) -> str:
    return "\n".join(f"{number:4d} {name}" for number, name in enumerate(launches, 1))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--show", action="store_true", help="list the launches; write nothing")
    if not parser.parse_args(argv).show:
        ROWS.write_text("".join(json.dumps(row) + "\n" for row in count()))
        return
    for space in SPACES:
        for mode in MODES:
            found: Mapping[str, Counts] = step(space, mode, "bf16", BLOCKS[0], False)
            for part in PARTS:
                print(f"{space} {mode} step, {part} of {BLOCKS[0]} blocks\n{listing(found[part].launches)}\n")


if __name__ == "__main__":
    sys.exit(main())
