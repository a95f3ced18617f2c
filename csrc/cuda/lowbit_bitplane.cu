// The streaming GEMM (lowbit_stream.cuh) on bit-planes: q = sum_i w_i 2^i and a = sum_j a_j 2^j in two's complement (the
// last plane counts negatively), so a group's sum is sum_ij +-2^(i+j) popcount(w_i AND a_j), one b1 product per weight
// plane. The A planes of a token are columns of B: with one token and 8 planes the product is full, with 4 or 2 planes
// two or four tokens fill it. No weight is ever unpacked.
#include "cuda/lowbit_stream.cuh"

namespace jointnas {
namespace {

// Weights: word 2i + r of lane 4g + t holds plane i of row 8r + g, inputs 32t .. 32t + 31.
// Activations: [token][group][plane] 128 bits, as act_quant_pack writes them with layout 3.
template <int BITS, int ABITS, int NT> struct PlaneMath {
  static constexpr int kWarps = NT < 4 ? 16 : 8, kTogether = 2, kColumns = ABITS;
  static constexpr float kUnit = 1;
  using Sum = int;
  uint32_t x[NT];

  JN_DEVICE static float combine(int plane) { return plane == ABITS - 1 ? -(1 << plane) : 1 << plane; }
  JN_DEVICE void load(const LowbitArgs& p, int first_token, int group, int lane) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int column = 8 * n + lane / 4, token = min_of(first_token + column / ABITS, p.tokens - 1);
      const size_t at = ((size_t(token) * (p.inputs / kGroup) + group) * ABITS + column % ABITS) * 4 + lane % 4;
      x[n] = ptx::load4(static_cast<const uint32_t*>(p.x) + at);
    }
  }
  JN_DEVICE void tiles(const uint32_t (&w)[2][2 * BITS], int (&sum)[2][NT][4]) const {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < BITS; ++i) {
          if (i == 0) {  // counts onto the sum, whose beginning then costs nothing
            ptx::mma_m16n8k128_and(sum[r][n], w[r][0], w[r][1], x[n]);
            continue;
          }
          int count[4] = {0, 0, 0, 0};
          ptx::mma_m16n8k128_and(count, w[r][2 * i], w[r][2 * i + 1], x[n]);
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[r][n][c] += i == BITS - 1 ? -(count[c] << i) : count[c] << i;
        }
  }
};

}  // namespace

// Few tokens, W{2,4} x A{2,4,8} on bit-planes, zero points by row_sum: weight as ops/lowbit lays bit-planes out, x of
// act_quant_pack(layout 3); warp_rows and splits as for the streaming kernel.
int lowbit_bitplane(const LowbitArgs& p, cudaStream_t stream) {
  if (const int error = check(p)) return error;
  if (!p.act_scale) return kBadArgument;
  return dispatch([&](auto type, auto bits, auto a_bits, auto tiles) {
    return run_stream<Half<type>, PlaneMath<bits, a_bits, tiles>, bits, tiles>(p, stream);
  }, Type{p.dtype}, OneOf<2, 4>{p.w_bits}, OneOf<2, 4, 8>{p.a_bits}, OneOf<1, 2, 4>{p.token_tiles});
}
JN_EXPORT(lowbit_bitplane);

}  // namespace jointnas
