// Per-token dynamic activation quantization, written in the byte order the int8 kernels read: one block per token, one
// read of x, one write of a. Every step is rounded to x's type, as torch and compressed-tensors do it.
//
// Pairs of inputs stay in one word from the load to the level, as an instruction on a pair takes one issue slot like any
// other: 11 per input of 8192 in SASS for sm_90a, where true divisions and single conversions took about 75.
#include "cuda/lowbit.cuh"

namespace jointnas {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kStep = 8;  // inputs per thread and piece: 32i + 8t .. + 7 of a group, two words of the packed token
constexpr int kFewTokens = 128;  // fewer do not fill a device, so that a token has to be quick by itself
constexpr int kPieces = 8;  // held in registers: 64 bytes in flight per thread, and few warps to meet per token

template <class T> JN_DEVICE float half_of(uint32_t pair, int which) {
  return ptx::to_float(T{static_cast<uint16_t>(pair >> (16 * which))});
}
template <class T> JN_DEVICE float rounded(float v) { return ptx::to_float(ptx::from_float<T>(v)); }
template <class T> JN_DEVICE uint32_t twice(float v) { return ptx::pack2<T>(v, v); }
template <class T> constexpr uint32_t kOne = both(half_bits(kIsBf16<T>, 1));

// Pairs divided by a positive s, each quotient rounded to T.
template <class T> struct Divisor;
// With r + t = 1 / s, x r + RN(x t) is the rounded quotient. r and t have 8 bits each, but fp32's exponents, which are
// too few for s at their ends: multiplied by a power of two, as x is. What that takes from tiny x / s changes no level.
// Of all pairs of significands one, 226 / 251, needs 1 / s not to be taken from below.
template <> struct Divisor<BF16> {
  uint32_t scale, inverse, rest;
  JN_DEVICE explicit Divisor(float s) {
    const float by = s < 1 ? 0x1p64f : 0x1p-64f, r = ptx::reciprocal(s * by) * 0x1.000002p0f;
    scale = twice<BF16>(by);
    inverse = twice<BF16>(r);
    rest = twice<BF16>(r - half_of<BF16>(inverse, 0));
  }
  JN_DEVICE uint32_t operator()(uint32_t x) const {
    constexpr uint32_t none = 0x80008000u;  // -0: the sum with it is the product
    x = ptx::fma2<BF16>(x, scale, none);
    return ptx::fma2<BF16>(x, inverse, ptx::fma2<BF16>(x, rest, none));
  }
};
// The same in fp32: two fp16 numbers are too short for 1 / s.
template <> struct Divisor<F16> {
  float inverse, rest;
  JN_DEVICE explicit Divisor(float s) : inverse(ptx::reciprocal(s)) { rest = fmaf(-s, inverse, 1.0f) * inverse; }
  JN_DEVICE uint32_t operator()(uint32_t x) const {
    const float low = half_of<F16>(x, 0), high = half_of<F16>(x, 1);
    return ptx::pack2<F16>(fmaf(low, inverse, low * rest), fmaf(high, inverse, high * rest));
  }
};

// Numbers from -128 to 127 rounded to integers, to nearest even, in the low bytes of a pair.
template <class T> JN_DEVICE uint32_t integers(uint32_t v) {
  if constexpr (kIsBf16<T>) {
    // From 128 to 256 the last bit counts ones: 128 is added to positive numbers and 256 to negative ones, whose last
    // seven bits, below the sign, are those of two's complement then.
    const uint32_t offset = ptx::and_or(v >> 8, 0x00800080u, both(half_bits(true, 128)));
    return ptx::fma2<T>(v, kOne<T>, offset) ^ offset;
  } else {
    return ptx::fma2<T>(v, kOne<T>, both(half_bits(false, 1536)));  // 2^10 + 2^9, the low byte being zero
  }
}

template <class T> struct Quantizer {
  Divisor<T> by;
  uint32_t zero, low, high;
  JN_DEVICE uint32_t operator()(uint32_t x) const {
    const uint32_t v = ptx::fma2<T>(by(x), kOne<T>, zero);
    return integers<T>(ptx::smaller2<T>(ptx::larger2<T>(v, low), high));
  }
};

// The largest pair of a warp's lanes, in all of them.
template <class T> JN_DEVICE uint32_t largest(uint32_t pair) {
#pragma unroll
  for (int m = 16; m; m /= 2) pair = ptx::larger2<T>(pair, ptx::shuffle_xor(pair, m));
  return pair;
}

// PIECES of a row are read once; of longer rows the rest is read again.
template <class T, int LAYOUT, int PIECES>
__global__ void __launch_bounds__(kMaxThreads, 1)
    act_quant_kernel(const T* x, int8_t* a, float* scale, int* zero, int inputs, int bits, int symmetric, float inverse,
                     float inverse_rest) {
  JN_DYNAMIC_SHARED(shared);
  uint32_t* partial = reinterpret_cast<uint32_t*>(shared);  // one pair per warp
  const int token = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, threads = blockDim.x;
  const int first = threadIdx.x * kStep, step = threads * kStep;  // whole groups: a thread keeps its place in them
  ptx::launch_dependents();
  ptx::wait_dependencies();
  x += static_cast<size_t>(token) * inputs + first;

  const T* next = x;
  const auto load = [&](int from) {  // zeros past the end leave the range as it is
    Vec4 v{{0, 0, 0, 0}};
    if (from + first < inputs) v = ptx::load16(next);
    next += step;
    return v;
  };
  Vec4 row[PIECES];
#pragma unroll
  for (int i = 0; i < PIECES; ++i) row[i] = load(i * step);
  uint32_t most = 0, least = 0;
  const auto extend = [&](const Vec4& v) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      most = ptx::larger2<T>(most, v.w[j]);
      least = ptx::smaller2<T>(least, v.w[j]);
    }
  };
#pragma unroll
  for (int i = 0; i < PIECES; ++i) extend(row[i]);
#pragma unroll 1
  for (int from = PIECES * step; from < inputs; from += step) extend(load(from));

  least ^= 0x80008000u;  // from here on a pair is (largest, -smallest)
  uint32_t range = largest<T>(ptx::larger2<T>(ptx::permute(most, least, 0x5410), ptx::permute(most, least, 0x7632)));
  if (lane == 0) partial[warp] = range;
  ptx::sync_threads();
  if (lane < threads / 32) range = partial[lane];
  range = largest<T>(range);  // lanes without a warp still hold their own warp's

  const float high = half_of<T>(range, 0), low = -half_of<T>(range, 1);
  const float qmin = -static_cast<float>(1 << (bits - 1)), qmax = -qmin - 1;
  const float unit = symmetric ? ptx::larger(-low, high) : rounded<T>(high - low);
  float s = rounded<T>(fmaf(unit, inverse, unit * inverse_rest)), z = 0;
  // a token of zeros has scale 0; the smallest step of the type stands in (torch.finfo(dtype).eps)
  if (s == 0) s = kIsBf16<T> ? 0x1p-7f : 0x1p-10f;
  const Divisor<T> by(s);
  if (!symmetric) {
    z = rounded<T>(qmin - half_of<T>(by(twice<T>(low)), 0));
    z = ptx::round_even(z < qmin ? qmin : z > qmax ? qmax : z);
  }
  if (threadIdx.x == 0) {
    scale[token] = s + (s - s);  // of a range that is not finite: NaN, and so is every result of the token
    zero[token] = ptx::to_int(z);
  }

  const Quantizer<T> quantize{by, twice<T>(z), twice<T>(qmin), twice<T>(qmax)};
  constexpr uint32_t kOrder = LAYOUT == 3 ? 0x6420 : 0x6240;  // of a word's bytes: as they come, or place_in_token's
  // wgmma's order has a thread's second word 16 bytes behind the first: neighbours swap, so that each writes 8 bytes
  constexpr bool kSwap = LAYOUT == 1 || LAYOUT == 2;
  const int group = threadIdx.x / (kGroup / kStep), in_group = threadIdx.x % (kGroup / kStep) * kStep;
  const bool odd = threadIdx.x % 2;
  const int place = kSwap ? place_for_wgmma(1, in_group) + (odd ? 12 : 0) : place_in_token(in_group);
  size_t at = static_cast<size_t>(token) * inputs + group * kGroup + place, stride = step;
  if (LAYOUT == 2) {
    at = place_swizzled(gridDim.x, token, group, place);
    stride = place_swizzled(gridDim.x, 0, step / kGroup, 0);
  } else if (LAYOUT == 3) {
    at = (static_cast<size_t>(token) * (inputs / kGroup) + group) * bits * (kGroup / 8) + in_group / 8;
    stride = step / 8 * bits;
  }
  a += at;
  const auto write = [&](const Vec4& v, int from) {
    uint32_t word[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) word[i] = ptx::permute(quantize(v.w[2 * i]), quantize(v.w[2 * i + 1]), kOrder);
    if (kSwap) {
      const uint32_t got = ptx::shuffle_xor(odd ? word[0] : word[1], 1);
      (odd ? word[0] : word[1]) = got;
    }
    if (from + first < inputs) {
      if (LAYOUT < 3) ptx::store8(a, word[0], word[1]);
#pragma unroll 1
      for (int b = 0; LAYOUT == 3 && b < bits; ++b) {  // the product moves bit 0 of a word's four bytes side by side
        const uint32_t four = (word[0] >> b & 0x01010101u) * 0x01020408u >> 24;
        const uint32_t more = (word[1] >> b & 0x01010101u) * 0x01020408u >> 24;
        a[b * (kGroup / 8)] = static_cast<int8_t>(four | more << 4);
      }
    }
    a += stride;
  };
#pragma unroll
  for (int i = 0; i < PIECES; ++i) write(row[i], i * step);
  next = x + PIECES * step;
#pragma unroll 1
  for (int from = PIECES * step; from < inputs; from += step) write(load(from), from);
}

constexpr int kThreads = 256;

// One thread per 32 inputs, half of a swizzled row: a 4 x 4 transposition of words, [t][s, h] to [s, h][t].
__global__ void __launch_bounds__(kThreads) token_layout_kernel(const Vec4* x, char* out, int tokens, int inputs) {
  ptx::launch_dependents();
  const long long i = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= static_cast<long long>(tokens) * (inputs / 32)) return;
  const int token = static_cast<int>(i / (inputs / 32)), part = static_cast<int>(i % (inputs / 32));
  Vec4 in[4], to[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) in[t] = ptx::load_readonly(x + i * 4 + t);
#pragma unroll
  for (int sh = 0; sh < 4; ++sh)
#pragma unroll
    for (int t = 0; t < 4; ++t) to[sh].w[t] = in[t].w[sh];
#pragma unroll
  for (int sh = 0; sh < 4; ++sh)
    *reinterpret_cast<Vec4*>(out + place_swizzled(tokens, token, part / 2, (part % 2 * 4 + sh) * 16)) = to[sh];
}

}  // namespace

// Per-token dynamic quantization of x[M, I] (dtype, I a multiple of 128) in the order the kernels read. Writes scale[M]
// (the rounded scale, as fp32), zero[M] and, by layout,
//   0  int8 [M, I] for lowbit_stream and lowbit_tile       1  int8 [M, I] for lowbit_wgmma
//   2  int8 [I / 128, ceil(M / 8), 8, 128] for lowbit_int8, swizzled; tokens past the end are not written
//   3  bits [M, I / 128, bits, 128] for lowbit_bitplane: plane j holds bit j of the two's complement, input k at bit k
int act_quant_pack(const void* x, int8_t* a, float* scale, int* zero, int tokens, int inputs, int bits, int symmetric,
                   int layout, int dtype, cudaStream_t stream) {
  if (inputs % kGroup || inputs < 1 || tokens < 1 || (bits != 2 && bits != 4 && bits != 8)) return kBadArgument;
  if (!aligned(x, a)) return kMisaligned;
  const double divisor = ((1 << bits) - 1) / (symmetric ? 2.0 : 1.0);
  const float inverse = static_cast<float>(1 / divisor), rest = static_cast<float>(1 / divisor - inverse);
  return dispatch([&](auto type, auto order, auto pieces) {
    const int vectors = (inputs / kStep + pieces - 1) / pieces, threads = min_of((vectors + 31) / 32 * 32, kMaxThreads);
    return launch(act_quant_kernel<Half<type>, order, pieces>, dim3(tokens), dim3(threads), 128, stream, true,
                  static_cast<const Half<type>*>(x), a, scale, zero, inputs, bits, symmetric, inverse, rest);
  }, Type{dtype}, OneOf<0, 1, 2, 3>{layout}, OneOf<1, kPieces>{tokens < kFewTokens ? 1 : kPieces});
}
JN_EXPORT(act_quant_pack);

// x[M, I] of a 16-bit type to [I / 64, ceil(M / 8), 8, 64] for lowbit_half, swizzled; tokens past the end are not written.
int token_layout(const void* x, void* out, int tokens, int inputs, cudaStream_t stream) {
  if (inputs % kGroup || tokens < 1) return kBadArgument;
  if (!aligned(x, out)) return kMisaligned;
  const long long blocks = static_cast<long long>(tokens) * inputs / 32;
  const auto grid = static_cast<unsigned>((blocks + kThreads - 1) / kThreads);
  return launch(token_layout_kernel, dim3(grid), dim3(kThreads), 0, stream, false, static_cast<const Vec4*>(x),
                static_cast<char*>(out), tokens, inputs);
}
JN_EXPORT(token_layout);

}  // namespace jointnas
