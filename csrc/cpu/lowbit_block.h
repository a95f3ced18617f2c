// One block of weights from the storage layout to the prepared one, per instruction set (each_isa.h, hence no guard;
// needs lowbit_fields.h).

namespace jointnas::JN_ISA {

// Bits i, i + B, i + 2 B, ... of each lane, moved together.
template <int B>
inline vi every(vi w) {
  if constexpr (B == 2) {
    w = w & seti(0x55555555u);
    w = (w + shr<1>(w)) & seti(0x33333333u);
    w = (w + shr<2>(w)) & seti(0x0f0f0f0fu);
    w = (w + shr<4>(w)) & seti(0x00ff00ffu);
    return (w + shr<8>(w)) & seti(0x0000ffffu);
  } else {
    w = w & seti(0x11111111u);
    w = (w + shr<3>(w)) & seti(0x03030303u);
    w = (w + shr<6>(w)) & seti(0x000f000fu);
    return (w + shr<12>(w)) & seti(0x000000ffu);
  }
}

// B words of 32 inputs to the B bit-planes of these inputs, in place; for each of W rows.
template <int B>
inline void to_planes(uint32_t* words) {
  vi in[B], out[B];
  for (int i = 0; i < B; ++i) in[i] = loadi(words + i * kBlock);
  fields<B>([&](auto plane) {
    out[plane()] = seti(0);
    fields<B>([&](auto i) { out[plane()] = out[plane()] + shl<32 / B * i()>(every<B>(shr<plane()>(in[i()]))); });
  });
  for (int i = 0; i < B; ++i) storei(words + i * kBlock, out[i]);
}

template <int B>
void pack_block_bits(const LowbitLayout& l, const uint32_t* packed, const void* scale, int64_t scale_groups,
                     bool bf16_scale, int64_t block, uint32_t* data) {
  const int64_t first = block * kBlock, last = l.O - 1, row_words = l.groups * l.words;
  const auto word = [&](int64_t c) { return data + (c / l.words * l.height() + l.meta + c % l.words) * kBlock; };
  for (int64_t r = 0; r < kBlock; r += W)
    for (int64_t c = 0; c < row_words; c += W) {
      // The next block in the order of memory: 16 rows at once are more streams than the processor follows by itself,
      // and rows of 4 KiB share the same few lines of a first-level cache.
      const uint32_t* next = packed + (first + kBlock) * row_words + r * row_words + c * W;
      for (int64_t i = 0; i < W * W; i += 16) __builtin_prefetch(next + i, 0, 2);
      transpose([&](int64_t i) { return packed + std::min(first + r + i, last) * row_words + c; },
                std::min<int64_t>(W, row_words - c), [&](int64_t i) { return word(c + i) + r; });
    }
  const int64_t share = l.groups / scale_groups;  // stored groups per group
  for (int64_t g = 0; g < l.groups; ++g) {
    uint32_t* meta = data + g * l.height() * kBlock;
    for (int64_t r = 0; r < kBlock; ++r) {
      const int64_t at = std::min(first + r, last) * scale_groups + g / share;
      uint32_t bits;
      if (bf16_scale)
        bits = static_cast<uint32_t>(static_cast<const uint16_t*>(scale)[at]) << 16;
      else
        std::memcpy(&bits, static_cast<const float*>(scale) + at, 4);
      meta[r] = first + r > last ? 0 : bits;
    }
    for (int64_t r = 0; r < kBlock; r += W) {
      uint32_t* words = meta + l.meta * kBlock + r;
      vi sum = seti(0u - (static_cast<uint32_t>(l.group()) << (B - 1)));
      for (int64_t c = 0; c < l.words; ++c)
        fields<8 / B>([&](auto f) {
          sum = dot<(B < 8)>(sum, Bytes<B>::template operand<f()>(loadi(words + c * kBlock)), seti(0x01010101u));
        });
      if (bf16_scale)
        storei(meta + r, loadi(meta + r) + (sum & seti(0xffffu)));
      else
        storei(meta + kBlock + r, sum);
      if constexpr (B < 8)
        if (l.planes)
          for (int64_t c = 0; c < l.words; c += B) to_planes<B>(words + c * kBlock);
    }
  }
}

inline void pack_block(const LowbitLayout& l, const uint32_t* packed, const void* scale, int64_t scale_groups,
                       bool bf16_scale, int64_t block, uint32_t* data) {
  const auto f = l.w_bits == 2 ? pack_block_bits<2> : l.w_bits == 4 ? pack_block_bits<4> : pack_block_bits<8>;
  f(l, packed, scale, scale_groups, bf16_scale, block, data);
}

}  // namespace jointnas::JN_ISA
