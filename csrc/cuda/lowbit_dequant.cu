// Tiled low-bit weights to a dense [O, I] matrix, for prefill: with many tokens the library's 16-bit GEMM at full rate
// plus one pass over the weights beats dequantising inside a GEMM. q * scale, rounded once to the output type.
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

}  // namespace

// Tiled weights and scales to dense [O, I] of dtype.
int lowbit_dequant(const void* weight, const void* scale, void* out, int rows, int inputs, int bits, int dtype,
                   cudaStream_t stream) {
  if (inputs % kGroup || rows < 1) return kBadArgument;
  if (!aligned(weight, out)) return kMisaligned;
  const int groups = inputs / kGroup, tiles = (rows + kTileRows - 1) / kTileRows;
  const auto blocks = static_cast<unsigned>((static_cast<long long>(tiles) * groups + kWarps - 1) / kWarps);
  return dispatch([&](auto type, auto width) {
    using T = Half<type>;
    return launch(dequant_kernel<T, width>, dim3(blocks), dim3(kWarps * 32), 0, stream, false,
                  static_cast<const Vec4*>(weight), static_cast<const T*>(scale), static_cast<T*>(out), rows, groups,
                  tiles);
  }, Type{dtype}, OneOf<2, 4, 8>{bits});
}
JN_EXPORT(lowbit_dequant);

}  // namespace jointnas
