#include "cpu/parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace jointnas {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

GompParallel gomp_parallel() {
  // Not cached while missing: torch may be imported later.
  static std::atomic<GompParallel> found{nullptr};
  GompParallel f = found.load(std::memory_order_relaxed);
  if (!f) {
    f = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.store(f, std::memory_order_relaxed);
  }
  return f;
}

struct Job {
  Task task;
  void* context;
  int64_t chunks;
  std::atomic<int64_t> next{0};
};

void work(void* p) {
  Job& job = *static_cast<Job*>(p);
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.chunks;) job.task(job.context, i);
}

}  // namespace

void parallel_run(int64_t chunks, int threads, Task task, void* context) {
  threads = static_cast<int>(std::min<int64_t>(threads, chunks));
  if (threads <= 1) {
    for (int64_t i = 0; i < chunks; ++i) task(context, i);
    return;
  }
  Job job{task, context, chunks};
  if (GompParallel gomp = gomp_parallel()) {
    gomp(work, &job, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> team;
  for (int t = 1; t < threads; ++t) team.emplace_back(work, &job);
  work(&job);
  for (auto& t : team) t.join();
}

const char* parallel_backend() { return gomp_parallel() ? "openmp" : "std::thread"; }

}  // namespace jointnas
