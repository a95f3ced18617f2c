// The streaming GEMM (lowbit_stream.cuh) for 16-bit and 8-bit activations on the tensor cores' bf16, f16 and s8 products.
#include "cuda/lowbit_stream.cuh"

namespace jointnas {
namespace {

// Dequantising keeps the issue slots busy, so 4 warps per scheduler where registers and shared memory allow.
template <int BITS, int NT> constexpr int stream_warps = BITS == 8 || NT > 1 ? 8 : 16;

// 16-bit activations: T is F16 or BF16.
template <class T, int BITS, int NT> struct HalfMath {
  static constexpr int kWarps = stream_warps<BITS, NT>, kTogether = 2, kColumns = 1;
  static constexpr float kUnit = 1;
  using Sum = float;
  using Words = uint32_t[kTogether][2 * BITS];
  using Sums = float[kTogether][NT][4];
  Vec4 x[NT][4];  // [token tile][i]: inputs 32i + 8t .. + 7 of token g

  JN_DEVICE static float combine(int) { return 1; }

  JN_DEVICE void load(const LowbitArgs& p, int first_token, int group, int lane) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int token = min_of(first_token + 8 * n + lane / 4, p.tokens - 1);
      const T* row = static_cast<const T*>(p.x) + size_t(token) * p.inputs + group * kGroup + lane % 4 * 8;
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] = ptx::load16(row + 32 * i);
    }
  }

  // sum[r][n] = tile r (words w[r]) times the tokens
  template <int STEP> JN_DEVICE void step(const Words& w, Sums& sum) const {
    constexpr int per_word = 8 / BITS, f0 = 2 * STEP, f1 = f0 + 1;
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
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
  JN_DEVICE void tiles(const Words& w, Sums& sum) const {
    step<0>(w, sum); step<1>(w, sum); step<2>(w, sum); step<3>(w, sum);
    step<4>(w, sum); step<5>(w, sum); step<6>(w, sum); step<7>(w, sum);
  }
};

// int8 activations: sums are exact integers, times 2^(8-BITS).
template <int BITS, int NT> struct IntMath {
  static constexpr int kWarps = stream_warps<BITS, NT>, kTogether = NT < 4 ? 2 : 1, kColumns = 1;
  static constexpr float kUnit = 1.0f / (1 << (8 - BITS));
  using Sum = int;
  using Words = uint32_t[kTogether][2 * BITS];
  using Sums = int[kTogether][NT][4];
  Vec4 x[NT][2];  // lane t's 32 bytes of the group, token g

  JN_DEVICE static float combine(int) { return 1; }

  JN_DEVICE void load(const LowbitArgs& p, int first_token, int group, int lane) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int token = min_of(first_token + 8 * n + lane / 4, p.tokens - 1);
      const int8_t* row = static_cast<const int8_t*>(p.x) + size_t(token) * p.inputs + group * kGroup + lane % 4 * 32;
#pragma unroll
      for (int i = 0; i < 2; ++i) x[n][i] = ptx::load16(row + 16 * i);
    }
  }

  template <int I> JN_DEVICE void step(const Words& w, Sums& sum) const {
    constexpr int n8 = 8 / BITS, f = 4 * I;
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      const uint32_t a[4] = {
          spread<BITS, f % n8>(w[r][f / n8]), spread<BITS, (f + 1) % n8>(w[r][(f + 1) / n8]),
          spread<BITS, (f + 2) % n8>(w[r][(f + 2) / n8]), spread<BITS, (f + 3) % n8>(w[r][(f + 3) / n8])};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const Vec4& v = x[n][I / 2];
        ptx::mma_m16n8k32_s8(sum[r][n], a, v.w[I % 2 * 2], v.w[I % 2 * 2 + 1]);
      }
    }
  }
  JN_DEVICE void tiles(const Words& w, Sums& sum) const {
    step<0>(w, sum); step<1>(w, sum); step<2>(w, sum); step<3>(w, sum);
  }
};

}  // namespace

// Few tokens: each warp streams weights of its own, once.
int lowbit_stream(const LowbitArgs& p, cudaStream_t stream) {
  if (const int error = check(p)) return error;
  const Type type{p.dtype};
  const OneOf<2, 4, 8> bits{p.w_bits};
  return p.act_scale ? dispatch([&](auto type, auto bits, auto tiles) {
    return run_stream<Half<type>, IntMath<bits, tiles>, bits, tiles>(p, stream);
  }, type, bits, OneOf<1, 2, 4>{p.token_tiles}) : dispatch([&](auto type, auto bits, auto tiles) {
    return run_stream<Half<type>, HalfMath<Half<type>, bits, tiles>, bits, tiles>(p, stream);
  }, type, bits, OneOf<1, 2>{p.token_tiles});  // of 16 bits lowbit_stripe has more
}
JN_EXPORT(lowbit_stream);

}  // namespace jointnas
