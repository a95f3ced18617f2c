// What the files of the low-bit CPU kernels share: the layout of prepared weights and that of activations.
#pragma once
#include <cstddef>
#include <cstdint>

namespace jointnas {

constexpr int64_t kBlock = 64;  // output rows per block, adjacent lanes

// data [blocks][groups][meta + words][kBlock]: `meta` vectors of scales and sums, then the words of a group.
struct LowbitLayout {
  int64_t O, I, groups, words, meta;
  int w_bits;
  bool planes;

  LowbitLayout(int64_t outputs, int64_t inputs, int64_t g, int bits, bool bf16_scale, bool bit_planes)
      : O(outputs), I(inputs), groups(inputs / g), words(g * bits / 32), meta(bf16_scale ? 1 : 2), w_bits(bits),
        planes(bit_planes) {}
  int64_t group() const { return I / groups; }
  int64_t height() const { return meta + words; }
  int64_t blocks() const { return (O + kBlock - 1) / kBlock; }
  int64_t block_words() const { return groups * height() * kBlock; }
};

// How activations meet weights: as 4 bytes, 2 bf16, 1 fp32 or 32 bits of a plane per 32-bit entry; or two of them as the
// 16 sums that 2-bit weights can make of them.
enum Kind : int { kBytes = 4, kPairs = 2, kFloats = 1, kPlanes = 32, kSums = 0 };

// Activations in the order in which the kernels read them.
struct LowbitTokens {
  int64_t M, entries;  // entries per token and group
  uint32_t* table;  // [groups][M][entries]
  uint32_t* offset;  // [groups][M]: -2^(b-1) sum of the group's levels
  float* zero;  // [M]: -zero point; 0 where activations are not quantized
  float* s;  // [M]: scale; 1 where activations are not quantized
  int a_bits;
  Kind kind;
  bool symmetric;
};

inline int64_t entries_per_group(int64_t group, Kind kind, int a_bits) {
  return kind == kSums ? group / 2 * 16 : group / kind * (kind == kPlanes ? a_bits : 1);
}

// A product, and the parts of it that a team of threads shares (decode.cpp has one of its own).
struct LowbitPlan {
  LowbitLayout layout;
  LowbitTokens tokens;
  const uint32_t* data;  // prepared weights, or
  const uint32_t* packed;  // [O, I b/32] with scale [O, scale_groups]
  const void* scale;
  int64_t scale_groups;
  uint32_t scale_mask;  // the scale's bits in a meta word
  int64_t sums;  // words from a scale to its sum
  void* y;  // [M, O] dtype
  int dtype;
  int8_t* levels;  // [M, I]
  int level;  // Isa
  bool amx, streams;
  int64_t begin, end;  // tokens that are multiplied; of up to 4 all

  // How M tokens of `dtype` meet the weights; an error code.
  int arrange(int64_t M, int a_bits, bool symmetric, int isa);
  // Memory of the tokens, in bytes, and where it is.
  int64_t token_bytes() const;
  void place(void* memory);
  // Token m, x [I] dtype, into that memory.
  void prepare(const void* x, int64_t m);
  // Rows of the blocks from `first` to before `end` of y; `scratch`: memory of this thread.
  void multiply(int64_t first, int64_t end, void* scratch) const;
  int64_t scratch_bytes() const;
  int64_t panel_groups() const;  // that are unpacked together
};

// Whether products of these exist; stored: inputs per scale.
bool lowbit_legal(int dtype, int w_bits, int a_bits, int64_t stored, bool planes);

// Tiles (lowbit_amx.h): tokens of one, and entries of a group per product; 0 where a group does not divide into tiles.
constexpr int64_t kTileRows = 16;
inline int64_t tile_entries(int64_t entries) { return entries % 16 == 0 ? 16 : entries == 8 ? 8 : 0; }

}  // namespace jointnas
