// W{2,4,8}A16 for 17 to 128 tokens on any architecture: blocks of 256 rows x 32 or 64 tokens, one group of 128 inputs per
// step, a cp.async ring for weights, scales and tokens.
//
// All groups of all rows are one row of steps, of which every block takes an equal stripe, so that all SMs work however
// many rows there are: 8192 x 8192 has 2048 steps, at most 19 for each of 108 SMs (0.998 busy), where whole strips of 64
// rows per block kept 64 of the 108. A stripe may begin and end inside a row block; the last of its blocks adds the shares.
//
// Each of the eight warps fetches and dequantises the weights of its own 32 rows, so a weight becomes 16 bits once, and
// tokens are shared: per step and SM they are 16 KB of 64 tokens, where each 64 rows read all tokens from L2 before.
// Sums as in lowbit_stream.cuh: one group by the tensor cores, then one fma per output applies the scale.
#include "cuda/lowbit.cuh"

namespace jointnas {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kWarpTiles = 2;                        // share the token fragments that a warp reads
constexpr int kStripeTiles = kWarps * kWarpTiles;    // of a row block
constexpr int kStripeRows = kStripeTiles * kTileRows;

template <int BITS, int NT> struct Shape {
  static constexpr int tokens = NT * 8, token_bytes = tokens * kGroup * 2;
  static constexpr int tile_bytes = BITS * 256, warp_bytes = kWarpTiles * (tile_bytes + 32);  // weights, then scales
  static constexpr int stage_bytes = token_bytes + kWarps * warp_bytes;
  static constexpr int fit = 160 * 1024 / stage_bytes;  // sm_80 has 163 KB
  // 26 KB of weights or more on their way (W2): bandwidth x latency is 15 KB per SM of an A100, 26 KB of an H200
  static constexpr int stages = fit > 4 ? 4 : fit;
  static_assert(stages >= 3);
  static constexpr int bytes = stages * stage_bytes + 16;  // and a flag
};

// Steps in order, row block by row block, in `count` equal stripes.
struct Stripes {
  int steps, count;
  JN_DEVICE int begin(int stripe) const { return steps * stripe / count; }
  JN_DEVICE int of(int step) const { return ((step + 1) * count - 1) / steps; }
};

// Products of the inputs 32I .. 32I + 31 of a group, which are fields 4I .. 4I + 3.
template <class T, int BITS, int NT, int I>
JN_DEVICE void step(const unsigned char* weights, const unsigned char* tokens, int odd,
                    uint32_t (&w)[kWarpTiles][2 * BITS], float (&sum)[kWarpTiles][NT][4]) {
  uint32_t a[kWarpTiles][2][4];
#pragma unroll
  for (int r = 0; r < kWarpTiles; ++r) {
    if constexpr (I * BITS % 8 == 0) load_words<BITS, I * BITS / 8, 1>(weights + r * BITS * 256, w[r]);
    dequant_steps<T, BITS, 2 * I, 2>(w[r], a[r]);
  }
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const Vec4 b = *reinterpret_cast<const Vec4*>(tokens + n * 8 * kGroup * 2 + (I ^ odd) * 64);
#pragma unroll
    for (int r = 0; r < kWarpTiles; ++r) {
      ptx::mma_m16n8k16<T>(sum[r][n], a[r][0], b.w[0], b.w[1]);
      ptx::mma_m16n8k16<T>(sum[r][n], a[r][1], b.w[2], b.w[3]);
    }
  }
}

// Whether this block is to store the sums of a row block: adds what `shares` blocks have of it, of which this one is
// number `share`, in their order, once all are there. Shares are stored as threads hold them.
template <int NT>
JN_DEVICE bool gather(const LowbitArgs& p, float (&acc)[kWarpTiles][NT][4], int share, int shares, int part, int parts,
                      int* flag) {
  constexpr int vectors = kWarpTiles * NT;
  Vec4* mine = reinterpret_cast<Vec4*>(p.partial) + threadIdx.x;
  auto at = [&](int s, int v) { return mine + ((size_t(s) * parts + part) * vectors + v) * kThreads; };
#pragma unroll
  for (int v = 0; v < vectors; ++v) {
    Vec4 u;
#pragma unroll
    for (int c = 0; c < 4; ++c) u.w[c] = ptx::float_bits(acc[v / NT][v % NT][c]);
    *at(share, v) = u;
  }
  ptx::fence_device();
  ptx::sync_threads();
  if (threadIdx.x == 0) {
    int* lock = p.locks + part;
    *flag = ptx::atomic_add(lock, 1) == shares - 1;
    if (*flag) *lock = 0;
  }
  ptx::sync_threads();
  if (!*flag) return false;
  ptx::fence_device();
#pragma unroll
  for (int v = 0; v < vectors; ++v)
#pragma unroll
    for (int c = 0; c < 4; ++c) acc[v / NT][v % NT][c] = 0;
#pragma unroll 1
  for (int s = 0; s < shares; ++s)
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
      float u[4];
      ptx::load_l2(reinterpret_cast<const float*>(at(s, v)), u);
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[v / NT][v % NT][c] += u[c];
    }
  return true;
}

template <class T, int BITS, int NT> __global__ void __launch_bounds__(kThreads, 1) stripe_kernel(const LowbitArgs p) {
  JN_DYNAMIC_SHARED(shared);
  using S = Shape<BITS, NT>;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int tiles = (p.rows + kTileRows - 1) / kTileRows, groups = p.inputs / kGroup;
  const int row_blocks = (p.rows + kStripeRows - 1) / kStripeRows, first_token = blockIdx.x * S::tokens;
  const Stripes stripes{row_blocks * groups, p.splits};
  const int stripe = blockIdx.y, begin = stripes.begin(stripe), end = stripes.begin(stripe + 1);

  // Rows and tokens past the end are copies of the last one; their results are not stored. Places count vectors of 16
  // bytes: 32 bits reach 64 GB.
  constexpr int per_tile = S::tile_bytes / 16, per_token = kGroup * 2 / 16, token_rounds = NT * 8 * per_token / kThreads;
  uint32_t tile_at[kWarpTiles], scale_at, token_at[token_rounds];
  int next_tile = begin / groups * kStripeTiles + warp * kWarpTiles;  // the warp's first one to be fetched
  auto find = [&] {
#pragma unroll
    for (int r = 0; r < kWarpTiles; ++r)
      tile_at[r] = static_cast<uint32_t>(min_of(next_tile + r, tiles - 1)) * groups * per_tile + lane;
    scale_at = min_of(next_tile + lane % 4 / 2, tiles - 1) * 2 + lane % 2;
  };
  find();
#pragma unroll
  for (int j = 0; j < token_rounds; ++j) {
    const int token = min_of(first_token + (j * kThreads + thread) / per_token, p.tokens - 1);
    token_at[j] = static_cast<uint32_t>(token) * groups * per_token + thread % per_token;
  }
  // Vector v of a token is at v ^ (token % 2 * 4): the 8 lanes of a phase (2 tokens x 4 vectors) hit all 32 banks.
  const int token_to = (thread / per_token * per_token + (thread % per_token ^ thread / per_token % 2 * 4)) * 16;
  const uint64_t once = ptx::read_once();
  auto fetch_weights = [&](int group, unsigned char* stage) {
    unsigned char* dst = stage + S::token_bytes + warp * S::warp_bytes + lane * 16;
#pragma unroll
    for (int r = 0; r < kWarpTiles; ++r) {
      const Vec4* src = static_cast<const Vec4*>(p.weight) + (tile_at[r] + group * per_tile);
#pragma unroll
      for (int v = 0; v < BITS / 2; ++v) ptx::cp_async16_once(dst + r * S::tile_bytes + v * 512, src + v * 32, once);
    }
    if (lane < kWarpTiles * 2) {
      const Vec4* src = static_cast<const Vec4*>(p.scale) + (scale_at + static_cast<uint32_t>(group) * tiles * 2);
      ptx::cp_async16_once(dst + kWarpTiles * S::tile_bytes, src, once);
    }
  };
  auto fetch_tokens = [&](int group, unsigned char* stage) {
    const Vec4* x = static_cast<const Vec4*>(p.x) + group * per_token;
#pragma unroll
    for (int j = 0; j < token_rounds; ++j) ptx::cp_async16(stage + j * kThreads * 16 + token_to, x + token_at[j]);
  };

  int next = begin, next_group = begin % groups;
  auto advance = [&] {
    ++next;
    if (++next_group < groups) return;
    next_group = 0;
    next_tile += kStripeTiles;
    find();
  };
  ptx::launch_dependents();
#pragma unroll
  for (int s = 0; s < S::stages - 1; ++s) {
    if (next < end) fetch_weights(next_group, shared + s * S::stage_bytes);
    advance();
  }
  ptx::wait_dependencies();  // everything below may depend on the previous kernel; the weights do not
#pragma unroll
  for (int s = 0; s < S::stages - 1; ++s) {
    if (begin + s < end) fetch_tokens((begin + s) % groups, shared + s * S::stage_bytes);
    ptx::cp_async_commit();
  }

  int stage = 0;
  for (int at = begin; at < end;) {
    const int row_block = at / groups, stop = min_of(end, (row_block + 1) * groups);
    float acc[kWarpTiles][NT][4] = {};
    for (; at < stop; ++at) {
      ptx::cp_async_wait<S::stages - 2>();
      ptx::sync_threads();  // all have copied their parts of this stage, and nobody reads the one before any more
      const unsigned char* src = shared + stage * S::stage_bytes;
      const unsigned char* weights = src + S::token_bytes + warp * S::warp_bytes;
      const unsigned char* tokens = src + g * kGroup * 2 + t * 16;
      uint32_t w[kWarpTiles][2 * BITS];
      float sum[kWarpTiles][NT][4] = {};
      step<T, BITS, NT, 0>(weights + lane * 16, tokens, g % 2, w, sum);
      unsigned char* before = shared + (stage == 0 ? S::stages - 1 : stage - 1) * S::stage_bytes;
      if (next < end) {  // beside products
        fetch_weights(next_group, before);
        fetch_tokens(next_group, before);
      }
      ptx::cp_async_commit();
      advance();
      step<T, BITS, NT, 1>(weights + lane * 16, tokens, g % 2, w, sum);
      step<T, BITS, NT, 2>(weights + lane * 16, tokens, g % 2, w, sum);
      step<T, BITS, NT, 3>(weights + lane * 16, tokens, g % 2, w, sum);
#pragma unroll
      for (int r = 0; r < kWarpTiles; ++r) {
        const uint32_t both_rows = *reinterpret_cast<const uint32_t*>(weights + kWarpTiles * S::tile_bytes + r * 32 + 4 * g);
        const float low = ptx::to_float(T{static_cast<uint16_t>(both_rows)});         // row g
        const float high = ptx::to_float(T{static_cast<uint16_t>(both_rows >> 16)});  // row g + 8
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int c = 0; c < 4; ++c) acc[r][n][c] += sum[r][n][c] * (c < 2 ? low : high);
      }
      stage = stage == S::stages - 1 ? 0 : stage + 1;
    }

    // The row block ends, or the stripe; what the next steps need is on its way meanwhile.
    const int first = stripes.of(row_block * groups);
    const int shares = stripes.of(row_block * groups + groups - 1) - first + 1;
    int* flag = reinterpret_cast<int*>(shared + S::stages * S::stage_bytes);
    const int part = row_block * gridDim.x + blockIdx.x, parts = row_blocks * gridDim.x;
    if (shares > 1 && !gather<NT>(p, acc, stripe - first, shares, part, parts, flag)) continue;
    const int row = row_block * kStripeRows + warp * kWarpTiles * kTileRows + g;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = first_token + 8 * n + 2 * t + e;
        T* y = static_cast<T*>(p.y) + size_t(token) * p.rows + row;
#pragma unroll
        for (int r = 0; r < 2 * kWarpTiles; ++r)
          if (token < p.tokens && row + 8 * r < p.rows) y[8 * r] = ptx::from_float<T>(acc[r / 2][n][r % 2 * 2 + e]);
      }
  }
}

template <class T, int BITS, int NT> int run(const LowbitArgs& p, cudaStream_t stream) {
  using S = Shape<BITS, NT>;
  const unsigned row_blocks = (p.rows + kStripeRows - 1) / kStripeRows, passes = (p.tokens + S::tokens - 1) / S::tokens;
  const size_t steps = size_t(row_blocks) * (p.inputs / kGroup);
  if (!locked(p, dim3(row_blocks, 1, passes)) || p.splits > steps || (steps + 1) * p.splits > INT32_MAX) return kBadArgument;
  // passes over the tokens first: those of the same weights run beside each other, and L2 serves all but one
  const dim3 grid(passes, p.splits);
  return launch(stripe_kernel<T, BITS, NT>, grid, dim3(kThreads), S::bytes, stream, p.early != 0, p);
}
}  // namespace

// 16-bit activations: `splits` stripes; partial [shares of a row block, 256 * row blocks, tokens of all passes].
int lowbit_stripe(const LowbitArgs& p, cudaStream_t stream) {
  if (const int error = check(p)) return error;
  if (p.act_scale) return kBadArgument;
  return dispatch([&](auto type, auto bits, auto tiles) { return run<Half<type>, bits, tiles>(p, stream); },
                  Type{p.dtype}, OneOf<2, 4, 8>{p.w_bits}, OneOf<4, 8>{p.token_tiles});
}
JN_EXPORT(lowbit_stripe);

}  // namespace jointnas
