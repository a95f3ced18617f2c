// The end of every low-bit GEMM: a block's sums to y, or to the shares of a split along the inputs and then to y.
#pragma once
#include "cuda/hopper.cuh"
#include "cuda/lowbit.cuh"

namespace jointnas {

// Adds the shares of a block's outputs in order, W rows of a token (1 or 4) at a time, for `store(token, row, sum)`.
// `together` of those have their loads in flight at once: one after the other, 64 tokens of 128 rows would be 32 trips
// to L2 for each of 256 threads.
template <int W, class Store>
JN_DEVICE void add_shares(const LowbitArgs& p, int threads, int first_row, int block_rows, int first_token, int tokens,
                          Store store) {
  constexpr int together = 4;
  const int per_token = block_rows / W, all = tokens * per_token;
  for (int first = threadIdx.x; first < all; first += together * threads) {
    const float* src[together];
    float v[together][W] = {};
#pragma unroll
    for (int j = 0; j < together; ++j) {
      const int i = min_of(first + j * threads, all - 1), row = min_of(first_row + i % per_token * W, p.rows - W);
      src[j] = p.partial + size_t(first_token + i / per_token) * p.rows + row;
    }
    for (int s = 0; s < p.splits; ++s) {
#pragma unroll
      for (int j = 0; j < together; ++j) {
        float share[W];
        ptx::load_l2(src[j] + size_t(s) * p.tokens * p.rows, share);
#pragma unroll
        for (int k = 0; k < W; ++k) v[j][k] += share[k];
      }
    }
#pragma unroll
    for (int j = 0; j < together; ++j) {
      const int i = first + j * threads, row = i % per_token * W;
      if (i >= all || first_row + row >= p.rows) continue;
#pragma unroll
      for (int k = 0; k < W; ++k) store(i / per_token, row + k, v[j][k]);
    }
  }
}

// `sum(token, row)` is the block's share of an output, token < block_tokens, row < block_rows counted inside the block.
// With splits, the last block of a strip adds the shares in order, so the result does not depend on who was last.
// `shared` may be overwritten. Called by the first `threads` threads of a block, with nobody at barrier 1.
// With quantized activations (act_scale) the sums are multiplied by `unit` (spread() scales weights up), the zero point
// times the row's sum of weights is taken off, and the token's scale applied.
// MANY tokens are worth the registers of add_shares; few are not: the bit-plane kernel would have 128 instead of 78, and a
// block of it no room beside the kernel before.
template <class T, bool MANY = false, class Sum>
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
  if constexpr (MANY) {
    if (p.rows % 4 == 0) add_shares<4>(p, threads, first_row, block_rows, first_token, tokens, store);
    else add_shares<1>(p, threads, first_row, block_rows, first_token, tokens, store);
  } else {
    for (int i = threadIdx.x; i < tokens * block_rows; i += threads) {
      const int token = i / block_rows, row = i % block_rows;
      if (first_row + row >= p.rows) continue;
      float v = 0;
      for (int s = 0; s < p.splits; ++s) {
        float share[1];
        ptx::load_l2(p.partial + (size_t(s) * p.tokens + first_token + token) * p.rows + first_row + row, share);
        v += share[0];
      }
      store(token, row, v);
    }
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

// A warp's accumulators of wgmma, 16 rows by N tokens, to y where the inputs are not split, by this warp alone, so that
// others multiply meanwhile: 32 tokens at a time are turned round in `own`, kTurnBytes of shared memory, and stored 16
// bytes per lane. `first_row` is the warp's. Factors as in finish_block.
constexpr int kTurnBytes = 32 * (kTileRows * 2 + 8);  // 16 halves, then scale and zero point per token

template <class T, bool QUANTIZED, int N>
JN_DEVICE void store_warp(const LowbitArgs& p, float unit, const float (&total)[N / 2], int first_row, int first_token,
                          unsigned char* own) {
  constexpr int turn = N < 32 ? N : 32;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // A token's two vectors change places every 4 tokens: stmatrix writes 8 tokens at once, 4 of which fill all banks.
  auto place = [own](int token, int vector) { return own + token * 32 + (vector ^ token / 4 % 2) * 16; };
  float* factors = reinterpret_cast<float*>(own + 32 * 32);
  float row_sum[2] = {}, scale = 0, zero = 0;
  auto fetch = [&](int token) {
    if (lane >= turn || first_token + token + lane >= p.tokens) return;
    scale = p.act_scale[first_token + token + lane];
    zero = static_cast<float>(p.act_zero[first_token + token + lane]);
  };
  if constexpr (QUANTIZED) {
    fetch(0);
#pragma unroll
    for (int r = 0; r < 2; ++r) row_sum[r] = first_row + 8 * r + g < p.rows ? p.row_sum[first_row + 8 * r + g] : 0;
  }
#pragma unroll
  for (int first = 0; first < N; first += turn) {
    if constexpr (QUANTIZED) {
      factors[2 * lane] = scale;
      factors[2 * lane + 1] = zero;
      if (first + turn < N) fetch(first + turn);
    }
    ptx::sync_warp();  // and what was turned before has been read
#pragma unroll
    for (int sixteen = 0; sixteen < turn; sixteen += 16) {
      uint32_t out[4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = (first + sixteen + 8 * j) / 2;
        float v[4];
        Vec4 f{};
        if constexpr (QUANTIZED) f = *reinterpret_cast<const Vec4*>(factors + 2 * (sixteen + 8 * j + 2 * t));
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // tokens 2t, 2t + 1 of row g, then of row g + 8
          v[i] = total[at + i];
          if constexpr (QUANTIZED)
            v[i] = (v[i] * unit - ptx::bits_float(f.w[i % 2 * 2 + 1]) * row_sum[i / 2]) *
                   ptx::bits_float(f.w[i % 2 * 2]);
        }
        out[2 * j] = ptx::pack2<T>(v[0], v[1]);
        out[2 * j + 1] = ptx::pack2<T>(v[2], v[3]);
      }
      ptx::store_transposed4(place(sixteen + lane / 16 * 8 + lane % 8, lane / 8 % 2), out);
    }
    ptx::sync_warp();
#pragma unroll
    for (int sixteen = 0; sixteen < turn; sixteen += 16) {
      const int token = sixteen + lane / 2, m = first_token + first + token, row = first_row + lane % 2 * 8;
      if (m >= p.tokens) continue;
      const Vec4 v = *reinterpret_cast<const Vec4*>(place(token, lane % 2));
      T* y = static_cast<T*>(p.y) + size_t(m) * p.rows + row;
      if (p.rows % 8 == 0) {
        if (row < p.rows) *reinterpret_cast<Vec4*>(y) = v;
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (row + j < p.rows) y[j] = T{static_cast<uint16_t>(v.w[j / 2] >> 16 * (j % 2))};
      }
    }
  }
}

}  // namespace jointnas
