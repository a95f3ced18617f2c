"""Instructions of the CUDA kernels' main loops, counted in what nvcc assembles, and the least time they leave possible.

    python -m benchmarks.sass [NAME ...]              # prints what the working tree's kernels have
    python -m benchmarks.sass [NAME ...] --commit REV # counts those of a commit and files the rows

An `Item` says which instance of which kernel, which loop, what one trip of one warp does and how many trips a product
takes. Rows in benchmarks/results/sass.jsonl hold counts alone; floors are computed from them here. `table` compares the
first row of an item with its newest one.

Floors are in clocks of one SM. It issues four warp instructions per clock, and each of its pipes executes so many lanes
of a warp per clock (CUDA C++ programming guide, "Throughput of Native Arithmetic Instructions"). Tensor cores count at
the rates that benchmarks/instruction_rates.py measured on an H200, on an A100 at those of the data sheet. The slowest,
or the bytes at copy bandwidth, is a time that nothing can beat, no measurement: latencies and waits come on top.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.rows import Row

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "benchmarks" / "results" / "sass.jsonl"


@dataclass(frozen=True)
class Item:
    """What is counted.

    ``kernel`` is a pattern of its mangled name, ``loop`` of an instruction of its main loop (`Code.loop`); without
    ``loop`` the whole kernel counts. ``per``: what one trip of one warp does. ``warps``: trips of all warps in
    ``product``, which moves ``bytes`` to or from memory; where SMs have unequal shares, as many as if all
    were as busy as the busiest (`_uneven`).
    """

    name: str
    source: str
    arch: str
    kernel: str
    loop: str | None
    per: str
    product: str
    warps: float
    bytes: float

    @property
    def params(self) -> dict[str, Any]:
        """What a row needs besides counts: the item's next version may do something else per trip."""
        names = ("source", "arch", "per", "product", "warps", "bytes")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Gpu:
    name: str
    sms: int
    hertz: float
    copy: float  # bytes per second
    lanes: dict[str, int]  # of a pipe, per clock and SM
    tensor: dict[str, float]  # multiply-adds per clock and SM by instruction, or by instruction and shape

    @staticmethod
    def rate(operations: float, sms: int, hertz: float) -> float:
        return operations / 2 / sms / hertz


H200, A100 = (132, 1.755e9), (108, 1.41e9)
GPUS = {
    "90a": Gpu(
        "H200", *H200, 4.24e12, {"FMA": 128, "ALU": 64, "XU": 16, "memory": 32},
        {"HGMMA": Gpu.rate(952e12, *H200), "IGMMA": Gpu.rate(1.91e15, *H200), "HMMA": Gpu.rate(615e12, *H200),
         "IMMA": Gpu.rate(1.23e15, *H200), "BMMA": Gpu.rate(9.84e15, *H200)},
    ),
    "80": Gpu(
        "A100", *A100, 1.7e12, {"FMA": 64, "ALU": 64, "XU": 16, "memory": 32},
        {"HMMA": Gpu.rate(312e12, *A100), "IMMA": Gpu.rate(624e12, *A100),
         "IMMA.16864": Gpu.rate(1248e12, *A100), "BMMA": Gpu.rate(4.992e15, *A100)},
    ),
}  # fmt: skip

# kind: (instructions, their pipe). The first that matches counts; an IMAD keeps its pipe twice as long as an FFMA of
# sm_90; shared memory and L1 move a word per lane. Uniform instructions and control only take an issue slot.
KINDS = {
    "tensor": (r"[HIB]G?MMA", "tensor"),
    "convert": (r"I2FP|F2FP", "ALU"),
    "convert, slow": (r"I2F|F2I|F2F|FRND|MUFU", "XU"),
    "fp32": (r"FFMA|FADD|FMUL", "FMA"),
    "half": (r"HFMA2|HADD2|HMUL2", "FMA"),
    "IMAD": (r"IMAD|IDP", "FMA"),
    "integer": (r"IADD3|VIADD|LOP3|SHF|PRMT|LEA|I?SETP|FSETP|SEL|FSEL|[IFH]MNMX|V[HI]MNMX|MOV|PLOP3|BMSK|IABS", "ALU"),
    "shared": (r"LDS|STS|SYNCS", "memory"),
    "global": (r"LDG|STG|UBLKCP|ATOMG|RED|LD|ST", "memory"),
    "uniform": (r"U[A-Z]|R2UR|S2UR", ""),
    "other": (r"", ""),
}

GROUPS, TILES = 8192 // 128, 8192 // 16  # of 8192 x 8192


def _weights(bits: int) -> float:
    return 8192 * 8192 * (bits / 8 + 2 / 128)


def _product(tokens: int, bits: int, token_bytes: int) -> float:
    return _weights(bits) + tokens * 8192 * (token_bytes + 2)


def _uneven(trips: int, arch: str) -> int:
    """Of the busiest SM's ``trips``."""
    return trips * GPUS[arch].sms


ITEMS = (
    *(
        Item(f"int8, W{bits}A8, {n} tokens", "lowbit_int8", "90a", rf"int8_kernelINS_4BF16ELi{bits}ELi{n}E", "IGMMA",
             f"group, 16 rows x {n} tokens", f"W{bits}A8 8192², M = 4096", TILES * GROUPS * 4096 / n,
             _product(4096, bits, 1))
        for bits, n in ((4, 256), (4, 128), (8, 256))
    ),
    *(
        Item(f"tile, W{bits}A{a_bits}, 128 tokens, sm_{arch}", "lowbit_tile", arch,
             rf"tile_kernelINS_4BF16ELi{bits}ELi8ELi{a_bits}E", "IMMA", "group, 32 rows x 64 tokens",
             f"W{bits}A{a_bits} 8192², M = 512", TILES / 2 * GROUPS * 8, _product(512, bits, 1))
        for arch, bits, a_bits in (("80", 4, 8), ("80", 4, 4), ("80", 2, 4), ("90a", 4, 8))
    ),
    *(
        Item(f"stream, W{bits}A8, {8 * nt} tokens, sm_{arch}", "lowbit_stream", arch,
             rf"stream_kernelINS_4BF16E.*IntMathILi{bits}ELi{nt}EE", "IMMA", f"group, 64 rows x {8 * nt} tokens",
             f"W{bits}A8 8192², M = {8 * nt if nt > 1 else 1}", TILES / 4 * GROUPS,
             _product(8 * nt if nt > 1 else 1, bits, 1))
        for arch in ("80", "90a") for bits, nt in ((4, 1), (4, 4), (2, 1))
    ),
    *(  # a block has 128 of the rows, so that 64 of 108 SMs have one
        Item(f"stream, W4A16, {8 * nt} tokens, sm_80", "lowbit_stream", "80",
             rf"stream_kernelINS_4BF16E.*HalfMathIS1_Li4ELi{nt}EE", "HMMA", f"group, 64 rows x {8 * nt} tokens",
             f"W4A16 8192², M = {m}", _uneven(2 * GROUPS, "80"), _product(m, 4, 2))
        for nt, m in ((1, 1), (2, 16))
    ),
    *(
        Item(f"W4A16, M = {m}, sm_{arch}", "lowbit_stripe", arch, rf"stripe_kernelINS_4BF16ELi4ELi{nt}E", "HMMA",
             f"group, 32 rows x {8 * nt} tokens", f"W4A16 8192², M = {m}",
             _uneven(8 * -(-(TILES // 16 * GROUPS) // GPUS[arch].sms), arch), _product(m, 4, 2))
        for arch, nt, m in (("80", 4, 32), ("80", 8, 64), ("90a", 4, 32))
    ),
    Item("planes, W2A8, 1 token, sm_90a", "lowbit_bitplane", "90a",
         r"stream_kernelINS_4BF16E.*PlaneMathILi2ELi8ELi1EE", "BMMA", "group, 64 rows x 8 planes",
         "W2A8 8192², M = 1", TILES / 4 * GROUPS, _product(1, 2, 1)),
    *(
        Item(f"W{bits}A16, M = {m}", "lowbit_half", "90a", rf"half_kernelINS_4BF16ELi{bits}ELi{n}E", "HGMMA",
             f"group, 16 rows x {n} tokens", f"W{bits}A16 8192², M = {m}", TILES * GROUPS * m / n, _product(m, bits, 2))
        for bits, n, m in ((4, 64, 64), (4, 256, 512), (4, 256, 4096), (8, 256, 4096))
    ),
    *(
        Item(f"quant_lora_mix, {half}, sm_{arch}", "quant_lora_mix", arch, rf"mix_kernelINS_{name}ELi128ELb0ELb0E",
             "HMMA", "precision of 16 rows x 128 inputs", "4096², 3 precisions", 3 * 4096**2 / 2048, 4 * 4096**2)
        for arch in ("80", "90a") for half, name in (("bf16", "4BF16"), ("fp16", "3F16"))
    ),
    *(  # all of it, also what rows that fit in registers leave out
        Item(f"act_quant_pack, {half}, sm_{arch}", "act_quant_pack", arch,
             rf"act_quant_kernelINS_{name}ELi{layout}ELi8E", None, "2048 inputs of a token",
             "4096 tokens of 8192", 4096 * 8192 / 2048, 3 * 4096 * 8192)
        for arch, layout in (("80", 0), ("90a", 2)) for half, name in (("bf16", "4BF16"), ("fp16", "3F16"))
    ),
)  # fmt: skip


# --- counting ---------------------------------------------------------------------------------------------------------


def nvcc() -> str:
    return shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"


def release() -> str:
    return re.findall(r"release ([\d.]+)", subprocess.check_output([nvcc(), "--version"], text=True))[0]


def cuobjdump() -> Path:
    triton = importlib.util.find_spec("triton")
    assert triton is not None, "cuobjdump comes with triton, which is not installed"
    return Path(str(triton.origin)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def assemble(source: str, arch: str, csrc: Path, target: Path) -> Path:
    """A .cu file as a cubin; no product may wait for the one before it."""
    command = [nvcc(), "-O3", "-std=c++17", f"-I{csrc}", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin"]
    command += [str(csrc / "cuda" / f"{source}.cu"), "-o", str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "wgmma.mma_async instructions are serialized" not in done.stdout + done.stderr
    return target


@dataclass(frozen=True)
class Code:
    """An assembled kernel."""

    lines: list[tuple[int, str, str]]  # address, instruction, operands
    registers: int

    @property
    def loops(self) -> list[tuple[int, int]]:
        """Addresses of the first and the last instruction of every loop, in the order in which they end."""
        found = []
        for at, what, operands in self.lines:
            target = re.search(r"0x([0-9a-f]+)", operands)
            if what.startswith("BRA") and target and int(target[1], 16) < at:
                found.append((int(target[1], 16), at))
        return found

    def loop(self, holding: str) -> list[str]:
        """Instructions of the innermost loop with one that matches, of several such loops the densest in them: a cold
        block at a kernel's end that jumps back into the loop looks like a loop around all in between."""
        found = [at for at, what, _ in self.lines if re.match(holding, what)]
        around = [(a, b) for a, b in self.loops if any(a <= at <= b for at in found)]
        innermost = [(a, b) for a, b in around if not any((a, b) != (c, d) and a <= c and d <= b for c, d in around)]
        density = {(a, b): sum(a <= at <= b for at in found) / (b - a) for a, b in innermost}
        first, last = max(density, key=lambda ends: density[ends])
        return [what for at, what, _ in self.lines if first <= at <= last]


def kernels(cubin: Path) -> dict[str, Code]:
    """All of a file, by mangled name."""
    dump = lambda flag: subprocess.check_output([cuobjdump(), flag, cubin], text=True)  # noqa: E731
    registers = dict(re.findall(r"Function (\S+):\s+REG:(\d+)", dump("-res-usage")))
    pattern = r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    found = {}
    for part in dump("-sass").split("Function : ")[1:]:
        name = part.split()[0]
        lines = [(int(at, 16), what, operands) for at, what, operands in re.findall(pattern, part, re.M)]
        found[name] = Code(lines, int(registers[name]))
    return found


def shortened(instruction: str) -> str:
    """Its name, with the shape of a product and the width of an access."""
    if kind(instruction) == "tensor":
        return instruction
    return instruction.split(".")[0] + "".join(re.findall(r"\.(?:64|128)\b", instruction)[:1])


def count(item: Item, code: dict[str, Code]) -> Row:
    """What a row holds: instructions by name, and registers."""
    found = [name for name in code if re.search(item.kernel, name)]
    assert len(found) == 1, f"{item.name}: {len(found)} kernels match {item.kernel!r} among {list(code)}"
    kernel = code[found[0]]
    inside = [what for _, what, _ in kernel.lines] if item.loop is None else kernel.loop(item.loop)
    short = Counter(map(shortened, inside))
    return {
        "topic": "sass", "name": item.name, "params": item.params, "registers": kernel.registers,
        "instructions": short.total(), "counts": dict(short.most_common()),
    }  # fmt: skip


def count_all(items: Iterable[Item], csrc: Path) -> list[Row]:
    found, files = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for item in items:
            key = item.source, item.arch
            if key not in files:
                files[key] = kernels(assemble(*key, csrc, Path(folder) / "kernels.cubin"))
            found.append(count(item, files[key]))
    return found


def count_commit(items: Iterable[Item], commit: str) -> list[Row]:
    """Rows of the kernels as they were in a commit."""
    git = lambda *words: subprocess.check_output(["git", *words], cwd=ROOT)  # noqa: E731
    stamp = {
        "nvcc": release(),
        "commit": git("rev-parse", "--short", commit).decode().strip(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(git("archive", commit, "csrc"))) as archive:
            archive.extractall(folder, filter="data")
        return [row | stamp for row in count_all(items, Path(folder) / "csrc")]


# --- floors -----------------------------------------------------------------------------------------------------------


def kind(instruction: str) -> str:
    return next(name for name, (pattern, _) in KINDS.items() if re.match(pattern, instruction))


def multiply_adds(instruction: str) -> int:
    """Of one warp: HMMA.16816, IMMA.16832, BMMA.168128; of a warpgroup's HGMMA.64x128x16 a quarter."""
    shape = re.search(r"MMA\.(?:(\d+)x(\d+)x(\d+)|(16)(8)(\d+))", instruction)
    assert shape, instruction
    m, n, k = (int(x) for x in shape.groups() if x)
    return m * n * k // (4 if "GMMA" in instruction else 1)


def clocks(counts: dict[str, int], gpu: Gpu) -> dict[str, float]:
    """Of an SM, per warp and trip, by what would take them: issuing, and every pipe."""
    found = Counter({"issue": sum(counts.values()) / 4})
    for instruction, n in counts.items():
        name = kind(instruction)
        pipe = KINDS[name][1]
        if name == "tensor":
            what, shape, *_ = instruction.split(".")
            found[pipe] += n * multiply_adds(instruction) / gpu.tensor.get(f"{what}.{shape}", gpu.tensor[what])
        elif pipe:
            words = {"64": 2, "128": 4}.get(instruction.split(".")[-1], 1) if pipe == "memory" else 1
            found[pipe] += n * words * 32 / (min(64, gpu.lanes[pipe]) if name == "IMAD" else gpu.lanes[pipe])
    return dict(found)


def floor(row: Row) -> tuple[str, float]:
    """What bounds the product, and its seconds."""
    params, gpu = row["params"], GPUS[row["params"]["arch"]]
    seconds = {what: n * params["warps"] / gpu.sms / gpu.hertz for what, n in clocks(row["counts"], gpu).items()}
    seconds["bytes"] = params["bytes"] / gpu.copy
    return max(seconds.items(), key=lambda pair: pair[1])


# --- the page ---------------------------------------------------------------------------------------------------------


def history(file: Path = ROWS) -> dict[str, tuple[Row, Row]]:
    """First and newest row of every item there is."""
    found: dict[str, tuple[Row, Row]] = {}
    for row in rows.read(file):
        found[row["name"]] = (found.get(row["name"], (row,))[0], row)
    return {item.name: found[item.name] for item in ITEMS if item.name in found}


def _by_kind(counts: dict[str, int]) -> str:
    kinds = Counter[str]()
    for instruction, n in counts.items():
        kinds[kind(instruction)] += n
    return ", ".join(f"{n} {name}" for name, n in kinds.most_common())


def _predicted(row: Row) -> str:
    what, seconds = floor(row)
    return f"{seconds * 1e6:.1f} µs by {what}"


def table(file: Path = ROWS) -> str:
    body = []
    for name, (first, newest) in history(file).items():
        cells = [
            [name, row["params"]["source"], row["params"]["per"], str(row["instructions"]), str(row["registers"]),
             _by_kind(row["counts"]), row["params"]["product"], _predicted(row), row["commit"]]
            for row in (first, newest)
        ]  # fmt: skip
        body.append([" → ".join(dict.fromkeys(both)) for both in zip(*cells, strict=True)])
    head = ["what", "kernel", "per warp and", "instructions", "registers", "of these", "product", "predicted, at least",
            "commit"]  # fmt: skip
    return rows.table(head, body)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names of items (default: all)")
    parser.add_argument("--commit", help="count this commit's kernels and file the rows")
    args = parser.parse_args(argv)
    items = [item for item in ITEMS if not args.names or any(name in item.name for name in args.names)]
    found = count_commit(items, args.commit) if args.commit else count_all(items, ROOT / "csrc")
    for item, row in zip(items, found, strict=True):
        if args.commit:
            rows.append(ROWS, row)
        print(f"{item.name}: {row['instructions']} instructions per {item.per}, {row['registers']} registers")
        print(f"    {_by_kind(row['counts'])}\n    {row['counts']}")
        per_clock = {what: round(n, 1) for what, n in clocks(row["counts"], GPUS[item.arch]).items()}
        print(f"    clocks {per_clock}; {item.product}: predicted at least {_predicted(row)}")


if __name__ == "__main__":
    sys.exit(main())
