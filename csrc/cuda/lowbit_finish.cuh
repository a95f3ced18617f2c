// The end of every low-bit GEMM: a block's sums to y, or to the shares of a split along the inputs and then to y.
#pragma once
#include "cuda/lowbit.cuh"

namespace jointnas {

// `sum(token, row)` is the block's share of an output, token < block_tokens, row < block_rows counted inside the block.
// With splits, the last block of a strip adds the shares in order, so the result does not depend on who was last.
// `shared` may be overwritten.
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
  ptx::sync_threads();
  int* last = static_cast<int*>(shared);
  if (threadIdx.x == 0) {
    int* lock = p.locks + blockIdx.z * gridDim.x + blockIdx.x;
    *last = ptx::atomic_add(lock, 1) == p.splits - 1;
    if (*last) *lock = 0;
  }
  ptx::sync_threads();
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

}  // namespace jointnas
