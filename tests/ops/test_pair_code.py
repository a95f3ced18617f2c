"""The PTX that rounds, shifts and clamps two values at once (ops/quant/kernels.py), executed here instruction by
instruction: the two may belong to different rows, and NaN stays NaN."""

from __future__ import annotations

import math
import re
import struct

import pytest
import torch

from jointnas_kernels.ops.quant import kernels

HALF = {"bf16": torch.bfloat16, "f16": torch.float16}


def word_of(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def value_of(word: int) -> float:
    return struct.unpack("<f", struct.pack("<I", word))[0]


def split(word: int, half: str) -> list[float]:
    """The two halves, lower first."""
    parts = word & 0xFFFF, word >> 16
    if half == "bf16":
        return [value_of(part << 16) for part in parts]
    return [struct.unpack("<e", struct.pack("<H", part))[0] for part in parts]


def join(pair: list[float], half: str) -> int:
    """Both rounded to the type, to nearest even."""
    words = []
    for value in pair:
        digits, smallest = (8, -133) if half == "bf16" else (11, -24)
        if math.isfinite(value) and value:
            unit = 2.0 ** max(math.frexp(value)[1] - digits, smallest)
            value = round(value / unit) * unit
        words.append(word_of(value) >> 16 if half == "bf16" else struct.unpack("<H", struct.pack("<e", value))[0])
    return words[0] | words[1] << 16


def extreme(kind: list[str], a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        return math.nan if "NaN" in kind or (math.isnan(a) and math.isnan(b)) else b if math.isnan(a) else a
    return max(a, b) if kind[0] == "max" else min(a, b)


def execute(code: str, inputs: list[int]) -> tuple[float, float]:
    """$0 and $1 as fp32, of $2, .. ``inputs``; registers and operands hold 32-bit words."""
    registers = {f"${i + 2}": word for i, word in enumerate(inputs)}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in code.strip("{} ").split(";"):
        instruction, _, operands = line.strip().partition(" ")
        names = re.findall(r"[$\w]+", operands)
        if instruction.startswith(".reg") or not instruction:
            continue
        kind = instruction.split(".")
        half = kind[2 if kind[0] in ("cvt", "fma") else -1].removesuffix("x2")
        if instruction == "cvt.f32.f16":
            registers[names[0]] = word_of(split(value(names[1]), "f16")[0])
        elif kind[0] == "cvt":  # the first source is the upper half
            registers[names[0]] = join([value_of(value(names[2])), value_of(value(names[1]))], half)
        elif kind[0] == "fma":
            triples = zip(*(split(value(n), half) for n in names[1:]), strict=True)
            registers[names[0]] = join([a * b + c for a, b, c in triples], half)
        elif kind[0] in ("max", "min"):
            pairs = zip(*(split(value(n), half) for n in names[1:]), strict=True)
            registers[names[0]] = join([extreme(kind, a, b) for a, b in pairs], half)
        elif kind[0] == "prmt":
            taken = value(names[1]).to_bytes(4, "little") + value(names[2]).to_bytes(4, "little")
            order = value(names[3])
            registers[names[0]] = sum(taken[order >> 4 * i & 7] << 8 * i for i in range(4))
        elif kind[0] == "mov" and len(names) == 3:  # {h, k}, p
            registers[names[0]], registers[names[1]] = value(names[2]) & 0xFFFF, value(names[2]) >> 16
        elif kind[0] in ("mov", "shl", "and"):
            a, b = value(names[1]), value(names[2]) if len(names) > 2 else 0
            registers[names[0]] = {"mov": a, "shl": (a << b % 32) & 0xFFFFFFFF, "and": a & b}[kind[0]]
        else:
            raise AssertionError(f"unknown instruction {instruction!r}")
    return value_of(registers["$0"]), value_of(registers["$1"])


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_levels_of_a_pair_from_two_rows(bits: int, half: str) -> None:
    torch.manual_seed(0)
    code = {"bf16": kernels.LEVEL_BF16, "f16": kernels.LEVEL_F16}[half].value
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    x = torch.randn(100, 2) * 2.0**bits
    x[0, 0] = x[1, 1] = float("nan")
    z = torch.randint(int(low), int(high) + 1, (100, 2)).float()
    bounds = [join([v, v], half) for v in (low, low, high, high)]
    found = [
        execute(code, [*map(word_of, v), *(join([s, s], half) for s in shift), *bounds])
        for v, shift in zip(x.tolist(), z.tolist(), strict=True)
    ]
    v = x.to(HALF[half])
    expected = (v + z.to(v.dtype)).clamp(low, high).float()
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("half", HALF)
def test_rounding_of_a_pair(half: str) -> None:
    torch.manual_seed(0)
    code = {"bf16": kernels.ROUND_BF16, "f16": kernels.ROUND_F16}[half].value
    x = torch.randn(100, 2) * torch.logspace(-3, 3, 100)[:, None]
    found = [execute(code, [*map(word_of, v)]) for v in x.tolist()]
    assert torch.equal(torch.tensor(found), x.to(HALF[half]).float())
