// Whitening in two launches: partial moments, then every block merges them and whitens its share.
#include "cuda/launch.cuh"
#include "cuda/masked_whiten.h"
#include "cuda/moments.cuh"
#include "cuda/quads.cuh"

namespace rlhf::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(BLOCK, MIN_BLOCKS)
    moments_kernel(const T* x, const bool* mask, int64_t tokens, Moments* partial) {
  const Range all = {0, tokens};
  Sample sample;
  for (int64_t first = (blockIdx.x * int64_t(BLOCK) + threadIdx.x) * QUAD; first < tokens;
       first += gridDim.x * int64_t(BLOCK) * QUAD) {
    const Quad<T> values = load(x, first, all);
    const Quad<bool> counted = load_counted(mask, first, all);
    for (int i = 0; i < QUAD; ++i) {
      if (counted.at[i]) sample.add(values.at[i]);
    }
  }
  store_moments(sample, partial);
}

template <typename T>
__global__ void __launch_bounds__(BLOCK, MIN_BLOCKS)
    whiten_kernel(const T* x, const bool* mask, int64_t tokens, const Moments* partial, int n_partial,
                  WhitenOptions options, T* out) {
  const Range all = {0, tokens};
  const Whitening f = whitening(partial, n_partial, options.shift_mean, options.unbiased, options.eps);
  for (int64_t first = (blockIdx.x * int64_t(BLOCK) + threadIdx.x) * QUAD; first < tokens;
       first += gridDim.x * int64_t(BLOCK) * QUAD) {
    Quad<T> values = load(x, first, all);
    const Quad<bool> counted = load_counted(mask, first, all);
    for (int i = 0; i < QUAD; ++i) values.at[i] = counted.at[i] ? T(f(values.at[i])) : T(0);
    store(out, first, all, values);
  }
}

}  // namespace

template <typename T>
void masked_moments(const T* x, const bool* mask, int64_t tokens, double* partial, void* stream) {
  launch("masked_whiten", moments_kernel<T>, token_grid(tokens), stream, x, mask, tokens,
         reinterpret_cast<Moments*>(partial));
}

template <typename T>
void whiten(const T* x, const bool* mask, int64_t tokens, const double* partial, int n_partial, WhitenOptions options,
            T* out, void* stream) {
  const auto* moments = reinterpret_cast<const Moments*>(partial);
  launch("masked_whiten", whiten_kernel<T>, token_grid(tokens), stream, x, mask, tokens, moments, n_partial, options,
         out);
}

template void masked_moments(const float*, const bool*, int64_t, double*, void*);
template void masked_moments(const double*, const bool*, int64_t, double*, void*);
template void whiten(const float*, const bool*, int64_t, const double*, int, WhitenOptions, float*, void*);
template void whiten(const double*, const bool*, int64_t, const double*, int, WhitenOptions, double*, void*);

}  // namespace rlhf::cuda
