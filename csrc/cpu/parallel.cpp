#include "cpu/parallel.h"

#include <dlfcn.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

constexpr int kSpins = 4000;  // some 50 us

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Of the system: to sleep while the number is `value`, or to wake so many who do.
void futex(std::atomic<unsigned>& number, int operation, unsigned value) {
  static_assert(sizeof(number) == 4 && std::atomic<unsigned>::is_always_lock_free);
  syscall(SYS_futex, &number, operation, value, nullptr, nullptr, 0);
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

namespace {

using OmpNumber = int (*)();

struct TeamJob {
  Member member;
  void* context;
  OmpNumber me, size;
  std::atomic<Team*> team{nullptr};
  alignas(Team) char memory[sizeof(Team)];
};

void join(void* p) {
  TeamJob& job = *static_cast<TeamJob*>(p);
  const int me = job.me(), size = job.size();
  // The runtime may grant fewer threads than were asked for; the first one knows how many, and makes the team.
  if (me == 0) job.team.store(new (job.memory) Team(size), std::memory_order_release);
  Team* team;
  while (!(team = job.team.load(std::memory_order_acquire))) pause();
  job.member(job.context, *team, me, size);
}

}  // namespace

void Team::barrier() {
  if (size_ == 1) return;
  const unsigned round = round_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1);  // before the sleepers are counted, as they are counted before they look at the round
    if (sleepers_.load()) futex(round_, FUTEX_WAKE_PRIVATE, INT_MAX);
    return;
  }
  for (int spins = 0; spins < kSpins; ++spins) {
    if (round_.load(std::memory_order_acquire) != round) return;
    pause();
  }
  // Some member has lost its core, perhaps to this one: sleeping gives it away, and is woken as soon as it can go on.
  // Yielding puts off both, and steps of a small model took 20 times as long on a busy machine.
  sleepers_.fetch_add(1);
  while (round_.load() == round) futex(round_, FUTEX_WAIT_PRIVATE, round);
  sleepers_.fetch_sub(1);
}

void team_run(int threads, Member member, void* context) {
  Team alone(1);
  if (threads <= 1) return member(context, alone, 0, 1);
  const auto me = reinterpret_cast<OmpNumber>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  const auto size = reinterpret_cast<OmpNumber>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  if (GompParallel gomp = gomp_parallel(); gomp && me && size) {
    TeamJob job{member, context, me, size, {}, {}};
    gomp(join, &job, static_cast<unsigned>(threads), 0);
    return;
  }
  Team team(threads);
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back([&, t] { member(context, team, t, threads); });
  member(context, team, 0, threads);
  for (auto& t : others) t.join();
}

const char* parallel_backend() { return gomp_parallel() ? "openmp" : "std::thread"; }

}  // namespace jointnas
