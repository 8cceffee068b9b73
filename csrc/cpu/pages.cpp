#include "cpu/pages.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace rlhf {

void map_pages(char* begin, char* end) {
#ifdef __linux__
  constexpr int kPopulateWrite =
      23;  // MADV_POPULATE_WRITE of Linux 5.14; an older kernel refuses it, and pages fault in
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const uintptr_t last = reinterpret_cast<uintptr_t>(end) / page * page;
  // A few pages fault in sooner than they are asked for.
  if (first + 4 * page <= last) madvise(reinterpret_cast<void*>(first), last - first, kPopulateWrite);
#else
  (void)begin, (void)end;
#endif
}

}  // namespace rlhf
