// Low-bit GEMM for few tokens (decode): the cost is reading the weights once, so each warp streams its own tiles
// through a private cp.async ring and never waits for another warp until the final sum.
//
// Weights are the A operand (16 rows per mma), tokens the B operand (8 per mma), so one token wastes no weight bytes.
// A warp owns 64 rows (4 tiles) and every warps-th group of 128 inputs of its block's share. Per group the tensor
// cores sum in fp32 (or exactly in int32), then one fma per output applies the scale: weights are never rounded to q*s.
#include <type_traits>

#include "cuda_ops.h"
#include "lowbit.cuh"
#include "lowbit_finish.cuh"

namespace jointnas {
namespace {

constexpr int kWarps = 8;
constexpr int kStrip = 4;  // tiles per warp: token fragments are loaded once per 64 rows

// 128 KB of weights in flight per block: several times bandwidth x latency (26 KB per SM at 4.3 TB/s and 0.8 us)
template <int BITS> constexpr int kStages = BITS == 2 ? 8 : BITS == 4 ? 4 : 2;
template <int BITS> constexpr int kTileBytes = BITS * 256;
template <int BITS> constexpr int kStageBytes = kStrip * (kTileBytes<BITS> + 32);  // weights, then 16 scales per tile
constexpr int kSumPitch = 64 + 4;  // floats per token in the final sum; +4 keeps the 4 token rows of a store apart

template <int BITS, int NT> constexpr size_t shared_bytes() {
  const size_t ring = size_t(kWarps) * kStages<BITS> * kStageBytes<BITS>, sum = size_t(kWarps) * NT * 8 * kSumPitch * 4;
  return ring > sum ? ring : sum;
}

// 16-bit activations: T is F16 or BF16.
template <class T, int BITS, int NT> struct HalfMath {
  using Sum = float;
  Vec4 x[NT][4];  // [token tile][i]: inputs 32i + 8t .. + 7 of token g

  JN_DEVICE void load(const JnLowbitArgs& p, int first_token, int group, int lane) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int token = first_token + 8 * n + lane / 4;
      const T* row = static_cast<const T*>(p.x) + size_t(token) * p.inputs + group * kGroup + lane % 4 * 8;
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] = token < p.tokens ? ptx::load_readonly(row + 32 * i) : Vec4{{0, 0, 0, 0}};
    }
  }

  // sum[r][n] = tile r (words w[r]) times the tokens; two tiles at once, so that two chains of products overlap
  template <int STEP> JN_DEVICE void step(const uint32_t (&w)[2][2 * BITS], float (&sum)[2][NT][4]) const {
    constexpr int per_word = 8 / BITS, f0 = 2 * STEP, f1 = f0 + 1;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t w0 = w[r][f0 / per_word], w1 = w[r][f1 / per_word];
      const uint32_t a[4] = {dequant<T, BITS, f0 % per_word, 0>(w0), dequant<T, BITS, f1 % per_word, 0>(w1),
                             dequant<T, BITS, f0 % per_word, 1>(w0), dequant<T, BITS, f1 % per_word, 1>(w1)};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const Vec4& v = x[n][STEP / 2];
        ptx::mma_m16n8k16<T>(sum[r][n], a, v.w[STEP % 2 * 2], v.w[STEP % 2 * 2 + 1]);
      }
    }
  }
  JN_DEVICE void tiles(const uint32_t (&w)[2][2 * BITS], float (&sum)[2][NT][4], const int (&)[NT][2]) const {
    step<0>(w, sum); step<1>(w, sum); step<2>(w, sum); step<3>(w, sum);
    step<4>(w, sum); step<5>(w, sum); step<6>(w, sum); step<7>(w, sum);
  }
};

// int8 activations: sums are exact integers, times 2^(8-BITS).
template <int BITS, int NT> struct IntMath {
  using Sum = int;
  Vec4 x[NT][2];  // lane t's 32 bytes of the group, token g

  JN_DEVICE void load(const JnLowbitArgs& p, int first_token, int group, int lane) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int token = first_token + 8 * n + lane / 4;
      const int8_t* row = static_cast<const int8_t*>(p.x) + size_t(token) * p.inputs + group * kGroup + lane % 4 * 32;
#pragma unroll
      for (int i = 0; i < 2; ++i) x[n][i] = token < p.tokens ? ptx::load_readonly(row + 16 * i) : Vec4{{0, 0, 0, 0}};
    }
  }

  template <int I>
  JN_DEVICE void step(const uint32_t (&w)[2][2 * BITS], int (&sum)[2][NT][4], int (&ones)[2][4]) const {
    constexpr int n8 = 8 / BITS, f = 4 * I;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t a[4] = {
          spread<BITS, f % n8>(w[r][f / n8]), spread<BITS, (f + 1) % n8>(w[r][(f + 1) / n8]),
          spread<BITS, (f + 2) % n8>(w[r][(f + 2) / n8]), spread<BITS, (f + 3) % n8>(w[r][(f + 3) / n8])};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const Vec4& v = x[n][I / 2];
        ptx::mma_m16n8k32_s8(sum[r][n], a, v.w[I % 2 * 2], v.w[I % 2 * 2 + 1]);
      }
      ptx::mma_m16n8k32_s8(ones[r], a, 0x01010101u, 0x01010101u);  // row sums of q, for the zero points
    }
  }
  JN_DEVICE void tiles(const uint32_t (&w)[2][2 * BITS], int (&sum)[2][NT][4], const int (&zero)[NT][2]) const {
    int ones[2][4] = {};
    step<0>(w, sum, ones); step<1>(w, sum, ones); step<2>(w, sum, ones); step<3>(w, sum, ones);
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[r][n][c] -= zero[n][c % 2] * ones[r][c / 2 * 2];
  }
};

template <class T, class Math, int BITS, int NT>
__global__ void __launch_bounds__(kWarps * 32, 1) stream_kernel(const JnLowbitArgs p) {
  JN_DYNAMIC_SHARED(shared);
  constexpr int stages = kStages<BITS>, tile_bytes = kTileBytes<BITS>, stage_bytes = kStageBytes<BITS>;
  constexpr bool quantized = sizeof(typename Math::Sum) && !std::is_same_v<typename Math::Sum, float>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp % p.warp_rows, warp_k = warp / p.warp_rows, k_warps = kWarps / p.warp_rows;
  const int tiles = (p.rows + kTileRows - 1) / kTileRows, groups = p.inputs / kGroup;
  const int first_tile = (blockIdx.x * p.warp_rows + warp_row) * kStrip;
  const int first_token = blockIdx.z * NT * 8;
  const int begin = groups * blockIdx.y / p.splits + warp_k, end = groups * (blockIdx.y + 1) / p.splits;

  unsigned char* ring = shared + size_t(warp) * stages * stage_bytes;
  const char* weight = static_cast<const char*>(p.weight);
  const T* scale = static_cast<const T*>(p.scale);

  auto fetch = [&](int group, int stage) {
    unsigned char* dst = ring + stage * stage_bytes;
    const bool inside = group < end;
#pragma unroll
    for (int r = 0; r < kStrip; ++r) {
      const bool valid = inside && first_tile + r < tiles;
      const char* src = weight + (size_t(valid ? first_tile + r : 0) * groups + (valid ? group : 0)) * tile_bytes;
#pragma unroll
      for (int v = 0; v < BITS / 2; ++v)
        ptx::cp_async16(dst + r * tile_bytes + (v * 32 + lane) * 16, src + (v * 32 + lane) * 16, valid);
    }
    if (lane < kStrip * 2) {
      const bool valid = inside && first_tile + lane / 2 < tiles;
      const T* src = scale + (valid ? (size_t(group) * tiles + first_tile) * kTileRows + lane * 8 : 0);
      ptx::cp_async16(dst + kStrip * tile_bytes + lane * 16, src, valid);
    }
    ptx::cp_async_commit();
  };

  ptx::launch_dependents();
#pragma unroll
  for (int s = 0; s < stages - 1; ++s) fetch(begin + s * k_warps, s);
  ptx::wait_dependencies();  // everything below may depend on the previous kernel; the weights do not

  float acc[kStrip][NT][4] = {};
  int zero[NT][2] = {};
  if constexpr (quantized) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int token = first_token + 8 * n + lane % 4 * 2 + c;
        zero[n][c] = token < p.tokens ? p.act_zero[token] : 0;
      }
  }
  // Tokens of the next group are loaded one group ahead, as long as two sets fit in registers.
  constexpr bool ahead = NT < 4;
  Math now, next;
  if (ahead && begin < end) now.load(p, first_token, begin, lane);
  int stage = 0;
  for (int group = begin; group < end; group += k_warps) {
    ptx::cp_async_wait<stages - 2>();
    ptx::sync_warp();  // scales were copied by 8 lanes; and all lanes are done with the stage fetched into next
    fetch(group + (stages - 1) * k_warps, (stage + stages - 1) % stages);
    if (!ahead) now.load(p, first_token, group, lane);
    else if (group + k_warps < end) next.load(p, first_token, group + k_warps, lane);
    const unsigned char* src = ring + stage * stage_bytes;
#pragma unroll
    for (int pair = 0; pair < kStrip; pair += 2) {
      uint32_t w[2][2 * BITS];
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int v = 0; v < BITS / 2; ++v) {
          const Vec4 u = *reinterpret_cast<const Vec4*>(src + (pair + r) * tile_bytes + (v * 32 + lane) * 16);
#pragma unroll
          for (int j = 0; j < 4; ++j) w[r][4 * v + j] = u.w[j];
        }
      typename Math::Sum sum[2][NT][4] = {};
      now.tiles(w, sum, zero);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const T* s = reinterpret_cast<const T*>(src + kStrip * tile_bytes) + (pair + r) * kTileRows + lane / 4 * 2;
        const float low = ptx::to_float(s[0]), high = ptx::to_float(s[1]);  // rows g, g + 8
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int c = 0; c < 4; ++c) acc[pair + r][n][c] += static_cast<float>(sum[r][n][c]) * (c < 2 ? low : high);
      }
    }
    if (ahead) now = next;
    stage = (stage + 1) % stages;
  }

  // Sum over the block's k-warps in shared memory, always in the same order.
  ptx::cp_async_wait<0>();
  ptx::sync_threads();
  float* sums = reinterpret_cast<float*>(shared);  // [warp][token][row]
#pragma unroll
  for (int r = 0; r < kStrip; ++r)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int token = 8 * n + lane % 4 * 2 + c % 2, row = 16 * r + lane / 4 + c / 2 * 8;
        sums[(warp * NT * 8 + token) * kSumPitch + row] = acc[r][n][c];
      }
  ptx::sync_threads();

  finish_block<T, quantized, BITS>(p, kWarps * 32, blockIdx.x * p.warp_rows * 64, p.warp_rows * 64, first_token, NT * 8,
                                   shared, [&](int token, int row) {
    float v = 0;
    for (int k = 0; k < k_warps; ++k)
      v += sums[((k * p.warp_rows + row / 64) * NT * 8 + token) * kSumPitch + row % 64];
    return v;
  });
}

template <class T, int BITS, int NT> int run(const JnLowbitArgs& p, cudaStream_t stream) {
  const dim3 grid((p.rows + 64 * p.warp_rows - 1) / (64 * p.warp_rows), p.splits, (p.tokens + 8 * NT - 1) / (8 * NT));
  if (p.act_scale)
    return launch(stream_kernel<T, IntMath<BITS, NT>, BITS, NT>, grid, dim3(kWarps * 32), shared_bytes<BITS, NT>(),
                  stream, p.early != 0, p);
  return launch(stream_kernel<T, HalfMath<T, BITS, NT>, BITS, NT>, grid, dim3(kWarps * 32), shared_bytes<BITS, NT>(),
                stream, p.early != 0, p);
}
template <class T, int BITS> int run_tiles(const JnLowbitArgs& p, cudaStream_t stream) {
  switch (p.token_tiles) {
    case 1: return run<T, BITS, 1>(p, stream);
    case 2: return run<T, BITS, 2>(p, stream);
    case 4: return run<T, BITS, 4>(p, stream);
    default: return 1;  // cudaErrorInvalidValue
  }
}
template <class T> int run_bits(const JnLowbitArgs& p, cudaStream_t stream) {
  switch (p.w_bits) {
    case 2: return run_tiles<T, 2>(p, stream);
    case 4: return run_tiles<T, 4>(p, stream);
    case 8: return run_tiles<T, 8>(p, stream);
    default: return 1;
  }
}

}  // namespace
}  // namespace jointnas

int jn_lowbit_stream(const JnLowbitArgs* args, void* stream) {
  const JnLowbitArgs& p = *args;
  const bool strips = p.warp_rows == 1 || p.warp_rows == 2 || p.warp_rows == 4 || p.warp_rows == 8;
  if (p.inputs % jointnas::kGroup || !strips || p.splits < 1 || p.tokens < 1 || p.rows < 1) return 1;
  if (p.splits > 1 && !(p.partial && p.locks)) return 1;
  auto s = static_cast<cudaStream_t>(stream);
  if (p.dtype == JN_F16) return jointnas::run_bits<jointnas::F16>(p, s);
  if (p.dtype == JN_BF16) return jointnas::run_bits<jointnas::BF16>(p, s);
  return 1;
}
