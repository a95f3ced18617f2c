// Test-only twin of ptx.cuh: runs a kernel's blocks (or clusters of blocks) one after another on the CPU, their threads
// as fibers. Barriers and warp-wide instructions switch fibers until every participant has arrived. Shared memory starts
// out as 0xFF bytes; a cp.async destination holds 0xFF until its group is waited for, so a read that comes too early
// gives NaN. What the hardware would not do ends the process.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#define JN_DEVICE inline
#define JN_HOST_DEVICE inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define JN_DYNAMIC_SHARED(name) unsigned char* name = ::jointnas::emu::shared_base()

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;
using cudaError_t = int;
inline const char* cudaGetErrorName(cudaError_t) { return "emulated"; }

namespace jointnas::emu {

inline void require(bool sound, const char* what) {
  if (sound) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}
inline void require_aligned(const void* p, const char* what) { require(reinterpret_cast<uintptr_t>(p) % 16 == 0, what); }

struct Copy { void* dst; const void* src; bool valid; int bytes = 16; };
struct BulkCopy { void* dst; const void* src; int bytes; };
struct Barrier {  // in shared memory, hopper.cuh
  int arrivals, pending;
  long bytes;  // announced and not yet here; negative when the copies were faster
  unsigned phase;
  std::vector<BulkCopy> copies;
  void arrive();
  void land();
  void turn() {
    if (pending || bytes) return;
    pending = arrivals;
    ++phase;
  }
};
struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = false;
  std::unique_ptr<char[]> stack;
  std::vector<Copy> open;                 // copies not yet committed
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<std::function<void()>> open_products;          // the same for wgmma
  std::vector<std::vector<std::function<void()>>> products;
  std::map<void*, std::vector<unsigned char>> sums;  // of products that were waited for, until a fence of the accumulator
};
struct Meeting { unsigned generation = 0; int arrived = 0; };
struct Warp { Meeting meeting; alignas(16) unsigned char in[32][64], out[32][64]; };
struct Block {
  std::vector<unsigned char> shared;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Meeting barriers_of_ranks[16], cluster_barrier, named[256];  // named: [rank][id]
  std::map<void*, Barrier> barriers;
  int current = 0, idle = 0, threads = 0;  // threads: of one block
  size_t shared_stride = 0;                // between the shared memories of a cluster's blocks
  int rank() const { return current / threads; }
  jmp_buf scheduler;
  std::function<void()> body;
};
inline Block*& block_pointer() { static Block* b = nullptr; return b; }
inline Block& block() { return *block_pointer(); }
inline dim3& thread_index() { static dim3 d; return d; }
inline dim3& block_index() { static dim3 d; return d; }
inline dim3& block_size() { static dim3 d; return d; }
inline dim3& grid_size() { static dim3 d; return d; }

inline unsigned char* shared_base() {  // 1024-byte aligned, as on the device
  const auto first = (reinterpret_cast<uintptr_t>(block().shared.data()) + 1023) / 1024 * 1024;
  return reinterpret_cast<unsigned char*>(first + block().rank() * block().shared_stride);
}
inline void Barrier::arrive() {
  block().idle = 0;
  require(pending-- > 0, "more arrivals at a barrier than it was initialised for");
  turn();
}
inline void Barrier::land() {
  if (copies.empty()) return;
  block().idle = 0;
  for (const BulkCopy& copy : copies) {
    std::memcpy(copy.dst, copy.src, copy.bytes);
    bytes -= copy.bytes;
  }
  copies.clear();
  turn();
}

constexpr size_t kStack = 128 * 1024;

inline void yield() {
  Block& b = block();
  if (_setjmp(b.fibers[b.current].resume) == 0) _longjmp(b.scheduler, 1);
}
inline void entry() {
  Block& b = block();
  b.body();
  b.fibers[b.current].done = true;
  b.idle = 0;
  _longjmp(b.scheduler, 1);
}
// `ranks` blocks at consecutive x, as one cluster
inline void run_block(const std::function<void()>& body, unsigned threads, size_t shared_bytes, unsigned ranks = 1) {
  static Block b;  // fibers and their stacks are reused
  block_pointer() = &b;
  const dim3 first = block_index();
  const unsigned all = threads * ranks;
  b.body = body;
  b.threads = static_cast<int>(threads);
  b.shared_stride = (shared_bytes + 1023) / 1024 * 1024;
  b.shared.assign(b.shared_stride * ranks + 1024, 0xFF);
  b.warps.assign((all + 31) / 32, Warp{});
  for (Meeting& m : b.barriers_of_ranks) m = Meeting{};
  for (Meeting& m : b.named) m = Meeting{};
  b.cluster_barrier = Meeting{};
  b.barriers.clear();
  b.idle = 0;
  if (b.fibers.size() != all) b.fibers = std::vector<Fiber>(all);
  for (Fiber& f : b.fibers) {
    f.started = f.done = false;
    f.open.clear();
    f.groups.clear();
    f.open_products.clear();
    f.products.clear();
    f.sums.clear();
    if (!f.stack) f.stack.reset(new char[kStack]);
  }
  volatile unsigned live = all, next = 0;
  while (live) {
    while (b.fibers[next].done) next = (next + 1) % all;
    b.current = static_cast<int>(next);
    thread_index() = dim3(next % threads);
    block_index() = dim3(first.x + next / threads, first.y, first.z);
    Fiber& f = b.fibers[next];
    require(++b.idle <= static_cast<int>(all) * 4, "emulated block is deadlocked: its threads wait for ever");
    if (_setjmp(b.scheduler) == 0) {
      if (f.started) _longjmp(f.resume, 1);
      f.started = true;
      getcontext(&f.start);
      f.start.uc_stack.ss_sp = f.stack.get();
      f.start.uc_stack.ss_size = kStack;
      f.start.uc_link = nullptr;
      makecontext(&f.start, entry, 0);
      setcontext(&f.start);
    }
    if (b.fibers[next].done) live = live - 1;
    next = (next + 1) % all;
  }
}
// Wait until `count` threads have called; the last one runs `act` first.
template <class F> void meet(Meeting& m, int count, F act) {
  const unsigned mine = m.generation;
  block().idle = 0;
  if (++m.arrived == count) {
    act();
    m.arrived = 0;
    ++m.generation;
  }
  while (m.generation == mine) yield();
}
// Every lane gives `in`; `act(in[32], out[32])` runs once; every lane gets its out.
template <class In, class Out, class F> Out warp_wide(const In& in, F act) {
  static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64);
  Block& b = block();
  const int lane = b.current % 32;
  Warp& w = b.warps[b.current / 32];
  std::memcpy(w.in[lane], &in, sizeof(In));
  meet(w.meeting, 32, [&] {
    In all[32];
    Out result[32];
    for (int i = 0; i < 32; ++i) std::memcpy(&all[i], w.in[i], sizeof(In));
    act(all, result);
    for (int i = 0; i < 32; ++i) std::memcpy(w.out[i], &result[i], sizeof(Out));
  });
  Out out;
  std::memcpy(&out, w.out[lane], sizeof(Out));
  return out;
}
}  // namespace jointnas::emu

#define threadIdx (::jointnas::emu::thread_index())
#define blockIdx (::jointnas::emu::block_index())
#define blockDim (::jointnas::emu::block_size())
#define gridDim (::jointnas::emu::grid_size())

namespace jointnas::ptx {

inline float to_float(float v) { return v; }
inline float bits_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t float_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
inline float to_float(BF16 v) { return bits_float(static_cast<uint32_t>(v.bits) << 16); }
inline float to_float(F16 v) {
  const int sign = v.bits >> 15, exponent = (v.bits >> 10) & 31, mantissa = v.bits & 1023;
  float f = exponent == 31 ? (mantissa ? NAN : INFINITY)
          : exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(float(mantissa), -24);
  return sign ? -f : f;
}
template <class T> T from_float(float v);
template <> inline float from_float<float>(float v) { return v; }
template <> inline BF16 from_float<BF16>(float v) {
  uint32_t u = float_bits(v);
  if (std::isnan(v)) return BF16{0x7fff};
  return BF16{static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <> inline F16 from_float<F16>(float v) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  const float a = std::fabs(v);
  if (std::isnan(v)) return F16{0x7fff};
  if (a >= 65520.0f) return F16{static_cast<uint16_t>(sign | 0x7c00)};
  if (a == 0) return F16{sign};
  int e = std::max(std::ilogb(a), -14);
  const int m = static_cast<int>(std::nearbyint(std::ldexp(a, 10 - e)));  // 10 fraction bits; a carry raises the exponent
  return F16{static_cast<uint16_t>(sign | (m >= 1024 ? ((e + 15) << 10) + (m - 1024) : m))};
}
template <class T> uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}
inline float reciprocal(float a) { return 1 / a; }
inline float divide(float a, float b) { return a / b; }
inline float round_even(float a) { return std::nearbyint(a); }
inline float smaller(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmin(a, b); }
inline float larger(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }
inline int to_int(float a) { return std::isnan(a) ? 0 : static_cast<int>(std::nearbyint(a)); }
template <class T> float half_of(uint32_t v, int i) { return to_float(T{static_cast<uint16_t>(v >> (16 * i))}); }
template <class T> uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 2; ++i) {
    const double r = double(half_of<T>(a, i)) * half_of<T>(b, i) + half_of<T>(c, i);
    float f = float(r);  // to odd, so that the rounding to T is the only one
    if (!std::isnan(r) && double(f) != r) {
      if (std::fabs(double(f)) > std::fabs(r)) f = std::nextafter(f, 0.0f);
      f = bits_float(float_bits(f) | 1);
    }
    d |= uint32_t(from_float<T>(f).bits) << (16 * i);
  }
  return d;
}

template <class T, class F> uint32_t each_half(uint32_t a, uint32_t b, F f) {
  return pack2<T>(f(half_of<T>(a, 0), half_of<T>(b, 0)), f(half_of<T>(a, 1), half_of<T>(b, 1)));
}
template <class T> uint32_t smaller2(uint32_t a, uint32_t b) { return each_half<T>(a, b, smaller); }
template <class T> uint32_t larger2(uint32_t a, uint32_t b) { return each_half<T>(a, b, larger); }

inline uint32_t xor_here(uint32_t a, uint32_t b) { return a ^ b; }
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t order) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) d |= static_cast<uint32_t>(bytes >> 8 * (order >> 4 * i & 7) & 0xff) << 8 * i;
  return d;
}
inline uint32_t and_or(uint32_t v, uint32_t mask, uint32_t bits) { return (v & mask) | bits; }
inline uint32_t bits_of(uint32_t a, uint32_t mask, uint32_t b) { return (a & mask) | (b & ~mask); }
inline uint32_t and_xor(uint32_t v, uint32_t mask, uint32_t bits) { return (v & mask) ^ bits; }

struct MmaIn { uint32_t a[4], b[2]; uint32_t c[4]; };
struct MmaOut { uint32_t c[4]; };
// One m16n8 product; `dot(a registers of a row, b registers of a column)`: lane 4g+t of A holds rows g, g+8 in
// registers {0,2}, {1,3}; lane 4g+t of B holds column g; C holds rows g (0,1), g+8 (2,3), columns 2t, 2t+1.
template <class C, class F> void mma(C (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, F dot) {
  MmaIn in;
  std::memcpy(in.a, a, 16);
  in.b[0] = b0;
  in.b[1] = b1;
  std::memcpy(in.c, c, 16);
  const MmaOut out = emu::warp_wide<MmaIn, MmaOut>(in, [&](const MmaIn* all, MmaOut* result) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        C sum;
        std::memcpy(&sum, &all[lane].c[i], 4);
        for (int t = 0; t < 4; ++t)
          for (int half = 0; half < 2; ++half)
            sum += dot(all[4 * (row % 8) + t].a[2 * half + row / 8], all[4 * column + t].b[half]);
        std::memcpy(&result[lane].c[i], &sum, 4);
      }
  });
  std::memcpy(c, out.c, 16);
}
template <class T> void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma(c, a, b0, b1, [](uint32_t x, uint32_t y) {
    return half_of<T>(x, 0) * half_of<T>(y, 0) + half_of<T>(x, 1) * half_of<T>(y, 1);
  });
}
template <class T> void mma_m16n8k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  mma_m16n8k16<T>(c, {a0, a1, 0, 0}, b, 0);
}
inline void mma_m16n8k32_s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma(c, a, b0, b1, [](uint32_t x, uint32_t y) {
    int s = 0;
    for (int i = 0; i < 4; ++i) s += int(int8_t(x >> (8 * i))) * int(int8_t(y >> (8 * i)));
    return s;
  });
}
inline void mma_m16n8k64_s4(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma(c, a, b0, b1, [](uint32_t x, uint32_t y) {
    int s = 0;
    for (int up = 28; up >= 0; up -= 4) s += (int(x << up) >> 28) * (int(y << up) >> 28);
    return s;
  });
}
// A: two registers, rows g and g + 8; B: one. Lane t holds bits 32t .. 32t + 31 of the 128.
inline void mma_m16n8k128_and(int (&c)[4], uint32_t low, uint32_t high, uint32_t b) {
  const uint32_t a[4] = {low, high, 0, 0};
  mma(c, a, b, 0, [](uint32_t x, uint32_t y) { return __builtin_popcount(x & y); });
}

inline emu::Fiber& fiber() { return emu::block().fibers[emu::block().current]; }
inline void cp_async16(void* dst, const void* src, bool valid) {
  for (const void* p : {static_cast<const void*>(dst), valid ? src : nullptr})
    emu::require_aligned(p, "cp.async with an address that is no multiple of 16");
  std::memset(dst, 0xFF, 16);
  fiber().open.push_back({dst, src, valid});
}
inline void cp_async16(void* dst, const void* src) { cp_async16(dst, src, true); }
inline uint64_t read_once() { return 0; }
inline void cp_async16_once(void* dst, const void* src, uint64_t) { cp_async16(dst, src); }
inline void cp_async4(void* dst, const void* src) {
  std::memset(dst, 0xFF, 4);
  fiber().open.push_back({dst, src, true, 4});
}
inline void cp_async_commit() {
  fiber().groups.push_back(std::move(fiber().open));
  fiber().open.clear();
}
template <int PENDING> void cp_async_wait() {
  auto& groups = fiber().groups;
  while (groups.size() > PENDING) {
    for (const emu::Copy& copy : groups.front()) {
      if (copy.valid) std::memcpy(copy.dst, copy.src, copy.bytes);
      else std::memset(copy.dst, 0, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}
inline Vec4 load_readonly(const void* p) {
  emu::require_aligned(p, "16-byte load from an address that is no multiple of 16");
  Vec4 v;
  std::memcpy(&v, p, 16);
  return v;
}
inline Vec4 load16(const void* p) { return load_readonly(p); }
inline void store8(void* p, uint32_t first, uint32_t second) {
  emu::require(reinterpret_cast<uintptr_t>(p) % 8 == 0, "8-byte store to an address that is no multiple of 8");
  std::memcpy(p, &first, 4);
  std::memcpy(static_cast<char*>(p) + 4, &second, 4);
}
inline uint32_t load4(const void* p) { uint32_t v; std::memcpy(&v, p, 4); return v; }
struct RowIn { const unsigned char* row; };
struct RowOut { uint32_t a[4]; };
inline void ldmatrix4(uint32_t (&a)[4], const void* row) {
  emu::require_aligned(row, "ldmatrix with an address that is no multiple of 16");
  const RowIn in{static_cast<const unsigned char*>(row)};
  const RowOut out = emu::warp_wide<RowIn, RowOut>(in, [](const RowIn* all, RowOut* result) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) std::memcpy(&result[lane].a[i], all[8 * i + lane / 4].row + 4 * (lane % 4), 4);
  });
  std::memcpy(a, out.a, 16);
}
template <int N> void load_l2(const float* p, float (&v)[N]) {
  emu::require(reinterpret_cast<uintptr_t>(p) % sizeof(v) == 0, "load at an address that is no multiple of its size");
  std::memcpy(v, p, sizeof(v));
}

inline void sync_threads() {
  emu::Block& b = emu::block();
  emu::meet(b.barriers_of_ranks[b.rank()], b.threads, [] {});
}
inline void sync_some(int id, int threads) {
  emu::meet(emu::block().named[emu::block().rank() * 16 + id], threads, [] {});
}
inline void arrive_some(int id, int threads) {
  emu::Meeting& m = emu::block().named[emu::block().rank() * 16 + id];
  emu::block().idle = 0;
  if (++m.arrived < threads) return;
  m.arrived = 0;
  ++m.generation;
}
inline void sync_warp() { emu::meet(emu::block().warps[emu::block().current / 32].meeting, 32, [] {}); }
template <class T> T shuffle_xor(T v, int mask) {
  return emu::warp_wide<T, T>(v, [mask](const T* in, T* out) { for (int i = 0; i < 32; ++i) out[i] = in[i ^ mask]; });
}
inline int atomic_add(int* p, int v) { const int old = *p; *p += v; return old; }
inline void fence_device() {}
inline void launch_dependents() {}
inline void wait_dependencies() {}

}  // namespace jointnas::ptx

namespace jointnas {
inline int compute_capability() {
  const char* given = std::getenv("JN_EMULATED_CAPABILITY");
  return given ? std::atoi(given) : 90;
}
template <class... P, class... A>
int launch_cluster(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, int cluster, bool,
                   A... args) {
  emu::grid_size() = grid;
  emu::block_size() = block;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += cluster) {
        emu::block_index() = dim3(x, y, z);
        emu::run_block([&] { kernel(static_cast<P>(args)...); }, block.x, shared_bytes, cluster);
      }
  return 0;
}
template <auto> int resident_blocks(dim3, size_t, int cluster) { return 4 / cluster * cluster; }
template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, bool, A... args) {
  return launch_cluster(kernel, grid, block, shared_bytes, stream, 1, false, args...);
}
}  // namespace jointnas
