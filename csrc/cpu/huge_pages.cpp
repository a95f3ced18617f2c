#include <sys/mman.h>

#include "cpu/cpu_ops.h"
#include "cpu/isa.h"

int jn_cpu_huge_pages(void* begin, int64_t bytes) {
  constexpr uintptr_t kPage = 4096;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  // Advice only: a kernel without huge pages refuses, and nothing changes.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  return jointnas::kOk;
}
