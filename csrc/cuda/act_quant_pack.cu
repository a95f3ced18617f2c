// Per-token dynamic activation quantization, written in the byte order the int8 kernels read: one block per token, one
// read of x, one write of a. Every step is rounded to x's type, as torch and compressed-tensors do it
// (jointnas_kernels/ops/lowbit_linear.py: quantize_tokens).
#include "cuda_ops.h"
#include "lowbit.cuh"

namespace jointnas {
namespace {

constexpr int kThreads = 256;

template <class T> JN_DEVICE float rounded(float v) { return ptx::to_float(ptx::from_float<T>(v)); }

// Eight inputs per thread and step: 32i + 8t .. + 7 of a group, two words (s = 0, 1) of the packed token.
constexpr int kStep = 8;

template <class T>
__global__ void __launch_bounds__(kThreads)
    act_quant_kernel(const T* x, int8_t* a, float* scale, int* zero, int inputs, int bits, int symmetric, float tiny) {
  JN_DYNAMIC_SHARED(shared);
  float* partial = reinterpret_cast<float*>(shared);  // [2][warps]
  const int token = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  ptx::launch_dependents();
  ptx::wait_dependencies();
  x += static_cast<size_t>(token) * inputs;
  a += static_cast<size_t>(token) * inputs;

  float low = 0, high = 0;
  for (int k = threadIdx.x * kStep; k < inputs; k += kThreads * kStep) {
    T v[kStep];
    for (int j = 0; j < kStep * static_cast<int>(sizeof(T)) / 16; ++j)
      reinterpret_cast<Vec4*>(v)[j] = ptx::load_readonly(reinterpret_cast<const Vec4*>(x + k) + j);
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      const float f = ptx::to_float(v[j]);
      low = f < low ? f : low;
      high = f > high ? f : high;
    }
  }
#pragma unroll
  for (int m = 16; m; m /= 2) {
    const float l = ptx::shuffle_xor(low, m), h = ptx::shuffle_xor(high, m);
    low = l < low ? l : low;
    high = h > high ? h : high;
  }
  if (lane == 0) {
    partial[warp] = low;
    partial[kThreads / 32 + warp] = high;
  }
  ptx::sync_threads();
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) {
    low = partial[i] < low ? partial[i] : low;
    high = partial[kThreads / 32 + i] > high ? partial[kThreads / 32 + i] : high;
  }

  const float qmin = -static_cast<float>(1 << (bits - 1)), qmax = -qmin - 1, levels = qmax - qmin;
  float s, z = 0;
  if (symmetric) {
    s = rounded<T>(ptx::divide(-low > high ? -low : high, levels * 0.5f));
    if (s == 0) s = tiny;
  } else {
    s = rounded<T>(ptx::divide(rounded<T>(high - low), levels));
    if (s == 0) s = tiny;
    z = rounded<T>(qmin - rounded<T>(ptx::divide(low, s)));
    z = ptx::round_even(z < qmin ? qmin : z > qmax ? qmax : z);
  }
  if (threadIdx.x == 0) {
    scale[token] = s;
    zero[token] = static_cast<int>(z);
  }

  for (int k = threadIdx.x * kStep; k < inputs; k += kThreads * kStep) {
    T v[kStep];
    for (int j = 0; j < kStep * static_cast<int>(sizeof(T)) / 16; ++j)
      reinterpret_cast<Vec4*>(v)[j] = ptx::load_readonly(reinterpret_cast<const Vec4*>(x + k) + j);
    uint32_t word[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      float q = rounded<T>(rounded<T>(ptx::divide(ptx::to_float(v[j]), s)) + z);
      q = ptx::round_even(q < qmin ? qmin : q > qmax ? qmax : q);
      const int place = place_in_token(j);
      word[place / 4] |= (static_cast<uint32_t>(static_cast<int>(q)) & 0xffu) << (8 * (place % 4));
    }
    uint32_t* dst = reinterpret_cast<uint32_t*>(a + k / kGroup * kGroup + place_in_token(k % kGroup));
    dst[0] = word[0];
    dst[1] = word[1];
  }
}

template <class T> int run(const void* x, int8_t* a, float* scale, int* zero, int tokens, int inputs, int bits,
                           int symmetric, float tiny, cudaStream_t stream) {
  return launch(act_quant_kernel<T>, dim3(tokens), dim3(kThreads), 2 * kThreads / 32 * sizeof(float), stream, false,
                static_cast<const T*>(x), a, scale, zero, inputs, bits, symmetric, tiny);
}

}  // namespace
}  // namespace jointnas

int jn_act_quant_pack(const void* x, int8_t* a, float* scale, int* zero, int tokens, int inputs, int bits,
                      int symmetric, int dtype, void* stream) {
  if (inputs % jointnas::kGroup || tokens < 1 || (bits != 2 && bits != 4 && bits != 8)) return 1;
  auto s = static_cast<cudaStream_t>(stream);
  // a token of zeros has scale 0; the smallest step of the type stands in (torch.finfo(dtype).eps)
  if (dtype == JN_F16) return jointnas::run<jointnas::F16>(x, a, scale, zero, tokens, inputs, bits, symmetric, 0x1p-10f, s);
  if (dtype == JN_BF16) return jointnas::run<jointnas::BF16>(x, a, scale, zero, tokens, inputs, bits, symmetric, 0x1p-7f, s);
  return 1;
}
