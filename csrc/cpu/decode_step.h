// What one call of the decoder runs (a token for each sequence, or a chunk of a prompt), and the memory that takes.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/bf16.h"
#include "cpu/decode.h"
#include "cpu/isa.h"
#include "cpu/lowbit.h"
#include "errors.h"

namespace jointnas {

constexpr int64_t kMostSequences = 16;
constexpr int64_t kMostTokens = 4096;  // of a call: what bounds its memory
constexpr int64_t kKeys = 96;  // positions that a tile of queries meets at a time: their keys stay in the caches
constexpr int64_t kMostLanes = 32;  // queries of a tile

// Attention of a chunk with one key-value head of one sequence, whose keys and values are in the cache.
template <class T>
struct ChunkHeads {
  T* queries;  // [chunk, stride], `share` heads of each token; results take their places
  int64_t stride, share, chunk, D;
  const T* norm;  // of queries, or null
  float epsilon, scale;
  const T *cosines, *sines;  // by position; null: queries and keys are rotated
  const int64_t* positions;  // [chunk]
  const T *keys, *values;  // [length, D]
  int64_t slot, start, window;  // of the first token; what the sequence sees

  int64_t rows() const { return chunk * share; }
};

inline int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

inline float as_fp32(int64_t bits) {
  const uint32_t low = static_cast<uint32_t>(bits);
  float f;
  std::memcpy(&f, &low, 4);
  return f;
}

template <class T>
const T* in(int64_t address) {
  return reinterpret_cast<const T*>(address);
}

// The memory of a step, cut up.
struct Arena {
  char* at;
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(at);
    at += lines(count * static_cast<int64_t>(sizeof(T)));
    return p;
  }
};

inline LowbitPlan plan_of(const DecodeLinear& l, int dtype) {
  const int64_t stored = std::max<int64_t>(1, l.stored);  // of dense weights: 0, and no plan
  LowbitPlan plan{LowbitLayout(l.outputs, l.inputs, stored, static_cast<int>(l.w_bits), l.bf16_scale != 0, false)};
  plan.data = in<uint32_t>(l.data), plan.dtype = dtype;
  return plan;
}

// Row `id` of a packed weight: of the head, for an embedding that is tied to it.
template <class T>
void packed_row(const DecodeLinear& weight, int dtype, int64_t id, T* to) {
  const LowbitLayout l = plan_of(weight, dtype).layout;
  const uint32_t* group = in<uint32_t>(weight.data) + id / kBlock * l.block_words() + id % kBlock;
  for (int64_t g = 0; g < l.groups; ++g, group += l.height() * kBlock) {
    const float scale = as_fp32(weight.bf16_scale ? *group & 0xffff0000u : *group);
    for (int64_t c = 0; c < l.words; ++c)
      for (int64_t bit = 0; bit < 32; bit += weight.w_bits) {
        const uint32_t level = group[(l.meta + c) * kBlock] >> bit & ((1u << weight.w_bits) - 1);  // q + 2^(bits-1)
        *to++ = from_float<T>(static_cast<float>(static_cast<int>(level) - (1 << (weight.w_bits - 1))) * scale);
      }
  }
}

inline int64_t units(const DecodeLinear& l) { return (l.outputs + kBlock - 1) / kBlock; }  // of work, dense or packed

// First slot that a token in `slot` sees; what stands before its sequence sees itself alone.
inline int64_t first_seen(int64_t slot, int64_t start, int64_t window) {
  return std::min(slot, window ? std::max(start, slot + 1 - window) : start);
}

struct Step {
  const DecodeModel& model;
  int64_t sequences, chunk, keep;  // tokens of each sequence, one after the other; the last of them that have logits
  int64_t slot;  // of the first of them
  const int64_t *ids, *positions, *starts;  // [sequences, chunk] twice, [sequences]
  void* logits;  // [sequences, keep, vocab]
  int threads, level, isa;

  int64_t M = sequences * chunk;
  int64_t bytes = 0;  // of an element
  int64_t token_bytes = 0, scratch_bytes = 0;  // of the most demanding linear
  int error = kOk;

  const DecodeBlock* blocks() const { return in<DecodeBlock>(model.first_block); }

  // Arguments that can be checked without the model's memory.
  bool legal() const {
    return sequences >= 1 && sequences <= kMostSequences && chunk >= 1 && M <= kMostTokens && keep >= 0 &&
           keep <= chunk && (model.dtype == kF32 || model.dtype == kBf16);
  }

  int measure() {
    bytes = model.dtype == kF32 ? 4 : 2;
    const auto add = [&](const DecodeLinear& l, int64_t tokens) {
      if (!l.outputs || !tokens || l.w_bits == 16) return;
      const int dtype = static_cast<int>(model.dtype), a_bits = static_cast<int>(l.a_bits);
      if (!lowbit_legal(dtype, static_cast<int>(l.w_bits), a_bits, l.stored, false)) {
        error = kBadArgument;
        return;
      }
      LowbitPlan plan = plan_of(l, dtype);
      if (const int code = plan.arrange(tokens, a_bits, l.symmetric != 0, isa)) error = code;
      token_bytes = std::max(token_bytes, plan.token_bytes());
      scratch_bytes = std::max(scratch_bytes, plan.scratch_bytes());
    };
    for (int64_t i = 0; i < model.blocks; ++i) {
      const DecodeBlock& b = blocks()[i];
      for (const DecodeLinear* l : {&b.q, &b.k, &b.v, &b.o, &b.gate, &b.up, &b.down}) add(*l, M);
    }
    add(model.head, sequences * keep);
    return error;
  }

  int64_t widest() const { return std::max({model.hidden, model.heads * model.head_dim, model.intermediate}); }
  int64_t qkv() const { return (model.heads + 2 * model.kv_heads) * model.head_dim; }

  // Attention of single tokens over many positions is shared by parts of so many, whatever the number of threads.
  static int64_t part(int64_t positions) {
    int64_t size = 64;
    while (size * kMostParts < positions) size *= 2;
    return size;
  }
  int64_t parts(int64_t positions) const { return (positions + part(slot + 1) - 1) / part(slot + 1); }
  int64_t most_parts() const { return std::min<int64_t>(kMostParts, (model.length + 63) / 64); }

  // Shared by all: x, products, prepared tokens, parts of attention.
  int64_t shared_bytes() const {
    return 2 * lines(M * model.hidden * bytes) + lines(M * qkv() * bytes) + lines(M * 2 * model.intermediate * bytes) +
           lines(M * widest() * bytes) + lines(token_bytes) + lines(partials() * 4);
  }
  int64_t partials() const { return chunk > 1 ? 0 : M * model.heads * most_parts() * (model.head_dim + 2); }
  // Of each thread: a row, prepared tokens, scratch, heads, scores.
  int64_t own_bytes() const {
    return lines(widest() * bytes) + lines(token_bytes) + lines(scratch_bytes) + lines(heads() * bytes) +
           lines(scores() * 4);
  }
  int64_t heads() const { return (model.heads / model.kv_heads + 3) * model.head_dim; }
  int64_t scores() const {  // of a chunk: queries, results, scores of a tile, and its keys or values
    return chunk == 1 ? 4 * part(model.length) : (2 * model.head_dim + kKeys) * kMostLanes + kKeys * model.head_dim;
  }
  int64_t total_bytes() const { return shared_bytes() + threads * own_bytes() + 64; }
};

}  // namespace jointnas
