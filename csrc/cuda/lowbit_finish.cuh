// The end of every low-bit GEMM: a block's sums to y, or to the shares of a split along the inputs and then to y.
#pragma once
#include "cuda/lowbit.cuh"

namespace jointnas {

// `sum(token, row)` is the block's share of an output, token < block_tokens, row < block_rows counted inside the block.
// With splits, the last block of a strip adds the shares in order, so the result does not depend on who was last.
// `shared` may be overwritten. Called by the first `threads` threads of a block, with nobody at barrier 1.
// With quantized activations (act_scale) the sums are multiplied by `unit` (spread() scales weights up), the zero point
// times the row's sum of weights is taken off, and the token's scale applied.
template <class T, class Sum>
JN_DEVICE void finish_block(const LowbitArgs& p, float unit, int threads, int first_row, int block_rows, int first_token,
                            int block_tokens, void* shared, Sum sum) {
  const int tokens = p.tokens - first_token < block_tokens ? p.tokens - first_token : block_tokens;
  auto store = [&](int token, int row, float v) {
    const int m = first_token + token;
    if (p.act_scale) {
      v = (v * unit - static_cast<float>(p.act_zero[m]) * p.row_sum[first_row + row]) * p.act_scale[m];
    }
    static_cast<T*>(p.y)[size_t(m) * p.rows + first_row + row] = ptx::from_float<T>(v);
  };
  for (int i = threadIdx.x; i < tokens * block_rows; i += threads) {
    const int token = i / block_rows, row = i % block_rows;
    if (first_row + row >= p.rows) continue;
    const float v = sum(token, row);
    if (p.splits == 1) store(token, row, v);
    else p.partial[(size_t(blockIdx.y) * p.tokens + first_token + token) * p.rows + first_row + row] = v;
  }
  if (p.splits == 1) return;

  ptx::fence_device();
  ptx::sync_some(1, threads);
  int* last = static_cast<int*>(shared);
  if (threadIdx.x == 0) {
    int* lock = p.locks + blockIdx.z * gridDim.x + blockIdx.x;
    *last = ptx::atomic_add(lock, 1) == p.splits - 1;
    if (*last) *lock = 0;
  }
  ptx::sync_some(1, threads);
  if (!*last) return;
  ptx::fence_device();
  for (int i = threadIdx.x; i < tokens * block_rows; i += threads) {
    const int token = i / block_rows, row = i % block_rows;
    if (first_row + row >= p.rows) continue;
    float v = 0;
    for (int s = 0; s < p.splits; ++s)
      v += ptx::load_l2(p.partial + (size_t(s) * p.tokens + first_token + token) * p.rows + first_row + row);
    store(token, row, v);
  }
}

// A warp's accumulators of wgmma, 16 rows by N tokens of kBlockRows, into `sums` [token][kPitch] in shared memory, so that
// stores to y are coalesced.
template <int N> JN_DEVICE void exchange(const float (&total)[N / 2], int warp, int lane, float* sums) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    sums[(i / 4 * 8 + 2 * t + i % 2) * kPitch + warp * kTileRows + g + i % 4 / 2 * 8] = total[i];
}

// As finish_block, for kernels of sm_90a without splits: `sums` [token][kPitch] of kBlockRows rows in shared memory, eight rows
// of a token per thread, 16 bytes at a time where y allows.
template <class T, bool QUANTIZED>
JN_DEVICE void store_block(const LowbitArgs& p, float unit, int threads, int first_row, int first_token,
                           int block_tokens, const float* sums) {
  constexpr int per_token = kBlockRows / 8;
  const int row = first_row + static_cast<int>(threadIdx.x) % per_token * 8;
  float row_sum[8] = {};
  if constexpr (QUANTIZED) {
#pragma unroll
    for (int j = 0; j < 8; ++j) row_sum[j] = row + j < p.rows ? p.row_sum[row + j] : 0;
  }
  const int tokens = min_of(block_tokens, p.tokens - first_token);
  for (int token = threadIdx.x / per_token; token < tokens; token += threads / per_token) {
    const int m = first_token + token;
    const float scale = QUANTIZED ? p.act_scale[m] : 1, zero = QUANTIZED ? static_cast<float>(p.act_zero[m]) : 0;
    alignas(16) T out[8];
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const Vec4 u = *reinterpret_cast<const Vec4*>(sums + token * kPitch + row - first_row + 4 * v);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float sum = ptx::bits_float(u.w[j]);
        out[4 * v + j] = ptx::from_float<T>(QUANTIZED ? (sum * unit - zero * row_sum[4 * v + j]) * scale : sum);
      }
    }
    T* y = static_cast<T*>(p.y) + size_t(m) * p.rows + row;
    if (p.rows % 8 == 0) {
      if (row < p.rows) *reinterpret_cast<Vec4*>(y) = *reinterpret_cast<const Vec4*>(out);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (row + j < p.rows) y[j] = out[j];
    }
  }
}

}  // namespace jointnas
