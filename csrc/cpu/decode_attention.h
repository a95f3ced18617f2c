// Attention of a decode step, per instruction set (each_isa.h, hence no guard; included by cpu/decode.cpp behind
// decode_vectors.h): of single tokens, bound by reading keys and values, and of chunks, bound by arithmetic.

namespace jointnas::JN_ISA {

// scores[a][i] = scale <q[a], keys[i]> for Q queries
template <int Q, class T>
void scores_of(const T* q, const T* keys, int64_t n, int64_t D, float scale, float* scores, int64_t stride) {
  const auto some = [&](auto count, int64_t i) {
    constexpr int R = count();
    vf s[Q][R];
    for (auto& of_query : s)
      for (vf& x : of_query) x = set(0.0f);
    each(0, D, [&](auto at) {
      vf key[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) key[r] = at(keys + (i + r) * D);
#pragma GCC unroll 4
      for (int a = 0; a < Q; ++a) {
        const vf query = at(q + a * D);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) s[a][r] = fma(key[r], query, s[a][r]);
      }
    });
    for (int a = 0; a < Q; ++a)
      for (int r = 0; r < R; ++r) scores[a * stride + i + r] = sum(s[a][r]) * scale;
  };
  constexpr int kRows = Q <= 2 ? 4 : 2;  // sums that fit into the registers
  int64_t i = 0;
  for (; i + kRows <= n; i += kRows) some(std::integral_constant<int, kRows>{}, i);
  for (; i < n; ++i) some(std::integral_constant<int, 1>{}, i);
}

// out[a][j] = sum of p[a][i] rows[i][j] from column j on, V vectors at a time; the first column that is left.
template <int Q, int V, class T>
int64_t mixed_columns(const float* p, int64_t p_stride, const T* rows, int64_t n, int64_t D, float* out, int64_t stride,
                      int64_t j) {
  for (; j + V * W <= D; j += V * W) {
    vf total[Q][V];
    for (auto& of_query : total)
      for (vf& x : of_query) x = set(0.0f);
    for (int64_t i = 0; i < n; ++i) {
      vf row[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) row[v] = load(rows + i * D + j + v * W);
#pragma GCC unroll 4
      for (int a = 0; a < Q; ++a) {
        const vf share = set(p[a * p_stride + i]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) total[a][v] = fma(share, row[v], total[a][v]);
      }
    }
    for (int a = 0; a < Q; ++a)
      for (int v = 0; v < V; ++v) store(out + a * stride + j + v * W, total[a][v]);
  }
  return j;
}

// Attention of Q queries [Q, D] with one key-value head over n positions, not yet divided by the sum. out [Q][stride]: D
// values, the largest score, the sum. scores [Q, n].
template <int Q, class T>
void attend_queries(const T* q, const T* keys, const T* values, int64_t n, float scale, float* scores, float* out,
                    int64_t stride, int64_t D) {
  scores_of<Q>(q, keys, n, D, scale, scores, n);
  for (int a = 0; a < Q; ++a) {
    float *const own = scores + a * n, *const to = out + a * stride + D;
    float most = own[0];
    int64_t i = 0;
    if (n >= W) {
      vf largest = load(own);
      for (i = W; i + W <= n; i += W) largest = max(largest, load(own + i));
      most = hmax(largest);
    }
    for (; i < n; ++i) most = std::max(most, own[i]);
    bool nan = false;
    for (i = 0; i < n; ++i) nan |= own[i] != own[i];
    vf all = set(0.0f);
    each(0, n, [&](auto at) {
      at.put(own, exp_minus(set(most) - at(own)));
      all = all + at(own);
    });
    to[0] = most, to[1] = nan ? NAN : sum(all);  // exp_minus makes a number of NaN
  }
  constexpr int kVectors = Q == 1 ? 4 : 2;
  int64_t j = mixed_columns<Q, kVectors>(scores, n, values, n, D, out, stride, 0);
  j = mixed_columns<Q, 1>(scores, n, values, n, D, out, stride, j);
  for (int a = 0; a < Q; ++a)
    each(j, D, [&](auto at) {
      vf total = set(0.0f);
      for (int64_t i = 0; i < n; ++i) total = fma(set(scores[a * n + i]), at(values + i * D), total);
      at.put(out + a * stride, total);
    });
}

template <class T>
void attend(const T* q, int64_t queries, const T* keys, const T* values, int64_t n, float scale, float* scores, float* out,
            int64_t stride, int64_t D) {
  int64_t a = 0;
  const auto next = [&](auto count) {
    attend_queries<count()>(q + a * D, keys, values, n, scale, scores, out + a * stride, stride, D);
    a += count();
  };
  while (a + 4 <= queries) next(std::integral_constant<int, 4>{});
  if (queries - a == 3) next(std::integral_constant<int, 3>{});
  if (queries - a == 2) next(std::integral_constant<int, 2>{});
  if (queries - a == 1) next(std::integral_constant<int, 1>{});
}

// out [D] of one query from its parts [count][D + 2].
template <class T>
void merged_parts(const float* parts, int64_t count, T* out, int64_t D) {
  const int64_t stride = D + 2;
  float most = parts[D], all = 0.0f, share[kMostParts];
  for (int64_t i = 1; i < count; ++i) most = std::max(most, parts[i * stride + D]);
  for (int64_t i = 0; i < count; ++i) {
    share[i] = std::exp(parts[i * stride + D] - most);
    all += share[i] * parts[i * stride + D + 1];
  }
  each(0, D, [&](auto at) {
    vf total = set(0.0f);
    for (int64_t i = 0; i < count; ++i) total = fma(set(share[i]), at(parts + i * stride), total);
    at.put(out, total * set(1.0f / all));
  });
}

// Chunks: lanes are queries, the heads of successive tokens that share a key-value head. Keys and values are read as they
// lie in the cache, an element at a time for all lanes, and nothing is added up across lanes.
constexpr int kLanes = 2 * W;
static_assert(kLanes <= kMostLanes);
#if defined(JN_AVX512)
constexpr int kOuterRows = 12;
#else
constexpr int kOuterRows = 6;  // with two vectors each: 12 sums, as many as two FMAs of 4 to 5 cycles keep busy
#endif

inline int64_t tile_lanes() { return kLanes; }

// c[r] = (kAdds ? c[r] * by : 0) + sum of a[r rows + k columns] b[k], for k < N and R rows r; b, c: lanes. A function that
// ends in stores, for the reason in lowbit_gemm.h.
template <int R, bool kAdds>
__attribute__((noinline)) void add_outer(const float* a, int64_t rows, int64_t columns, const float* b, int64_t N,
                                         const vf* by, float* c) {
  vf s[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) s[r][v] = kAdds ? load(c + r * kLanes + v * W) * by[v] : set(0.0f);
  for (int64_t k = 0; k < N; ++k, a += columns, b += kLanes) {
    const vf b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf x = set(a[r * rows]);
      s[r][0] = fma(x, b0, s[r][0]);
      s[r][1] = fma(x, b1, s[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) store(c + r * kLanes + v * W, s[r][v]);
}

template <int N, class F>
inline void counted(int64_t n, const F& f) {  // f(n), as a constant of at most N
  if constexpr (N > 0) {
    if (n == N) return f(std::integral_constant<int, N>{});
    counted<N - 1>(n, f);
  }
}

// The same for any number of rows, in tiles as even as possible.
template <bool kAdds>
void add_outers(const float* a, int64_t count, int64_t rows, int64_t columns, const float* b, int64_t N, const vf* by,
                float* c) {
  for (int64_t left = (count + kOuterRows - 1) / kOuterRows, r = 0; left > 0; --left) {
    const int64_t now = (count - r + left - 1) / left;
    counted<kOuterRows>(now, [&](auto n) { add_outer<n(), kAdds>(a + r * rows, rows, columns, b, N, by, c + r * kLanes); });
    r += now;
  }
}

inline const float* as_floats(const float* x, int64_t, float*) { return x; }
inline const float* as_floats(const bf16* x, int64_t n, float* y) {
  each(0, n, [&](auto at) { at.put(y, at(x)); });
  return y;
}

// Slots [first, last] that each lane sees, and the softmax so far: the largest score, the sum.
struct Lanes {
  float first[kLanes], last[kLanes];
  vf most[2], all[2];
};

// Scores [n][lanes] of slots from `slot` on to e^(score - largest); by: what earlier sums are multiplied by.
inline void softmax_tile(Lanes& l, float* scores, int64_t slot, int64_t n, bool masked, vf* by) {
  constexpr float kLowest = -3e38f;  // of a slot that is not seen; below every `most`
  for (int v = 0; v < 2; ++v) {
    float* const own = scores + v * W;
    const vf first = load(l.first + v * W), last = load(l.last + v * W);
    vf most = l.most[v];
    for (int64_t i = 0; i < n; ++i) {
      vf s = load(own + i * kLanes);
      if (masked) {
        const vf at = set(static_cast<float>(slot + i));
        s = less(at, first, set(kLowest), less(last, at, set(kLowest), s));
        store(own + i * kLanes, s);
      }
      most = max(most, s);
    }
    by[v] = exp_minus(most - l.most[v]);
    vf all = l.all[v] * by[v];
    for (int64_t i = 0; i < n; ++i) {
      const vf s = load(own + i * kLanes), e = exp_minus(most - s);
      store(own + i * kLanes, e);
      all = fma(s, set(0.0f), all + e);  // exp_minus makes a number of NaN
    }
    l.most[v] = most, l.all[v] = all;
  }
}

// Queries [tile kLanes, (tile + 1) kLanes) of a chunk. memory: floats of Step::scores; head [2 D].
template <class T>
void attend_tile(const ChunkHeads<T>& c, int64_t tile, float* memory, T* head) {
  const int64_t D = c.D, begin = tile * kLanes, count = std::min<int64_t>(kLanes, c.rows() - begin);
  float *const q = memory, *const out = q + D * kLanes, *const scores = out + D * kLanes;
  float* const floats = scores + kKeys * kLanes;
  Lanes l;
  const auto query = [&](int64_t lane) {
    const int64_t row = begin + lane;
    return c.queries + row / c.share * c.stride + row % c.share * D;
  };
  int64_t first = c.slot + c.chunk, first_most = 0, last = 0, last_least = first;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const int64_t t = (begin + std::min(lane, count - 1)) / c.share, slot = c.slot + t;
    const int64_t seen = first_seen(slot, c.start, c.window);
    l.first[lane] = static_cast<float>(seen), l.last[lane] = static_cast<float>(slot);
    first = std::min(first, seen), first_most = std::max(first_most, seen);
    last_least = std::min(last_least, slot), last = std::max(last, slot);
    if (lane < count) {
      const T* from = query(lane);
      if (const int64_t at = c.positions[t] * D; c.cosines) {
        rotate(from, c.norm, c.epsilon, c.cosines + at, c.sines + at, head, D);
        from = head;
      }
      for (int64_t d = 0; d < D; ++d) q[d * kLanes + lane] = to_float(from[d]) * c.scale;
    } else {
      for (int64_t d = 0; d < D; ++d) q[d * kLanes + lane] = 0.0f;
    }
  }
  for (int v = 0; v < 2; ++v) l.most[v] = set(-1e30f), l.all[v] = set(0.0f);
  std::memset(out, 0, static_cast<size_t>(D * kLanes) * 4);
  for (int64_t slot = first; slot <= last; slot += kKeys) {
    const int64_t n = std::min(kKeys, last + 1 - slot);
    vf by[2];
    add_outers<false>(as_floats(c.keys + slot * D, n * D, floats), n, D, 1, q, D, by, scores);
    softmax_tile(l, scores, slot, n, slot < first_most || slot + n > last_least + 1, by);
    add_outers<true>(as_floats(c.values + slot * D, n * D, floats), D, 1, D, scores, n, by, out);
  }
  for (int v = 0; v < 2; ++v) {
    const vf share = set(1.0f) / l.all[v];
    for (int64_t d = 0; d < D; ++d) store(out + d * kLanes + v * W, load(out + d * kLanes + v * W) * share);
  }
  for (int64_t lane = 0; lane < count; ++lane) {
    T* const to = query(lane);
    for (int64_t d = 0; d < D; ++d) to[d] = from_float<T>(out[d * kLanes + lane]);
  }
}

}  // namespace jointnas::JN_ISA
