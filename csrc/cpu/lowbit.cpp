// lowbit_linear: y[m, n] = s[m] * sum_g scale[n, g] * sum_{k in g} q[n, k] (a[m, k] - z[m]), W{2,4,8} x A{8,16}
// (4- and 2-bit activations are int8 values of a smaller range), and the same for W <= 4 times A <= 4 by popcount.
//
// Weights come in the prepared layout (lowbit.h): lanes are output rows, so an activation entry is broadcast, there
// is nothing to add up across lanes, and a block of 64 rows is one stream. Few tokens: fields are cut from the words
// in registers, and the product is one pass over the weights at the speed of memory. Many: a group of a block is
// unpacked once into the first-level cache and multiplied with all tokens (lowbit_gemm.h; in AMX tiles: lowbit_amx.h).
//
// Integers: u = q + 2^(b-1) is unsigned and a signed, as VNNI wants them. With S = sum of q over the group,
//     sum q (a - z) = [sum u a - 2^(b-1) sum a] - z S
// The bracket, which starts from the tokens' offset, and S are exact in int32. Scaled, both are added up over the groups,
// the latter once for all tokens, and z is multiplied with its sum.
// Floats: q is an exact bf16 or fp32, accumulated per group in fp32.

#ifdef JN_ISA  // once per instruction set

#include "cpu/lowbit_fields.h"
#include "cpu/lowbit_block.h"
#include "cpu/lowbit_tokens.h"
#include "cpu/lowbit_gemm.h"
#if defined(JN_AVX512EXT)
#include "cpu/lowbit_amx.h"
#endif

namespace jointnas::JN_ISA {

// All rows of S successive blocks, V W of each at a time, times tokens [token, token + MB).
template <class Op, int V, int MB, int S>
void gemv(const LowbitPlan& plan, const uint32_t* data, int64_t block, int64_t token) {
  const LowbitLayout& l = plan.layout;
  const LowbitTokens& t = plan.tokens;
  constexpr int R = S * V, kLanes = V * W, kPasses = kBlock / kLanes;  // vectors of rows; parts of a block
  const int64_t stride = l.block_words();
  const auto of_row = [&](const uint32_t* at, int v) { return at + v / V * stride + v % V * W; };
  // One stream: 4 KiB ahead, beyond the page where the processor's own prefetching ends. It costs a load per line, which
  // integer products, done with a line sooner, feel on AMD: without, W8A8 and W4A8 took 336 and 169 instead of 394 and
  // 218 us (Zen 4, 60 GB/s), W4A16 196 instead of 186. Where a block takes several passes, its lines are not read in
  // their order, which the processor's own cannot follow: W4A8 97 without, 58 with it (Zen 3, 553 KB, 17 GB/s).
  constexpr int kAhead = S > 1 ? 512 : 1024;
  const auto prefetch = [&](const uint32_t* at, const uint32_t* in_order) {
    if constexpr (kPasses > 1)
      for (int lane = 0; lane < kLanes; lane += 16) __builtin_prefetch(in_order + kAhead + lane);
    else if constexpr (!Op::kInteger || S > 1)
      for (int v = 0; v < R; v += (W < 16 ? 16 / W : 1)) __builtin_prefetch(of_row(at, v) + kAhead);
  };
  vf total[kPasses][R][MB], correction[kPasses][R];
  for (int pass = 0; pass < kPasses; ++pass)
    for (int v = 0; v < R; ++v) {
      correction[pass][v] = set(0.0f);
      for (vf& of_token : total[pass][v]) of_token = set(0.0f);
    }
  for (int64_t g = 0; g < l.groups; ++g) {
    const uint32_t* a[MB];
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m) a[m] = t.table + (g * t.M + token + m) * t.entries;
    const uint32_t* const group = data + g * l.height() * kBlock;
    const uint32_t* next = group;
    for (int pass = 0; pass < kPasses; ++pass) {
      const uint32_t *const meta = group + pass * kLanes, *w = meta;
      typename Op::Acc acc[R][MB];
#pragma GCC unroll 16
      for (int m = 0; m < MB; ++m)
#pragma GCC unroll 16
        for (int v = 0; v < R; ++v) {
          if constexpr (Op::kInteger)
            acc[v][m] = seti(t.offset[g * t.M + token + m]);
          else
            acc[v][m] = set(0.0f);
        }
      for (int64_t i = 0; i < l.meta; ++i, w += kBlock, next += kLanes) prefetch(w, next);
      for (int64_t c = 0; c < l.words; ++c, w += kBlock, next += kLanes) {
        vi words[R];
#pragma GCC unroll 16
        for (int v = 0; v < R; ++v) words[v] = loadi(of_row(w, v));
        prefetch(w, next);
        fields<Op::kFields>([&](auto f) {
          vi u[R];
#pragma GCC unroll 16
          for (int v = 0; v < R; ++v) u[v] = Op::template operand<f()>(words[v]);
#pragma GCC unroll 16
          for (int m = 0; m < MB; ++m) {
            const vi am = Op::activation(a[m], c * Op::kFields + f());
#pragma GCC unroll 16
            for (int v = 0; v < R; ++v) acc[v][m] = Op::mul(acc[v][m], u[v], am);
          }
        });
      }
#pragma GCC unroll 16
      for (int v = 0; v < R; ++v) {
        const Meta of(plan, of_row(meta, v));
#pragma GCC unroll 16
        for (int m = 0; m < MB; ++m) total[pass][v][m] = of.add(acc[v][m], total[pass][v][m]);
        if constexpr (Op::kInteger) correction[pass][v] = of.correct(correction[pass][v]);
      }
    }
  }
  for (int pass = 0; pass < kPasses; ++pass)
    for (int v = 0; v < R; ++v)
      for (int m = 0; m < MB; ++m)
        put_rows(plan, token + m, (block + v / V) * kBlock + pass * kLanes + v % V * W, total[pass][v][m],
                 correction[pass][v]);
}

// Products of W <= 4 bit-planes with A <= 4: a pair of planes (i, j) weighs 2^(i + j).
template <int B, int A>
void popcounts(const LowbitPlan& plan, const uint32_t* data, int64_t block, int64_t lane, int64_t token) {
  const LowbitLayout& l = plan.layout;
  const LowbitTokens& t = plan.tokens;
  vf total = set(0.0f), correction = total;
  const uint32_t* w = data + lane;
  for (int64_t g = 0; g < l.groups; ++g) {
    const uint32_t* meta = w;
    const uint32_t* a = t.table + (g * t.M + token) * t.entries;
    vi acc[A + B - 1];
#pragma GCC unroll 8
    for (int i = 0; i < A + B - 1; ++i) acc[i] = seti(0);
    w += l.meta * kBlock;
    for (int64_t c = 0; c < l.words; c += B, a += A)
#pragma GCC unroll 4
      for (int i = 0; i < B; ++i, w += kBlock) {
        const vi plane = loadi(w);
#pragma GCC unroll 4
        for (int j = 0; j < A; ++j) acc[i + j] = acc[i + j] + popcount(plane & seti(a[j]));
      }
    vi sum = seti(t.offset[g * t.M + token]);
    fields<A + B - 1>([&](auto i) { sum = sum + shl<i()>(acc[i()]); });
    const Meta of(plan, meta);
    total = of.add(dot16(sum, of.sums, seti(0x10000u - (1u << (A - 1)))), total);  // planes are those of a + 2^(A-1)
    correction = of.correct(correction);
  }
  put_rows(plan, token, block * kBlock + lane, total, correction);
}

constexpr int kVectors = W == 8 ? 2 : 4;  // of rows of a block at a time

template <class Op, int MB, int S = 1>
void gemv_rows(const LowbitPlan& plan, const uint32_t* data, int64_t block, int64_t token) {
  // On AVX2 one token has four sums of floats: two wait for their own FMA (4 cycles).
  constexpr int V = W == 8 && MB == 1 && !Op::kInteger ? 4 : MB <= 2 || W == 16 ? kVectors : kVectors / 2;
  gemv<Op, V, MB, S>(plan, data, block, token);
}

template <class Op>
void one_token(const LowbitPlan& plan, const uint32_t* data, int64_t block, int64_t blocks) {
#if defined(JN_AVX512)
  if (blocks > 1) return (blocks == 4 ? gemv_rows<Op, 1, 4> : gemv_rows<Op, 1, 2>)(plan, data, block, 0);
#endif
  gemv_rows<Op, 1>(plan, data, block, 0);
}

template <class Op>
void multiply(const LowbitPlan& plan, const uint32_t* data, int64_t block, int64_t blocks, uint32_t* scratch) {
  const int64_t M = plan.tokens.M;
  if (M == 1 && !plan.amx) return one_token<Op>(plan, data, block, blocks);
#if defined(JN_AVX512EXT)
  if constexpr (Op::kInteger || std::is_same_v<typename Op::Product, PairProduct>)
    if (plan.amx) return gemm_amx<Op>(plan, data, block, scratch);
#endif
  if (M > 4) return gemm<Op>(plan, data, block, scratch);
  (M == 2 ? gemv_rows<Op, 2> : M == 3 ? gemv_rows<Op, 3> : gemv_rows<Op, 4>)(plan, data, block, 0);
}

template <int B>
void multiply_bits(const LowbitPlan& plan, const uint32_t* data, int64_t block, int64_t blocks, uint32_t* scratch) {
  const LowbitTokens& t = plan.tokens;
  if (t.kind == kBytes) return multiply<Bytes<B>>(plan, data, block, blocks, scratch);
  if constexpr (B < 8)
    if (t.kind == kPlanes) {
      for (int64_t m = plan.begin; m < plan.end; ++m)
        for (int64_t lane = 0; lane < kBlock; lane += W)
          (t.a_bits == 2 ? popcounts<B, 2> : popcounts<B, 4>)(plan, data, block, lane, m);
      return;
    }
#if defined(JN_AVX512)
  if constexpr (B == 2)
    if (t.kind == kSums) return one_token<Sums>(plan, data, block, blocks);
#endif
#if defined(JN_AVX512EXT)
  if (t.kind == kPairs) return multiply<Pairs<B>>(plan, data, block, blocks, scratch);
#endif
  multiply<Floats<B>>(plan, data, block, blocks, scratch);
}

// One block, or 2 or 4 that are prepared; with `packed` its weights come from the storage layout and are laid out in
// `scratch` first.
inline void multiply_blocks(const LowbitPlan& plan, int64_t block, int64_t blocks, uint32_t* scratch) {
  const uint32_t* data = plan.data + block * plan.layout.block_words();
  if (plan.packed) {
    pack_block(plan.layout, plan.packed, plan.scale, plan.scale_groups, plan.layout.meta == 1, block, scratch);
    data = scratch;
    scratch += plan.layout.block_words();
  }
  const auto f = plan.layout.w_bits == 2 ? multiply_bits<2> : plan.layout.w_bits == 4 ? multiply_bits<4> : multiply_bits<8>;
  f(plan, data, block, blocks, scratch);
}

}  // namespace jointnas::JN_ISA

#else

#include <type_traits>
#include <utility>

#include "cpu/bf16.h"
#include "cpu/isa.h"
#include "cpu/lowbit.h"
#include "cpu/parallel.h"
#include "export.h"

namespace jointnas {

constexpr int64_t kTokens = 256;  // multiplied with an unpacked panel
constexpr int64_t kPanelWords = 32 << 10;  // of a panel, which stays in the second-level cache

}  // namespace jointnas

#define JN_EXTENSION 1
#define JN_THIS_FILE "cpu/lowbit.cpp"
#include "cpu/each_isa.h"

namespace jointnas {
int LowbitPlan::arrange(int64_t M, int a_bits, bool symmetric, int isa) {
  const LowbitLayout& l = layout;
  const bool integer = a_bits < 16, bf16_input = dtype == kBf16;
  level = choose_isa(isa, l.planes ? kHasVpopcnt : integer ? kHasVnni : bf16_input ? kHasBf16 : kNoFeature);
  if (!level) return kIsaMissing;
  LowbitTokens& t = tokens;
  t.M = M, t.a_bits = a_bits, t.symmetric = symmetric;
  begin = 0, end = M;
  const auto tiles = [&](Kind kind) {
    const int64_t entries = entries_per_group(l.group(), kind, a_bits);
    return level == kAmx && M > (kind == kBytes ? 4 : 1) && tile_entries(entries) > 0;
  };
  // Per cycle Intel multiplies and adds 16 bf16 by vdpbf16ps, 32 fp32 by FMA, 512 bf16 by tiles, and has 1 permutation.
  const bool intel = cpu_features() & kIsIntel, pairs = bf16_input && level >= kAvx512Ext && (!intel || tiles(kPairs));
  const bool sums_of_two = intel && level >= kAvx512 && M == 1 && l.w_bits == 2;
  t.kind = l.planes ? kPlanes : integer ? kBytes : pairs ? kPairs : sums_of_two ? kSums : kFloats;
  t.entries = entries_per_group(l.group(), t.kind, a_bits);
  amx = (t.kind == kBytes || t.kind == kPairs) && tiles(t.kind);
  // Several streams are more for the processor's own prefetching, share the loads of activations and give the
  // multipliers more independent sums. Four: W4A8 331 instead of 470 us, W2A8 191 instead of 300 (Emerald Rapids,
  // 30 GB/s). Not measured on AMD.
  streams = intel && level >= kAvx512 && M == 1 && !packed && !l.planes;
  scale_mask = l.meta == 1 ? 0xffff0000u : ~0u;
  sums = (l.meta - 1) * kBlock;
  return kOk;
}

int64_t LowbitPlan::token_bytes() const {
  const int64_t groups = layout.groups * tokens.M;
  const int64_t beyond = amx ? 2 * kTileRows * tokens.entries : 0;  // what tiles read after the last token, at most
  return (groups * (tokens.entries + 1) + 2 * tokens.M + beyond) * 4 + (tokens.a_bits < 16 ? tokens.M * layout.I : 0);
}

void LowbitPlan::place(void* memory) {
  LowbitTokens& t = tokens;
  const int64_t groups = layout.groups * t.M;
  t.table = static_cast<uint32_t*>(memory);
  t.offset = t.table + groups * t.entries;
  t.zero = reinterpret_cast<float*>(t.offset + groups);
  t.s = t.zero + t.M;
  levels = reinterpret_cast<int8_t*>(t.s + t.M);
}

void LowbitPlan::prepare(const void* x, int64_t m) {
  if (dtype == kF32) {
    JN_DISPATCH(level, prepare_token(layout, tokens, static_cast<const float*>(x), m, levels + m * layout.I));
  } else {
    JN_DISPATCH(level, prepare_token(layout, tokens, static_cast<const bf16*>(x), m, levels + m * layout.I));
  }
}

void LowbitPlan::multiply(int64_t first, int64_t end, void* scratch) const {
  for (int64_t block = first, count; block < end; block += count) {
    count = !streams || end - block < 2 ? 1 : end - block < 4 ? 2 : 4;
    JN_DISPATCH(level, multiply_blocks(*this, block, count, static_cast<uint32_t*>(scratch)));
  }
}

int64_t LowbitPlan::panel_groups() const {
  return std::clamp<int64_t>(kPanelWords / (tokens.entries * kBlock), 1, layout.groups);
}

int64_t LowbitPlan::scratch_bytes() const {
  const int64_t panel = tokens.M > 4 || amx ? (panel_groups() * tokens.entries + kTokens) * kBlock : 0;
  return (panel + (packed ? layout.block_words() : 0)) * 4;
}

bool lowbit_legal(int dtype, int w_bits, int a_bits, int64_t stored, bool planes) {
  return (dtype == kF32 || dtype == kBf16) && stored > 0 && stored % (planes ? 32 : 32 / w_bits) == 0 &&
         (!planes || (w_bits <= 4 && (a_bits == 2 || a_bits == 4)));
}

namespace {

int run(LowbitPlan& plan, const void* x, int64_t M, int a_bits, bool symmetric, int threads, int isa) {
  const LowbitLayout& l = plan.layout;
  if (const int error = plan.arrange(M, a_bits, symmetric, isa)) return error;
  if (M == 0 || l.O == 0) return kOk;
  const Memory memory = allocate(plan.token_bytes());
  if (!memory) return kNoMemory;
  plan.place(memory.get());
  const int64_t row = l.I * (plan.dtype == kF32 ? 4 : 2);
  // Few tokens are ready before a second thread has woken up.
  parallel_for(M, M * l.I > 32768 ? threads : 1,
               [&](int64_t m) { plan.prepare(static_cast<const char*>(x) + m * row, m); });
  // A pass at the speed of memory wants long contiguous runs; a few per thread even out their speeds.
  const int64_t unit = plan.streams && l.blocks() >= 4 * threads ? 4 : 1, units = (l.blocks() + unit - 1) / unit;
  const int64_t runs = M > 4 ? units : std::min<int64_t>(units, 4 * threads);
  return parallel_for(runs, threads, plan.scratch_bytes(), [&](int64_t i, void* scratch) {
    plan.multiply(units * i / runs * unit, std::min(l.blocks(), units * (i + 1) / runs * unit), scratch);
  });
}

}  // namespace

// Weights laid out for lowbit_matmul: packed int32 [O, I w_bits/32] (the storage layout of ops/lowbit) and scale
// [O, I/g] scale_dtype to data int32 [ceil(O/64), I/stored, meta + words, 64] (LowbitLayout). stored divides g; both are
// whole words.
int cpu_lowbit_pack(const void* packed, const void* scale, void* data, int64_t O, int64_t I, int w_bits, int64_t g,
                    int64_t stored, bool planes, int scale_dtype, int threads, int isa) {
  const int level = choose_isa(isa, kHasVnni);
  if (!level) return kIsaMissing;
  if (!lowbit_legal(scale_dtype, w_bits, 2, stored, planes) || g % stored) return kBadArgument;
  const LowbitLayout l(O, I, stored, w_bits, scale_dtype == kBf16, planes);
  parallel_for(l.blocks(), threads, [&](int64_t block) {
    JN_DISPATCH(level, pack_block(l, static_cast<const uint32_t*>(packed), scale, I / g, scale_dtype == kBf16, block,
                                  static_cast<uint32_t*>(data) + block * l.block_words()));
  });
  return kOk;
}
JN_EXPORT(cpu_lowbit_pack);

// y = x_hat (q scale)^T: x, y [M, I], [M, O] dtype; a_bits 16, or 2..8: x is quantized per token first; scale_dtype that
// of lowbit_pack. kAvx512Ext: AVX512_VNNI for a_bits < 16, AVX512_BF16 for bf16 activations, AVX512_VPOPCNTDQ for planes
int cpu_lowbit_matmul(const void* x, const void* data, void* y, int64_t M, int64_t O, int64_t I, int w_bits, int a_bits,
                      int64_t stored, bool symmetric, bool planes, int dtype, int scale_dtype, int threads, int isa) {
  if (!lowbit_legal(dtype, w_bits, a_bits, stored, planes)) return kBadArgument;
  LowbitPlan plan{LowbitLayout(O, I, stored, w_bits, scale_dtype == kBf16, planes)};
  plan.data = static_cast<const uint32_t*>(data), plan.y = y, plan.dtype = dtype;
  return run(plan, x, M, a_bits, symmetric, threads, isa);
}
JN_EXPORT(cpu_lowbit_matmul);

// The same from the storage layout, laid out block by block on the way.
int cpu_lowbit_linear(const void* x, const void* packed, const void* scale, void* y, int64_t M, int64_t O, int64_t I,
                      int w_bits, int a_bits, int64_t g, int64_t stored, bool symmetric, int dtype, int scale_dtype,
                      int threads, int isa) {
  if (!lowbit_legal(dtype, w_bits, a_bits, stored, false) || g % stored) return kBadArgument;
  LowbitPlan plan{LowbitLayout(O, I, stored, w_bits, scale_dtype == kBf16, false)};
  plan.packed = static_cast<const uint32_t*>(packed), plan.scale = scale, plan.scale_groups = I / g;
  plan.y = y, plan.dtype = dtype;
  return run(plan, x, M, a_bits, symmetric, threads, isa);
}
JN_EXPORT(cpu_lowbit_linear);

}  // namespace jointnas

#endif
