// Large results are fresh memory, and a fault a page costs more than the loop that fills the page.
#pragma once

#include <cstdint>

namespace rlhf {

// Maps the pages of [begin, end) that are not mapped yet, where the system can do so in one call.
void map_pages(char* begin, char* end);

// Maps the pages of a range a piece ahead of the loop that writes it front to back, so that they are still in the cache
// when it comes to them. On a Xeon under KVM, Linux 6.18, filling 8 MB takes 1.2 ms instead of 2.8, 311 MB 144 ms
// instead of 222; transparent huge pages took 0.5 ms, but up to 400 ms more where the hypervisor had taken free memory
// back.
class PagesAhead {
 public:
  template <class T>
  [[gnu::always_inline]] PagesAhead(T* out, int64_t begin, int64_t end)
      : mapped_(reinterpret_cast<char*>(out + begin)), end_(reinterpret_cast<char*>(out + end)) {}

  // To be called before anything below p is written.
  template <class T>
  [[gnu::always_inline]] void reach(const T* p) {
    while (reinterpret_cast<const char*>(p) > mapped_) {
      char* const next = end_ - mapped_ < kPiece ? end_ : mapped_ + kPiece;
      map_pages(mapped_, next);
      mapped_ = next;
    }
  }

 private:
  static constexpr int64_t kPiece = 256 << 10;
  char* mapped_;
  char* end_;
};

}  // namespace rlhf
