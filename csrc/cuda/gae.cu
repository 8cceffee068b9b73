// Generalised advantage estimation: one launch; two where few long sequences are split into chunks.
#include "cuda/gae.h"
#include "cuda/launch.cuh"
#include "cuda/scan.cuh"

namespace rlhf::cuda {
namespace {

// MAPS: only the map of every chunk is wanted.
template <int GROUP, bool MAPS, typename T>
__global__ void __launch_bounds__(BLOCK, MIN_BLOCKS)
    gae_kernel(Layout layout, GaeArgs<T> x, Recursion<T> p, int chunks) {
  Affine<T>* chunk_maps = reinterpret_cast<Affine<T>*>(x.chunk_maps);
  for (int64_t unit = Units<GROUP>::first(); unit < layout.rows * chunks; unit += Units<GROUP>::step()) {
    const Chunk<GROUP> chunk(layout, unit, chunks);
    const Range range = chunk.range;
    const int64_t gap_end = x.gap_zero ? counted_end<GROUP>(layout.mask, range) : range.begin;
    const auto load_tokens = [&](int64_t first) -> Tokens<T> {
      return {load(x.rewards, first, range), load(x.values, first, range), load_counted(layout.mask, first, range)};
    };
    if constexpr (MAPS) {
      const auto nothing = [](int64_t, const Tokens<T>&, const Quad<T>&) {};
      const Affine<T> map = sweep(chunk, p, gap_end, identity<T>(), load_tokens, nothing);
      if (group_lane<GROUP>() == 0) chunk_maps[unit] = map;
    } else {
      const T boundary = x.bootstrap == nullptr ? T(0) : x.bootstrap[chunk.row];
      const Affine<T> state = entering_state(chunk, unit, chunks, boundary, chunk_maps);
      sweep(chunk, p, gap_end, state, load_tokens, [&](int64_t first, const Tokens<T>& tokens, Quad<T> advantages) {
        Quad<T> returns;
        for (int i = 0; i < QUAD; ++i) {
          returns.at[i] = tokens.counted.at[i] ? advantages.at[i] + tokens.values.at[i] : T(0);
          advantages.at[i] = tokens.counted.at[i] ? advantages.at[i] : T(0);
        }
        store(x.advantages, first, range, advantages);
        store(x.returns, first, range, returns);
      });
    }
  }
}

}  // namespace

template <typename T>
void gae(const Layout& layout, const ScanPlan& plan, const GaeArgs<T>& args, void* stream) {
  const Recursion<T> recursion(args.gamma, args.lam);
  const int blocks = plan.grid(layout);
  if (plan.warps) return launch("gae", gae_kernel<WARP, false, T>, blocks, stream, layout, args, recursion, 1);
  if (plan.chunks > 1) launch("gae", gae_kernel<BLOCK, true, T>, blocks, stream, layout, args, recursion, plan.chunks);
  launch("gae", gae_kernel<BLOCK, false, T>, blocks, stream, layout, args, recursion, plan.chunks);
}

template void gae(const Layout&, const ScanPlan&, const GaeArgs<float>&, void*);
template void gae(const Layout&, const ScanPlan&, const GaeArgs<double>&, void*);

}  // namespace rlhf::cuda
