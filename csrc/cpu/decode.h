// A decode step of a packed model: what Python describes once, as int64 alone (addresses, sizes, flags), so that an
// array of int64 is such a struct (jointnas_kernels/runtime/decode.py writes it, member by member).
#pragma once
#include <cstdint>

namespace jointnas {

constexpr int64_t kMostParts = 32;  // of the positions that attention is shared by

struct DecodeLinear {
  int64_t data;  // w_bits < 16: prepared weight (LowbitLayout); 16: [outputs, inputs] dtype
  int64_t bias;  // [outputs] dtype, or 0
  int64_t outputs, inputs;
  int64_t w_bits, stored, bf16_scale;  // of a prepared weight
  int64_t a_bits, symmetric;
};

// Fused projections (Phi-3) are q with the rows of q, k, v, and gate with those of gate and up; the others have 0 outputs.
struct DecodeBlock {
  int64_t input_norm, post_norm;  // [hidden] dtype
  int64_t q_norm, k_norm;  // [head_dim] dtype, or 0
  int64_t keys, values;  // cache, [batch, kv heads, length, head_dim] dtype
  int64_t window;  // positions a token looks back at, itself included; 0: all
  DecodeLinear q, k, v, o, gate, up, down;
};

struct DecodeModel {
  int64_t dtype;
  int64_t hidden, heads, kv_heads, head_dim, intermediate, vocab;
  int64_t blocks, length;  // of the caches
  int64_t embedding;  // [vocab, hidden] dtype, or 0: the rows of the head, which is packed
  int64_t final_norm;
  int64_t cosines, sines;  // [length, head_dim] dtype, by position
  int64_t epsilon, scale;  // fp32 as bits
  DecodeLinear head;
  int64_t first_block;  // address of DecodeBlock [blocks]
};

// What a step is made of, each alone, once per block (runtime/parts.py): a product is that of q, for rows of `hidden`
// inputs, and two blocks' share them; head norms and the rotation are those of all query heads with their keys.
enum DecodePart : int64_t { kEmbed, kNorm, kProduct, kHeadNorm, kRotate, kAttend, kSwiglu, kResidual, kDecodeParts };

}  // namespace jointnas
