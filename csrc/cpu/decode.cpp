// Tokens through a packed model: one for each of some sequences (a decode step), or a chunk of each one's prompt; from ids
// to logits, in one call by one team of threads. Between the products there are no allocations, no locks and five barriers
// a block:
//
//     norm, quantize | q k v   ||  rope, cache, attention  ||  quantize | o, += x   ||
//     norm, quantize | gate up ||  swiglu, quantize | down, += x                    ||
//
// What stands before a | is done by every thread for itself if there is one token (that takes less than a barrier), and
// shared by tokens and a barrier otherwise. The attention of a chunk has one barrier more, behind its keys and values.
// Every output row, head and token is computed by one thread in one order, so results do not depend on the number of
// threads. Vectors have the model's dtype and are rounded where transformers
// rounds them: a bf16 model differs from the stock one only by the order of sums.

#ifdef JN_ISA  // once per instruction set

#include <type_traits>

#include "cpu/decode_step.h"
#include "cpu/decode_vectors.h"
#include "cpu/decode_attention.h"

#else

#include "cpu/bf16.h"
#include "cpu/decode_step.h"
#include "cpu/parallel.h"
#include "export.h"

#define JN_THIS_FILE "cpu/decode.cpp"
#include "cpu/each_isa.h"

namespace jointnas {
namespace {

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
    partial = shared.take<float>(s.partials());
    up = gate + s.M * m.intermediate;
    Arena own{memory + s.shared_bytes() + me * s.own_bytes()};
    row = own.take<T>(s.widest());
    own_tokens = own.take<char>(s.token_bytes);
    scratch = own.take<char>(s.scratch_bytes);
    head = own.take<T>(s.heads());
    scores = own.take<float>(s.scores());
  }

  // y of some linears [M, outputs] that read the same M rows; make(m, row): token m's row. What follows a product for rows
  // [first, end) of token m: then(m, first, end).
  struct Output {
    const DecodeLinear* linear;
    T* y;
  };
  template <int N, class Make, class Then>
  void products(const Output (&outputs)[N], int64_t M, const Make& make, const Then& then) {
    const DecodeLinear& first = *outputs[0].linear;
    const bool alone = M == 1;
    T* const in_rows = alone ? row : rows;
    LowbitPlan plan = plan_of(first, dtype());
    const bool packed = first.w_bits < 16;
    if (packed) {
      plan.arrange(M, static_cast<int>(first.a_bits), first.symmetric != 0, s.isa);
      plan.place(alone ? own_tokens : tokens);
    }
    for (int64_t m = alone ? 0 : me; m < M; m += alone ? 1 : count) {
      T* const to = in_rows + m * first.inputs;
      make(m, to);
      if (packed) plan.prepare(to, m);
    }
    if (!alone) team.barrier();
    // Blocks of rows, each by parts of its tokens, so that an odd number of blocks leaves no thread waiting.
    const int64_t parts = std::clamp<int64_t>(M / 8, 1, count);
    int64_t all = 0;
    for (const Output& o : outputs) all += units(*o.linear) * parts;
    int64_t begin = all * me / count, end = all * (me + 1) / count;
    for (const Output& o : outputs) {
      const int64_t own = units(*o.linear) * parts, last = std::min(end, own);
      for (int64_t from = std::max<int64_t>(begin, 0), to; from < last; from = to) {
        const bool whole = from % parts == 0 && last - from >= parts;
        to = whole ? last / parts * parts : std::min(from / parts * parts + parts, last);
        const int64_t first_part = from % parts, last_part = whole ? parts : first_part + to - from;
        product(o, in_rows, alone ? own_tokens : tokens, M, from / parts, (to + parts - 1) / parts,
                M * first_part / parts, M * last_part / parts, then);
      }
      begin -= own, end -= own;
    }
    team.barrier();
  }

  // Blocks [from, to) of one of them, for tokens [m0, m1) of M.
  template <class Then>
  void product(const Output& o, const T* in_rows, void* prepared, int64_t M, int64_t from, int64_t to, int64_t m0,
               int64_t m1, const Then& then) {
    const DecodeLinear& l = *o.linear;
    const int64_t r0 = from * kBlock, r1 = std::min(to * kBlock, l.outputs);
    if (l.w_bits < 16) {
      LowbitPlan plan = plan_of(l, dtype());
      plan.arrange(M, static_cast<int>(l.a_bits), l.symmetric != 0, s.isa);
      plan.place(prepared);
      plan.y = o.y, plan.begin = m0, plan.end = m1;
      plan.multiply(from, to, scratch);
    } else {
      JN_DISPATCH(s.level, dense_rows(in<T>(l.data), in_rows + m0 * l.inputs, o.y + m0 * l.outputs, r0, r1, m1 - m0,
                                      l.inputs, l.outputs));
    }
    for (int64_t m = m0; m < m1; ++m) {
      if (l.bias) JN_DISPATCH(s.level, add_row(in<T>(l.bias) + r0, o.y + m * l.outputs + r0, r1 - r0));
      then(m, r0, r1);
    }
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

  // Where a token's queries, key and value of a key-value head are.
  struct Heads {
    T *q, *k, *v;
  };
  Heads heads(const DecodeBlock& b, int64_t t, int64_t g) const {
    const int64_t D = s.model.head_dim, H = s.model.heads, K = s.model.kv_heads, share = H / K;
    if (b.k.outputs) {
      T *const q = qkv + t * H * D, *const k = qkv + s.M * H * D + t * K * D;
      return {q + g * share * D, k + g * D, k + s.M * K * D + g * D};
    }
    T* const q = qkv + t * s.qkv();
    return {q + g * share * D, q + (H + g) * D, q + (H + K + g) * D};
  }

  // The rotation of queries and keys, and attention; a step does both.
  template <bool kRotates, bool kAttends>
  void attention(const DecodeBlock& b) {
    const DecodeModel& m = s.model;
    const int64_t D = m.head_dim, H = m.heads, K = m.kv_heads, share = H / K, seen = s.slot + 1;
    const int64_t parts = kAttends ? s.parts(seen) : 1, items = s.M * K * parts, stride = D + 2;
    const float eps = as_fp32(m.epsilon);
    T *const queries = head, *const key = head + share * D;  // each of them, while it is made, with its successor's place
    for (int64_t item = items * me / count, end = items * (me + 1) / count; item < end; ++item) {
      const int64_t t = item / (K * parts), g = item / parts % K, i = item % parts;
      const int64_t from = first_seen(s.slot, s.starts[t / s.chunk], b.window) + i * s.part(seen);
      const int64_t to = kAttends ? std::min(from + s.part(seen), seen) : seen;
      if (from >= seen) continue;
      const Heads of = heads(b, t, g);
      const int64_t cache = (t * K + g) * m.length * D;
      T *const keys = reinterpret_cast<T*>(b.keys) + cache, *const values = reinterpret_cast<T*>(b.values) + cache;
      if constexpr (kRotates) {
        const T *cosine = in<T>(m.cosines) + s.positions[t] * D, *sine = in<T>(m.sines) + s.positions[t] * D;
        for (int64_t h = 0; h < share; ++h)
          JN_DISPATCH(s.level, rotate(of.q + h * D, in<T>(b.q_norm), eps, cosine, sine, queries + h * D, D));
        if (to == seen) JN_DISPATCH(s.level, rotate(of.k, in<T>(b.k_norm), eps, cosine, sine, key, D));
      }
      if constexpr (!kAttends) continue;
      if (to == seen) {
        std::memcpy(keys + s.slot * D, key, static_cast<size_t>(D) * sizeof(T));
        std::memcpy(values + s.slot * D, of.v, static_cast<size_t>(D) * sizeof(T));
      }
      float* const out = partial + (t * H + g * share) * s.most_parts() * stride + i * stride;
      JN_DISPATCH(s.level, attend(queries, share, keys + from * D, values + from * D, to - from, as_fp32(m.scale), scores,
                                  out, s.most_parts() * stride, D));
    }
    if constexpr (kAttends) team.barrier();
  }

  // The same of chunks; results take the places of the queries.
  void chunk_attention(const DecodeBlock& b) {
    const DecodeModel& m = s.model;
    const int64_t D = m.head_dim, K = m.kv_heads, share = m.heads / K;
    const float eps = as_fp32(m.epsilon);
    T *const keys = reinterpret_cast<T*>(b.keys), *const values = reinterpret_cast<T*>(b.values);
    for (int64_t item = s.M * K * me / count, end = s.M * K * (me + 1) / count; item < end; ++item) {
      const int64_t t = item / K, g = item % K, angle = s.positions[t] * D;
      const int64_t place = ((t / s.chunk * K + g) * m.length + s.slot + t % s.chunk) * D;
      const Heads of = heads(b, t, g);
      if (m.cosines)
        JN_DISPATCH(s.level, rotate(of.k, in<T>(b.k_norm), eps, in<T>(m.cosines) + angle, in<T>(m.sines) + angle, head, D));
      std::memcpy(keys + place, m.cosines ? head : of.k, static_cast<size_t>(D) * sizeof(T));
      std::memcpy(values + place, of.v, static_cast<size_t>(D) * sizeof(T));
    }
    team.barrier();
    int64_t lanes = 1;
    JN_DISPATCH(s.level, lanes = tile_lanes());
    const int64_t tiles = (s.chunk * share + lanes - 1) / lanes;
    // In turns, because later tiles see more.
    for (int64_t item = me; item < s.sequences * K * tiles; item += count) {
      const int64_t one = item / (K * tiles), g = item / tiles % K, first = one * s.chunk;
      const int64_t cache = (one * K + g) * m.length * D;
      const ChunkHeads<T> of{heads(b, first, g).q, b.k.outputs ? m.heads * D : s.qkv(), share, s.chunk, D, in<T>(b.q_norm),
                             eps, as_fp32(m.scale), in<T>(m.cosines), in<T>(m.sines), s.positions + first, keys + cache,
                             values + cache, s.slot, s.starts[one], b.window};
      JN_DISPATCH(s.level, attend_tile(of, item % tiles, scores, head));
    }
    team.barrier();
  }

  // Token t's heads: from their parts, or from where a chunk's are.
  auto attended(const DecodeBlock& b) {
    return [this, &b](int64_t t, T* to) {
      const int64_t D = s.model.head_dim, H = s.model.heads;
      if (s.chunk > 1) {
        std::memcpy(to, heads(b, t, 0).q, static_cast<size_t>(H * D) * sizeof(T));
        return;
      }
      const int64_t parts = s.parts(s.slot + 1 - first_seen(s.slot, s.starts[t], b.window));
      for (int64_t h = 0; h < H; ++h)
        JN_DISPATCH(s.level, merged_parts(partial + (t * H + h) * s.most_parts() * (D + 2), parts, to + h * D, D));
    };
  }

  void embed() {
    const int64_t hidden = s.model.hidden;
    for (int64_t t = me; t < s.M; t += count)
      if (s.model.embedding)
        std::memcpy(x + t * hidden, in<T>(s.model.embedding) + s.ids[t] * hidden, static_cast<size_t>(hidden) * sizeof(T));
      else
        packed_row(s.model.head, dtype(), s.ids[t], x + t * hidden);
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
      const int64_t first = m.hidden * me / count, end = m.hidden * (me + 1) / count, all = s.M * m.heads;
      switch (which) {
        case kEmbed: embed(); break;
        case kNorm: rows_of(normed(b.input_norm), m.hidden); break;
        case kProduct: {  // two share their inputs, about as many as in a block: 7 products have 4
          T* const y = static_cast<T*>(s.logits);
          if (++i < m.blocks) {
            const Output pair[2] = {{&b.q, y}, {&s.blocks()[i].q, y + s.M * b.q.outputs}};
            products(pair, s.M, copied(x, m.hidden), nothing());
          } else {
            const Output last[1] = {{&b.q, y}};
            products(last, s.M, copied(x, m.hidden), nothing());
          }
          break;
        }
        case kHeadNorm:
          for (int64_t item = all * me / count; item < all * (me + 1) / count; ++item)
            JN_DISPATCH(s.level, norm_row(qkv + item * m.head_dim, in<T>(b.q_norm), as_fp32(m.epsilon), head, m.head_dim));
          break;
        case kRotate: attention<true, false>(b); break;
        case kAttend: s.chunk > 1 ? chunk_attention(b) : attention<false, true>(b); break;
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
        products(parts, s.M, normed(b.input_norm), nothing());
      } else {
        const Output parts[1] = {{&b.q, qkv}};
        products(parts, s.M, normed(b.input_norm), nothing());
      }
      if (s.chunk > 1)
        chunk_attention(b);
      else
        attention<true, true>(b);
      const Output o[1] = {{&b.o, out}};
      products(o, s.M, attended(b), residual());
      const int64_t F = m.intermediate, width = b.up.outputs ? F : 2 * F;
      if (b.up.outputs) {
        const Output parts[2] = {{&b.gate, gate}, {&b.up, up}};
        products(parts, s.M, normed(b.post_norm), nothing());
      } else {
        const Output parts[1] = {{&b.gate, gate}};
        products(parts, s.M, normed(b.post_norm), nothing());
      }
      const T* const second = b.up.outputs ? up : gate + F;
      const Output down[1] = {{&b.down, out}};
      products(down, s.M, swiglu(width, second), residual());
    }
    if (!s.keep) return;
    const Output logits[1] = {{&m.head, static_cast<T*>(s.logits)}};
    const auto normal = normed(m.final_norm);
    const auto last = [&](int64_t i, T* to) { normal((i / s.keep + 1) * s.chunk - s.keep + i % s.keep, to); };
    products(logits, s.sequences * s.keep, last, nothing());
  }
};

}  // namespace

// Bytes of memory that such a step takes; to `size`.
int cpu_decode_size(const DecodeModel* model, int64_t sequences, int64_t chunk, int64_t keep, int64_t* size, int threads,
                    int isa) {
  Step step{*model, sequences, chunk, keep, 0, nullptr, nullptr, nullptr, nullptr, threads, choose_isa(isa), isa};
  if (!step.legal()) return kBadArgument;
  if (const int error = step.measure()) return error;
  *size = step.total_bytes();
  return kOk;
}
JN_EXPORT(cpu_decode_size);

// `work(worker)` by every member of a team.
template <class F>
int step_run(Step step, void* memory, const F& work) {
  const DecodeModel& model = step.model;
  if (!step.legal() || step.slot < 0 || step.slot > model.length - step.chunk) return kBadArgument;
  if (!step.level) return kIsaMissing;
  for (int64_t t = 0; t < step.M; ++t)
    if (step.ids[t] < 0 || step.ids[t] >= model.vocab || step.positions[t] < 0 || step.positions[t] >= model.length)
      return kBadArgument;
  for (int64_t i = 0; i < step.sequences; ++i)
    if (step.starts[i] < 0 || step.starts[i] >= step.slot + step.chunk) return kBadArgument;
  if (const int error = step.measure()) return error;
  team_run(step.threads, [&](Team& team, int me, int count) {
    if (model.dtype == kF32)
      work(Worker<float>(step, team, me, count, static_cast<char*>(memory)));
    else
      work(Worker<bf16>(step, team, me, count, static_cast<char*>(memory)));
  });
  return kOk;
}

// logits [sequences, keep, vocab] of the last of tokens ids [sequences, chunk] at rotary positions [sequences, chunk],
// whose keys and values go to the caches from `slot` on; each token sees those up to its own, sequence i from starts[i]
// on. memory: of cpu_decode_size, 64-byte aligned.
int cpu_decode_step(const DecodeModel* model, int64_t sequences, int64_t chunk, int64_t keep, const int64_t* ids,
                    const int64_t* positions, const int64_t* starts, int64_t slot, void* logits, void* memory, int threads,
                    int isa) {
  return step_run({*model, sequences, chunk, keep, slot, ids, positions, starts, logits, threads, choose_isa(isa), isa},
                  memory, [](auto worker) { worker.run(); });
}
JN_EXPORT(cpu_decode_step);

// One part of such a step (DecodePart), once per block; y: [2, sequences, chunk, outputs] of products, in turns. Without rotary angles
// the attention of a chunk is that of rotated queries and keys. Otherwise as cpu_decode_step, whose memory holds zeros at
// first.
int cpu_decode_part(const DecodeModel* model, int64_t part, int64_t sequences, int64_t chunk, const int64_t* ids,
                    const int64_t* positions, const int64_t* starts, int64_t slot, void* y, void* memory, int threads,
                    int isa) {
  if (part < 0 || part >= kDecodeParts) return kBadArgument;
  return step_run({*model, sequences, chunk, 1, slot, ids, positions, starts, y, threads, choose_isa(isa), isa}, memory,
                  [part](auto worker) { worker.part(static_cast<DecodePart>(part)); });
}
JN_EXPORT(cpu_decode_part);

}  // namespace jointnas

#endif
