// Low-bit GEMM for many tokens: blocks of 128 rows x 64 or 128 tokens, one group of 128 inputs per step, cp.async ring.
//
// As in lowbit_stream.cu the weights are the A operand, dequantised in registers, and the tensor cores sum one group at
// a time before the scale is applied in fp32. Eight warps: 4 along the rows (2 tiles each) x 2 along the tokens, so a
// weight is dequantised twice and a token fragment read from shared memory four times per block.
#include <type_traits>

#include "cuda/lowbit.cuh"
#include "cuda/lowbit_finish.cuh"

namespace jointnas {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpTiles = 2;

// NT: 8-token tiles per warp; a block has 2 * 8 * NT tokens. BYTES: of one activation.
template <int BITS, int NT, int BYTES> struct Shape {
  static constexpr int tokens = 16 * NT;
  static constexpr int weight_bytes = kBlockTiles * BITS * 256;
  static constexpr int scale_bytes = kBlockTiles * 32;
  static constexpr int token_bytes = kGroup * BYTES;  // one token's group
  static constexpr int stage_bytes = weight_bytes + scale_bytes + tokens * token_bytes;
  static constexpr int fit = 160 * 1024 / stage_bytes;  // sm_80 has 163 KB
  static constexpr int stages = fit > 4 ? 4 : fit;
  static constexpr int ring = stages * stage_bytes, sums = tokens * kPitch * 4;
  static constexpr int bytes = ring > sums ? ring : sums;
};

// Where 16-byte vector `v` of a token's group sits in shared memory: neighbouring tokens swap halves (16-bit) or
// neighbours (8-bit), so that the 8 lanes of a phase (2 tokens x 4 vectors) hit all 32 banks.
template <int BYTES> JN_HOST_DEVICE constexpr int swizzle(int token, int v) {
  return BYTES == 2 ? v ^ (token % 2 * 4) : v ^ (token % 2);
}

// ABITS: 16, 8 or 4 bits of activations; levels of 4 bits are stored as bytes, too.
template <class T, int BITS, int NT, int ABITS>
__global__ void __launch_bounds__(kThreads, 1) tile_kernel(const LowbitArgs p) {
  JN_DYNAMIC_SHARED(shared);
  constexpr int bytes = ABITS == 16 ? 2 : 1;
  using S = Shape<BITS, NT, bytes>;
  using Sum = std::conditional_t<ABITS == 16, float, int>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp_row = warp % 4 * kWarpTiles, warp_token = warp / 4 * NT * 8;
  const int tiles = (p.rows + kTileRows - 1) / kTileRows, groups = p.inputs / kGroup;
  const int first_tile = blockIdx.x * kBlockTiles, first_token = blockIdx.z * S::tokens;
  const int begin = groups * blockIdx.y / p.splits, end = groups * (blockIdx.y + 1) / p.splits;

  // Rows and tokens past the end are copies of the last one; their results are not stored. Places are found once: a
  // thread's tile and token of each round differ by whole rounds. They count vectors of 16 bytes: 32 bits reach 64 GB.
  constexpr int per_tile = BITS * 16, per_token = S::token_bytes / 16;
  constexpr int weight_rounds = kBlockTiles * per_tile / kThreads, token_rounds = S::tokens * per_token / kThreads;
  static_assert(kThreads % per_tile == 0 && kThreads % per_token == 0);
  const int thread = threadIdx.x;
  uint32_t weight_at[weight_rounds], token_at[token_rounds];
#pragma unroll
  for (int j = 0; j < weight_rounds; ++j) {
    const int tile = min_of(first_tile + (j * kThreads + thread) / per_tile, tiles - 1);
    weight_at[j] = static_cast<uint32_t>(tile) * groups * per_tile + thread % per_tile;
  }
#pragma unroll
  for (int j = 0; j < token_rounds; ++j) {
    const int token = min_of(first_token + (j * kThreads + thread) / per_token, p.tokens - 1);
    token_at[j] = static_cast<uint32_t>(token) * groups * per_token + thread % per_token;
  }
  const uint32_t scale_at = min_of(first_tile + thread / 2, tiles - 1) * 2 + thread % 2;
  const int token_to = (thread / per_token * per_token + swizzle<bytes>(thread / per_token, thread % per_token)) * 16;

  auto fetch = [&](int group, int stage) {
    if (group < end) {
      unsigned char* dst = shared + stage * S::stage_bytes;
      const Vec4* weight = static_cast<const Vec4*>(p.weight) + group * per_tile;
#pragma unroll
      for (int j = 0; j < weight_rounds; ++j)
        ptx::cp_async16(dst + (j * kThreads + thread) * 16, weight + weight_at[j]);
      dst += S::weight_bytes;
      if (thread < S::scale_bytes / 16)
        ptx::cp_async16(dst + thread * 16, static_cast<const Vec4*>(p.scale) + (scale_at + group * tiles * 2));
      dst += S::scale_bytes;
      const Vec4* x = static_cast<const Vec4*>(p.x) + group * per_token;
#pragma unroll
      for (int j = 0; j < token_rounds; ++j) ptx::cp_async16(dst + j * kThreads * 16 + token_to, x + token_at[j]);
    }
    ptx::cp_async_commit();
  };

  ptx::launch_dependents();
  ptx::wait_dependencies();
#pragma unroll
  for (int s = 0; s < S::stages - 1; ++s) fetch(begin + s, s);

  float acc[kWarpTiles][NT][4] = {};
  int stage = 0;
  for (int group = begin; group < end; ++group) {
    ptx::cp_async_wait<S::stages - 2>();
    ptx::sync_threads();
    fetch(group + S::stages - 1, (stage + S::stages - 1) % S::stages);
    const unsigned char* src = shared + stage * S::stage_bytes;
    const unsigned char* tokens = src + S::weight_bytes + S::scale_bytes;

    Sum sum[kWarpTiles][NT][4];
#pragma unroll
    for (int r = 0; r < kWarpTiles; ++r)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[r][n][c] = kNothing<Sum>;
    uint32_t w[kWarpTiles][4];  // the vector in use
    auto read = [&](int vector) {
#pragma unroll
      for (int r = 0; r < kWarpTiles; ++r) {
        const Vec4 u = *reinterpret_cast<const Vec4*>(src + (warp_row + r) * BITS * 256 + (vector * 32 + lane) * 16);
#pragma unroll
        for (int j = 0; j < 4; ++j) w[r][j] = u.w[j];
      }
    };
    constexpr int per_word = 8 / BITS;
    if constexpr (ABITS == 4) {
#if defined(JN_EMULATE) || __CUDA_ARCH__ < 900
      auto step = [&](auto index) {  // 64 inputs: fields 8J .. 8J + 7, a vector of W4 and half a one of W2
        constexpr int J = decltype(index)::value, first = BITS == 4 ? 0 : 2 * J;  // among the words of the vector
        if constexpr (J * BITS % 4 == 0) read(J * BITS / 4);
        uint32_t a[kWarpTiles][4];
#pragma unroll
        for (int r = 0; r < kWarpTiles; ++r) {
          spread_nibbles<BITS, first>(w[r], a[r][0], a[r][1]);
          spread_nibbles<BITS, first + 1>(w[r], a[r][2], a[r][3]);
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const int token = warp_token + 8 * n + g;
          const Vec4 b = *reinterpret_cast<const Vec4*>(tokens + (token * 8 + swizzle<1>(token, 2 * t + J)) * 16);
          const uint32_t b0 = pair_nibbles(b.w[0], b.w[1]), b1 = pair_nibbles(b.w[2], b.w[3]);
#pragma unroll
          for (int r = 0; r < kWarpTiles; ++r) ptx::mma_m16n8k64_s4(sum[r][n], a[r], b0, b1);
        }
      };
      step(std::integral_constant<int, 0>{});
      step(std::integral_constant<int, 1>{});
#endif
    } else if constexpr (ABITS == 8) {
      auto step = [&](auto index) {  // 32 inputs: fields 4I .. 4I + 3
        constexpr int I = decltype(index)::value, f = 4 * I, word = f / per_word;
        if constexpr (word % 4 == 0 && f % per_word == 0) read(word / 4);
        uint32_t a[kWarpTiles][4];
#pragma unroll
        for (int r = 0; r < kWarpTiles; ++r) {
          a[r][0] = spread<BITS, f % per_word>(w[r][f / per_word % 4]);
          a[r][1] = spread<BITS, (f + 1) % per_word>(w[r][(f + 1) / per_word % 4]);
          a[r][2] = spread<BITS, (f + 2) % per_word>(w[r][(f + 2) / per_word % 4]);
          a[r][3] = spread<BITS, (f + 3) % per_word>(w[r][(f + 3) / per_word % 4]);
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const int token = warp_token + 8 * n + g;
          const uint32_t* b = reinterpret_cast<const uint32_t*>(
              tokens + (token * 8 + swizzle<1>(token, 2 * t + I / 2)) * 16 + I % 2 * 8);
#pragma unroll
          for (int r = 0; r < kWarpTiles; ++r) ptx::mma_m16n8k32_s8(sum[r][n], a[r], b[0], b[1]);
        }
      };
      step(std::integral_constant<int, 0>{});
      step(std::integral_constant<int, 1>{});
      step(std::integral_constant<int, 2>{});
      step(std::integral_constant<int, 3>{});
    } else {
      auto step = [&](auto index) {  // 32 inputs: fields 4I .. 4I + 3, two k16 products
        constexpr int I = decltype(index)::value, f = 4 * I;
        if constexpr (f / per_word % 4 == 0 && f % per_word == 0) read(f / per_word / 4);
        uint32_t a[2][kWarpTiles][4];
#pragma unroll
        for (int r = 0; r < kWarpTiles; ++r) {
          const uint32_t w0 = w[r][f / per_word % 4], w1 = w[r][(f + 1) / per_word % 4];
          const uint32_t w2 = w[r][(f + 2) / per_word % 4], w3 = w[r][(f + 3) / per_word % 4];
          a[0][r][0] = dequant<T, BITS, f % per_word, 0>(w0);
          a[0][r][1] = dequant<T, BITS, (f + 1) % per_word, 0>(w1);
          a[0][r][2] = dequant<T, BITS, f % per_word, 1>(w0);
          a[0][r][3] = dequant<T, BITS, (f + 1) % per_word, 1>(w1);
          a[1][r][0] = dequant<T, BITS, (f + 2) % per_word, 0>(w2);
          a[1][r][1] = dequant<T, BITS, (f + 3) % per_word, 0>(w3);
          a[1][r][2] = dequant<T, BITS, (f + 2) % per_word, 1>(w2);
          a[1][r][3] = dequant<T, BITS, (f + 3) % per_word, 1>(w3);
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const int token = warp_token + 8 * n + g;
          const Vec4 b = *reinterpret_cast<const Vec4*>(tokens + (token * 16 + swizzle<2>(token, 4 * I + t)) * 16);
#pragma unroll
          for (int r = 0; r < kWarpTiles; ++r) {
            ptx::mma_m16n8k16<T>(sum[r][n], a[0][r], b.w[0], b.w[1]);
            ptx::mma_m16n8k16<T>(sum[r][n], a[1][r], b.w[2], b.w[3]);
          }
        }
      };
      step(std::integral_constant<int, 0>{});
      step(std::integral_constant<int, 1>{});
      step(std::integral_constant<int, 2>{});
      step(std::integral_constant<int, 3>{});
    }
#pragma unroll
    for (int r = 0; r < kWarpTiles; ++r) {
      const T* s = reinterpret_cast<const T*>(src + S::weight_bytes) + (warp_row + r) * kTileRows + 2 * g;
      const float low = ptx::to_float(s[0]), high = ptx::to_float(s[1]);  // rows g, g + 8
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[r][n][c] += sum_of(sum[r][n][c]) * (c < 2 ? low : high);
    }
    stage = (stage + 1) % S::stages;
  }

  ptx::cp_async_wait<0>();
  ptx::sync_threads();
  float* sums = reinterpret_cast<float*>(shared);  // [token][row], so that stores to y are coalesced
#pragma unroll
  for (int r = 0; r < kWarpTiles; ++r)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        sums[(warp_token + 8 * n + 2 * t + c % 2) * kPitch + (warp_row + r) * kTileRows + g + c / 2 * 8] = acc[r][n][c];
  ptx::sync_threads();
  constexpr float unit = 1.0f / (1 << (ABITS == 4 ? 4 - BITS : 8 - BITS));
  finish_block<T>(p, unit, kThreads, first_tile * kTileRows, kBlockRows, first_token, S::tokens, shared,
                  [&](int token, int row) { return sums[token * kPitch + row]; });
}

template <class T, int BITS, int NT, int ABITS> int run(const LowbitArgs& p, cudaStream_t stream) {
  using S = Shape<BITS, NT, ABITS == 16 ? 2 : 1>;
  const int block_rows = kBlockTiles * kTileRows;
  const dim3 grid((p.rows + block_rows - 1) / block_rows, p.splits, (p.tokens + S::tokens - 1) / S::tokens);
  if (!locked(p, grid)) return kBadArgument;
  return launch(tile_kernel<T, BITS, NT, ABITS>, grid, dim3(kThreads), S::bytes, stream, p.early != 0, p);
}
}  // namespace

// Many tokens: blocks of 128 rows x 64 or 128 tokens. Weights and levels of at most 4 bits multiply as such where the
// tensor cores have it, before sm_90.
int lowbit_tile(const LowbitArgs& p, cudaStream_t stream) {
  if (const int error = check(p)) return error;
  const bool four = p.a_bits <= 4 && p.w_bits <= 4 && compute_capability() < 90;
  return dispatch([&](auto type, auto bits, auto tiles, auto levels) {
    if constexpr (bits == 8 && levels == 4) return kBadArgument;
    else return run<Half<type>, bits, tiles / 2, levels>(p, stream);
  }, Type{p.dtype}, OneOf<2, 4, 8>{p.w_bits}, OneOf<8, 16>{p.token_tiles}, OneOf<16, 8, 4>{!p.act_scale ? 16 : four ? 4 : 8});
}
JN_EXPORT(lowbit_tile);

}  // namespace jointnas
