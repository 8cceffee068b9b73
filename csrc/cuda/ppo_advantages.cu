// KL, shaped rewards, GAE and whitening. Two launches: the scan, which leaves partial moments of the advantages, and
// their whitening. One more where rewards are whitened, since their moments come before the scan, and one more where
// long sequences are split into chunks.
#include "cuda/kl.cuh"
#include "cuda/launch.cuh"
#include "cuda/masked_whiten.h"
#include "cuda/moments.cuh"
#include "cuda/ppo_advantages.h"
#include "cuda/scan.cuh"

namespace rlhf::cuda {
namespace {

constexpr double WHITEN_EPS = 1e-8;

enum class Pass {
  SHAPE,  // rewards and KL, and the moments of the rewards
  MAPS,   // the map of every chunk
  SCAN,   // advantages and returns, their moments, and whatever SHAPE has not written
};

template <typename T>
struct Shaped {
  Quad<T> rewards, kl;
};

template <typename T>
struct Shaping {
  const AdvantageArgs<T>& x;
  Range range;
  int64_t last;  // the last counted token
  T score;       // of the sequence
  T coef, clip;

  __device__ Shaped<T> operator()(int64_t first, const Quad<bool>& counted) const {
    const Quad<T> logprobs = load(x.logprobs, first, range), ref = load(x.ref_logprobs, first, range);
    const Quad<T> scores = load_or_zero(x.per_sequence ? nullptr : x.scores, first, range);
    Shaped<T> out;
    for (int i = 0; i < QUAD; ++i) {
      const T kl = kl_value(logprobs.at[i] - ref.at[i], x.kl_estimator);
      const T token_score = x.per_sequence ? (first + i == last ? score : T(0)) : clamp_to(scores.at[i], -clip, clip);
      out.kl.at[i] = counted.at[i] ? kl : T(0);
      out.rewards.at[i] = counted.at[i] ? token_score - (coef == 0 ? T(0) : coef * kl) : T(0);  // k3 may be inf
    }
    return out;
  }
};

template <int GROUP, Pass PASS, typename T>
__global__ void __launch_bounds__(BLOCK, MIN_BLOCKS)
    advantages_kernel(Layout layout, AdvantageArgs<T> x, Recursion<T> p, int chunks, int n_reward_moments) {
  Affine<T>* chunk_maps = reinterpret_cast<Affine<T>*>(x.chunk_maps);
  const bool shaped_before = PASS != Pass::SHAPE && x.whiten_rewards;
  Whitening whiten_reward = {0, 1, 0};
  if (shaped_before) {
    whiten_reward =
        whitening(reinterpret_cast<const Moments*>(x.reward_moments), n_reward_moments, false, false, WHITEN_EPS);
  }
  const T coef = x.kl_coef_tensor == nullptr ? T(x.kl_coef) : *x.kl_coef_tensor;
  const T clip = T(x.score_clip);
  Sample sample;
  for (int64_t unit = Units<GROUP>::first(); unit < layout.rows * chunks; unit += Units<GROUP>::step()) {
    const Chunk<GROUP> chunk(layout, unit, chunks);
    const Range range = chunk.range;
    const bool one_score = x.per_sequence && !shaped_before;
    const int64_t last = one_score ? counted_end<GROUP>(layout.mask, range) - 1 : -1;
    const Shaping<T> shape = {x,    range, last, one_score ? clamp_to(x.scores[chunk.row], -clip, clip) : T(0),
                              coef, clip};
    const auto load_tokens = [&](int64_t first) -> Tokens<T> {
      const Quad<bool> counted = load_counted(layout.mask, first, range);
      Quad<T> rewards;
      if (shaped_before) {
        rewards = load(x.rewards, first, range);
        for (int i = 0; i < QUAD; ++i) rewards.at[i] = counted.at[i] ? T(whiten_reward(rewards.at[i])) : T(0);
      } else {
        const Shaped<T> shaped = shape(first, counted);
        rewards = shaped.rewards;
        if constexpr (PASS != Pass::MAPS) store(x.kl, first, range, shaped.kl);
      }
      if constexpr (PASS != Pass::MAPS) store(x.rewards, first, range, rewards);
      return {rewards, load(x.values, first, range), counted};
    };
    if constexpr (PASS == Pass::SHAPE) {
      for (int64_t tile = chunk.first; tile < chunk.last; ++tile) {
        const Tokens<T> tokens = load_tokens(chunk.quad(tile));
        for (int i = 0; i < QUAD; ++i) {
          if (tokens.counted.at[i]) sample.add(tokens.rewards.at[i]);
        }
      }
    } else if constexpr (PASS == Pass::MAPS) {
      const auto nothing = [](int64_t, const Tokens<T>&, const Quad<T>&) {};
      const Affine<T> map = sweep(chunk, p, range.begin, identity<T>(), load_tokens, nothing);
      if (group_lane<GROUP>() == 0) chunk_maps[unit] = map;
    } else {
      const Affine<T> state = entering_state(chunk, unit, chunks, T(0), chunk_maps);
      sweep(chunk, p, range.begin, state, load_tokens, [&](int64_t first, const Tokens<T>& tokens, Quad<T> advantages) {
        Quad<T> returns;
        for (int i = 0; i < QUAD; ++i) {
          if (tokens.counted.at[i]) sample.add(advantages.at[i]);
          returns.at[i] = tokens.counted.at[i] ? advantages.at[i] + tokens.values.at[i] : T(0);
          advantages.at[i] = tokens.counted.at[i] ? advantages.at[i] : T(0);
        }
        store(x.advantages, first, range, advantages);
        store(x.returns, first, range, returns);
      });
    }
  }
  if constexpr (PASS == Pass::SHAPE) store_moments(sample, reinterpret_cast<Moments*>(x.reward_moments));
  if constexpr (PASS == Pass::SCAN) store_moments(sample, reinterpret_cast<Moments*>(x.advantage_moments));
}

template <int GROUP, typename T>
void passes(const Layout& layout, const ScanPlan& plan, const AdvantageArgs<T>& x, void* stream) {
  const Recursion<T> p(x.gamma, x.lam);
  const int blocks = plan.grid(layout);
  const auto run = [&](auto kernel) {
    launch("ppo_advantages", kernel, blocks, stream, layout, x, p, plan.chunks, blocks);
  };
  if (x.whiten_rewards) run(advantages_kernel<GROUP, Pass::SHAPE, T>);
  if (GROUP == BLOCK && plan.chunks > 1) run(advantages_kernel<BLOCK, Pass::MAPS, T>);
  run(advantages_kernel<GROUP, Pass::SCAN, T>);
}

}  // namespace

template <typename T>
void ppo_advantages(const Layout& layout, const ScanPlan& plan, const AdvantageArgs<T>& x, void* stream) {
  plan.warps ? passes<WARP>(layout, plan, x, stream) : passes<BLOCK>(layout, plan, x, stream);
  if (!x.whiten_advantages) return;
  const WhitenOptions options = {true, false, WHITEN_EPS};
  whiten(x.advantages, layout.mask, layout.tokens, x.advantage_moments, plan.grid(layout), options, x.advantages,
         stream);
}

template void ppo_advantages(const Layout&, const ScanPlan&, const AdvantageArgs<float>&, void*);
template void ppo_advantages(const Layout&, const ScanPlan&, const AdvantageArgs<double>&, void*);

}  // namespace rlhf::cuda
