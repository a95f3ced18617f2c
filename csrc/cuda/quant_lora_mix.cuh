// What a block of quant_lora_mix.cu reads, and where it is in shared memory.
#pragma once
#include "cuda/dispatch.cuh"
#include "cuda/ptx.cuh"

namespace jointnas::mix {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kTile = 128, kRows = 16, kPrecisions = 4;  // rank padded to 32
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, to nearest even
constexpr float kTiny = 0x1p-100f;

struct Weight {
  const void* weight;   // [O, I] dtype, I a multiple of 128
  const void* lora_a;   // [P, r, I] dtype, r 8, 16, 24 or 32
  const void* lora_b;   // [P, O, r] dtype
  const float* clip;    // [P, O, I / group], or null for all
  void* target;         // W~ [O, I] to write, or dW [end - begin, I] to read, dtype
  int64_t rows, begin, end;  // O; the rows to work on
  int64_t inputs, group;     // I; 32, 64 or 128
};
constexpr int kMost = 8;

struct Params {
  Weight of[kMost];
  int units[kMost];   // of work of each
  int all_units;
  const float* probs;
  float *partial, *total;
  int* arrived;
  int rank, precisions;
  int columns;  // 128-input tiles whose A a block keeps
  float scaling;
  uint32_t nil;  // 0, which the compiler must not know: xor with it puts W into operand order once, not per precision
  float high[kPrecisions], inverse[kPrecisions], rest[kPrecisions];  // top level; 1 / ((2^b - 1)/2) in two floats
};

// Byte offsets in shared memory.
JN_HOST_DEVICE int fragment_bytes(int columns, int precisions) { return columns * precisions * 16 * 32 * 16; }
// Shared memory of a warp, for kPrecisions whatever their number, so that all offsets (in bytes) are constants: the
// next tile of W; to reduce, the next tile of dW; B of this row tile and the next; the clip ratios of this tile and the
// next; to reduce, a sum per lane and precision.
template <int GROUPS, bool CLIP, bool REDUCE> struct Layout {
  static constexpr int kGrad = 8 * 32 * 16, kLoraB = kGrad * (REDUCE ? 2 : 1), kBuffer = kPrecisions * 64;
  static constexpr int kRatios = kLoraB + 2 * kBuffer * 16, kRatioBuffer = kPrecisions * GROUPS * 16;
  static constexpr int kSums = kRatios + (CLIP ? 2 * kRatioBuffer * 4 : 0);
  static constexpr int kBytes = kSums + (REDUCE ? kPrecisions * 32 * 4 : 0);
};

// A_p of this block's columns as B operands of the products: word k/8 of lane 4 n + (k/2 % 4) holds
// ranks k, k + 1 of column n of n-tile j. Column n = 2 t + e of n-tile j = 4 c + i is input 32 c + 8 t + 2 i + e.
template <class T>
JN_DEVICE void load_lora_a(const Params& p, const Weight& m, Vec4* fragments, int first_column, int columns) {
  static_assert(kThreads == 256, "one thread per piece of 8 columns and pair of ranks");
  const int piece = threadIdx.x / 16, pair = threadIdx.x % 16;  // so that a warp's stores meet in no bank thrice
  const bool inside = 2 * pair < p.rank;  // the rank is even; zeros here make the padding of B' irrelevant
  const int tile = 4 * (piece / 4), lane = 8 * (piece % 4) + pair % 4;
  uint32_t* words = reinterpret_cast<uint32_t*>(fragments) + (tile * 32 + lane) * 4 + pair / 4;
  const T* a = static_cast<const T*>(m.lora_a) + first_column * kTile + 8 * piece;
  if (inside) a += static_cast<size_t>(2 * pair) * m.inputs;
#pragma unroll 1
  for (int column = 0; column < columns; ++column, a += kTile) {
    Vec4 even[kPrecisions], odd[kPrecisions];  // of all precisions, to wait for memory once
    const T* from = a;
#pragma unroll
    for (int i = 0; i < kPrecisions; ++i, from += static_cast<size_t>(p.rank) * m.inputs) {
      even[i] = odd[i] = Vec4{{0, 0, 0, 0}};
      if (inside && i < p.precisions) {
        even[i] = ptx::load_readonly(from);
        odd[i] = ptx::load_readonly(from + m.inputs);
      }
    }
#pragma unroll
    for (int i = 0; i < kPrecisions; ++i) {
      if (i == p.precisions) break;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        words[k * 32 * 4] = (even[i].w[k] & 0xffff) | odd[i].w[k] << 16;
        words[(k * 32 + 4) * 4] = even[i].w[k] >> 16 | (odd[i].w[k] & 0xffff0000u);
      }
      words += 16 * 32 * 4;
    }
  }
}

// Past the end the last row stands in: its dW is taken as 0, and it is not stored.
JN_DEVICE int existing(int end, int row) { return row < end ? row : end - 1; }

// Start fetching B_p of 16 rows: [precision][row][4 vectors], swapped within a row: ldmatrix then meets no bank twice.
JN_HOST_DEVICE int lora_b_place(int row, int vector) { return 4 * row + (vector ^ (row / 2 % 4)); }
template <class T>
JN_DEVICE void fetch_lora_b(const Params& p, const Weight& m, Vec4* stage, int first_row, int end, int lane) {
  const T* b = static_cast<const T*>(m.lora_b);
  const int vector = lane % 4;
  const bool inside = 8 * vector < p.rank;
#pragma unroll 1
  for (int precision = 0; precision < p.precisions; ++precision) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 4 + 8 * i;
      const T* from = b + static_cast<size_t>(existing(end, first_row + row)) * p.rank + (inside ? 8 * vector : 0);
      ptx::cp_async16(stage + lora_b_place(row, vector), from, inside);
    }
    stage += 64;
    b += static_cast<size_t>(m.rows) * p.rank;
  }
}

// The clip ratios of a tile: [precision][group][16 rows].
template <int GROUP>
JN_DEVICE void fetch_ratios(const Params& p, const Weight& m, float* stage, int first_row, int end, int input,
                            int lane) {
  constexpr int kGroups = kTile / GROUP;
  const int groups = static_cast<int>(m.inputs) / GROUP;
  const float* from = m.clip + static_cast<size_t>(existing(end, first_row + lane % 16)) * groups + input / GROUP;
#pragma unroll 1
  for (int i = lane / 16; i < p.precisions * kGroups; i += 2)
    ptx::cp_async4(stage + i * 16 + lane % 16, from + static_cast<size_t>(i / kGroups) * m.rows * groups + i % kGroups);
}

// This lane's eight pieces of 16 rows by 128 columns of W and of dW.
template <class T, bool REDUCE>
JN_DEVICE void fetch_tile(const Params& p, const Weight& m, Vec4* stage, int first_row, int end, int input, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first_row + lane / 4 + 8 * h, r = existing(end, row);
    const T* w = static_cast<const T*>(m.weight) + static_cast<size_t>(r) * m.inputs + input + 8 * (lane % 4);
    const T* g = static_cast<const T*>(m.target) + static_cast<size_t>(r - m.begin) * m.inputs + input + 8 * (lane % 4);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      Vec4* to = stage + (4 * h + c) * 32 + lane;
      ptx::cp_async16(to, w + 32 * c, true);
      if (REDUCE) ptx::cp_async16(to + 8 * 32, g + 32 * c, row < end);
    }
  }
}

// The pieces as A operands, rows g and g + 8 of n-tile j.
JN_DEVICE void operands(const Params& p, const Vec4* stage, uint32_t (&w)[16][2], int lane) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const Vec4 low = stage[c * 32 + lane], high = stage[(4 + c) * 32 + lane];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      w[4 * c + k][0] = ptx::xor_here(low.w[k], p.nil);
      w[4 * c + k][1] = ptx::xor_here(high.w[k], p.nil);
    }
  }
}

}  // namespace jointnas::mix
