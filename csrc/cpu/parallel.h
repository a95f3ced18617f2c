// Threads of the CPU kernels: the team of the OpenMP runtime that torch has already loaded.
//
// Why not link libgomp: torch brings its own copy (libgomp.so.1, in some wheels under a mangled name), and two
// runtimes in one process oversubscribe the cores. Why not a pool of our own: after a parallel region libgomp's
// workers spin for a while, so a second pool competes with them. Measured on 2 cores, 4 MiB read and written
// right after a torch op (median): this way 44 us, own pool 91 us, new threads 214 us; alone 26, 57, 76 us.
// So GOMP_parallel is looked up in the process (libomp and libiomp5 export it, too). Without any OpenMP runtime
// threads are created per call: correct, ~50 us slower.
//
// Work is claimed chunk by chunk from a counter, which is right for any team size the runtime grants (one thread
// inside a nested region). A kernel's chunk grid never depends on the thread count and partial sums are kept per
// chunk, so results are bit-identical for every number of threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "errors.h"

namespace jointnas {

using Task = void (*)(void* context, int64_t chunk);

void parallel_run(int64_t chunks, int threads, Task task, void* context);

template <class F>
void parallel_for(int64_t chunks, int threads, const F& f) {
  parallel_run(chunks, threads, [](void* c, int64_t i) { (*static_cast<const F*>(c))(i); },
               const_cast<void*>(static_cast<const void*>(&f)));
}

// Cache lines of their own, and one line more than asked for; null when there is no memory.
using Memory = std::unique_ptr<void, void (*)(void*)>;
inline Memory allocate(int64_t bytes) {
  return Memory(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64 + 64)), std::free);
}

// f(chunk, memory), each with `bytes` of memory.
template <class F>
int parallel_for(int64_t chunks, int threads, int64_t bytes, const F& f) {
  std::atomic<int> error{kOk};
  parallel_for(chunks, threads, [&](int64_t chunk) {
    const Memory memory = allocate(bytes);
    if (memory)
      f(chunk, memory.get());
    else
      error = kNoMemory;
  });
  return error;
}

// Threads that run one function together, and wait for each other in it.
class Team {
 public:
  explicit Team(int size) : size_(size) {}
  void barrier();

 private:
  const int size_;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> round_{0}, sleepers_{0};
};

// f(team, member, members) by as many threads as the runtime grants, at most `threads`.
using Member = void (*)(void* context, Team& team, int me, int count);
void team_run(int threads, Member member, void* context);
template <class F>
void team_run(int threads, const F& f) {
  team_run(threads, [](void* c, Team& team, int me, int count) { (*static_cast<const F*>(c))(team, me, count); },
           const_cast<void*>(static_cast<const void*>(&f)));
}

// "openmp" (runtime found in the process) or "std::thread"
const char* parallel_backend();

}  // namespace jointnas
