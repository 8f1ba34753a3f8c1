// Large buffers in huge pages: the system zeroes and maps fresh memory 4 KiB at a time, which takes
// longer than to compute what is written there.
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <mutex>

#include "ops.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace opsd {
namespace {

constexpr int64_t HUGE_PAGE = int64_t{1} << 21;
constexpr int64_t SMALLEST = 4 * HUGE_PAGE;  // below it malloc's memory is seldom fresh

struct Span {
  void* at = nullptr;
  int64_t bytes = 0;
};

#if defined(__linux__)
// Whole huge pages; null where the system has no memory to give.
Span map(int64_t bytes) {
  bytes = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  void* found = mmap(nullptr, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) return {};
  char* begin = static_cast<char*>(found);
  const int64_t head = -reinterpret_cast<intptr_t>(begin) & (HUGE_PAGE - 1);
  if (head) munmap(begin, head);
  if (head < HUGE_PAGE) munmap(begin + head + bytes, HUGE_PAGE - head);
  madvise(begin + head, bytes, MADV_HUGEPAGE);
  return {begin + head, bytes};
}

void unmap(Span span) {
  if (span.at) munmap(span.at, span.bytes);
}

// The last small workspace, whose pages the system may take back at any time (MADV_FREE): the next
// call finds them mapped if it has not.
constexpr int64_t LARGEST_KEPT = int64_t{128} << 20;

class Kept {
 public:
  Span take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (span_.bytes >= bytes) return std::exchange(span_, {});
    }
    return map(bytes);
  }

  void put(Span span) {
    if (span.bytes <= LARGEST_KEPT) {
      madvise(span.at, span.bytes, MADV_FREE);
      const std::lock_guard<std::mutex> lock(mutex_);
      if (span.bytes > span_.bytes) std::swap(span, span_);
    }
    unmap(span);
  }

 private:
  std::mutex mutex_;
  Span span_;
};

Kept& kept() {
  static Kept* const found = new Kept;  // outlives every tensor
  return *found;
}
#endif

}  // namespace

Tensor large_empty(at::IntArrayRef shape, at::ScalarType dtype, bool workspace) {
  const int64_t bytes = c10::multiply_integers(shape) * c10::elementSize(dtype);
#if defined(__linux__)
  if (bytes >= SMALLEST) {
    const Span span = workspace ? kept().take(bytes) : map(bytes);
    if (span.at)
      return at::from_blob(
          span.at, shape,
          [span, workspace](void*) { workspace ? kept().put(span) : unmap(span); },
          at::TensorOptions(dtype));
  }
#endif
  return at::empty(shape, dtype);
}

}  // namespace opsd
