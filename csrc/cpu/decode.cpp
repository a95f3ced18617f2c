// One decode step of a packed model: a token for each of M sequences, from ids to logits, in one call by one team of
// threads. Between the products there are no allocations, no locks and five barriers a block:
//
//     norm, quantize | q k v   ||  rope, cache, attention  ||  quantize | o, += x   ||
//     norm, quantize | gate up ||  swiglu, quantize | down, += x                    ||
//
// What stands before a | is done by every thread for itself if there is one token (that takes less than a barrier), and
// shared by tokens and a barrier otherwise. Every output row, head and token is computed by one thread in one order, so
// results do not depend on the number of threads. Vectors have the model's dtype and are rounded where transformers
// rounds them: a bf16 model differs from the stock one only by the order of sums.

#ifdef JN_ISA  // once per instruction set

#include <type_traits>

#include "cpu/decode.h"
#include "cpu/decode_vectors.h"

#else

#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "cpu/bf16.h"
#include "cpu/decode.h"
#include "cpu/isa.h"
#include "cpu/lowbit.h"
#include "cpu/parallel.h"
#include "export.h"

#define JN_THIS_FILE "cpu/decode.cpp"
#include "cpu/each_isa.h"

namespace jointnas {
namespace {

constexpr int64_t kMostTokens = 16;

int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

float as_fp32(int64_t bits) {
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

LowbitPlan plan_of(const DecodeLinear& l, int dtype) {
  const int64_t stored = std::max<int64_t>(1, l.stored);  // of dense weights: 0, and no plan
  LowbitPlan plan{LowbitLayout(l.outputs, l.inputs, stored, static_cast<int>(l.w_bits), l.bf16_scale != 0, false)};
  plan.data = in<uint32_t>(l.data), plan.dtype = dtype;
  return plan;
}

int64_t units(const DecodeLinear& l) { return (l.outputs + kBlock - 1) / kBlock; }  // of work, dense or packed

struct Step {
  const DecodeModel& model;
  int64_t M, slot;
  const int64_t *ids, *positions, *starts;
  void* logits;
  int threads, level, isa;

  int64_t bytes = 0;  // of an element
  int64_t token_bytes = 0, scratch_bytes = 0;  // of the most demanding linear
  int error = kOk;

  const DecodeBlock* blocks() const { return in<DecodeBlock>(model.first_block); }

  template <class F>
  void each_linear(const F& f) const {
    for (int64_t b = 0; b < model.blocks; ++b)
      for (const DecodeLinear* l : {&blocks()[b].q, &blocks()[b].k, &blocks()[b].v, &blocks()[b].o, &blocks()[b].gate,
                                    &blocks()[b].up, &blocks()[b].down})
        if (l->outputs) f(*l);
    f(model.head);
  }

  int measure() {
    bytes = model.dtype == kF32 ? 4 : 2;
    each_linear([&](const DecodeLinear& l) {
      if (l.w_bits == 16) return;
      const int dtype = static_cast<int>(model.dtype), a_bits = static_cast<int>(l.a_bits);
      if (!lowbit_legal(dtype, static_cast<int>(l.w_bits), a_bits, l.stored, false)) {
        error = kBadArgument;
        return;
      }
      LowbitPlan plan = plan_of(l, dtype);
      if (const int code = plan.arrange(M, a_bits, l.symmetric != 0, isa)) error = code;
      token_bytes = std::max(token_bytes, plan.token_bytes());
      scratch_bytes = std::max(scratch_bytes, plan.scratch_bytes());
    });
    return error;
  }

  int64_t widest() const { return std::max({model.hidden, model.heads * model.head_dim, model.intermediate}); }
  int64_t qkv() const { return (model.heads + 2 * model.kv_heads) * model.head_dim; }

  // Attention over many positions is shared by parts of so many of them, whatever the number of threads.
  static int64_t part(int64_t positions) {
    int64_t size = 64;
    while (size * kMostParts < positions) size *= 2;
    return size;
  }
  int64_t parts(int64_t positions) const { return (positions + part(slot + 1) - 1) / part(slot + 1); }
  int64_t first(const DecodeBlock& b, int64_t t) const {
    return b.window ? std::max(starts[t], slot + 1 - b.window) : starts[t];
  }

  int64_t most_parts() const { return std::min<int64_t>(kMostParts, (model.length + 63) / 64); }

  // Shared by all: x, products, attention, prepared tokens.
  int64_t shared_bytes() const {
    return M * (2 * lines(model.hidden * bytes) + lines(qkv() * bytes) + 2 * lines(model.intermediate * bytes)) +
           lines(M * widest() * bytes) + 7 * 64 + lines(token_bytes) +
           lines(M * model.heads * most_parts() * (model.head_dim + 2) * 4);
  }
  // Of each thread: a row, prepared tokens, scratch, heads, scores.
  int64_t own_bytes() const {
    return lines(widest() * bytes) + lines(token_bytes) + lines(scratch_bytes) +
           lines((model.heads / model.kv_heads + 3) * model.head_dim * bytes) + lines(4 * part(model.length) * 4) + 8 * 64;
  }
  int64_t total_bytes() const { return shared_bytes() + threads * own_bytes() + 64; }
};

template <class T>
struct Worker {
  const Step& s;
  Team& team;
  int me, count;
  T *x, *qkv, *out, *gate, *up, *rows;  // shared, [M, ...]
  float* partial;  // shared, [M, heads, parts, head_dim + 2]
  void* tokens;
  T* row;  // own
  void *own_tokens, *scratch;
  T* head;
  float* scores;

  Worker(const Step& step, Team& t, int index, int size, char* memory) : s(step), team(t), me(index), count(size) {
    const DecodeModel& m = s.model;
    Arena shared{memory};
    x = shared.take<T>(s.M * m.hidden);
    qkv = shared.take<T>(s.M * s.qkv());
    out = shared.take<T>(s.M * m.hidden);
    gate = shared.take<T>(s.M * 2 * m.intermediate);
    rows = shared.take<T>(s.M * s.widest());
    tokens = shared.take<char>(s.token_bytes);
    partial = shared.take<float>(s.M * m.heads * s.most_parts() * (m.head_dim + 2));
    up = gate + s.M * m.intermediate;
    Arena own{memory + s.shared_bytes() + me * s.own_bytes()};
    row = own.take<T>(s.widest());
    own_tokens = own.take<char>(s.token_bytes);
    scratch = own.take<char>(s.scratch_bytes);
    head = own.take<T>((m.heads / m.kv_heads + 3) * m.head_dim);
    scores = own.take<float>(4 * s.part(m.length));
  }

  // y of some linears [M, outputs] that read the same rows; make(m, row): token m's row. What follows a product for rows
  // [first, end) of token m: then(m, first, end).
  struct Output {
    const DecodeLinear* linear;
    T* y;
  };
  template <int N, class Make, class Then>
  void products(const Output (&outputs)[N], const Make& make, const Then& then) {
    const DecodeLinear& first = *outputs[0].linear;
    const bool alone = s.M == 1;
    T* const in_rows = alone ? row : rows;
    LowbitPlan plan = plan_of(first, dtype());
    const bool packed = first.w_bits < 16;
    if (packed) {
      plan.arrange(s.M, static_cast<int>(first.a_bits), first.symmetric != 0, s.isa);
      plan.place(alone ? own_tokens : tokens);
    }
    for (int64_t m = alone ? 0 : me; m < s.M; m += alone ? 1 : count) {
      T* const to = in_rows + m * first.inputs;
      make(m, to);
      if (packed) plan.prepare(to, m);
    }
    if (!alone) team.barrier();
    int64_t all = 0;
    for (const Output& o : outputs) all += units(*o.linear);
    int64_t begin = all * me / count, end = all * (me + 1) / count;
    for (const Output& o : outputs) {
      const DecodeLinear& l = *o.linear;
      const int64_t own = units(l), from = std::max<int64_t>(begin, 0), to = std::min(end, own);
      if (from < to) {
        const int64_t r0 = from * kBlock, r1 = std::min(to * kBlock, l.outputs);
        if (packed) {
          LowbitPlan one = plan_of(l, dtype());
          one.arrange(s.M, static_cast<int>(l.a_bits), l.symmetric != 0, s.isa);
          one.place(alone ? own_tokens : tokens);
          one.y = o.y;
          one.multiply(from, to, scratch);
        } else {
          for (int64_t m = 0; m < s.M; ++m)
            JN_DISPATCH(s.level, dense_rows(in<T>(l.data), in_rows + m * l.inputs, o.y + m * l.outputs, r0, r1, l.inputs));
        }
        for (int64_t m = 0; m < s.M; ++m) {
          if (l.bias)
            JN_DISPATCH(s.level, add_row(in<T>(l.bias) + r0, o.y + m * l.outputs + r0, r1 - r0));
          then(m, r0, r1);
        }
      }
      begin -= own, end -= own;
    }
    team.barrier();
  }

  int dtype() const { return static_cast<int>(s.model.dtype); }

  auto normed(int64_t weight) {
    return [this, weight](int64_t m, T* to) {
      JN_DISPATCH(s.level, norm_row(x + m * s.model.hidden, in<T>(weight), as_fp32(s.model.epsilon), to, s.model.hidden));
    };
  }
  auto copied(const T* from, int64_t width) {
    return [from, width](int64_t m, T* to) { std::memcpy(to, from + m * width, static_cast<size_t>(width) * sizeof(T)); };
  }
  auto residual() {
    return [this](int64_t m, int64_t r0, int64_t r1) {
      const int64_t at = m * s.model.hidden + r0;
      JN_DISPATCH(s.level, add_row(out + at, x + at, r1 - r0));
    };
  }
  static auto nothing() {
    return [](int64_t, int64_t, int64_t) {};
  }

  // The rotation of queries and keys, and attention; a step does both.
  template <bool kRotates, bool kAttends>
  void attention(const DecodeBlock& b) {
    const DecodeModel& m = s.model;
    const int64_t D = m.head_dim, H = m.heads, K = m.kv_heads, share = H / K, fused = s.qkv(), seen = s.slot + 1;
    const int64_t parts = kAttends ? s.parts(seen) : 1, items = s.M * K * parts, stride = D + 2;
    const float eps = as_fp32(m.epsilon);
    T *const queries = head, *const key = head + share * D;  // each of them, while it is made, with its successor's place
    for (int64_t item = items * me / count, end = items * (me + 1) / count; item < end; ++item) {
      const int64_t t = item / (K * parts), g = item / parts % K, i = item % parts;
      const int64_t from = s.first(b, t) + i * s.part(seen), to = kAttends ? std::min(from + s.part(seen), seen) : seen;
      if (from >= seen) continue;
      const T *q, *k, *v;
      if (b.k.outputs) {
        q = qkv + t * H * D + g * share * D;
        k = qkv + s.M * H * D + t * K * D + g * D;
        v = qkv + s.M * (H + K) * D + t * K * D + g * D;
      } else {
        q = qkv + t * fused + g * share * D;
        k = qkv + t * fused + (H + g) * D;
        v = qkv + t * fused + (H + K + g) * D;
      }
      const int64_t cache = (t * K + g) * m.length * D;
      T *const keys = reinterpret_cast<T*>(b.keys) + cache, *const values = reinterpret_cast<T*>(b.values) + cache;
      if constexpr (kRotates) {
        const T *cosine = in<T>(m.cosines) + s.positions[t] * D, *sine = in<T>(m.sines) + s.positions[t] * D;
        for (int64_t h = 0; h < share; ++h)
          JN_DISPATCH(s.level, rotate(q + h * D, in<T>(b.q_norm), eps, cosine, sine, queries + h * D, D));
        if (to == seen) JN_DISPATCH(s.level, rotate(k, in<T>(b.k_norm), eps, cosine, sine, key, D));
      }
      if constexpr (!kAttends) continue;
      if (to == seen) {
        std::memcpy(keys + s.slot * D, key, static_cast<size_t>(D) * sizeof(T));
        std::memcpy(values + s.slot * D, v, static_cast<size_t>(D) * sizeof(T));
      }
      float* const out = partial + (t * H + g * share) * s.most_parts() * stride + i * stride;
      JN_DISPATCH(s.level, attend(queries, share, keys + from * D, values + from * D, to - from, as_fp32(m.scale), scores,
                                  out, s.most_parts() * stride, D));
    }
    if constexpr (kAttends) team.barrier();
  }

  // Token t's heads, from their parts.
  auto attended(const DecodeBlock& b) {
    return [this, &b](int64_t t, T* to) {
      const int64_t D = s.model.head_dim, H = s.model.heads, parts = s.parts(s.slot + 1 - s.first(b, t));
      for (int64_t h = 0; h < H; ++h)
        JN_DISPATCH(s.level, merged_parts(partial + (t * H + h) * s.most_parts() * (D + 2), parts, to + h * D, D));
    };
  }

  // Row `id` of the packed head: of an embedding that is tied to it.
  void row_of_head(int64_t id, T* to) const {
    const DecodeLinear& head = s.model.head;
    const LowbitLayout l = plan_of(head, static_cast<int>(s.model.dtype)).layout;
    const uint32_t* group = in<uint32_t>(head.data) + id / kBlock * l.block_words() + id % kBlock;
    for (int64_t g = 0; g < l.groups; ++g, group += l.height() * kBlock) {
      const float scale = as_fp32(head.bf16_scale ? *group & 0xffff0000u : *group);
      for (int64_t c = 0; c < l.words; ++c)
        for (int64_t bit = 0; bit < 32; bit += head.w_bits) {
          const uint32_t level = group[(l.meta + c) * kBlock] >> bit & ((1u << head.w_bits) - 1);  // q + 2^(bits-1)
          *to++ = from_float<T>(static_cast<float>(static_cast<int>(level) - (1 << (head.w_bits - 1))) * scale);
        }
    }
  }

  void embed() {
    const int64_t hidden = s.model.hidden;
    for (int64_t t = me; t < s.M; t += count)
      if (s.model.embedding)
        std::memcpy(x + t * hidden, in<T>(s.model.embedding) + s.ids[t] * hidden, static_cast<size_t>(hidden) * sizeof(T));
      else
        row_of_head(s.ids[t], x + t * hidden);
    team.barrier();
  }

  // Rows of tokens as `products` has them made.
  template <class Make>
  void rows_of(const Make& make, int64_t width) {
    const bool alone = s.M == 1;
    for (int64_t t = alone ? 0 : me; t < s.M; t += alone ? 1 : count) make(t, (alone ? row : rows) + t * width);
  }

  auto swiglu(int64_t width, const T* second) {
    return [this, width, second](int64_t t, T* to) {
      JN_DISPATCH(s.level, swiglu_row(gate + t * width, second + t * width, to, s.model.intermediate));
    };
  }

  void part(DecodePart which) {
    const DecodeModel& m = s.model;
    embed();
    for (int64_t i = 0; i < m.blocks; ++i) {
      const DecodeBlock& b = s.blocks()[i];
      const Output y[1] = {{&b.q, static_cast<T*>(s.logits)}};
      const int64_t first = m.hidden * me / count, end = m.hidden * (me + 1) / count, all = s.M * m.heads;
      switch (which) {
        case kEmbed: embed(); break;
        case kNorm: rows_of(normed(b.input_norm), m.hidden); break;
        case kProduct: products(y, copied(x, m.hidden), nothing()); break;
        case kHeadNorm:
          for (int64_t item = all * me / count; item < all * (me + 1) / count; ++item)
            JN_DISPATCH(s.level, norm_row(qkv + item * m.head_dim, in<T>(b.q_norm), as_fp32(m.epsilon), head, m.head_dim));
          break;
        case kRotate: attention<true, false>(b); break;
        case kAttend: attention<false, true>(b); break;
        case kSwiglu: rows_of(swiglu(m.intermediate, up), m.intermediate); break;
        default:
          for (int64_t t = 0; t < s.M; ++t) residual()(t, first, end);
      }
    }
    team.barrier();
  }

  void run() {
    const DecodeModel& m = s.model;
    embed();
    for (int64_t i = 0; i < m.blocks; ++i) {
      const DecodeBlock& b = s.blocks()[i];
      const int64_t D = m.head_dim;
      if (b.k.outputs) {
        const Output parts[3] = {{&b.q, qkv}, {&b.k, qkv + s.M * m.heads * D}, {&b.v, qkv + s.M * (m.heads + m.kv_heads) * D}};
        products(parts, normed(b.input_norm), nothing());
      } else {
        const Output parts[1] = {{&b.q, qkv}};
        products(parts, normed(b.input_norm), nothing());
      }
      attention<true, true>(b);
      const Output o[1] = {{&b.o, out}};
      products(o, attended(b), residual());
      const int64_t F = m.intermediate, width = b.up.outputs ? F : 2 * F;
      if (b.up.outputs) {
        const Output parts[2] = {{&b.gate, gate}, {&b.up, up}};
        products(parts, normed(b.post_norm), nothing());
      } else {
        const Output parts[1] = {{&b.gate, gate}};
        products(parts, normed(b.post_norm), nothing());
      }
      const T* const second = b.up.outputs ? up : gate + F;
      const Output down[1] = {{&b.down, out}};
      products(down, swiglu(width, second), residual());
    }
    const Output logits[1] = {{&m.head, static_cast<T*>(s.logits)}};
    products(logits, normed(m.final_norm), nothing());
  }
};

}  // namespace

// Bytes of memory that a step of M tokens takes; to `size`.
int cpu_decode_size(const DecodeModel* model, int64_t M, int64_t* size, int threads, int isa) {
  if (M < 1 || M > kMostTokens || (model->dtype != kF32 && model->dtype != kBf16)) return kBadArgument;
  Step step{*model, M, 0, nullptr, nullptr, nullptr, nullptr, threads, choose_isa(isa), isa};
  if (const int error = step.measure()) return error;
  *size = step.total_bytes();
  return kOk;
}
JN_EXPORT(cpu_decode_size);

// `work(worker)` by every member of a team.
template <class F>
int step_run(const DecodeModel* model, int64_t M, const int64_t* ids, const int64_t* positions, const int64_t* starts,
             int64_t slot, void* y, void* memory, int threads, int isa, const F& work) {
  if (M < 1 || M > kMostTokens || slot < 0 || slot >= model->length) return kBadArgument;
  Step step{*model, M, slot, ids, positions, starts, y, threads, choose_isa(isa), isa};
  if (!step.level) return kIsaMissing;
  for (int64_t m = 0; m < M; ++m)
    if (ids[m] < 0 || ids[m] >= model->vocab || positions[m] < 0 || positions[m] >= model->length || starts[m] < 0 ||
        starts[m] > slot)
      return kBadArgument;
  if (const int error = step.measure()) return error;
  team_run(threads, [&](Team& team, int me, int count) {
    if (model->dtype == kF32)
      work(Worker<float>(step, team, me, count, static_cast<char*>(memory)));
    else
      work(Worker<bf16>(step, team, me, count, static_cast<char*>(memory)));
  });
  return kOk;
}

// logits [M, vocab] of tokens ids [M] at rotary positions [M], whose keys and values go to `slot` of the caches; token m
// sees slots from starts[m] on. memory: of cpu_decode_size, 64-byte aligned.
int cpu_decode_step(const DecodeModel* model, int64_t M, const int64_t* ids, const int64_t* positions,
                    const int64_t* starts, int64_t slot, void* logits, void* memory, int threads, int isa) {
  return step_run(model, M, ids, positions, starts, slot, logits, memory, threads, isa, [](auto worker) { worker.run(); });
}
JN_EXPORT(cpu_decode_step);

// One part of it (DecodePart), once per block; y: [M, outputs] of a product. Otherwise as cpu_decode_step, whose memory
// holds zeros at first.
int cpu_decode_part(const DecodeModel* model, int64_t part, int64_t M, const int64_t* ids, const int64_t* positions,
                    const int64_t* starts, int64_t slot, void* y, void* memory, int threads, int isa) {
  if (part < 0 || part >= kDecodeParts) return kBadArgument;
  return step_run(model, M, ids, positions, starts, slot, y, memory, threads, isa,
                  [part](auto worker) { worker.part(static_cast<DecodePart>(part)); });
}
JN_EXPORT(cpu_decode_part);

}  // namespace jointnas

#endif
