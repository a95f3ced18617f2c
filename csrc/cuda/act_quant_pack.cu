// Per-token dynamic activation quantization, written in the byte order the int8 kernels read: one block per token, one
// read of x, one write of a. Every step is rounded to x's type, as torch and compressed-tensors do it.
#include "cuda/lowbit.cuh"

namespace jointnas {
namespace {

constexpr int kMaxThreads = 1024;  // one token has to be quick too: 8 inputs per thread at 8192

template <class T> JN_DEVICE float rounded(float v) { return ptx::to_float(ptx::from_float<T>(v)); }

// Eight inputs per thread and step: 32i + 8t .. + 7 of a group, two words (s = 0, 1) of the packed token.
constexpr int kStep = 8;

// The extremes of a warp's lanes, in all of them.
JN_DEVICE void meet(float& low, float& high) {
#pragma unroll
  for (int m = 16; m; m /= 2) {
    low = ptx::smaller(low, ptx::shuffle_xor(low, m));
    high = ptx::larger(high, ptx::shuffle_xor(high, m));
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    act_quant_kernel(const T* x, int8_t* a, float* scale, int* zero, int inputs, int bits, int symmetric, int layout,
                     float tiny) {
  JN_DYNAMIC_SHARED(shared);
  float* partial = reinterpret_cast<float*>(shared);  // [2][32], one entry per warp
  const int token = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, threads = blockDim.x;
  ptx::launch_dependents();
  ptx::wait_dependencies();
  x += static_cast<size_t>(token) * inputs;

  float low = 0, high = 0;
  for (int k = threadIdx.x * kStep; k < inputs; k += threads * kStep) {
    T v[kStep];
    *reinterpret_cast<Vec4*>(v) = ptx::load16(x + k);
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      const float f = ptx::to_float(v[j]);
      low = ptx::smaller(low, f);
      high = ptx::larger(high, f);
    }
  }
  meet(low, high);
  if (lane == 0) {
    partial[warp] = low;
    partial[32 + warp] = high;
  }
  ptx::sync_threads();
  if (lane < threads / 32) {
    low = partial[lane];
    high = partial[32 + lane];
  }
  meet(low, high);  // lanes without a warp still hold their own warp's extremes

  const float qmin = -static_cast<float>(1 << (bits - 1)), qmax = -qmin - 1, levels = qmax - qmin;
  float s, z = 0;
  if (symmetric) {
    s = rounded<T>(ptx::divide(ptx::larger(-low, high), levels * 0.5f));
    if (s == 0) s = tiny;
  } else {
    s = rounded<T>(ptx::divide(rounded<T>(high - low), levels));
    if (s == 0) s = tiny;
    z = rounded<T>(qmin - rounded<T>(ptx::divide(low, s)));
    z = ptx::round_even(z < qmin ? qmin : z > qmax ? qmax : z);
  }
  if (threadIdx.x == 0) {
    scale[token] = s + (s - s);  // of a range that is not finite: NaN, and so is every result of the token
    zero[token] = ptx::to_int(z);
  }

  for (int k = threadIdx.x * kStep; k < inputs; k += threads * kStep) {
    T v[kStep];
    *reinterpret_cast<Vec4*>(v) = ptx::load16(x + k);
    int level[kStep];
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      const float q = rounded<T>(rounded<T>(ptx::divide(ptx::to_float(v[j]), s)) + z);
      level[j] = ptx::to_int(q < qmin ? qmin : q > qmax ? qmax : q);
    }
    if (layout == 3) {  // a byte of every plane
      for (int b = 0; b < bits; ++b) {
        int byte = 0;
#pragma unroll
        for (int j = 0; j < kStep; ++j) byte |= (level[j] >> b & 1) << j;
        const size_t plane = (static_cast<size_t>(token) * (inputs / kGroup) + k / kGroup) * bits + b;
        a[plane * (kGroup / 8) + k % kGroup / 8] = static_cast<int8_t>(byte);
      }
      continue;
    }
    uint32_t word[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      const int place = place_in_token(j);
      word[place / 4] |= (static_cast<uint32_t>(level[j]) & 0xffu) << (8 * (place % 4));
    }
    const int in_group = k % kGroup;  // input of s = 0; s = 1 follows at once, or 16 bytes later for wgmma
    const size_t row = static_cast<size_t>(token) * inputs + k / kGroup * kGroup;
    size_t first, second;
    if (layout == 0) {
      first = row + place_in_token(in_group);
      second = first + 4;
    } else if (layout == 1) {
      first = row + place_for_wgmma(1, in_group);
      second = first + 16;
    } else {
      first = place_swizzled(gridDim.x, token, k / kGroup, place_for_wgmma(1, in_group));
      second = place_swizzled(gridDim.x, token, k / kGroup, place_for_wgmma(1, in_group) + 16);
    }
    *reinterpret_cast<uint32_t*>(a + first) = word[0];
    *reinterpret_cast<uint32_t*>(a + second) = word[1];
  }
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
  const int threads = min_of((inputs / kStep + 31) / 32 * 32, kMaxThreads);
  return dispatch([&](auto type) {
    using T = Half<type>;
    // a token of zeros has scale 0; the smallest step of the type stands in (torch.finfo(dtype).eps)
    const float tiny = type == kF16 ? 0x1p-10f : 0x1p-7f;
    return launch(act_quant_kernel<T>, dim3(tokens), dim3(threads), 64 * sizeof(float), stream, true,
                  static_cast<const T*>(x), a, scale, zero, inputs, bits, symmetric, layout, tiny);
  }, Type{dtype});
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
