// Tiled low-bit weights to a dense [O, I] matrix, for prefill: with many tokens the library's 16-bit GEMM at full rate
// plus one pass over the weights beats dequantising inside a GEMM. q * scale, rounded once to the output type.
#include "cuda/cuda_ops.h"
#include "cuda/lowbit.cuh"

namespace jointnas {
namespace {

constexpr int kWarps = 8;

// A warp per tile: a lane holds, of rows g and g + 8, inputs 32i + 8t .. + 7 for i = 0..3, and stores 16 bytes each.
template <class T, int BITS>
__global__ void __launch_bounds__(kWarps * 32)
    dequant_kernel(const Vec4* weight, const T* scale, T* out, int rows, int groups, int tiles) {
  const int lane = threadIdx.x % 32;
  const long long index = static_cast<long long>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (index >= static_cast<long long>(tiles) * groups) return;
  const int tile = static_cast<int>(index / groups), group = static_cast<int>(index % groups);
  uint32_t w[2 * BITS];
#pragma unroll
  for (int v = 0; v < BITS / 2; ++v) {
    const Vec4 u = ptx::load_readonly(weight + (index * (BITS / 2) + v) * 32 + lane);
#pragma unroll
    for (int j = 0; j < 4; ++j) w[4 * v + j] = u.w[j];
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = tile * kTileRows + 8 * r + lane / 4;
    if (row >= rows) continue;
    const float s = ptx::to_float(scale[(static_cast<size_t>(group) * tiles + tile) * kTileRows + lane / 4 * 2 + r]);
    T* dst = out + (static_cast<size_t>(row) * groups + group) * kGroup + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Vec4 packed;
#pragma unroll
      for (int half = 0; half < 4; ++half) {  // half = 2s + h: inputs 4s + 2h, + 1
        const int field = 4 * i + 2 * (half / 2) + r, h = half % 2;
        const uint32_t word = w[field / (8 / BITS)] >> (BITS * (field % (8 / BITS)) + 8 * h);
        constexpr int mask = (1 << BITS) - 1, offset = 1 << (BITS - 1);
        const uint32_t low = ptx::from_float<T>(static_cast<float>(static_cast<int>(word & mask) - offset) * s).bits;
        const uint32_t high = ptx::from_float<T>(static_cast<float>(static_cast<int>(word >> 16 & mask) - offset) * s).bits;
        packed.w[half] = low | high << 16;
      }
      *reinterpret_cast<Vec4*>(dst + 32 * i) = packed;
    }
  }
}

template <class T> int run(const void* weight, const void* scale, void* out, int rows, int inputs, int bits,
                           cudaStream_t stream) {
  const int groups = inputs / kGroup, tiles = (rows + kTileRows - 1) / kTileRows;
  const auto blocks = static_cast<unsigned>((static_cast<long long>(tiles) * groups + kWarps - 1) / kWarps);
  const auto go = [&](auto kernel) {
    return launch(kernel, dim3(blocks), dim3(kWarps * 32), 0, stream, false, static_cast<const Vec4*>(weight),
                  static_cast<const T*>(scale), static_cast<T*>(out), rows, groups, tiles);
  };
  if (bits == 2) return go(dequant_kernel<T, 2>);
  if (bits == 4) return go(dequant_kernel<T, 4>);
  if (bits == 8) return go(dequant_kernel<T, 8>);
  return 1;  // cudaErrorInvalidValue
}

}  // namespace
}  // namespace jointnas

int jn_lowbit_dequant(const void* weight, const void* scale, void* out, int rows, int inputs, int bits, int dtype,
                      void* stream) {
  if (inputs % jointnas::kGroup || rows < 1) return 1;
  auto s = static_cast<cudaStream_t>(stream);
  if (dtype == JN_F16) return jointnas::run<jointnas::F16>(weight, scale, out, rows, inputs, bits, s);
  if (dtype == JN_BF16) return jointnas::run<jointnas::BF16>(weight, scale, out, rows, inputs, bits, s);
  return 1;
}
