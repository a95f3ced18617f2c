"""The quantizer kernels hardly divide: here their substitutes are checked against true division on the host.

    Markstein             y = RN(x r), e = fma(-y, s, x), fma(e, r, y)      r = RN(1/s), any fp32 s
    two-part reciprocal   fma(x, r, RN(x t)), t = RN(fma(-s, r, 1) r)       r within 2 ulp of 1/s, s a half type
    constant divisor      the same with r + t = 2 / (2^b - 1)               every fp32 significand
    one product           RN_bf16(x r)                                      x, s bf16, r within 2 ulp of 1/s
    two bf16 products     RN_bf16(x r + RN_bf16(x t))                       r + t = 0 to 3 ulp above 1/s, both bf16
    scales of tokens      u / (2^b - 1) by the constant divisor             every half u, subnormal ones too
    whole bf16 levels     65537 v + z - 65536 v, and again (CPU kernels)    v = x r, r 1 or 2 ulp above RN(1/s)

A C++ program, because the proof is about fused multiply-adds. Random pairs alone would say little: a quotient is wrong
only if x/s almost lies on a rounding boundary, so most pairs are built backwards from one (x = RN(m s) and its
neighbours, m a 25-bit midpoint or a half-integer level).
"""

from __future__ import annotations

import ctypes
import subprocess

import pytest

SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
static uint64_t state = 88172645463325252ull;
static uint32_t next() { state ^= state << 13; state ^= state >> 7; state ^= state << 17; return state >> 16; }
static float bits(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
static uint32_t word(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
static float ulps(float f, int n) { return bits(word(f) + n); }
static float bf16(float f) { uint32_t u = word(f); return bits((u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u); }
static float fp16(float f) {  // normal range: 10 fraction bits
  uint32_t u = word(f); return bits((u + 0xfff + ((u >> 13) & 1)) & 0xffffe000u);
}
static float significand(int kept) {  // in [1, 2) with `kept` fraction bits
  return bits(0x3f800000u | ((next() & 0x7fffff) >> (23 - kept) << (23 - kept)));
}
static float markstein(float x, float s) {
  const float r = 1.0f / s, y = x * r;
  return std::fmaf(std::fmaf(-y, s, x), r, y);
}
static float two_part(float x, float s, int off) {
  const float r = ulps(1.0f / s, off), t = std::fmaf(-s, r, 1.0f) * r;
  return std::fmaf(x, r, x * t);
}
// kind 0: Markstein, 1: two-part, 2: plain product with the reciprocal; fraction bits of s. How many are wrong
extern "C" long divisions(int kind, int fraction, long count) {
  long wrong = 0;
  for (long i = 0; i < count; ++i) {
    const float s = std::ldexp(significand(fraction), int(next() % 40) - 20);
    float x;
    switch (next() % 4) {
      case 0: x = std::ldexp(significand(23), int(next() % 40) - 20); break;  // anything
      case 1: x = float((significand(23) + 0x1p-24) * s * (1 << next() % 9)); break;  // a rounding boundary
      case 2: x = float((next() % 256 + 0.5) * double(s)); break;  // a tie of levels
      default: x = float(double(1 + next() % 65535) / 512 * double(s));  // a short quotient
    }
    x = ulps(x, int(next() % 5) - 2);
    if (next() & 1) x = -x;
    const float y = kind == 0 ? markstein(x, s) : kind == 1 ? two_part(x, s, int(next() % 5) - 2) : x * (1.0f / s);
    wrong += y != x / s;
  }
  return wrong;
}
extern "C" long constant_divisor(int width) {  // every significand
  const double divisor = ((1 << width) - 1) / 2.0;
  const float r = float(1 / divisor), t = float(1 / divisor - r);
  long wrong = 0;
  for (uint32_t m = 0x3f800000u; m < 0x40000000u; ++m) {
    const float u = bits(m);
    wrong += std::fmaf(u, r, u * t) != u / float(divisor);
  }
  return wrong;
}
// Every pair of significands of a half type: x r or the two-part product, rounded to the type, against x / s
extern "C" long half_quotients(int fraction) {
  long wrong = 0;
  const uint32_t step = 1u << (23 - fraction);
  for (uint32_t a = 0x3f800000u; a < 0x40000000u; a += step)
    for (uint32_t b = 0x3f800000u; b < 0x40000000u; b += step)
      for (int off = -2; off <= 2; ++off) {
        const float x = bits(a), s = bits(b), q = x / s;
        if (fraction == 7) wrong += bf16(x * ulps(1.0f / s, off)) != bf16(q);
        else wrong += two_part(x, s, off) != q || fp16(two_part(x, s, off)) != fp16(q);
      }
  return wrong;
}
// Every pair of bf16 significands: two fused multiply-adds in bf16, each rounded once; 1/s within 1 ulp, times ``up``
extern "C" long packed_quotients(float up) {
  long wrong = 0;
  const auto short_of = [](double v) {  // RN to 8 bits
    const int e = v == 0 ? 0 : std::ilogb(v);
    return std::ldexp(std::nearbyint(std::ldexp(v, 7 - e)), e - 7);
  };
  for (uint32_t a = 0x3f800000u; a < 0x40000000u; a += 1u << 16)
    for (uint32_t b = 0x3f800000u; b < 0x40000000u; b += 1u << 16)
      for (int off = -1; off <= 1; ++off) {
        const float x = bits(a), s = bits(b), inverse = ulps(1.0f / s, off) * up;
        const float r = bf16(inverse), t = bf16(inverse - r);
        wrong += short_of(double(x) * r + short_of(double(x) * t)) != short_of(double(x) / s);
      }
  return wrong;
}
// Every half with this many fraction bits and exponents from ``least``, divided by 2^b - 1 or half of it, in that type
extern "C" long half_scales(int fraction, int least, int most) {
  long wrong = 0;
  const auto rounded = [=](float v) {
    const int e = v == 0 ? least : std::max(std::ilogb(v), least);
    return std::ldexp(std::nearbyint(std::ldexp(v, fraction - e)), e - fraction);
  };
  for (int width = 2; width <= 8; ++width)
    for (int half = 1; half <= 2; ++half) {
      const double divisor = ((1 << width) - 1) / double(half);
      const float r = float(1 / divisor), t = float(1 / divisor - r);
      for (int e = least - 1; e <= most; ++e)  // the first row: subnormal
        for (int m = 0; m < 1 << fraction; ++m) {
          const float u = std::ldexp(float(e < least ? m : m + (1 << fraction)), std::max(e, least) - fraction);
          wrong += rounded(std::fmaf(u, r, u * t)) != rounded(u / float(divisor));
        }
    }
  return wrong;
}
// Levels of every x / s in [2^-16, 300) and every zero point, as csrc/cpu/act_quant.h computes them; kind 0: fused,
// 1: not fused (its scalar pass), 2: without the second rounding
template <int kKind>
static long levels() {
  long wrong = 0;
  const auto fma = [](float a, float b, float c) { return kKind == 1 ? a * b + c : std::fmaf(a, b, c); };
  const auto level = [](float v) { return std::nearbyint(v < -128 ? -128 : v > 127 ? 127 : v); };
  for (uint32_t a = 0; a < 128; ++a)
    for (uint32_t b = 0; b < 128; ++b)
      for (int e = -16; e <= 8; ++e)
        for (int sign = -1; sign <= 1; sign += 2) {
          const float x = std::ldexp(bits(0x3f800000u | a << 16), e) * sign, s = bits(0x3f800000u | b << 16);
          const float q = bf16(x / s), v = x * (1.0f / s * 0x1.000002p0f);
          if (std::fabs(q) >= 300) continue;
          for (int z = -128; z < 128; ++z) {
            const float sum = fma(-v, 65536.0f, fma(v, 65537.0f, float(z)));
            const float rounded = kKind == 2 ? sum : fma(-sum, 65536.0f, sum * 65537.0f);
            wrong += level(rounded) != level(bf16(q + z));
          }
        }
  return wrong;
}
extern "C" long bf16_levels(int kind) { return kind == 0 ? levels<0>() : kind == 1 ? levels<1>() : levels<2>(); }
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("division")
    (folder / "division.cpp").write_text(SOURCE)
    target = folder / "libdivision.so"
    # without contraction the fused operations are exactly the ones written; -mfma makes fmaf one instruction
    flags = ["-O2", "-mfma", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, str(folder / "division.cpp"), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    names = ("divisions", "constant_divisor", "half_quotients", "packed_quotients", "half_scales", "bf16_levels")
    for name in names:
        getattr(library, name).restype = ctypes.c_long
    library.packed_quotients.argtypes = [ctypes.c_float]
    library.divisions.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long]
    return library


@pytest.mark.parametrize("fraction", [7, 10, 23], ids=["bf16", "fp16", "fp32"])
def test_markstein(host: ctypes.CDLL, fraction: int) -> None:
    assert host.divisions(0, fraction, 10_000_000) == 0


@pytest.mark.parametrize("fraction", [7, 10], ids=["bf16", "fp16"])
def test_two_part_reciprocal(host: ctypes.CDLL, fraction: int) -> None:
    assert host.divisions(1, fraction, 10_000_000) == 0


def test_plain_reciprocal_is_found_wrong(host: ctypes.CDLL) -> None:
    assert host.divisions(2, 7, 1_000_000) > 100_000


@pytest.mark.parametrize("width", range(2, 9))
def test_constant_divisor(host: ctypes.CDLL, width: int) -> None:
    assert host.constant_divisor(width) == 0


@pytest.mark.parametrize("fraction", [7, 10], ids=["bf16", "fp16"])
def test_half_quotients(host: ctypes.CDLL, fraction: int) -> None:
    assert host.half_quotients(fraction) == 0


def test_packed_quotients(host: ctypes.CDLL) -> None:
    assert host.packed_quotients(1 + 2**-23) == 0
    assert host.packed_quotients(1) == 1, "226 / 251 is too close to a boundary for an 1/s from below"


@pytest.mark.parametrize(("fraction", "least", "most"), [(7, -126, 127), (10, -14, 15)], ids=["bf16", "fp16"])
def test_scales_of_tokens(host: ctypes.CDLL, fraction: int, least: int, most: int) -> None:
    assert host.half_scales(fraction, least, most) == 0


@pytest.mark.parametrize("kind", [0, 1], ids=["fused", "unfused"])
def test_bf16_levels(host: ctypes.CDLL, kind: int) -> None:
    assert host.bf16_levels(kind) == 0


def test_bf16_levels_need_the_second_rounding(host: ctypes.CDLL) -> None:
    assert host.bf16_levels(2) > 10_000
